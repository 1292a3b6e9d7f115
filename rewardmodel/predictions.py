"""The predictions table: one row per battle, in the order of the battles, as a DataFrame and a Parquet file.

Columns:
    id, group, source, model_a, model_b: of the battle.
    winner_model_a, winner_model_b, winner_tie: the true outcome, null where unknown.
    p_model_a, p_model_b, p_tie: the prediction.
    ab_p_model_a, ...: the same with the responses in the given order; ba_p_model_a, ...: with A and B exchanged, and
        the result exchanged back; NaN for battles that the time limit left out.
    reward_a, reward_b: of the responses, where the objective scores each of them alone.
    baseline_p_model_a, ...: predicted by the baseline that the run blends with, if it blends.
    turns, script, prompt_chars, response_a_chars, response_b_chars: for the audits of bias.
    prompt, response_a, response_b: the first characters of the texts, in tables of labelled battles, for the report.
    seen: whether the battle's group was in the training data, where that is known.
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
"""Columns of the prediction, in the order of `OUTCOMES`."""

REWARDS = ("reward_a", "reward_b")
"""Columns of the responses' rewards."""

IDENTITY_COLUMNS = ("id", "prompt_chars", "response_a_chars", "response_b_chars")
"""Columns that identify a battle across tables; an id alone may be just a row number."""

SEEN_COLUMN = "seen"
"""Column that says whether the battle's group was in the training data of a run that predicted it."""

_EXCERPT_CHARS = 1_500
"""Characters of each text that the table of labelled battles keeps."""


def build_predictions(
    battles: Dataset, as_given: np.ndarray, exchanged: np.ndarray | None = None, rewards: np.ndarray | None = None
) -> pd.DataFrame:
    """Return the predictions table of some battles.

    Args:
        battles: n_battles rows.
        as_given: (n_battles, 3) float: A, B, tie, predicted with the responses in the given order.
        exchanged: the same predicted from swapped battles and swapped back, NaN where it was not computed; default:
            only the given order was.
        rewards: (n_battles, 2) float of response A and response B; default: the objective has none.
    """
    plain = battles.with_format(None)
    names = ("id", "group", "source", "model_a", "model_b")
    columns: dict[str, Any] = {name: np.asarray(plain[name][:]) for name in names}
    columns |= dict(zip(OUTCOMES, outcomes(battles).T, strict=True))
    columns |= average_orders(as_given, exchanged)
    if rewards is not None:
        columns |= dict(zip(REWARDS, rewards.T, strict=True))
    return pd.DataFrame(columns | _text_columns(battles))


