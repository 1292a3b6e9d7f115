"""A teacher's predictions and the battles that they are of in, battles that carry its probabilities out.

A teacher that trained on a battle's group knows the answer: its predictions of that battle are refused.
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
from rewardmodel.errors import InputError
from rewardmodel.predictions import IDENTITY_COLUMNS, SEEN_COLUMN, predicted, read_predictions


def with_teacher(battles: Dataset, path: Path, prefix: str = "") -> Dataset:
    """Return the battles with the probabilities that a teacher's predictions state.

    Args:
        battles: what the teacher predicted, in any order.
        path: the predictions, a parquet file of `rewardmodel predict`.
        prefix: of the battles' ids, which those of the predictions do not have.

    Raises:
        InputError: no predictions, a battle that is not among them, or one whose group the teacher trained on.
    """
    table = read_predictions(path)
    for name in (*IDENTITY_COLUMNS, SEEN_COLUMN):
        if name not in table:
            raise InputError(
                f"{path}: column '{name}' is missing, which a teacher needs; predict with `rewardmodel predict` and "
                "whole run folders"
            )
    ids = pd.Index([name.removeprefix(prefix) for name in battles["id"]])
    if table["id"].duplicated().any():
        raise InputError(f"{path}: id '{table['id'][table['id'].duplicated()].iloc[0]}' occurs twice; keep one")
    place = pd.Index(table["id"]).get_indexer(ids)
    if (place < 0).any():
        raise InputError(f"{path}: no prediction of battle '{ids[place < 0][0]}'; predict the whole file again")
    table = table.iloc[place]
    other = (table[list(IDENTITY_COLUMNS[1:])].to_numpy() != _characters(battles)).any(axis=1)
    if other.any():
        raise InputError(
            f"{path}: battle '{ids[other][0]}' there has texts of other lengths; predict this file with the teacher"
        )
    if (seen := table[SEEN_COLUMN].to_numpy(bool)).any():
        raise InputError(
            f"{path}: the teacher trained on the prompts or responses of {seen.sum()} of {len(seen)} battles (column "
            f"'{SEEN_COLUMN}', first '{ids[seen][0]}'); predict with the k-fold run, each battle by folds that did not "
            "see it"
        )
    for name, values in zip(TEACHER_COLUMNS, predicted(table).T, strict=True):
        battles = with_column(battles, name, values)
    return validate(battles, str(path))


def _characters(battles: Dataset) -> np.ndarray:
    """Return the characters of prompt, A and B, (n_battles, 3) int64."""
    parts = []
    for batch in battles.with_format("arrow").select_columns(list(TEXT_COLUMNS)).iter(batch_size=1000):
        parts.append(np.stack([count_characters(batch.column(name).combine_chunks()) for name in TEXT_COLUMNS], axis=1))
    return np.concatenate(parts)


def check_teacher(battles: Dataset, objective: str, reads_teacher: bool) -> None:
    """Raise unless the training battles have what their objective learns from, and nothing that it leaves unread.

    Raises:
        InputError: an objective that reads a teacher, and no battle has one; or another, and labelled battles have.
    """
    has_teacher = np.isfinite(teacher_probabilities(battles)).all(axis=1)
    if reads_teacher and not has_teacher.any():
        raise InputError(
            f"objective.name: {objective} learns from a teacher, but no training battle has one; give a source its "
            "predictions, data.train[i].teacher, or use cross_entropy"
        )
    unread = has_teacher & np.isfinite(outcomes(battles)).all(axis=1)
    if not reads_teacher and unread.any():
        source = battles[int(unread.argmax())]["source"]
        raise InputError(
            f"data.train: the battles of {source} have outcomes and a teacher, but objective.name {objective} reads no "
            "teacher of battles that have outcomes; use distillation, or leave out the teacher of that source"
        )


def with_soft_outcomes(battles: Dataset) -> Dataset:
    """Return the battles, those without an outcome with the teacher's probabilities for one."""
    known, teacher = outcomes(battles), teacher_probabilities(battles)
    alone = np.isnan(known).any(axis=1)
    if not alone.any():
        return battles
    for name, values, soft in zip(OUTCOMES, known.T, teacher.T, strict=True):
        battles = with_column(battles, name, np.where(alone, soft, values))
    return battles
