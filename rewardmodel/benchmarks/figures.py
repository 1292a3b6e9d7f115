"""Figures of a benchmark, each a function of sums over its rows: values, intervals, paired comparisons.

That form lets one bootstrap of whole prompt groups serve all of them: an accuracy of a subset, a weighted mean of
subsets, RewardBench 2's score of ties, a calibration error. Needs no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rewardmodel.evaluation.bootstrap import Draws, divide, interval_of, percentile_interval
from rewardmodel.evaluation.results import Interval


@dataclass(frozen=True)
class Figure:
    """One figure over the rows of a benchmark.

    Attributes:
        name: of the subset, or of what summarises several.
        columns: (n_rows, k) float64 terms, 0 for rows that do not count.
        of_sums: sums of the terms, (n_draws, k) -> values, (n_draws,).
        parts: for each mean that it is made of, which rows count, (n_rows,) bool.
        summary: whether it summarises other figures.
        percent: whether it is a share, shown in percent; higher is better.
    """

    name: str
    columns: np.ndarray
    of_sums: Callable[[np.ndarray], np.ndarray]
    parts: tuple[np.ndarray, ...]
    summary: bool = False
    percent: bool = True

    @property
    def rows(self) -> np.ndarray:
        """Which rows count at all, (n_rows,) bool."""
        return np.logical_or.reduce(self.parts)


def mean_figure(
    name: str, terms: np.ndarray, rows: np.ndarray, *, weights: np.ndarray | None = None, **kind: bool
) -> Figure:
    """Return the mean of terms over some rows.

    Args:
        name: of the figure.
        terms: (n_rows,) float64.
        rows: (n_rows,) bool, which rows count.
        weights: (n_rows,) of the rows in the mean; default: equal.
        kind: `summary` and `percent` of the figure.
    """
    counted = rows.astype(np.float64) if weights is None else np.where(rows, weights, 0.0)
    columns = np.stack([np.where(rows, terms, 0.0) * counted, counted], axis=1)
    return Figure(name, columns, lambda sums: divide(sums[:, 0], sums[:, 1]), (counted > 0,), **kind)


def weighted_figure(name: str, figures: Sequence[Figure], shares: Sequence[float], **kind: bool) -> Figure:
    """Return the sum of figures, each times its share; one that has no rows in a draw makes that draw NaN."""
    ends = np.cumsum([one.columns.shape[1] for one in figures])[:-1]

    def of_sums(sums: np.ndarray) -> np.ndarray:
        pieces = np.split(sums, ends, axis=1)
        values = [share * one.of_sums(piece) for one, share, piece in zip(figures, shares, pieces, strict=True)]
        return np.sum(values, axis=0)

    parts = tuple(part for one in figures for part in one.parts)
    return Figure(name, np.hstack([one.columns for one in figures]), of_sums, parts, **kind)


def average_figure(name: str, figures: Sequence[Figure]) -> Figure:
    """Return the mean of figures, whatever their numbers of rows."""
    return weighted_figure(name, figures, [1 / len(figures)] * len(figures), summary=True)


def draw_values(figures: Sequence[Figure], draws: Draws) -> list[np.ndarray]:
    """Return the values of each figure in the table itself and in the bootstrap samples, (1 + samples,) each."""
    sums = draws.sums(np.hstack([one.columns for one in figures]))
    pieces = np.split(sums, np.cumsum([one.columns.shape[1] for one in figures])[:-1], axis=1)
    return [one.of_sums(piece) for one, piece in zip(figures, pieces, strict=True)]


def fewest_groups(figure: Figure, draws: Draws) -> int:
    """Return how many groups the figure's part with the fewest has: as many as its interval can rest on."""
    return min(draws.groups_of(rows) for rows in figure.parts)


@dataclass(frozen=True)
class Compared:
    """A figure of one run minus that of another on the same rows."""

    name: str
    difference: Interval
    p: float | None
    """Two-sided, from the bootstrap: how rarely a difference of either sign is drawn if there is none; None: no
    interval."""
    p_holm: float | None
    """Corrected for the number of subsets; None for summaries, which are not corrected."""


def compare_figures(
    figures: Sequence[Figure], first: Sequence[np.ndarray], second: Sequence[np.ndarray], draws: Draws
) -> list[Compared]:
    """Return the paired differences of two runs, the p-values of the subsets corrected by Holm.

    Args:
        figures: of either run; both have the same rows.
        first: values of one run, as `draw_values` returns them.
        second: values of the other.
        draws: that both were computed from.
    """
    differences = [one - other for one, other in zip(first, second, strict=True)]
    groups = [fewest_groups(one, draws) for one in figures]
    p_values = [two_sided_p(values, count) for values, count in zip(differences, groups, strict=True)]
    known = [n for n, (one, p) in enumerate(zip(figures, p_values, strict=True)) if p is not None and not one.summary]
    corrected = dict(zip(known, correct_holm([p_values[number] or 0.0 for number in known]), strict=True))
    return [
        Compared(one.name, interval_of(values, count), p, corrected.get(number))
        for number, (one, values, count, p) in enumerate(zip(figures, differences, groups, p_values, strict=True))
    ]


def two_sided_p(values: np.ndarray, groups: int) -> float | None:
    """Return the two-sided p-value of a difference, (1 + samples,) values, or None where it has no interval."""
    drawn = values[1:][np.isfinite(values[1:])]
    if percentile_interval(drawn, groups)[0] is None:
        return None
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return float(min(1, 2 * (beyond + 1) / (len(drawn) + 1)))


def correct_holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, step by step from the smallest (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()
