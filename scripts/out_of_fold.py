"""A recipe and battles that are dealt into folds in, predictions of each fold by what learnt from the others out.

What bench_quality.py compares: heads that are fitted to what a frozen backbone reads, and models that are trained.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rewardmodel.objectives import Objective


class Read(NamedTuple):
    """Battles as a backbone reads them: features (n, n_sequences, width), labels (n, 3), weights (n,)."""

    features: np.ndarray
    labels: np.ndarray
    weight: np.ndarray


class Fold(NamedTuple):
    """Who learns and who is judged: groups, folds and whether a battle is of the arena, each (n,)."""

    group: np.ndarray
    fold: np.ndarray
    arena: np.ndarray


@dataclass(frozen=True)
class Consistent(Objective):
    """A joint objective that also takes the squared distance between what both orders predict of a battle as a loss."""

    consistency: float = 0.0

    def battle_losses(self, logits: Tensor, labels: Tensor, settings: Any, teacher: Tensor | None = None) -> Tensor:
        """Return the loss of each battle, (n,), of logits (n, 2, 3)."""
        first, second = self.probabilities_by_order(logits)
        apart = (first - second).square().sum(dim=1)
        return super().battle_losses(logits, labels, settings, teacher) + self.consistency * apart


def objective_of(recipe: Any, changes: dict[str, Any]) -> Objective:
    """Return the objective of a recipe with a lever's changes."""
    from rewardmodel.objectives import find_objective

    objective = find_objective(recipe.objective)
    if "consistency" in changes:
        return Consistent(**vars(objective), consistency=changes["consistency"])
    return objective


def opened(recipe: Any, battles: Any) -> tuple[Any, Any]:
    """Return a predictor that reads features with the backbone of a recipe, in every pooling, and battles as rows.

    Joint sequences are in both orders.
    """
    from rewardmodel.model.backbone import resolve_backbone
    from rewardmodel.model.forward import Predictor
    from rewardmodel.model.loading import build_model
    from rewardmodel.objectives import find_objective
    from rewardmodel.prompt.tokenization import tokenize

    # The other poolings are columns of this one.
    backbone = resolve_backbone(replace(recipe.model, pooling="last_and_responses"))
    objective = find_objective(recipe.objective)
    model, tokenizer = build_model(backbone, objective.head, 0)
    predictor = Predictor(
        model, tokenizer, backbone.dtype, recipe.inference.batch_tokens, feature_cache=backbone.feature_cache
    )
    joint = objective.encoding == "joint"
    return predictor, tokenize(battles, tokenizer, recipe.prompt, encoding=objective.encoding, both_orders=joint)


def read(recipe: Any, battles: Any) -> Read:
    """Return what the backbone of a recipe reads of battles, in both orders, out of the cache where it is there."""
    from rewardmodel.model.features import read_features
    from rewardmodel.model.heads import WIDTHS
    from rewardmodel.objectives import find_objective

    predictor, rows = opened(recipe, battles)
    found = read_features(predictor, rows)
    responses = find_objective(recipe.objective).head.responses
    width = found.shape[2] // WIDTHS["last_and_responses"](responses)
    columns = {"last": slice(0, width), "responses": slice(width, None), "last_and_responses": slice(None)}
    labels, weight = (np.asarray(rows[name][:], np.float32) for name in ("labels", "weight"))
    return Read(np.ascontiguousarray(found[..., columns[recipe.model.pooling]]), labels, weight)


def shown(recipe: Any, objective: Objective, given: Read) -> Read:
    """Return the orders of joint sequences that training sees: both, or one, in whose words the outcome is."""
    from rewardmodel.objectives import ORDER_COLUMNS

    swaps = recipe.data.swap_augmentation
    if objective.encoding == "separate" or swaps == "both":
        return given
    count = len(given.labels)
    order = np.random.default_rng(0).integers(0, 2 if swaps == "random" else 1, count)
    labels = np.take_along_axis(given.labels, np.array(ORDER_COLUMNS)[order], axis=1)
    return given._replace(features=given.features[np.arange(count), order][:, None], labels=labels)


