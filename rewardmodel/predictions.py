"""The predictions table: probabilities of both orders and their mean in, a parquet file and submission.csv out.

Columns, one battle a row, in the order of the battles: `id`, `group`, `source`, `model_a`, `model_b`, the true outcomes
(null where unknown), `p_model_a, p_model_b, p_tie` (what is predicted), the same of each order that was computed:
`ab_*` as given, `ba_*` with the responses exchanged (all of them speak of the battle's own A and B; NaN where the time
was up), `floor_*` by the floor that a run blends with (where it was asked), and what audits ask of the texts: `turns`,
`script`, and `prompt_chars`, `response_a_chars`, `response_b_chars`. Labelled battles also have the beginnings of their
texts, for people to read.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from datasets import Dataset

from rewardmodel.battles import OUTCOMES, SCRIPTS, TEXT_COLUMNS, count_characters, detect_scripts, is_labelled, outcomes
from rewardmodel.errors import InputError
from rewardmodel.files import atomic_path

logger = logging.getLogger(__name__)

PROBABILITIES = ("p_model_a", "p_model_b", "p_tie")
"""Predicted probabilities, in the order of `OUTCOMES`."""

IDENTITY_COLUMNS = ("id", "prompt_chars", "response_a_chars", "response_b_chars")
"""Columns by which a battle is known again; ids alone may be row numbers."""

SEEN_COLUMN = "seen"
"""Column that says whether the runs that predicted a battle had its group in training, where that is known."""

MODELS = ("model_a", "model_b")

EXCERPT = 1_500
"""Characters of a text that the table keeps of labelled battles."""


def build_predictions(battles: Dataset, as_given: np.ndarray, exchanged: np.ndarray | None = None) -> pd.DataFrame:
    """Return the predictions table.

    Args:
        battles: the battles, n_battles.
        as_given: (n_battles, 3) float: A, B, tie with the responses in the order given.
        exchanged: the same computed from swapped battles and swapped back, NaN where it was not; or None.
    """
    orders = {"ab": as_given} if exchanged is None else {"ab": as_given, "ba": exchanged}
    stated = average_probabilities(list(orders.values()))
    stated = np.where(np.isnan(stated), average_probabilities([as_given]), stated)
    plain = battles.with_format(None)
    columns: dict[str, Any] = {name: np.asarray(plain[name][:]) for name in ("id", "group", "source", *MODELS)}
    columns |= dict(zip(OUTCOMES, outcomes(battles).T, strict=True))
    columns |= dict(zip(PROBABILITIES, stated.T, strict=True))
    for order, probabilities in orders.items():
        columns |= {f"{order}_{name}": p for name, p in zip(PROBABILITIES, probabilities.T, strict=True)}
    return pd.DataFrame(columns | _text_columns(battles))


def _text_columns(battles: Dataset) -> dict[str, Any]:
    found: dict[str, list] = defaultdict(list)
    shown = is_labelled(battles)
    for table in battles.with_format("arrow").select_columns(list(TEXT_COLUMNS)).iter(batch_size=1000):
        for name in TEXT_COLUMNS:
            column = table.column(name).combine_chunks()
            found[f"{name}_chars"].append(count_characters(column))
            if name == "prompt":
                found["turns"].append(pc.list_value_length(column).to_numpy())
                found["script"].append(np.array(SCRIPTS)[detect_scripts(column)])
            if shown:
                begun = pc.utf8_slice_codeunits(pc.binary_join(column, "\n\n"), 0, EXCERPT)
                found[name].append(begun.to_numpy(zero_copy_only=False))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def average_tables(tables: Sequence[pd.DataFrame], weights: Sequence[float]) -> pd.DataFrame:
    """Return the weighted mean of predictions of the same battles, one row a battle.

    Args:
        tables: predictions whose index is the battle's number; each of all battles, or of some.
        weights: of each table, above 0; a battle's mean is over the tables that it is in.

    Returns:
        The table, by the battle's number; of an order (`ab_*`, `ba_*`) only where all tables have it, and NaN for
        battles that it is NaN for in one of theirs.
    """
    if len(tables) == 1:
        return tables[0]
    kept = [name for name in tables[0] if all(name in table for table in tables)]
    names = [name for name in kept if str(name).endswith(PROBABILITIES)]
    stacked = pd.concat([table[kept] for table in tables])
    share = pd.Series(np.repeat(weights, [len(table) for table in tables]).astype(np.float64), stacked.index)
    sums = stacked[names].astype(np.float64).mul(share, axis=0).groupby(level=0).sum()
    result = stacked[~stacked.index.duplicated()].sort_index()
    means = sums.div(share.groupby(level=0).sum(), axis=0)
    return result.assign(**means.mask(stacked[names].isna().groupby(level=0).any()))


def average_probabilities(probabilities: list[np.ndarray]) -> np.ndarray:
    """Return the mean of several (n_battles, 3) arrays as float64 rows that sum to 1."""
    mean = np.mean([array.astype(np.float64) for array in probabilities], axis=0)
    return mean / mean.sum(axis=1, keepdims=True)


def with_baseline(table: pd.DataFrame, probabilities: np.ndarray) -> pd.DataFrame:
    """Return predictions with a floor's of the same battles, (n_battles, 3), beside, as `floor_*`."""
    return table.assign(**{f"floor_{name}": p for name, p in zip(PROBABILITIES, probabilities.T, strict=True)})


