"""The bootstrap by prompt group: intervals of means, ratios, differences and slopes.

Battles of one prompt are not independent, so whole groups are drawn, not rows (Efron & Tibshirani 1993, ch. 13). The
draws of one seed are made once and kept, so that many figures share them; terms may be sparse.
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from rewardmodel.evaluation.results import Difference, Interval
from rewardmodel.metrics import METRICS, log_loss_terms

BOOTSTRAP_SAMPLES = 1000
"""Bootstrap samples of an interval."""

FEWEST_GROUPS = 10
"""Groups that an interval needs: resamples of fewer vary less than new groups would."""

SAME = 1e-12
"""Values that differ by less are the same up to rounding: an interval between them is none."""

MAX_SLOPE = 50.0
"""Slopes are clipped to ± this: where every winner has the larger x there is no finite one."""


@dataclass(frozen=True)
class Draws:
    """Bootstrap samples of groups.

    Attributes:
        members: (n_battles,) int, the number of each battle's group.
        counts: (1 + samples, n_groups) uint8, how often a group is counted: in row 0, the table itself, once; in the
            others as often as it was drawn.
    """

    members: np.ndarray
    counts: np.ndarray

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.counts.shape[1]

    def groups_of(self, rows: np.ndarray) -> int:
        """Return the number of groups of some battles, by mask or indices."""
        return len(np.unique(self.members[rows]))

    def sums(self, terms: np.ndarray | sparse.sparray) -> np.ndarray:
        """Return the sums over battles of (n_battles, k) terms, (1 + samples, k) float64."""
        battles, groups = len(self.members), self.groups
        member = sparse.csr_array((np.ones(battles), (self.members, np.arange(battles))), (groups, battles))
        by_group = (member @ sparse.csr_array(terms)).T.tocsr()
        # 100 draws at a time: the counts as float64 are eight times their size
        blocks = [self.counts[start : start + 100].T for start in range(0, len(self.counts), 100)]
        return np.concatenate([by_group @ np.ascontiguousarray(block, np.float64) for block in blocks], axis=1).T

    def means(self, terms: np.ndarray) -> np.ndarray:
        """Return the means over battles of (n_battles, k) terms, (1 + samples, k) float64."""
        sums = self.sums(np.column_stack([terms, np.ones(len(terms))]))  # the last column counts battles
        return sums[:, :-1] / sums[:, -1:]

    def times(self, rows: np.ndarray, samples: int) -> np.ndarray:
        """Return how often each battle of a mask is counted in the table and in some samples, (1 + samples, n_rows)."""
        return self.counts[: 1 + samples, self.members[rows]]


def draw_groups(groups: np.ndarray, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0) -> Draws:
    """Return bootstrap samples of whole groups.

    Args:
        groups: (n_battles,) integer labels.
        samples: how many.
        seed: of the draws.
    """
    labels, members = np.unique(groups, return_inverse=True)
    random = np.random.default_rng(seed)
    counts = np.ones((1 + samples, len(labels)), np.uint8)
    for sample in counts[1:]:
        sample[:] = np.bincount(random.integers(len(labels), size=len(labels)), minlength=len(labels))
    return Draws(members, counts)


def percentile_interval(
    values: np.ndarray, groups: int, level: float = 0.95
) -> tuple[float, float] | tuple[None, None]:
    """Return the percentile interval of bootstrap values, (samples,), NaN left out; None twice: there is none.

    Args:
        values: of the samples.
        groups: how many the samples are drawn from.
        level: of the interval.
    """
    if groups < FEWEST_GROUPS or not np.isfinite(values).any():
        return None, None
    tail = (1 - level) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return (float(low), float(high)) if high - low > SAME else (None, None)


def interval_of(values: np.ndarray, groups: int) -> Interval:
    """Return the interval of (1 + samples,) values, the table's own first; `groups` as of `percentile_interval`."""
    return Interval(float(values[0]), *percentile_interval(values[1:], groups))


