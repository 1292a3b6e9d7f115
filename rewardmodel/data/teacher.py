"""Add a teacher's predictions to battles, for distillation.

A teacher that trained on a battle's group has seen the answer: its prediction of that battle is refused.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from rewardmodel.battles import (
    OUTCOMES,
    TEACHER_COLUMNS,
    TEXT_COLUMNS,
    count_characters,
    outcomes,
    teacher_probabilities,
    validate,
    with_column,
)
from rewardmodel.errors import InputError, plural
from rewardmodel.predictions import IDENTITY_COLUMNS, SEEN_COLUMN, predicted, read_predictions


def with_teacher(battles: Dataset, path: Path, prefix: str = "") -> Dataset:
    """Return the battles with the teacher's probabilities in `TEACHER_COLUMNS`.

    Args:
        battles: a subset of the battles that the teacher predicted, in any order.
        path: the predictions, a Parquet file written by `rewardmodel predict`.
        prefix: prefix of the ids in `battles` that the predictions do not have.

    Raises:
        InputError: the file cannot be read, has no prediction of a battle, or predicts a battle whose group the teacher
            trained on.
    """
    table = read_predictions(path)
    for name in (*IDENTITY_COLUMNS, SEEN_COLUMN):
        if name not in table:
            raise InputError(
                f"{path}: column '{name}' is missing, but a teacher needs it; write the file with `rewardmodel "
                "predict` and complete run folders"
            )
    ids = pd.Index([name.removeprefix(prefix) for name in battles["id"]])
    if table["id"].duplicated().any():
        raise InputError(f"{path}: id '{table['id'][table['id'].duplicated()].iloc[0]}' occurs twice; keep one")

    # Align the predictions with the battles.
    rows = pd.Index(table["id"]).get_indexer(ids)
    if (rows < 0).any():
        raise InputError(f"{path}: no prediction of battle '{ids[rows < 0][0]}'; predict the whole file again")
    table = table.iloc[rows]

    # Refuse predictions of other texts, and of battles that the teacher trained on.
    changed = (table[list(IDENTITY_COLUMNS[1:])].to_numpy() != _count_characters(battles)).any(axis=1)
    if changed.any():
        raise InputError(
            f"{path}: battle '{ids[changed][0]}': its texts have other lengths than in the predictions; predict this "
            "file with the teacher"
        )
    seen = table[SEEN_COLUMN].to_numpy(bool)
    if seen.any():
        raise InputError(
            f"{path}: the teacher trained on the prompts or responses of {seen.sum()} of {plural(len(seen), 'battle')} "
            f"(column '{SEEN_COLUMN}', first '{ids[seen][0]}'); predict with a k-fold run, which predicts each "
            "battle by the folds that did not train on it"
        )
    for name, values in zip(TEACHER_COLUMNS, predicted(table).T, strict=True):
        battles = with_column(battles, name, values)
    return validate(battles, str(path))


def _count_characters(battles: Dataset) -> np.ndarray:
    """Return the characters of prompt, response A and response B, (n_battles, 3) int64."""
    parts = []
    for batch in battles.with_format("arrow").select_columns(list(TEXT_COLUMNS)).iter(batch_size=1000):
        parts.append(np.stack([count_characters(batch.column(name).combine_chunks()) for name in TEXT_COLUMNS], axis=1))
    return np.concatenate(parts)


def check_teacher(battles: Dataset, objective: str, reads_teacher: bool, share: float | None = None) -> None:
    """Raise unless the objective reads what the training battles have, and they have what it reads.

    Args:
        battles: to train on.
        objective: its name.
        reads_teacher: whether its loss reads a teacher.
        share: as of `with_soft_outcomes`.

    Raises:
        InputError: the objective reads a teacher, but no battle has one; or it does not, but battles have both an
            outcome and a teacher, which would be ignored.
    """
    has_teacher = np.isfinite(teacher_probabilities(battles)).all(axis=1)
    if reads_teacher and not has_teacher.any():
        raise InputError(
            f"objective.name: {objective} learns from a teacher, but no training battle has one; give a source its "
            "predictions, data.train[i].teacher, or use cross_entropy"
        )
    if share is not None:
        return
    unread = has_teacher & np.isfinite(outcomes(battles)).all(axis=1)
    if not reads_teacher and unread.any():
        source = battles[int(unread.argmax())]["source"]
        raise InputError(
            f"data.train: the battles of {source} have outcomes and a teacher, but objective.name {objective} would "
            "ignore the teacher; use distillation or a separate objective, or leave out the teacher of that source"
        )


def teacher_share(weight_votes: float, weight_teacher: float) -> float:
    """Return the share of the teacher in the outcome of a battle that has votes too.

    Raises:
        InputError: both weights are 0.
    """
    if not weight_votes + weight_teacher:
        raise InputError("objective.weight_votes, objective.weight_teacher: both are 0; give one of them a weight")
    return weight_teacher / (weight_votes + weight_teacher)


def with_soft_outcomes(battles: Dataset, share: float | None = None) -> Dataset:
    """Return the battles; those without an outcome get the teacher's probabilities as soft outcomes.

    Args:
        battles: to train on.
        share: of the teacher in the outcome of battles that have both: (1 - share) votes + share teacher, in which the
            cross-entropy is linear; None: their teacher is left alone.
    """
    known, teacher = outcomes(battles), teacher_probabilities(battles)
    unlabelled, taught = np.isnan(known).any(axis=1), np.isfinite(teacher).all(axis=1)
    both = taught & ~unlabelled if share else np.zeros_like(unlabelled)
    if not (unlabelled | both).any():
        return battles
    soft = np.where(unlabelled[:, None], teacher, known)
    if share:
        soft[both] = (1 - share) * known[both] + share * teacher[both]
    for name, values in zip(OUTCOMES, soft.T, strict=True):
        battles = with_column(battles, name, values)
    return battles
