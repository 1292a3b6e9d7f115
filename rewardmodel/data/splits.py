"""A recipe's data section in, its battles out: grouped, and dealt to folds, calibration and holdout."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from rewardmodel.battles import data_fingerprint, outcomes, teacher_probabilities, with_column
from rewardmodel.config.schema import DataConfig
from rewardmodel.data.folds import (
    CALIBRATION_FOLD,
    HOLDOUT_FOLD,
    TRAIN_ONLY,
    assign_folds,
    assign_groups,
    content_keys,
    limit_battles,
    train_mask,
)
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.files import atomic_path
from rewardmodel.run_folder import RunFolder


class Parts(NamedTuple):
    """Battles by what they are for; no prompt is in two parts, and the last two may be empty.

    A battle of a source that only trains, and that shares a prompt with a part that does not train, is in none.
    """

    training: Dataset
    validation: Dataset
    calibration: Dataset
    holdout: Dataset


def load_battles(data: DataConfig, battles: Any = None) -> Dataset:
    """Return the battles of a recipe with `group` and `fold` set; those with a teacher's outcome alone only train.

    Args:
        data: what to read, and how to deal it.
        battles: a Dataset, a DataFrame or a path in the place of `data.train`.

    Raises:
        InputError: battles with neither an outcome nor a teacher, too few prompts, or a fold that is not there.
    """
    if not 0 <= data.fold < data.folds:
        raise InputError(f"data.fold: {data.fold}, but data.folds makes folds 0 to {data.folds - 1}")
    if data.seed < 0:
        raise InputError(f"data.seed: {data.seed}; give a number from 0")
    if data.limit is not None and data.limit < 1:
        raise InputError(f"data.limit: {data.limit}; give a positive number of battles, or leave it out")
    battles = read_battles(data.train if battles is None else battles, seed=data.seed)
    battles = assign_groups(_unlabelled_only_train(battles))
    if data.limit is not None:
        battles = limit_battles(battles, data.limit, data.seed)
    return assign_folds(battles, data.folds, data.seed, data.calibration, data.holdout)


def _unlabelled_only_train(battles: Dataset) -> Dataset:
    """Return the battles, those without an outcome marked as `TRAIN_ONLY`; raise if they have no teacher either."""
    unlabelled = np.isnan(outcomes(battles)).any(axis=1)
    if not unlabelled.any():
        return battles
    untaught = unlabelled & np.isnan(teacher_probabilities(battles)).any(axis=1)
    if untaught.any():
        raise InputError(
            f"data.train: {battles[int(untaught.argmax())]['source']} has no outcomes (winner_model_a, winner_model_b, "
            "winner_tie); training needs labelled battles, or a teacher; give it as data.test to predict it"
        )
    if unlabelled.all():
        raise InputError(
            "data.train: no battle has an outcome of its own to validate on; add a source of labelled ones"
        )
    fold = np.asarray(battles.with_format(None)["fold"][:], np.int32)
    return with_column(battles, "fold", np.where(unlabelled & (fold == -1), np.int32(TRAIN_ONLY), fold))


def fingerprint_parts(parts: Parts) -> dict[str, str]:
    """Return the digests by which a run knows its battles again."""
    return {"training": data_fingerprint(parts.training), "validation": data_fingerprint(parts.validation)}


def split(battles: Dataset, fold: int | None) -> Parts:
    """Return dealt battles by part, with one fold for validation; or with all, where each trains for the others."""
    dealt = np.asarray(battles.with_format(None)["fold"][:])
    judged = dealt >= 0 if fold is None else dealt == fold
    masks = (train_mask(dealt, -1 if fold is None else fold), judged, dealt == CALIBRATION_FOLD, dealt == HOLDOUT_FOLD)
    return Parts(*(battles.select(np.flatnonzero(mask)) for mask in masks))


def write_training_keys(run: Path, battles: Dataset) -> None:
    """Write by what a run knows the groups again that it trained on: the sorted content keys of its battles."""
    with atomic_path(RunFolder(run).training_keys) as partial, partial.open("wb") as file:
        np.save(file, np.unique(content_keys(battles)))


def find_seen_battles(runs: list[Path], battles: Dataset) -> np.ndarray | None:
    """Return which battles share a group with a run's training battles, (n_runs, n_battles) bool.

    Args:
        runs: run folders.
        battles: with `group` set; one battle of a group that was trained on is enough.

    Returns:
        None if a run does not say what it trained on.
    """
    if not all(RunFolder(run).training_keys.is_file() for run in runs):
        return None
    own, group = content_keys(battles), np.asarray(battles.with_format(None)["group"][:])
    seen = np.empty((len(runs), len(battles)), bool)
    for number, run in enumerate(runs):
        hit = np.isin(own, np.load(RunFolder(run).training_keys)).any(axis=1)
        seen[number] = np.isin(group, group[hit])
    return seen