def summarise(predicted: np.ndarray, true: np.ndarray, groups: np.ndarray) -> dict[str, Interval]:
    """Return every metric of `metrics.METRICS` with its interval, by name.

    A metric of battles that are not there (no ties, none decided) is left out.

    Args:
        predicted: (n_battles, 3) probabilities.
        true: (n_battles, 3) outcomes.
        groups: (n_battles,) integer labels.
    """
    columns = {name: metric.columns(predicted, true) for name, metric in METRICS.items()}
    draws = draw_groups(groups)
    means = draws.means(np.concatenate(list(columns.values()), axis=1))
    result, start = {}, 0
    for name, terms in columns.items():
        of_mean, drawn = METRICS[name].of_mean, means[1:, start : start + terms.shape[1]]
        start += terms.shape[1]
        value = float(of_mean(terms.mean(axis=0)))
        if np.isfinite(value):
            result[name] = Interval(value, *percentile_interval(of_mean(drawn), draws.groups))
    return result


def paired_difference(first: np.ndarray, second: np.ndarray, true: np.ndarray, groups: np.ndarray) -> Difference:
    """Return the log loss of `first` minus that of `second` on the same battles, with its interval and p-value.

    The p-value is two-sided: how rarely a difference of either sign is drawn if there is none (Efron & Tibshirani
    1993, ch. 15).

    Args:
        first: (n_battles, 3) predicted probabilities.
        second: the same of another model.
        true: (n_battles, 3) outcomes.
        groups: (n_battles,) integer labels.
    """
    terms = log_loss_terms(first, true) - log_loss_terms(second, true)
    draws = draw_groups(groups)
    drawn = draws.means(terms[:, None])[1:, 0]
    low, high = percentile_interval(drawn, draws.groups)
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = None if low is None else float(min(1, 2 * (beyond + 1) / (len(drawn) + 1)))
    return Difference(float(terms.mean()), low, high, p)


def divide(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return sums over weights, NaN where there is no weight."""
    return np.divide(sums, weights, out=np.full(np.shape(sums), np.nan), where=weights > 0)


def fit_slopes(x: np.ndarray, share: np.ndarray, weight: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return slopes of logistic regressions of shares on x without intercept, one a draw, (1 + samples,).

    Args:
        x: (n_rows,) float, none of them 0.
        share: (n_rows,) float, 0 to 1: a winner, or a probability (the fractional logit of Papke & Wooldridge 1996).
        weight: (n_rows,) float.
        times: (1 + samples, n_rows) how often each row is drawn.

    Returns:
        The slopes, clipped to ± `MAX_SLOPE`; NaN in draws without rows.
    """
    if not len(x):
        return np.full(len(times), np.nan)
    # the table's own slope is where the search starts in every draw
    own = _solve(x, share, weight, times[:1], np.zeros(1))
    step = max(1, 1_000_000 // len(x))  # float64 that are in memory at a time
    blocks = [times[start : start + step] for start in range(0, len(times), step)]
    return np.concatenate([_solve(x, share, weight, block, np.full(len(block), own[0])) for block in blocks])


def _solve(x: np.ndarray, share: np.ndarray, weight: np.ndarray, times: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return the slopes where the score is 0, by Newton's method, or bisection where that leaves the bracket."""
    # draws without rows have no slope, those where one sign of x always wins an infinite one
    rising = weight * np.where(x > 0, share, 1 - share)
    up, down = (times.astype(np.float64) @ np.stack([rising, weight - rising], axis=1)).T
    least = 1e-12 * (up + down)
    ends = np.select([up + down == 0, down <= least, up <= least], [np.nan, MAX_SLOPE, -MAX_SLOPE], 0.0)
    slope = np.where(ends == 0, slope, ends)

    # Newton steps within [low, high], where the score changes its sign
    pull = times * (weight * x)
    low, high = np.full(len(slope), -MAX_SLOPE), np.full(len(slope), MAX_SLOPE)
    for _ in range(60):
        half = np.tanh(slope[:, None] * x / 2)
        score = pull @ (share - 0.5) - np.einsum("sn,sn->s", pull, half) / 2
        information = (pull * (1 - half**2)) @ x / 4
        low, high = np.where(score > 0, slope, low), np.where(score < 0, slope, high)
        newton = slope + divide(score, information)
        moved = np.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        moved = np.where(ends == 0, moved, slope)
        converged = not (np.abs(moved - slope) > 1e-8).any()
        slope = moved
        if converged:
            break
    return slope
