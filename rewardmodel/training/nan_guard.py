"""Losses of training steps -> an error once one is NaN or infinite, before a checkpoint is written."""

from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from rewardmodel.errors import plural


class RecordedLosses(NamedTuple):
    """Battles of an optimiser step and whether the loss of each is finite, (n,) bool.

    `finite` is copied from the GPU without waiting: read it once the event `ready` has happened; None: it can be read.
    """

    step: int
    ids: list[str]
    finite: torch.Tensor
    ready: torch.cuda.Event | None


class NanGuard:
    """Checks losses one step late, so that the host never waits for the GPU within a step.

    Args:
        computing: precision and attention, for the message.
    """

    def __init__(self, computing: str) -> None:
        self.computing = computing
        self.pending: list[RecordedLosses] = []

    def record(self, step: int, ids: list[str], losses: torch.Tensor) -> None:
        """Record losses of an optimiser step, and check those of the steps before.

        Args:
            step: number of the step.
            ids: of the battles.
            losses: (n,) loss of each battle.

        Raises:
            FloatingPointError: as `check_losses`.
        """
        if self.pending and self.pending[-1].step < step:
            self.check_losses()
        finite = losses.detach().isfinite().to("cpu", non_blocking=True)  # into pinned memory, if from a GPU
        ready = torch.cuda.Event() if losses.is_cuda else None
        if ready:
            ready.record()
        self.pending.append(RecordedLosses(step, ids, finite, ready))

    def check_losses(self) -> None:
        """Check all losses recorded so far.

        Raises:
            FloatingPointError: some are NaN or infinite; step and battles are named.
        """
        for step, ids, finite, ready in self.pending:
            if ready:
                ready.synchronize()
            bad = [name for name, good in zip(ids, finite.tolist(), strict=True) if not good]
            if bad:
                raise FloatingPointError(
                    f"step {step}: the loss of {len(bad)} of {plural(len(ids), 'battle')} is NaN or infinite "
                    f"({self.computing}); the first ids: {', '.join(bad[:5])}; {ADVICE}"
                )
        self.pending.clear()

    def check(self, model: torch.nn.Module) -> None:
        """Check all losses recorded so far, and the trainable weights, before a model is saved.

        Raises:
            FloatingPointError: as `check_losses`, or a trainable weight that is NaN or infinite.
        """
        self.check_losses()
        weights = [weight.detach() for weight in model.parameters() if weight.requires_grad]
        local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]  # FSDP: own shard
        if not get_total_norm(local).isfinite():
            raise FloatingPointError(f"trainable weights are NaN or infinite ({self.computing}); {ADVICE}")


ADVICE = (
    "checkpoints before it are good; look at those battles, lower trainer.learning_rate, or set model.dtype to float32"
)
"""What to do about losses that are NaN or infinite."""
