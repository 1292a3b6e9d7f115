"""Predicted and true outcome arrays in, log loss and its companions with intervals out; NumPy only.

Arrays are (n_battles, 3) float: A wins, B wins, tie. True outcomes may be soft (probabilities).
Each metric is a function of the mean over battles of per-battle terms, so that a bootstrap needs one pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ECE_BINS = 15
"""Equal-width confidence bins of the expected calibration error."""


def log_loss_terms(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return the cross-entropy of each battle in nats, (n_battles,), the competition's score.

    Rows are normalised, then probabilities are clipped to the machine epsilon of their dtype (`eps="auto"`);
    with hard outcomes the mean equals scikit-learn's `log_loss`.
    """
    epsilon = np.finfo(predicted.dtype).eps
    normalised = predicted / predicted.sum(axis=1, keepdims=True)
    return -(true * np.log(np.clip(normalised, epsilon, 1 - epsilon))).sum(axis=1)


def brier_terms(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return the squared distance of the three probabilities from the outcome, (n_battles,), 0 to 2 (Brier 1950)."""
    return ((predicted - true) ** 2).sum(axis=1)


def accuracy_terms(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return 1.0 where the likeliest outcome is the true one, (n_battles,); ties count as a class."""
    return (predicted.argmax(axis=1) == true.argmax(axis=1)).astype(np.float64)


def calibration_terms(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return confidence minus hit in the column of the battle's confidence bin, (n_battles, ECE_BINS)."""
    confidence = predicted.max(axis=1)
    terms = np.zeros((len(predicted), ECE_BINS))
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    terms[np.arange(len(predicted)), bins] = confidence - accuracy_terms(predicted, true)
    return terms


@dataclass(frozen=True)
class Metric:
    """Per-battle terms, (n_battles,) or (n_battles, k), and what their mean (..., k) becomes."""

    terms: Callable[[np.ndarray, np.ndarray], np.ndarray]
    of_mean: Callable[[np.ndarray], np.ndarray] = lambda mean: mean[..., 0]

    def __call__(self, predicted: np.ndarray, true: np.ndarray) -> float:
        """Return the metric over all battles."""
        return float(self.of_mean(_columns(self.terms(predicted, true)).mean(axis=0)))


log_loss = Metric(log_loss_terms)
brier = Metric(brier_terms)
accuracy = Metric(accuracy_terms)
expected_calibration_error = Metric(calibration_terms, lambda mean: np.abs(mean).sum(axis=-1))
"""Mean gap between confidence and hit rate over the bins, weighted by their battles (Guo et al. 2017)."""

METRICS = {
    "log_loss": log_loss,
    "brier": brier,
    "accuracy": accuracy,
    "expected_calibration_error": expected_calibration_error,
}
"""Metrics by their name in metrics.json."""


def class_prior(true: np.ndarray) -> np.ndarray:
    """Return the outcome shares, (3,): what a model that reads nothing would answer."""
    return true.mean(axis=0)


def bootstrap_interval(
    metric: Metric,
    predicted: np.ndarray,
    true: np.ndarray,
    groups: np.ndarray,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of a metric when whole groups are drawn again (Efron & Tibshirani 1993, ch. 13).

    Battles of one prompt are not independent, so groups are drawn, not rows.

    Args:
        metric: an entry of `METRICS`.
        predicted: (n_battles, 3).
        true: (n_battles, 3).
        groups: (n_battles,) integer labels.
        samples: bootstrap samples.
        level: coverage, 0 to 1.
        seed: of the draw.
    """
    _, members = np.unique(groups, return_inverse=True)
    sizes = np.bincount(members)
    terms = _columns(metric.terms(predicted, true))
    sums = np.stack([np.bincount(members, column) for column in terms.T], axis=1)
    random = np.random.default_rng(seed)
    values = np.empty(samples)
    for sample in range(samples):
        drawn = random.integers(len(sizes), size=len(sizes))
        values[sample] = metric.of_mean(sums[drawn].sum(axis=0) / sizes[drawn].sum())
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def summary(predicted: np.ndarray, true: np.ndarray, groups: np.ndarray) -> dict[str, dict[str, float]]:
    """Return every metric with its 95 % interval, clustered by group: name -> {value, low, high}."""
    result = {}
    for name, metric in METRICS.items():
        low, high = bootstrap_interval(metric, predicted, true, groups)
        result[name] = {"value": metric(predicted, true), "low": low, "high": high}
    return result


def _columns(terms: np.ndarray) -> np.ndarray:
    return terms[:, None] if terms.ndim == 1 else terms
