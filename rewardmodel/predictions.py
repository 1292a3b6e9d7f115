"""The predictions table: probabilities of both orders and their mean in, a parquet file and submission.csv out.

Columns, one battle a row, in the order of the battles: `id`, `group`, the true outcomes (null where unknown),
`p_model_a, p_model_b, p_tie` (what is predicted), and the same of each order that was computed: `ab_*` as given,
`ba_*` with the responses exchanged; all of them speak of the battle's own A and B.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from rewardmodel.battles import OUTCOMES, outcomes
from rewardmodel.errors import InputError
from rewardmodel.files import atomic_path

PROBABILITIES = ("p_model_a", "p_model_b", "p_tie")
"""Predicted probabilities, in the order of `OUTCOMES`."""


def predictions_table(battles: Dataset, as_given: np.ndarray, exchanged: np.ndarray | None) -> pd.DataFrame:
    """Return the predictions table.

    Args:
        battles: the battles, n_battles.
        as_given: (n_battles, 3) float: A, B, tie with the responses in the order given.
        exchanged: the same computed from swapped battles and swapped back; or None.
    """
    orders = {"ab": as_given} if exchanged is None else {"ab": as_given, "ba": exchanged}
    columns: dict[str, np.ndarray] = {name: np.asarray(battles.with_format(None)[name][:]) for name in ("id", "group")}
    columns |= dict(zip(OUTCOMES, outcomes(battles).T, strict=True))
    columns |= dict(zip(PROBABILITIES, average(list(orders.values())).T, strict=True))
    for order, probabilities in orders.items():
        columns |= {f"{order}_{name}": p for name, p in zip(PROBABILITIES, probabilities.T, strict=True)}
    return pd.DataFrame(columns)


def average(probabilities: list[np.ndarray]) -> np.ndarray:
    """Return the mean of several (n_battles, 3) arrays as float64 rows that sum to 1."""
    mean = np.mean([array.astype(np.float64) for array in probabilities], axis=0)
    return mean / mean.sum(axis=1, keepdims=True)


def predicted(table: pd.DataFrame, order: str = "") -> np.ndarray:
    """Return the predicted probabilities, (n_battles, 3) float64; `order` `ab` or `ba` gives that order's alone."""
    prefix = f"{order}_" if order else ""
    return table[[prefix + name for name in PROBABILITIES]].to_numpy(np.float64)


def true_outcomes(table: pd.DataFrame) -> np.ndarray:
    """Return the true outcomes, (n_battles, 3) float64; NaN where unknown."""
    return table[list(OUTCOMES)].to_numpy(np.float64)


def write_predictions(table: pd.DataFrame, path: Path) -> None:
    """Write the table as parquet, whole or not at all."""
    with atomic_path(path) as partial:
        table.to_parquet(partial, index=False)


def read_predictions(path: Path) -> pd.DataFrame:
    """Return a predictions table.

    Raises:
        InputError: no such file, or not such a table.
    """
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no predictions can be read there; give a predictions.parquet of a run") from error
    missing = [name for name in ("id", "group", *OUTCOMES, *PROBABILITIES) if name not in table]
    if missing:
        raise InputError(f"{path}: column '{missing[0]}' is missing; give a predictions.parquet of a run")
    return table


def write_submission(table: pd.DataFrame, path: Path) -> None:
    """Write submission.csv: `id` and the three outcome columns, in the table's order, rows summing to 1.

    Args:
        table: predictions.
        path: the file to write, whole or not at all.
    """
    submission = pd.DataFrame(predicted(table), columns=list(OUTCOMES))
    submission.insert(0, "id", table["id"].to_numpy())
    with atomic_path(path) as partial:
        submission.to_csv(partial, index=False, lineterminator="\n")


def check_sample(sample: Path, ids: Iterable[str]) -> None:
    """Raise unless a sample submission has the columns of a submission and these ids.

    Raises:
        InputError: it cannot be read, has other columns, or other ids.
    """
    try:
        expected = pd.read_csv(sample, dtype={"id": "str"}, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{sample}: no sample submission can be read there; give a CSV file") from error
    columns = ["id", *OUTCOMES]
    if list(expected.columns) != columns:
        raise InputError(f"{sample}: columns {list(expected.columns)}, but a submission has {columns}")
    here, there = set(ids), set(expected["id"])
    if here != there:
        name = sorted(here ^ there)[0]
        side = "is not among the battles to predict" if name in there else "is to be predicted, but is not there"
        raise InputError(f"{sample}: id '{name}' {side}; give the sample submission of the same test file")
