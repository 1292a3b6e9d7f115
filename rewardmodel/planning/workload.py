"""A recipe -> how many battles it trains and validates on, and their lengths in tokens, before anything is trained."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoConfig

from rewardmodel.config.schema import Recipe
from rewardmodel.data.folds import plan_parts
from rewardmodel.data.formats import read_battles
from rewardmodel.data.splits import load_battles, split
from rewardmodel.errors import InputError
from rewardmodel.model.loading import load_tokenizer
from rewardmodel.model.vocabulary import check_vocabulary
from rewardmodel.objectives import find_objective
from rewardmodel.prompt.tokenization import tokenize

ARENA_BATTLES = 57_477
"""Battles of the competition, assumed if a recipe's own are not on this machine."""

ARENA_TOKENS = ((0, 5, 25, 50, 75, 95, 99, 100), (30, 123, 314, 599, 940, 1943, 3748, 11218))
"""Percentiles of a battle's tokens, both responses in one sequence, of 1,870 battles of the competition (SmolLM2)."""

MEASURED_BATTLES = 500
"""Battles that are tokenised to estimate the lengths of all."""

Branches = list[list[int]]
"""Lengths of battles as in the column `branches` of token rows: tokens that a battle's sequences share, then the
further tokens of each. Two battles in both orders: `[[10, 30, 30], [12, 80, 80]]`; in one order:
`[[0, 40], [0, 92]]`."""


@dataclass(frozen=True)
class Workload:
    """The battles of a recipe.

    Attributes:
        training: number of battles to train on.
        validation: number of battles to validate on.
        branches: lengths in training, in tokens, of a sample of battles.
        predicted: lengths in prediction of the same battles.
        source: where the numbers come from, as text.
    """

    training: int
    validation: int
    branches: Branches
    predicted: Branches
    source: str


def read_workload(recipe: Recipe, folder: Path) -> Workload:
    """Return how many battles a recipe has, and how long they are.

    If its battles cannot be read on this machine, the number and the lengths of the competition's are assumed.

    Args:
        recipe: its data, prompt, objective and inference sections are read.
        folder: of the backbone, for its tokenizer.

    Raises:
        InputError: a template or a tokenizer that cannot be used, or folds that these battles cannot be split into.
    """
    data, longest = recipe.data, recipe.prompt.max_length
    try:
        battles = read_battles(data.train, seed=data.seed)
    except InputError as error:
        # lengths at evenly spaced percentiles: [0, length] in one order, [0, length, length] in both
        lengths = np.interp(np.linspace(0, 100, MEASURED_BATTLES), *ARENA_TOKENS).clip(max=longest).astype(int).tolist()
        branches, predicted = ([[0, *[length] * count] for length in lengths] for count in _count_sequences(recipe))
        shares = plan_parts(data.folds, data.calibration, data.holdout)[1]
        fold_sizes = min(ARENA_BATTLES, data.limit or ARENA_BATTLES) * shares[: data.folds]
        validation = round(fold_sizes[0])
        training = round(fold_sizes.sum()) - validation
        source = f"number and lengths as in the competition, because the recipe's battles cannot be read ({error})"
    else:
        parts = split(load_battles(data, battles), data.fold)
        training, validation = len(parts.training), len(parts.validation)
        chosen = np.linspace(0, len(battles) - 1, min(len(battles), MEASURED_BATTLES)).astype(int)
        sample, tokenizer = battles.select(chosen), load_tokenizer(folder)
        check_vocabulary(tokenizer, AutoConfig.from_pretrained(folder))
        encoding = find_objective(recipe.objective).encoding
        branches, predicted = (
            tokenize(sample, tokenizer, recipe.prompt, encoding=encoding, both_orders=count == 2)["branches"][:]
            for count in _count_sequences(recipe)
        )
        source = f"{len(sample):,} of {len(battles):,} tokenised"
    return Workload(training, validation, branches, predicted, source)


def _count_sequences(recipe: Recipe) -> tuple[int, int]:
    """Return how many sequences a battle has in training and in prediction."""
    if find_objective(recipe.objective).encoding == "separate":
        return 2, 2
    return 1 + (recipe.data.swap_augmentation == "both"), 1 + (recipe.inference.swap_tta == "both")
