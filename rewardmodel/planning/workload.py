"""A recipe in, how many battles it trains on and judges, and how long they are, out: for what is told beforehand."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rewardmodel.config.schema import Recipe
from rewardmodel.data.folds import plan_parts
from rewardmodel.data.formats import read_battles
from rewardmodel.data.splits import load_battles, split
from rewardmodel.errors import InputError
from rewardmodel.model.loading import load_tokenizer
from rewardmodel.objectives import find_objective
from rewardmodel.prompt.tokenization import tokenize

SAMPLE = 500
"""Battles that are tokenised to learn how long they are."""

ARENA = 57_477
"""Battles of the competition, assumed where a recipe's own are not at hand."""

ARENA_TOKENS = ((0, 5, 25, 50, 75, 95, 99, 100), (30, 123, 314, 599, 940, 1943, 3748, 11218))
"""Percentiles of a battle's tokens, both responses in one sequence, of 1,870 battles of the competition (SmolLM2)."""

Branches = list[list[int]]
"""Of some battles, as in `prompt.tokenization.TOKEN_ROW_FEATURES`."""


@dataclass(frozen=True)
class Battles:
    """What is to be learnt from.

    Attributes:
        training: battles.
        validation: battles.
        branches: of a sample of them, to train on.
        predicted: the same, to predict.
        source: where all this comes from, in words.
    """

    training: int
    validation: int
    branches: Branches
    predicted: Branches
    source: str


def read_lengths(recipe: Recipe, folder: Path) -> Battles:
    """Return how many battles a recipe has and how long they are.

    Args:
        recipe: whose data, prompt and objective are read. Where its battles are not at hand, those of the competition
            are taken in their place, as many and dealt in the same shares.
        folder: of the backbone, for its tokenizer.

    Raises:
        InputError: the template is not to be used, or the battles at hand cannot be dealt as the recipe says.
    """
    data, longest = recipe.data, recipe.prompt.max_length
    try:
        battles = read_battles(data.train, seed=data.seed)
    except InputError as error:
        lengths = np.interp(np.linspace(0, 100, SAMPLE), *ARENA_TOKENS).clip(max=longest).astype(int).tolist()
        branches, predicted = ([[0, *[length] * times] for length in lengths] for times in _times(recipe))
        source = f"as many and as long as those of the competition, for want of the recipe's ({error})"
        shares = plan_parts(data.folds, data.calibration, data.holdout)[1]
        dealt = min(ARENA, data.limit or ARENA) * shares[: data.folds]
        validation = round(dealt[0])
        training = round(dealt.sum()) - validation
    else:
        parts = split(load_battles(data, battles), data.fold)
        training, validation = len(parts.training), len(parts.validation)
        sample = battles.select(np.linspace(0, len(battles) - 1, min(len(battles), SAMPLE)).astype(int))
        encoding, tokenizer = find_objective(recipe.objective).encoding, load_tokenizer(folder)
        branches, predicted = (
            tokenize(sample, tokenizer, recipe.prompt, encoding=encoding, both_orders=times == 2)["branches"][:]
            for times in _times(recipe)
        )
        source = f"{len(sample):,} of {len(battles):,} tokenised"
    return Battles(training, validation, branches, predicted, source)


def _times(recipe: Recipe) -> tuple[int, int]:
    """Return how many sequences a battle has in training and in prediction."""
    if find_objective(recipe.objective).encoding == "separate":
        return 2, 2
    return 1 + (recipe.data.swap_augmentation == "both"), 1 + (recipe.inference.swap_tta == "both")
