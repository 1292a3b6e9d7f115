"""Predictions with known outcomes in, how good they are on kinds of battles out: sources, scripts, lengths."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from rewardmodel.evaluation.bootstrap import draw_groups, figure, ratio
from rewardmodel.metrics import accuracy_terms, class_prior, decided_terms, log_loss, log_loss_terms
from rewardmodel.predictions import predicted, require_outcomes

Facts = dict[str, Any]

Kind = tuple[np.ndarray, list[str]]
"""The number of each battle's slice, (n_battles,) int, and the names of the slices."""

LENGTHS = ["response_a_chars", "response_b_chars"]

CLOSE = 1.1
"""Lengths whose ratio is below this are within 10 %."""


def lengths(table: pd.DataFrame) -> np.ndarray:
    """Return 1 + the characters of both responses, (n_battles, 2) float64."""
    return 1 + table[LENGTHS].to_numpy(np.float64)


def slices(table: pd.DataFrame, least: int = 30) -> Facts:
    """Return how good predictions are on kinds of battles: dimension -> list of slices, None where it is not known.

    Args:
        table: predictions with known outcomes.
        least: slices of fewer battles become one, `others (their number)`.

    Returns:
        For `outcome` (the likeliest true one), `source`, `script`, `turns`, `length` (of the longer response) and
        `prompt_length` (in characters, quarters of the table) and `length_gap`: `name`, `battles`, `log_loss` and
        `accuracy` {value, low, high}, `accuracy_decided` (or None), `prior`: log loss of the slice's own outcome
        shares, `prior_all`: that of the whole table's shares on the slice.
    """
    true = require_outcomes(table)
    terms, prior = slice_terms(predicted(table), true), class_prior(true)
    kinds = {name: kind and _pooled(*kind, least) for name, kind in _kinds(table, true).items()}
    members = [_membership(*kind) for kind in kinds.values() if kind]
    columns = [member.multiply(column[:, None]) for member in members for column in terms.T]
    sums = draw_groups(table["group"].to_numpy()).sums(sparse.hstack(columns))
    result: Facts = {}
    for dimension, kind in kinds.items():
        if kind is None:
            result[dimension] = None
            continue
        codes, names = kind
        here, sums = np.split(sums, [terms.shape[1] * len(names)], axis=1)
        by_slice = here.reshape(len(here), terms.shape[1], len(names))
        inside = [true[codes == code] for code in range(len(names))]
        result[dimension] = [
            {"name": name, **slice_figures(by_slice[:, :, code], rows), "prior_all": _constant(prior, rows)}
            for code, (name, rows) in enumerate(zip(names, inside, strict=True))
        ]
    return result


def _membership(codes: np.ndarray, names: list[str]) -> sparse.sparray:
    """Return 1 where a battle is in a slice, (n_battles, n_slices)."""
    return sparse.csr_array((np.ones(len(codes)), codes, np.arange(len(codes) + 1)), (len(codes), len(names)))


def slice_terms(probabilities: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return 1, log loss, hit, hit of a decided battle and decided, (n_battles, 5)."""
    losses, hits = log_loss_terms(probabilities, true), accuracy_terms(probabilities, true)
    return np.column_stack([np.ones(len(true)), losses, hits, decided_terms(probabilities, true)])


def slice_figures(sums: np.ndarray, true: np.ndarray) -> Facts:
    """Return the figures of some battles from the sums of `slice_terms` over them, (1 + samples, 5), and outcomes."""
    battles, loss, hits, decided_hits, decided = sums.T
    return {
        "battles": len(true),
        "log_loss": figure(ratio(loss, battles)),
        "accuracy": figure(ratio(hits, battles)),
        "accuracy_decided": figure(ratio(decided_hits, decided)),
        "prior": _constant(class_prior(true), true),
    }


def _constant(prior: np.ndarray, true: np.ndarray) -> float:
    return log_loss(np.broadcast_to(prior, true.shape), true)


def _kinds(table: pd.DataFrame, true: np.ndarray) -> dict[str, Kind | None]:
    kinds: dict[str, Kind | None] = dict.fromkeys(
        ("outcome", "source", "script", "turns", "length", "length_gap", "prompt_length")
    )
    kinds["outcome"] = np.where(true[:, 0] == true[:, 1], 2, true.argmax(axis=1)), ["A", "B", "tie"]
    kinds |= {name: _named(table[name]) for name in ("source", "script") if name in table}
    if "turns" in table:
        kinds["turns"] = np.clip(table["turns"].to_numpy(int), 1, 3) - 1, ["1", "2", "3+"]
    if set(LENGTHS) <= set(table):
        longer = lengths(table).max(axis=1)
        ratios = longer / lengths(table).min(axis=1)
        kinds["length"] = _quarters(longer.astype(int) - 1)
        kinds["length_gap"] = (
            np.select([ratios < CLOSE, ratios <= 2], [0, 1], 2),
            ["within 10 %", "up to 2x", "above 2x"],
        )
    if "prompt_chars" in table:
        kinds["prompt_length"] = _quarters(table["prompt_chars"].to_numpy(int))
    return kinds


def _named(column: pd.Series) -> Kind | None:
    """Return the slices of a column's values, the most frequent first; None where all are empty."""
    names, codes, counts = np.unique(column.fillna("").to_numpy(str), return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    named = [str(names[code]) or "unknown" for code in order]
    return None if named == ["unknown"] else (np.argsort(order)[codes], named)


def _quarters(values: np.ndarray) -> Kind:
    ends = np.unique([*np.quantile(values, [0.25, 0.5, 0.75], method="lower"), values.max()])
    starts = [0, *(ends[:-1] + 1)]
    return np.searchsorted(ends, values), [f"{start}-{end}" for start, end in zip(starts, ends, strict=True)]


def _pooled(codes: np.ndarray, names: list[str], least: int) -> Kind:
    """Return the slices without empty ones, those of fewer than `least` battles as one."""
    counts = np.bincount(codes, minlength=len(names))
    large, small = np.flatnonzero(counts >= least), np.flatnonzero((counts > 0) & (counts < least))
    number = np.full(len(names), len(large))
    number[large] = np.arange(len(large))
    return number[codes], [names[code] for code in large] + [f"others ({len(small)})"] * (len(small) > 0)
