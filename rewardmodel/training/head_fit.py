"""Features and outcomes -> a fitted last layer of the head, which is all that trains on a frozen backbone.

Minimises the objective's loss of a linear layer, plus an L2 penalty on how far it moves from where it started, with
L-BFGS. The strength of the penalty is chosen by cross-validation over prompt groups of the training battles.
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

PENALTY_FOLDS = 3
"""Folds of the cross-validation that chooses the penalty."""

PENALTIES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3)
"""Strengths of the L2 penalty to choose from, the strongest first.

Half of it times the squared distance of the weights from their start is added to the summed loss of the battles.
Features are scaled to variance 1 / width first, so that a strength means the same for few and for many features.
"""

TIE_PENALTY = 3.0
"""Penalty of the weights that only ties depend on, in penalties of the other weights. Log loss of 2,578 arena battles
in five grouped folds, with SmolLM2-135M's layer 20 and penalty 1: 1.0148 with factor 1, 1.0092 with factor 3."""

PENALTY_FACTORS = {"weight": 1.0, "tie_apart": TIE_PENALTY, "tie_mean": TIE_PENALTY}
"""Penalty of each parameter of `model.heads`, as a factor; parameters that are not listed have none."""

MIN_RELATIVE_STD = 1e-4
"""Features whose standard deviation is a smaller fraction of their root mean square are rounding noise: they are scaled
by the latter, so that they stay small."""

MAX_ITERATIONS = 200
"""Most iterations of L-BFGS."""