def average_orders(as_given: np.ndarray, exchanged: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return the prediction, the mean of both orders, and each order's, (n_battles,) by column of the table.

    Arguments are those of `build_predictions`.
    """
    orders = {"ab": as_given} if exchanged is None else {"ab": as_given, "ba": exchanged}
    mean = average_probabilities(list(orders.values()))
    mean = np.where(np.isnan(mean), average_probabilities([as_given]), mean)
    columns = dict(zip(PROBABILITIES, mean.T, strict=True))
    for order, probabilities in orders.items():
        columns |= {f"{order}_{name}": p for name, p in zip(PROBABILITIES, probabilities.T, strict=True)}
    return columns


def _text_columns(battles: Dataset) -> dict[str, Any]:
    """Return the text statistics by column, each (n_battles,), and excerpts of the texts of labelled battles."""
    found: dict[str, list] = defaultdict(list)
    with_excerpts = is_labelled(battles)
    for table in battles.with_format("arrow").select_columns(list(TEXT_COLUMNS)).iter(batch_size=1000):
        for name in TEXT_COLUMNS:
            column = table.column(name).combine_chunks()
            found[f"{name}_chars"].append(count_characters(column))
            if name == "prompt":
                found["turns"].append(pc.list_value_length(column).to_numpy())
                found["script"].append(np.array(SCRIPTS)[detect_scripts(column)])
            if with_excerpts:
                excerpt = pc.utf8_slice_codeunits(pc.binary_join(column, "\n\n"), 0, _EXCERPT_CHARS)
                found[name].append(excerpt.to_numpy(zero_copy_only=False))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def average_tables(tables: Sequence[pd.DataFrame], weights: Sequence[float]) -> pd.DataFrame:
    """Return the weighted mean of several models' predictions, one row per battle.

    Args:
        tables: each indexed by battle number; a table may hold all battles or some of them (k-fold runs).
        weights: of each table, above 0; the mean of a battle is over the tables that contain it.

    Returns:
        A table indexed by battle number. Columns of an order (`ab_*`, `ba_*`) and rewards are there only if all tables
        have them, and are NaN for battles that are NaN in one of their tables.
    """
    if len(tables) == 1:
        return tables[0]
    kept = [name for name in tables[0] if all(name in table for table in tables)]
    names = [name for name in kept if str(name).endswith((*PROBABILITIES, *REWARDS))]

    # every table's rows, one after the other, each with its weight; then sums by battle number
    stacked = pd.concat([table[kept] for table in tables])
    share = pd.Series(np.repeat(weights, [len(table) for table in tables]).astype(np.float64), stacked.index)
    sums = stacked[names].astype(np.float64).mul(share, axis=0).groupby(level=0).sum()
    result = stacked[~stacked.index.duplicated()].sort_index()
    means = sums.div(share.groupby(level=0).sum(), axis=0)
    return result.assign(**means.mask(stacked[names].isna().groupby(level=0).any()))


def average_probabilities(probabilities: list[np.ndarray]) -> np.ndarray:
    """Return the mean of several (n_battles, 3) arrays of probabilities, float64, rows normalised to sum 1."""
    mean = np.mean([array.astype(np.float64) for array in probabilities], axis=0)
    return mean / mean.sum(axis=1, keepdims=True)


def with_baseline(table: pd.DataFrame, probabilities: np.ndarray) -> pd.DataFrame:
    """Return the table with a baseline's probabilities of the same battles, (n_battles, 3), added as `baseline_*`."""
    return table.assign(**{f"baseline_{name}": p for name, p in zip(PROBABILITIES, probabilities.T, strict=True)})


def stack_baseline(table: pd.DataFrame) -> np.ndarray:
    """Return the predictions and the baseline's, (n_battles, 6) float64: A, B, tie of each; the inputs of a blend."""
    return np.hstack([predicted(table), predicted(table, "baseline")])


def has_both_orders(table: pd.DataFrame) -> np.ndarray:
    """Return which battles were predicted in both orders, (n_battles,) bool."""
    return table["ba_p_tie"].notna().to_numpy() if "ba_p_tie" in table else np.zeros(len(table), bool)


def rule_probabilities(battles: Dataset, tie_if_same: float | None, win_if_other_empty: float | None) -> np.ndarray:
    """Return the probabilities that rules assign without a model, (n_battles, 3) float64; NaN where no rule applies.

    Args:
        battles: n_battles rows; leading and trailing white space of turns is ignored.
        tie_if_same: P(tie) if both responses are equal or both empty, A and B share the rest; None: no such rule.
        win_if_other_empty: P(win) of the response with text if the other has none, that one and the tie share the
            rest; None: no such rule.
    """
    if tie_if_same is None and win_if_other_empty is None:
        return np.full((len(battles), 3), np.nan)
    pairs = list(zip(*(battles.with_format(None)[name][:] for name in ("response_a", "response_b")), strict=True))
    return pair_rules(pairs, tie_if_same, win_if_other_empty)


def pair_rules(
    pairs: Sequence[tuple[list[str], list[str]]], tie_if_same: float | None, win_if_other_empty: float | None
) -> np.ndarray:
    """Return what `rule_probabilities` returns for the turns of both responses of each battle."""
    result = np.full((len(pairs), 3), np.nan)
    for row, responses in enumerate(pairs):
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
    """Return a copy of the table whose predictions are replaced where a rule applies.

    Args:
        table: n_battles rows.
        probabilities: (n_battles, 3), what `rule_probabilities` returned.
    """
    rows = ~np.isnan(probabilities[:, 0])
    if rows.any():
        logger.info("%d of %d battles are predicted by a rule: equal or empty responses", rows.sum(), len(table))
        table = table.copy()
        table.loc[rows, list(PROBABILITIES)] = probabilities[rows]
    return table


def predicted(table: pd.DataFrame, order: str = "") -> np.ndarray:
    """Return predicted probabilities, (n_battles, 3) float64: A, B, tie.

    Args:
        table: the predictions table.
        order: prefix of the columns: `ab` or `ba` for one order, `baseline` for the baseline; default: the prediction.
    """
    prefix = f"{order}_" if order else ""
    return table[[prefix + name for name in PROBABILITIES]].to_numpy(np.float64)


def true_outcomes(table: pd.DataFrame) -> np.ndarray:
    """Return the true outcomes, (n_battles, 3) float64: A, B, tie; NaN where unknown."""
    return table[list(OUTCOMES)].to_numpy(np.float64)


def require_outcomes(table: pd.DataFrame, where: str = "predictions") -> np.ndarray:
    """Return the true outcomes, (n_battles, 3) float64: A, B, tie.

    Raises:
        InputError: the table is empty, or an outcome is unknown; `where` names the table in the message.
    """
    true = true_outcomes(table)
    if not len(true) or np.isnan(true).any():
        raise InputError(f"{where}: the outcomes of these battles are not known; give predictions of labelled battles")
    return true


def write_predictions(table: pd.DataFrame, path: Path) -> None:
    """Write the table as a Parquet file, atomically."""
    with atomic_path(path) as partial:
        table.to_parquet(partial, index=False)


def read_predictions(path: Path) -> pd.DataFrame:
    """Return the predictions table of a Parquet file; columns `floor_*` of earlier releases become `baseline_*`.

    Raises:
        InputError: there is no such file, it cannot be read, or a column is missing.
    """
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as predictions; give a predictions.parquet of a run") from error
    table = table.rename(columns={f"floor_{name}": f"baseline_{name}" for name in PROBABILITIES})
    return check_columns(table, str(path))


def check_columns(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the table, or raise InputError if a column that every predictions table has is missing."""
    missing = [name for name in ("id", "group", *OUTCOMES, *PROBABILITIES) if name not in table]
    if missing:
        raise InputError(f"{where}: column '{missing[0]}' is missing; give a predictions.parquet of a run")
    return table


def write_submission(
    table: pd.DataFrame, path: Path, labels: Sequence[str] | None = None, tossed: bool = False
) -> None:
    """Write a submission as CSV, atomically: `id` and the three outcome columns, in the order of the table.

    Args:
        table: predictions.
        path: to write.
        labels: write a column `winner` instead, with the likeliest of these: `("model_a", "model_b")`.
        tossed: whether a coin decided which response is A: a column `chosen` then says which one the data prefers
            (model_a, model_b or tie), and `p_chosen` how likely the prediction says that is; empty where unknown.
    """
    shares = predicted(table)
    submission = pd.DataFrame(shares, columns=list(OUTCOMES))
    if labels is not None:
        columns = [_LABELS.index(label) for label in labels]
        submission = pd.DataFrame({"winner": np.array(labels)[shares[:, columns].argmax(axis=1)]})
    submission.insert(0, "id", table["id"].to_numpy())
    if tossed:
        true = true_outcomes(table)
        known = ~np.isnan(true).any(axis=1)
        likeliest = np.nan_to_num(true).argmax(axis=1)
        submission["chosen"] = np.where(known, np.array(_LABELS)[likeliest], "")
        submission["p_chosen"] = np.where(known, shares[np.arange(len(shares)), likeliest], np.nan)
    with atomic_path(path) as partial:
        submission.to_csv(partial, index=False, lineterminator="\n")


_LABELS = ("model_a", "model_b", "tie")
"""Names of the outcomes, in the order of `OUTCOMES`."""


def _read_sample(sample: Path) -> pd.DataFrame:
    try:
        expected = pd.read_csv(sample, dtype={"id": "str", "winner": "str"}, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{sample}: cannot be read as a sample submission; give a CSV file") from error
    kinds = [["id", *OUTCOMES], ["id", "winner"]]
    if list(expected.columns) not in kinds:
        raise InputError(
            f"{sample}: columns {list(expected.columns)}, but a submission has {kinds[0]} or {kinds[1]}; rename or "
            "remove columns"
        )
    return expected


def read_labels(sample: Path) -> tuple[str, ...] | None:
    """Return what the column `winner` of a sample submission may hold; None: it has probabilities.

    A tie is one of the labels only if the sample has one, because competitions without ties have this kind.

    Raises:
        InputError: it cannot be read, or has other columns or labels.
    """
    expected = _read_sample(sample)
    if "winner" not in expected:
        return None
    found = set(expected["winner"]) - {""}
    if unknown := sorted(found - {*_LABELS}):
        raise InputError(
            f"{sample}: winner '{unknown[0]}' is not one of {', '.join(_LABELS)}; give the original sample"
        )
    return _LABELS if "tie" in found else _LABELS[:2]


def check_sample(sample: Path, ids: Iterable[str]) -> None:
    """Raise unless a sample submission has the columns of a submission and exactly these ids.

    Raises:
        InputError: it cannot be read, or its columns, labels or ids differ.
    """
    expected = _read_sample(sample)
    read_labels(sample)
    here, there = set(ids), set(expected["id"])
    twice = expected["id"][expected["id"].duplicated()]
    if len(twice):
        raise InputError(f"{sample}: id '{twice.iloc[0]}' occurs twice; keep one of them")
    if here != there:
        name = sorted(here ^ there)[0]
        side = "is not among the battles to predict" if name in there else "is missing, but is to be predicted"
        raise InputError(f"{sample}: id '{name}' {side}; give the sample submission of the same test file")
