"""Features and outcomes in, the last layer of a head fitted to them out: all that trains on a frozen backbone.

The loss is the objective's, of a linear layer: L-BFGS finds its least. How much the weights are held back, an L2
penalty, is what predicts other prompt groups of the training battles best.
"""

import copy
import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from rewardmodel.errors import InputError
from rewardmodel.model.heads import PairTieHead, TieHead
from rewardmodel.objectives import Objective, Settings, initial_tie

logger = logging.getLogger(__name__)

FOLDS = 3
"""Parts of the training groups; each is predicted with what was fitted on the others, for every penalty."""

PENALTIES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3)
"""Half of it times the squared weights is added to the summed loss of the battles; of weights on features of variance
1 over their number, so that it means the same for few and for many."""

TIES_HELD = 3.0
"""How many times as much weights are held back that ties alone depend on. Log loss of 2,578 arena battles in five
grouped folds, by SmolLM2-135M's layer 20 and penalty 1: 1.0148 if they are held alike, 1.0092 with 3."""

HELD = {"weight": 1.0, "tie_apart": TIES_HELD, "tie_mean": TIES_HELD}
"""By how much weights of `model.heads` are held back; others are free."""

LEAST_SPREAD = 1e-4
"""Features whose standard deviation is a smaller part of their size are rounding noise, and stay small."""

STEPS = 200
"""Most iterations of L-BFGS."""


@dataclass(frozen=True)
class Examples:
    """What a layer is fitted to.

    Attributes:
        features: (n_battles, n_sequences, width) float32.
        labels: (n_battles, 3) float32 outcomes.
        teacher: (n_battles, 3) float32, NaN where there is none.
        weight: (n_battles,) float32.
    """

    features: torch.Tensor
    labels: torch.Tensor
    teacher: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(cls, rows: Dataset, features: np.ndarray, device: torch.device) -> "Examples":
        """Return the examples of rows of `prompt.tokenization.ROWS`, with their features."""
        columns = (np.asarray(rows[name][:], dtype=np.float32) for name in ("labels", "teacher", "weight"))
        return cls(*(torch.from_numpy(values).to(device) for values in (features, *columns)))

    def select(self, rows: np.ndarray) -> "Examples":
        """Return some of them, by (n,) bool."""
        chosen = torch.from_numpy(np.flatnonzero(rows)).to(self.labels.device)
        return Examples(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def fit_last_layer(
    layer: Any, examples: Examples, groups: np.ndarray, objective: Objective, settings: Settings
) -> dict[float, float]:
    """Fit a linear layer to features in place, by the penalty that does best across prompt groups.

    Args:
        layer: of `model.heads`, on the device of the examples.
        examples: the training battles.
        groups: (n_battles,) the prompt group of each.
        objective: the loss.
        settings: the recipe's `objective` section.

    Returns:
        The mean loss on left-out groups by penalty.

    Raises:
        InputError: all battles are of one group.
    """
    centred = layer.bias is not None or (isinstance(layer, TieHead) and not settings.center_rewards)
    center, scale = _standard(examples.features, centred)
    scaled = Examples((examples.features - center) / scale, examples.labels, examples.teacher, examples.weight)
    check_groups(groups)
    _, members = np.unique(groups, return_inverse=True)
    if objective.head.tie:
        torch.nn.init.constant_(layer.tie, initial_tie(float(examples.labels[:, 2].nanmean())))
        layer.tie.requires_grad_(objective.learns_ties)
    part = (np.random.default_rng(0).permutation(members.max() + 1) % FOLDS)[members]
    losses = dict.fromkeys(PENALTIES, 0.0)
    for number in np.unique(part):
        tried = copy.deepcopy(layer)
        others, own = scaled.select(part != number), scaled.select(part == number)
        for penalty in PENALTIES:  # from the strongest on: each begins where the one before ended
            _minimise(tried, others, objective, settings, penalty)
            with torch.no_grad():
                losses[penalty] += _loss(tried, own, objective, settings).item()
    total = _total(examples, objective)
    losses = {penalty: loss / total for penalty, loss in losses.items()}
    best = min(losses, key=losses.__getitem__)
    for penalty in PENALTIES[: PENALTIES.index(best) + 1]:
        _minimise(layer, scaled, objective, settings, penalty)
    _read_unscaled(layer, center, scale)
    logger.info("penalty %g: loss %.4f on left-out groups of the training battles", best, losses[best])
    return losses


def check_groups(groups: np.ndarray) -> None:
    """Raise InputError if all battles are of one prompt group, (n_battles,): no penalty could be chosen."""
    if len(np.unique(groups)) < 2:
        raise InputError(
            "data.train: the penalty of a fitted head (model.freeze_backbone, model.head_init) is chosen across "
            "prompts, and all battles share one; give battles of two at least"
        )


def _standard(features: torch.Tensor, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what to take off features, 0 where nothing could make up for it, and what to divide them by, (width,)."""
    flat = features.flatten(0, 1)
    mean = flat.mean(dim=0)
    spread, size = (flat - mean).square().mean(dim=0).sqrt(), flat.square().mean(dim=0).sqrt()
    spread = torch.where(spread > LEAST_SPREAD * size, spread, size) * math.sqrt(flat.shape[1])
    return mean if centred else torch.zeros_like(mean), torch.where(spread > 0, spread, 1.0)


def _read_unscaled(layer: Any, center: torch.Tensor, scale: torch.Tensor) -> None:
    """Change the weights of a layer that reads (features - center) / scale so that it reads features."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name in HELD:
                weight.div_(scale)
        if layer.bias is not None:
            layer.bias.sub_(layer.weight @ center)
        if isinstance(layer, PairTieHead):
            layer.tie.sub_(layer.tie_mean @ center)
        # A constant in rewards cancels in their difference.


def _total(examples: Examples, objective: Objective) -> float:
    return float((examples.weight * objective.denominators(examples.labels)).sum()) or 1.0


def _loss(layer: Any, examples: Examples, objective: Objective, settings: Settings) -> torch.Tensor:
    logits = layer(examples.features.flatten(0, 1)).view(*examples.features.shape[:2], -1)
    losses = objective.battle_losses(logits, examples.labels, settings, examples.teacher)
    return (losses * examples.weight).sum()


def _minimise(layer: Any, examples: Examples, objective: Objective, settings: Settings, penalty: float) -> None:
    total = _total(examples, objective)
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    search = torch.optim.LBFGS(
        weights, max_iter=STEPS, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def step() -> torch.Tensor:
        search.zero_grad()
        held = sum(HELD[name] * weight.square().sum() for name, weight in layer.named_parameters() if name in HELD)
        loss = (_loss(layer, examples, objective, settings) + penalty / 2 * held) / total
        loss.backward()
        return loss

    search.step(step)
    search.zero_grad()
