"""A recipe's data section in, its battles out: grouped, and dealt to folds, calibration and holdout."""

from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from rewardmodel.battles import is_labelled
from rewardmodel.config import DataConfig
from rewardmodel.errors import InputError
from rewardmodel.folds import CALIBRATION, HOLDOUT, assign_folds, assign_groups, limit, trains
from rewardmodel.formats import read_battles
from rewardmodel.runs import data_fingerprint


class Parts(NamedTuple):
    """Battles by what they are for; no prompt is in two parts, and the last two may be empty.

    A battle of a source that only trains, and that shares a prompt with a part that does not train, is in none.
    """

    training: Dataset
    validation: Dataset
    calibration: Dataset
    holdout: Dataset


def load_battles(data: DataConfig, battles: Any = None) -> Dataset:
    """Return the labelled battles of a recipe with `group` and `fold` set.

    Args:
        data: what to read, and how to deal it.
        battles: a Dataset, a DataFrame or a path in the place of `data.train`.

    Raises:
        InputError: unlabelled battles, too few prompts, or a fold that is not there.
    """
    if not 0 <= data.fold < data.folds:
        raise InputError(f"data.fold: {data.fold}, but data.folds makes folds 0 to {data.folds - 1}")
    if data.seed < 0:
        raise InputError(f"data.seed: {data.seed}; give a number from 0")
    if data.limit is not None and data.limit < 1:
        raise InputError(f"data.limit: {data.limit}; give a positive number of battles, or leave it out")
    battles = read_battles(data.train if battles is None else battles, seed=data.seed)
    if not is_labelled(battles):
        raise InputError(
            f"data.train: {battles['source'][0]} has no outcomes (winner_model_a, winner_model_b, winner_tie); "
            "training needs labelled battles, give it as data.test to predict it"
        )
    battles = assign_groups(battles)
    if data.limit is not None:
        battles = limit(battles, data.limit, data.seed)
    return assign_folds(battles, data.folds, data.seed, data.calibration, data.holdout)


def fingerprints(parts: Parts) -> dict[str, str]:
    """Return the digests by which a run knows its battles again."""
    return {"training": data_fingerprint(parts.training), "validation": data_fingerprint(parts.validation)}


def split(battles: Dataset, fold: int) -> Parts:
    """Return dealt battles by part, with one fold for validation."""
    dealt = np.asarray(battles.with_format(None)["fold"][:])
    masks = (trains(dealt, fold), dealt == fold, dealt == CALIBRATION, dealt == HOLDOUT)
    return Parts(*(battles.select(np.flatnonzero(mask)) for mask in masks))