def stack_baseline(table: pd.DataFrame) -> np.ndarray:
    """Return what is predicted, and beside it what the floor predicts, (n_battles, 6) float64."""
    return np.hstack([predicted(table), predicted(table, "floor")])


def has_both_orders(table: pd.DataFrame) -> np.ndarray:
    """Return which battles were predicted in both orders, (n_battles,) bool."""
    return table["ba_p_tie"].notna().to_numpy() if "ba_p_tie" in table else np.zeros(len(table), bool)


def rule_probabilities(battles: Dataset, tie_if_same: float | None, win_if_other_empty: float | None) -> np.ndarray:
    """Return the probabilities that rules give without a model, (n_battles, 3) float64; NaN where no rule speaks.

    Args:
        battles: the battles; white space at the ends of turns does not count.
        tie_if_same: P(tie) where both responses are the same, or both empty; A and B share the rest.
        win_if_other_empty: P(win) of a response beside one without text; that one and the tie share the rest.
    """
    result = np.full((len(battles), 3), np.nan)
    if tie_if_same is None and win_if_other_empty is None:
        return result
    texts = zip(*(battles.with_format(None)[name][:] for name in ("response_a", "response_b")), strict=True)
    for row, responses in enumerate(texts):
        a, b = ([turn.strip() for turn in turns] for turns in responses)
        if a == b or not (any(a) or any(b)):
            likely, chance = 2, tie_if_same
        elif any(a) and any(b):
            continue
        else:
            likely, chance = 0 if any(a) else 1, win_if_other_empty
        if chance is not None:
            result[row] = (1 - chance) / 2
            result[row, likely] = chance
    return result


def apply_rules(table: pd.DataFrame, probabilities: np.ndarray) -> pd.DataFrame:
    """Return predictions with what `rule_probabilities` gives in the place of what is stated in the end."""
    rows = ~np.isnan(probabilities[:, 0])
    if rows.any():
        logger.info("%d of %d battles are predicted by rule: same or empty responses", rows.sum(), len(table))
        table.loc[rows, list(PROBABILITIES)] = probabilities[rows]
    return table


def predicted(table: pd.DataFrame, order: str = "") -> np.ndarray:
    """Return the predicted probabilities, (n_battles, 3) float64; `order` `ab`, `ba` or `floor` gives those alone."""
    prefix = f"{order}_" if order else ""
    return table[[prefix + name for name in PROBABILITIES]].to_numpy(np.float64)


def true_outcomes(table: pd.DataFrame) -> np.ndarray:
    """Return the true outcomes, (n_battles, 3) float64; NaN where unknown."""
    return table[list(OUTCOMES)].to_numpy(np.float64)


def require_outcomes(table: pd.DataFrame, where: str = "predictions") -> np.ndarray:
    """Return the true outcomes, (n_battles, 3) float64.

    Raises:
        InputError: there are none, or they are not known.
    """
    true = true_outcomes(table)
    if not len(true) or np.isnan(true).any():
        raise InputError(f"{where}: the outcomes of these battles are not known; give predictions of labelled battles")
    return true


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
    return check_columns(table, str(path))


def check_columns(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return a predictions table, or raise InputError if a column that every one has is missing."""
    missing = [name for name in ("id", "group", *OUTCOMES, *PROBABILITIES) if name not in table]
    if missing:
        raise InputError(f"{where}: column '{missing[0]}' is missing; give a predictions.parquet of a run")
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
    twice = expected["id"][expected["id"].duplicated()]
    if len(twice):
        raise InputError(f"{sample}: id '{twice.iloc[0]}' is there twice; keep one of them")
    if here != there:
        name = sorted(here ^ there)[0]
        side = "is not among the battles to predict" if name in there else "is to be predicted, but is not there"
        raise InputError(f"{sample}: id '{name}' {side}; give the sample submission of the same test file")
