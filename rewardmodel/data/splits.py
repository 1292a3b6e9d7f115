"""Read the battles of a recipe's `data` section, and split them into training, validation, calibration and holdout."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from rewardmodel.battles import data_fingerprint, outcomes, teacher_probabilities, with_column
from rewardmodel.config.schema import DataConfig
from rewardmodel.data.duplicates import find_duplicates
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
from rewardmodel.data.formats import SourceReport, read_battles
from rewardmodel.errors import InputError, plural
from rewardmodel.files import atomic_path
from rewardmodel.run_folder import RunFolder

logger = logging.getLogger(__name__)


class Parts(NamedTuple):
    """Battles by purpose; no prompt is in two parts, and the last two may be empty.

    A battle of a source that only trains is in no part if it shares a prompt with a part that does not train.
    """

    training: Dataset
    validation: Dataset
    calibration: Dataset
    holdout: Dataset


def load_battles(data: DataConfig, battles: Any = None, reports: list[SourceReport] | None = None) -> Dataset:
    """Return the battles of a recipe with `group` and `fold` assigned.

    Battles that have only a teacher's probabilities, and no outcome, are used for training alone.

    Args:
        data: what to read, and how to split it.
        battles: a Dataset, a DataFrame or a path to read instead of `data.train`.
        reports: gets a report of each source that is read.

    Raises:
        InputError: a value of `data` out of range, battles with neither an outcome nor a teacher, too few prompts, or
            a file that cannot be read.
    """
    if not 0 <= data.fold < data.folds:
        raise InputError(f"data.fold: {data.fold}, but data.folds makes folds 0 to {data.folds - 1}")
    if data.seed < 0:
        raise InputError(f"data.seed: {data.seed}; give a number from 0")
    if data.limit is not None and data.limit < 1:
        raise InputError(f"data.limit: {data.limit}; give a positive number of battles, or leave it out")
    battles = read_battles(data.train if battles is None else battles, seed=data.seed, reports=reports)
    battles = assign_groups(_mark_unlabelled(battles))
    _warn_of_conflicts(battles)
    if data.limit is not None:
        battles = limit_battles(battles, data.limit, data.seed)
    return assign_folds(battles, data.folds, data.seed, data.calibration, data.holdout)


def _warn_of_conflicts(battles: Dataset) -> None:
    conflicts = find_duplicates(battles)["label_conflicts"]
    if conflicts["sets"]:
        logger.warning(
            "judged several times, with different winners: %s of responses, in %s, like %s; no model can predict all "
            "of them",
            plural(conflicts["sets"], "pair"),
            plural(conflicts["battles"], "battle"),
            " and ".join(conflicts["examples"][0][:2]),
        )


def _mark_unlabelled(battles: Dataset) -> Dataset:
    """Return the battles with those without an outcome marked as `TRAIN_ONLY`; raise if one has no teacher either."""
    unlabelled = np.isnan(outcomes(battles)).any(axis=1)
    if not unlabelled.any():
        return battles
    neither = unlabelled & np.isnan(teacher_probabilities(battles)).any(axis=1)
    if neither.any():
        raise InputError(
            f"data.train: {battles[int(neither.argmax())]['source']} has no outcomes (winner_model_a, winner_model_b, "
            "winner_tie); training needs labelled battles, or a teacher; to predict these, give them as data.test"
        )
    if unlabelled.all():
        raise InputError(
            "data.train: no battle has an outcome, so there is nothing to validate on; add a source of labelled battles"
        )
    fold = np.asarray(battles.with_format(None)["fold"][:], np.int32)
    return with_column(battles, "fold", np.where(unlabelled & (fold == -1), np.int32(TRAIN_ONLY), fold))


def fingerprint_parts(parts: Parts) -> dict[str, str]:
    """Return the hashes of the training and validation battles that a run saves, to detect that its data changed."""
    return {"training": data_fingerprint(parts.training), "validation": data_fingerprint(parts.validation)}


def split(battles: Dataset, fold: int | None) -> Parts:
    """Return the battles by part.

    Args:
        battles: with `fold` assigned.
        fold: the one to validate on; None: all of them, as in a k-fold run.
    """
    folds = np.asarray(battles.with_format(None)["fold"][:])
    masks = (
        train_mask(folds, -1 if fold is None else fold),
        folds >= 0 if fold is None else folds == fold,
        folds == CALIBRATION_FOLD,
        folds == HOLDOUT_FOLD,
    )
    return Parts(*(battles.select(np.flatnonzero(mask)) for mask in masks))


def write_training_keys(run: Path, battles: Dataset) -> None:
    """Write hashes of the training prompts and response pairs, sorted, to detect leakage at prediction time."""
    with atomic_path(RunFolder(run).training_keys) as partial, partial.open("wb") as file:
        np.save(file, np.unique(content_keys(battles)))


def find_seen_battles(runs: list[Path], battles: Dataset) -> np.ndarray | None:
    """Return which battles share a group with a run's training battles, (n_runs, n_battles) bool.

    Args:
        runs: run folders.
        battles: with `group` assigned; if one battle of a group was trained on, all of the group count as seen.

    Returns:
        None if a run has no record of what it trained on.
    """
    if not all(RunFolder(run).training_keys.is_file() for run in runs):
        return None
    keys, group = content_keys(battles), np.asarray(battles.with_format(None)["group"][:])
    seen = np.empty((len(runs), len(battles)), bool)
    for number, run in enumerate(runs):
        trained = np.isin(keys, np.load(RunFolder(run).training_keys)).any(axis=1)
        seen[number] = np.isin(group, group[trained])
    return seen
