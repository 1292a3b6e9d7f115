"""Groups of battles in, the same groups drawn again out, and sums, ratios and slopes on every draw with intervals.

For audits of many figures at once: the draws are made once and kept, terms may be sparse. One interval of one metric
is `metrics.bootstrap_interval`, which draws the same groups.
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from rewardmodel.metrics import BOOTSTRAP_SAMPLES, draw_counts, percentile_interval

STEEPEST = 50.0
"""Slopes are held within this, either side of 0: where every winner has the larger x there is no finite one."""

_BLOCK, _CELLS = 100, 1_000_000
"""Draws that sums, and draws times rows that slopes, hold as float64 at a time."""


@dataclass(frozen=True)
class Draws:
    """How often each group stands in the table as it is (row 0: once) and in bootstrap samples (the other rows).

    `members`: (n_battles,) the number of each battle's group; `counts`: (1 + samples, n_groups) uint8.
    """

    members: np.ndarray
    counts: np.ndarray

    def sums(self, terms: np.ndarray | sparse.sparray) -> np.ndarray:
        """Return the sums over battles of (n_battles, k) terms, (1 + samples, k) float64."""
        battles, groups = len(self.members), self.counts.shape[1]
        member = sparse.csr_array((np.ones(battles), (self.members, np.arange(battles))), (groups, battles))
        by_group = (member @ sparse.csr_array(terms)).T.tocsr()
        blocks = [self.counts[start : start + _BLOCK].T for start in range(0, len(self.counts), _BLOCK)]
        return np.concatenate([by_group @ np.ascontiguousarray(block, np.float64) for block in blocks], axis=1).T

    def times(self, rows: np.ndarray, samples: int) -> np.ndarray:
        """Return how often each battle of a mask stands in the table and in some samples, (1 + samples, n_rows)."""
        return self.counts[: 1 + samples, self.members[rows]]


def draw_groups(groups: np.ndarray, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0) -> Draws:
    """Return bootstrap samples of whole groups (Efron & Tibshirani 1993, ch. 13).

    Args:
        groups: (n_battles,) integer labels.
        samples: how many.
        seed: of the draws, which are those of `metrics.bootstrap_means`.
    """
    labels, members = np.unique(groups, return_inverse=True)
    counts = np.ones((1 + samples, len(labels)), np.uint8)
    for sample, drawn in enumerate(draw_counts(len(labels), samples, seed), start=1):
        counts[sample] = drawn
    return Draws(members, counts)


def ratio(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return sums over weights, NaN where there is no weight."""
    return np.divide(sums, weights, out=np.full(np.shape(sums), np.nan), where=weights > 0)


def figure(values: np.ndarray) -> dict[str, float] | None:
    """Return {value, low, high} (95 %) of (1 + samples,) values, row 0 the table's own; None if it has none."""
    if not np.isfinite(values[0]):
        return None
    low, high = percentile_interval(values[1:] if np.isfinite(values[1:]).any() else values)
    return {"value": float(values[0]), "low": low, "high": high}


def apart(found: dict[str, float], other: float = 0) -> bool:
    """Return whether a value is outside an interval; one that is a point, as that of a single group, tells nothing."""
    return found["low"] < found["high"] and not found["low"] <= other <= found["high"]


def slopes(x: np.ndarray, share: np.ndarray, weight: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return slopes of logistic regressions of shares on x without intercept, one a draw, (1 + samples,).

    Args:
        x: (n_rows,) float, none of them 0.
        share: (n_rows,) float, 0 to 1: a winner, or a probability (the fractional logit of Papke & Wooldridge 1996).
        weight: (n_rows,) float.
        times: (1 + samples, n_rows) how often each row is drawn.

    Returns:
        The slopes, within `STEEPEST`; NaN in draws without rows.
    """
    if not len(x):
        return np.full(len(times), np.nan)
    own = _solve(x, share, weight, times[:1], np.zeros(1))
    step = max(1, _CELLS // len(x))
    blocks = [times[start : start + step] for start in range(0, len(times), step)]
    return np.concatenate([_solve(x, share, weight, block, np.full(len(block), own[0])) for block in blocks])


def _solve(x: np.ndarray, share: np.ndarray, weight: np.ndarray, times: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return the slopes where the score is 0, by Newton's method, or bisection where that leaves the bracket."""
    rising = weight * np.where(x > 0, share, 1 - share)
    up, down = (times.astype(np.float64) @ np.stack([rising, weight - rising], axis=1)).T
    least = 1e-12 * (up + down)
    ends = np.select([up + down == 0, down <= least, up <= least], [np.nan, STEEPEST, -STEEPEST], 0.0)
    slope = np.where(ends == 0, slope, ends)
    pull = times * (weight * x)
    low, high = np.full(len(slope), -STEEPEST), np.full(len(slope), STEEPEST)
    for _ in range(60):
        half = np.tanh(slope[:, None] * x / 2)
        score = pull @ (share - 0.5) - np.einsum("sn,sn->s", pull, half) / 2
        information = (pull * (1 - half**2)) @ x / 4
        low, high = np.where(score > 0, slope, low), np.where(score < 0, slope, high)
        newton = slope + ratio(score, information)
        moved = np.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        moved = np.where(ends == 0, moved, slope)
        settled = not (np.abs(moved - slope) > 1e-8).any()
        slope = moved
        if settled:
            break
    return slope