def fitted(recipe: Any, objective: Objective, given: Read, groups: np.ndarray) -> Any:
    """Return a head's last layer, fitted to battles."""
    from rewardmodel.model.features import layer_logits
    from rewardmodel.model.heads import last_layer_class
    from rewardmodel.objectives import fit_tie
    from rewardmodel.training.head_fit import Examples, fit_last_layer

    shape = objective.head._replace(pairs=recipe.model.pair_ties)
    layer: Any = last_layer_class(shape)(given.features.shape[2], shape.num_labels, bias=False)
    torch.nn.init.zeros_(layer.weight)
    examples = Examples(
        *map(torch.from_numpy, (given.features, given.labels)),
        torch.full((len(given.labels), 3), torch.nan),
        torch.from_numpy(given.weight),
    )
    fit_last_layer(layer, examples, groups, objective, recipe.objective)
    if not objective.learns_ties:  # on the training battles: the fold's own are for judging
        rewards = layer_logits(layer, given.features)[..., 0]
        torch.nn.init.constant_(layer.tie, fit_tie(rewards, given.labels, objective.link))
    return layer


def fitted_out_of_fold(
    recipe: Any, given: Read, dealing: Fold, folds: list[int], changes: dict[str, Any]
) -> np.ndarray:
    """Return predictions of the arena battles by order, (orders, n_arena, 3), each by heads fitted to other folds.

    Those of folds that are not asked for are NaN.
    """
    from rewardmodel.data.folds import train_mask
    from rewardmodel.model.features import layer_logits

    objective = objective_of(recipe, changes)
    learnt, bags = shown(recipe, objective, given), changes.get("bags", 1)
    result = np.full((1 if objective.encoding == "separate" else 2, len(given.labels), 3), np.nan)
    for number in folds:
        training = np.flatnonzero(train_mask(dealing.fold, number) & (given.weight > 0))
        own = dealing.arena & (dealing.fold == number)
        result[:, own] = 0
        for bag in range(bags):
            drawn = training if bags == 1 else by_group(dealing.group, training, bag)
            some = Read(*(part[drawn] for part in learnt))
            layer = fitted(recipe, objective, some, dealing.group[drawn])
            orders = objective.probabilities_by_order(torch.from_numpy(layer_logits(layer, given.features[own])))
            result[:, own] += np.stack([order.numpy() for order in orders]) / bags
    return result[:, dealing.arena]


def by_group(groups: np.ndarray, training: np.ndarray, seed: int) -> np.ndarray:
    """Return rows of as many groups as train, drawn with replacement."""
    names, members = np.unique(groups[training], return_inverse=True)
    often = np.bincount(np.random.default_rng(seed).integers(0, len(names), len(names)), minlength=len(names))
    return np.repeat(training, often[members])


def trained_out_of_fold(recipe: Any, battles: Any, dealing: Fold, folds: list[int], folder: Path) -> np.ndarray:
    """Return predictions of the arena battles by order, (orders, n_arena, 3), each by a model trained on other folds.

    Those of folds that are not asked for are NaN. The folder keeps a run for each fold; those that are there go on.
    """
    from rewardmodel import predict, train
    from rewardmodel.data.splits import split
    from rewardmodel.objectives import find_objective
    from rewardmodel.predictions import predicted

    if not find_objective(recipe.objective).learns_ties:
        raise SystemExit(f"{recipe.objective.name} fits its tie parameter to the battles that judge it here")
    result: dict[str, np.ndarray] = {}
    for number in folds:
        parts, run = split(battles, number), folder / f"fold-{number}"
        keys = {"output_dir": str(run), "eval_strategy": "no"}  # the fold's battles judge, and so choose no checkpoint
        own = replace(recipe, trainer=recipe.trainer | keys)
        train(own, parts=parts, resume=run.is_dir())
        table = predict(run, parts.validation)
        for order in ("ab", "ba") if "ba_p_tie" in table else ("",):
            result.setdefault(order, np.full((len(battles), 3), np.nan))[dealing.fold == number] = predicted(
                table, order
            )
    return np.stack(list(result.values()))[:, dealing.arena]
