"""Predictions with known outcomes in, metrics of slices of the battles out: by source, script, turns, length."""

import numpy as np
import pandas as pd
from scipy import sparse

from rewardmodel.evaluation.bootstrap import divide, draw_groups, interval_of
from rewardmodel.evaluation.results import Slice
from rewardmodel.metrics import accuracy_terms, class_prior, decided_terms, log_loss, log_loss_terms
from rewardmodel.predictions import predicted, require_outcomes

Partition = tuple[np.ndarray, list[str]]
"""The number of each battle's slice, (n_battles,) int, and the names of the slices: ([0, 0, 1], ["arena", "judge"])."""

LENGTH_COLUMNS = ["response_a_chars", "response_b_chars"]

SIMILAR_LENGTH_RATIO = 1.1
"""Lengths whose ratio is below this differ by less than 10 %."""


def response_lengths(table: pd.DataFrame) -> np.ndarray:
    """Return 1 + the characters of both responses, (n_battles, 2) float64."""
    return 1 + table[LENGTH_COLUMNS].to_numpy(np.float64)


def measure_slices(table: pd.DataFrame, least: int = 30) -> dict[str, list[Slice] | None]:
    """Return metrics by dimension and slice: dimension -> slices, None where the table lacks its column.

    Args:
        table: predictions with known outcomes.
        least: slices of fewer battles, if there are several, become one, `others (their number)`.

    Returns:
        The slices of `outcome` (the likeliest true one), `source`, `script`, `turns`, `length` (of the longer response)
        and `prompt_length` (in characters, quarters of the table) and `length_gap`.

    Raises:
        InputError: no battles, or outcomes that are not known.
    """
    true = require_outcomes(table)
    terms, prior = slice_terms(predicted(table), true), class_prior(true)
    partitions = {name: one and _pool(*one, least) for name, one in _partitions(table, true).items()}

    # the sums of all terms on all slices of all dimensions at once: a column each, 0 outside the slice
    members = [_membership(*one) for one in partitions.values() if one]
    columns = [member.multiply(column[:, None]) for member in members for column in terms.T]
    draws = draw_groups(table["group"].to_numpy())
    sums = draws.sums(sparse.hstack(columns))

    # each dimension takes its columns from the left
    result: dict[str, list[Slice] | None] = {}
    for dimension, partition in partitions.items():
        if partition is None:
            result[dimension] = None
            continue
        codes, names = partition
        here, sums = np.split(sums, [terms.shape[1] * len(names)], axis=1)
        by_slice = here.reshape(len(here), terms.shape[1], len(names))
        result[dimension] = [
            summarise_slice(name, by_slice[:, :, code], true[codes == code], prior, draws.groups_of(codes == code))
            for code, name in enumerate(names)
        ]
    return result


def _membership(codes: np.ndarray, names: list[str]) -> sparse.sparray:
    """Return 1 where a battle is in a slice, (n_battles, n_slices)."""
    return sparse.csr_array((np.ones(len(codes)), codes, np.arange(len(codes) + 1)), (len(codes), len(names)))


def slice_terms(probabilities: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return 1, log loss, hit, hit of a decided battle and decided, (n_battles, 5)."""
    losses, hits = log_loss_terms(probabilities, true), accuracy_terms(probabilities, true)
    return np.column_stack([np.ones(len(true)), losses, hits, decided_terms(probabilities, true)])


def summarise_slice(name: str, sums: np.ndarray, true: np.ndarray, prior_all: np.ndarray, groups: int) -> Slice:
    """Return the metrics of a slice.

    Args:
        name: of the slice.
        sums: of `slice_terms` over its battles, (1 + samples, 5).
        true: their outcomes, (n, 3).
        prior_all: outcome shares of all battles, (3,).
        groups: how many prompt groups its battles are of.
    """
    battles, loss, hits, decided_hits, decided = sums.T
    return Slice(
        name=name,
        battles=len(true),
        log_loss=interval_of(divide(loss, battles), groups),
        accuracy=interval_of(divide(hits, battles), groups),
        accuracy_decided=interval_of(divide(decided_hits, decided), groups) if decided[0] else None,
        prior=constant_log_loss(class_prior(true), true),
        prior_all=constant_log_loss(prior_all, true),
    )


def constant_log_loss(shares: np.ndarray, true: np.ndarray) -> float:
    """Return the log loss of predicting the same outcome shares, (3,), for every battle of (n_battles, 3) outcomes."""
    return log_loss(np.broadcast_to(shares, true.shape), true)


def _partitions(table: pd.DataFrame, true: np.ndarray) -> dict[str, Partition | None]:
    """Return the partition of each dimension, None where the table lacks its column."""
    dimensions = ("outcome", "source", "script", "turns", "length", "length_gap", "prompt_length")
    found: dict[str, Partition | None] = dict.fromkeys(dimensions)
    found["outcome"] = np.where(true[:, 0] == true[:, 1], 2, true.argmax(axis=1)), ["A", "B", "tie"]
    found |= {name: _by_value(table[name]) for name in ("source", "script") if name in table}
    if "turns" in table:
        found["turns"] = np.clip(table["turns"].to_numpy(int), 1, 3) - 1, ["1", "2", "3+"]
    if set(LENGTH_COLUMNS) <= set(table):
        longer, shorter = response_lengths(table).max(axis=1), response_lengths(table).min(axis=1)
        gap = np.select([longer / shorter < SIMILAR_LENGTH_RATIO, longer / shorter <= 2], [0, 1], 2)
        found["length"] = _quarters(longer.astype(int) - 1)
        found["length_gap"] = gap, ["within 10 %", "up to 2x", "above 2x"]
    if "prompt_chars" in table:
        found["prompt_length"] = _quarters(table["prompt_chars"].to_numpy(int))
    return found


def _by_value(column: pd.Series) -> Partition | None:
    """Return the slices of a column's values, the most frequent first; None where all are empty."""
    names, codes, counts = np.unique(column.fillna("").to_numpy(str), return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    named = [str(names[code]) or "unknown" for code in order]
    return None if named == ["unknown"] else (np.argsort(order)[codes], named)


def _quarters(values: np.ndarray) -> Partition:
    """Return slices of equally many battles, named by their range, e.g. ["0-100", "101-200", "201-300", "301-400"]."""
    ends = np.unique([*np.quantile(values, [0.25, 0.5, 0.75], method="lower"), values.max()])
    starts = [0, *(ends[:-1] + 1)]
    return np.searchsorted(ends, values), [f"{start}-{end}" for start, end in zip(starts, ends, strict=True)]


def _pool(codes: np.ndarray, names: list[str], least: int) -> Partition:
    """Return the partition without empty slices, those of fewer than `least` battles merged if there are several."""
    counts = np.bincount(codes, minlength=len(names))
    large, small = np.flatnonzero(counts >= least), np.flatnonzero((counts > 0) & (counts < least))
    if len(small) == 1:
        large, small = np.flatnonzero(counts > 0), small[:0]
    new_code = np.full(len(names), len(large))
    new_code[large] = np.arange(len(large))
    return new_code[codes], [names[code] for code in large] + [f"others ({len(small)})"] * (len(small) > 0)
