"""Losses of training steps in, an error out once one is no number: before a checkpoint is spoilt."""

from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


class Watched(NamedTuple):
    """Battles of an optimiser step, whether the loss of each is finite, and when the host knows."""

    step: int
    ids: list[str]
    finite: torch.Tensor
    known: torch.cuda.Event | None


class Guard:
    """Looks at losses a step late, so that the host never waits for the GPU within a step.

    Args:
        computing: precision and attention, for the message.
    """

    def __init__(self, computing: str) -> None:
        self.computing = computing
        self.pending: list[Watched] = []

    def watch(self, step: int, ids: list[str], losses: torch.Tensor) -> None:
        """Note the losses, (n,), of battles of an optimiser step, and look at those of the step before.

        Raises:
            FloatingPointError: as `look`.
        """
        if self.pending and self.pending[-1].step < step:
            self.look()
        finite = losses.detach().isfinite().to("cpu", non_blocking=True)  # into pinned memory, if from a GPU
        known = torch.cuda.Event() if losses.is_cuda else None
        if known:
            known.record()
        self.pending.append(Watched(step, ids, finite, known))

    def look(self) -> None:
        """Look at all losses noted so far.

        Raises:
            FloatingPointError: some are no numbers; step and battles are named.
        """
        for step, ids, finite, known in self.pending:
            if known:
                known.synchronize()
            bad = [name for name, good in zip(ids, finite.tolist(), strict=True) if not good]
            if bad:
                raise FloatingPointError(
                    f"step {step}: the loss of {len(bad)} of {len(ids)} battles is no number ({self.computing}); the "
                    f"first ids: {', '.join(bad[:5])}; {ADVICE}"
                )
        self.pending.clear()

    def check(self, model: torch.nn.Module) -> None:
        """Look at all losses noted so far, and at the weights that train: what is saved next is good.

        Raises:
            FloatingPointError: as `look`, or a weight that is no number.
        """
        self.look()
        weights = [weight.detach() for weight in model.parameters() if weight.requires_grad]
        mine = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
        if not get_total_norm(mine).isfinite():
            raise FloatingPointError(f"weights that train are no numbers ({self.computing}); {ADVICE}")


ADVICE = (
    "checkpoints before it are good; look at those battles, lower trainer.learning_rate, or set model.dtype to float32"
)
"""What a person can do about losses that are no numbers."""