@dataclass(frozen=True)
class Examples:
    """Battles that a layer is fitted to.

    Attributes:
        features: (n_battles, n_sequences, width) float32, the inputs of the layer.
        labels: (n_battles, 3) float32, the outcomes.
        teacher: (n_battles, 3) float32, a teacher's probabilities; NaN without a teacher.
        weight: (n_battles,) float32, weight of each battle in the loss.
    """

    features: torch.Tensor
    labels: torch.Tensor
    teacher: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(cls, rows: Dataset, features: np.ndarray, device: torch.device) -> "Examples":
        """Return examples of token rows (`prompt.tokenization.TOKEN_ROW_FEATURES`) and their features."""
        columns = (np.asarray(rows[name][:], dtype=np.float32) for name in ("labels", "teacher", "weight"))
        return cls(*(torch.from_numpy(values).to(device) for values in (features, *columns)))

    def select(self, rows: np.ndarray) -> "Examples":
        """Return the examples selected by a mask, (n_battles,) bool."""
        chosen = torch.from_numpy(np.flatnonzero(rows)).to(self.labels.device)
        return Examples(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def fit_last_layer(
    layer: Any, examples: Examples, groups: np.ndarray, objective: Objective, settings: Settings
) -> dict[float, float]:
    """Fit a linear layer to features, in place, with the penalty that predicts left-out prompt groups best.

    The penalty pulls towards the weights that the layer has: zeros, or `training.answer_head`.

    Args:
        layer: of `model.heads`, on the device of the examples.
        examples: the training battles.
        groups: (n_battles,) prompt group of each battle.
        objective: the loss.
        settings: the recipe's `objective` section.

    Returns:
        The mean loss on left-out groups, by penalty.

    Raises:
        InputError: all battles are of one group.
    """
    check_groups(groups)

    # standardise the features; without a bias or a constant that cancels, they are not centred
    centred = layer.bias is not None or (isinstance(layer, TieHead) and not settings.center_rewards)
    center, scale = _standardization(examples.features, centred)
    scaled = Examples((examples.features - center) / scale, examples.labels, examples.teacher, examples.weight)
    with torch.no_grad():
        for weight in _penalised(layer).values():
            weight.mul_(scale)
    start = {name: weight.detach().clone() for name, weight in _penalised(layer).items()}
    if objective.head.tie:
        torch.nn.init.constant_(layer.tie, initial_tie(float(examples.labels[:, 2].nanmean())))
        layer.tie.requires_grad_(objective.learns_ties)

    # cross-validation: the loss of each penalty on the groups of a fold, by a layer fitted to the other folds
    _, members = np.unique(groups, return_inverse=True)
    fold = (np.random.default_rng(0).permutation(members.max() + 1) % PENALTY_FOLDS)[members]
    losses = dict.fromkeys(PENALTIES, 0.0)
    for number in np.unique(fold):
        candidate = copy.deepcopy(layer)
        training, held_out = scaled.select(fold != number), scaled.select(fold == number)
        for penalty in PENALTIES:  # each starts from the solution of the stronger one before it
            _minimise(candidate, training, objective, settings, penalty, start)
            with torch.no_grad():
                losses[penalty] += _sum_losses(candidate, held_out, objective, settings).item()
    total = total_weight(examples, objective)
    losses = {penalty: loss / total for penalty, loss in losses.items()}

    # fit to all battles with the best penalty, starting from the solutions of the stronger ones as before
    best = min(losses, key=losses.__getitem__)
    for penalty in PENALTIES[: PENALTIES.index(best) + 1]:
        _minimise(layer, scaled, objective, settings, penalty, start)
    _absorb_scaling(layer, center, scale)
    logger.info("penalty %g: loss %.4f on left-out groups of the training battles", best, losses[best])
    return losses


def check_groups(groups: np.ndarray) -> None:
    """Raise InputError if all battles are of one prompt group: there is none to choose the penalty on.

    Args:
        groups: (n_battles,) prompt group of each battle.
    """
    if len(np.unique(groups)) < 2:
        raise InputError(
            "data.train: the penalty of a fitted head (model.freeze_backbone, model.head_init) is chosen across "
            "prompts, and all battles have the same one; give battles of at least two"
        )


def _standardization(features: torch.Tensor, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return center and scale, each (width,): (features - center) / scale has variance 1 / width.

    The center is 0 unless `centred`, which needs a layer whose constants can absorb it.
    """
    flat = features.flatten(0, 1)
    mean = flat.mean(dim=0)
    std, rms = (flat - mean).square().mean(dim=0).sqrt(), flat.square().mean(dim=0).sqrt()
    scale = torch.where(std > MIN_RELATIVE_STD * rms, std, rms) * math.sqrt(flat.shape[1])
    return mean if centred else torch.zeros_like(mean), torch.where(scale > 0, scale, 1.0)


def _absorb_scaling(layer: Any, center: torch.Tensor, scale: torch.Tensor) -> None:
    """Change a layer that was fitted to (features - center) / scale, in place, so that it takes features."""
    with torch.no_grad():
        for weight in _penalised(layer).values():
            weight.div_(scale)
        if layer.bias is not None:
            layer.bias.sub_(layer.weight @ center)
        if isinstance(layer, PairTieHead):
            layer.tie.sub_(layer.tie_mean @ center)
        # without a bias, the rewards change by a constant, which cancels in their difference


def total_weight(examples: Examples, objective: Objective) -> float:
    """Return the denominator of the mean loss; 1 if no battle counts."""
    return float((examples.weight * objective.denominators(examples.labels)).sum()) or 1.0


def _sum_losses(layer: Any, examples: Examples, objective: Objective, settings: Settings) -> torch.Tensor:
    """Return the weighted sum of the battles' losses, a scalar."""
    logits = layer(examples.features.flatten(0, 1)).view(*examples.features.shape[:2], -1)
    losses = objective.battle_losses(logits, examples.labels, settings, examples.teacher)
    return (losses * examples.weight).sum()


def _penalised(layer: Any) -> dict[str, torch.Tensor]:
    """Return the layer's parameters that have a penalty, by name."""
    return {name: weight for name, weight in layer.named_parameters() if name in PENALTY_FACTORS}


def _minimise(
    layer: Any,
    examples: Examples,
    objective: Objective,
    settings: Settings,
    penalty: float,
    start: dict[str, torch.Tensor],
) -> None:
    """Minimise the mean loss, with the penalty on the distance from `start`, over the layer's parameters, in place."""
    total = total_weight(examples, objective)
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    optimizer = torch.optim.LBFGS(
        weights, max_iter=MAX_ITERATIONS, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        squares = sum(
            PENALTY_FACTORS[name] * (weight - start[name]).square().sum() for name, weight in _penalised(layer).items()
        )
        loss = (_sum_losses(layer, examples, objective, settings) + penalty / 2 * squares) / total
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
