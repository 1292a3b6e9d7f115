"""Battles and subsets of them in, predictions by a head that is fitted to each subset out: the backbone reads once.

For recipes with `model.freeze_backbone`, whose heads take seconds once the features are there.
"""

import copy
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from datasets import Dataset

from rewardmodel.config.schema import Recipe
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.compatibility import check_head
from rewardmodel.model.features import layer_logits, read_features
from rewardmodel.model.loading import build_model, trained_layer
from rewardmodel.objectives import find_objective, fit_tie
from rewardmodel.prompt.tokenization import tokenize
from rewardmodel.training.answer_head import answer_rows, start_from_answers
from rewardmodel.training.head_fit import Examples, check_groups, fit_last_layer
from rewardmodel.training.train import TrainingInputs, tokenize_training

Subset = tuple[np.ndarray, np.ndarray]
"""Rows of battles to train on, and rows to predict, int64."""


def fit_subsets(recipe: Recipe, battles: Dataset, subsets: Iterable[Subset]) -> Iterator[np.ndarray]:
    """Yield what heads fitted to subsets predict, (n_predicted, 3) float32; of two orders the mean.

    Args:
        recipe: with a frozen backbone.
        battles: with `group` assigned, those that train labelled or with a teacher.
        subsets: of their rows. The tie parameter of an objective that does not learn it is fitted to the training rows.

    Raises:
        InputError: the recipe cannot be used, or a subset is of one prompt.
    """
    check_head(recipe.model, recipe.objective)
    objective, settings = find_objective(recipe.objective), recipe.objective
    backbone = resolve_backbone(recipe.model, trainer=recipe.trainer, max_length=recipe.prompt.max_length)
    model, tokenizer = build_model(backbone, objective.head, recipe.trainer["seed"])
    layer = trained_layer(model)
    answers = answer_rows(model, tokenizer, backbone) if recipe.model.head_init == "answer" else None
    rows = tokenize_training(battles, tokenizer, recipe)
    both = objective.encoding == "joint" and recipe.inference.swap_tta == "both"
    judged_rows = tokenize(
        battles,
        tokenizer,
        recipe.prompt,
        recipe.trainer.get("dataset_num_proc"),
        encoding=objective.encoding,
        both_orders=both,
    )
    groups = np.asarray(battles["group"][:])
    predictor = TrainingInputs(recipe, backbone, model, tokenizer, rows, judged_rows, groups).predictor
    examples = Examples.of(rows, read_features(predictor, rows), layer.weight.device)
    features = examples.features.cpu().numpy()
    if objective.encoding == "joint":
        features = read_features(predictor, judged_rows)

    for training, judged in subsets:
        check_groups(groups[training])
        mask = np.zeros(len(battles), bool)
        mask[training] = True
        fitted, own = copy.deepcopy(layer), examples.select(mask)
        if answers is not None:
            start_from_answers(fitted, answers, own, objective, settings)
        fit_last_layer(fitted, own, groups[mask], objective, settings)
        if not objective.learns_ties:
            rewards, labels = layer_logits(fitted, features[mask])[..., 0], own.labels.cpu().numpy()
            torch.nn.init.constant_(fitted.tie, fit_tie(rewards, labels, objective.link))
        orders = objective.probabilities_by_order(torch.from_numpy(layer_logits(fitted, features[judged])))
        yield torch.stack(orders).mean(dim=0).numpy()
