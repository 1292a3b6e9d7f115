"""Log loss and other metrics of predicted and true outcomes; NumPy only.

Arrays are (n_battles, 3) float: A wins, B wins, tie. True outcomes may be soft (probabilities). Every metric is a
function of the mean of per-battle terms, so that one bootstrap of these means serves all metrics.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ECE_BINS = 15
"""Equal-width confidence bins of the expected calibration error."""


def log_loss_terms(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return the cross-entropy of each battle in nats, (n_battles,); its mean is the competition's score.

    Rows are normalised, then clipped to [eps, 1 - eps], eps of their dtype (`eps="auto"`); for hard outcomes the mean
    equals scikit-learn's `log_loss`.
    """
    epsilon = np.finfo(predicted.dtype).eps
    normalised = predicted / predicted.sum(axis=1, keepdims=True)
    return -(true * np.log(np.clip(normalised, epsilon, 1 - epsilon))).sum(axis=1)


def brier_terms(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return the squared error summed over the three outcomes, (n_battles,), 0 to 2 (Brier 1950)."""
    return ((predicted - true) ** 2).sum(axis=1)


def accuracy_terms(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return 1.0 where the likeliest of the three outcomes is the true one, else 0.0, (n_battles,)."""
    return (predicted.argmax(axis=1) == true.argmax(axis=1)).astype(np.float64)


def calibration_terms(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return confidence minus accuracy in the column of the battle's confidence bin, else 0, (n_battles, ECE_BINS)."""
    confidence = predicted.max(axis=1)
    terms = np.zeros((len(predicted), ECE_BINS))
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    terms[np.arange(len(predicted)), bins] = confidence - accuracy_terms(predicted, true)
    return terms


@dataclass(frozen=True)
class Metric:
    """A function of the mean over battles of per-battle terms.

    Attributes:
        terms: (predicted, true) -> (n_battles,) or (n_battles, k).
        of_mean: means of the terms, (..., k) -> values of the metric, (...).
    """

    terms: Callable[[np.ndarray, np.ndarray], np.ndarray]
    of_mean: Callable[[np.ndarray], np.ndarray] = lambda mean: mean[..., 0]

    def columns(self, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
        """Return the terms as columns, (n_battles, k)."""
        terms = self.terms(predicted, true)
        return terms[:, None] if terms.ndim == 1 else terms

    def __call__(self, predicted: np.ndarray, true: np.ndarray) -> float:
        """Return the metric over all battles."""
        return float(self.of_mean(self.columns(predicted, true).mean(axis=0)))


def decided_terms(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return (hit, 1) for battles with a winner, else (0, 0), (n_battles, 2); P(A) = P(B) counts as half a hit."""
    lead, won = predicted[:, 0] - predicted[:, 1], true[:, 0] - true[:, 1]
    decided = true[:, :2].max(axis=1) > true[:, 2]
    hit = np.where(lead == 0, 0.5, np.sign(lead) == np.sign(won))
    return np.stack([hit * decided, decided], axis=1).astype(np.float64)


def class_terms(outcome: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return the terms of the log loss of one outcome: (its part of the cross-entropy, its weight), (n_battles, 2)."""

    def terms(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
        only = np.zeros_like(true)
        only[:, outcome] = true[:, outcome]
        return np.stack([log_loss_terms(predicted, only), true[:, outcome]], axis=1)

    return terms


def _ratio(mean: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return mean[..., 0] / mean[..., 1]


log_loss = Metric(log_loss_terms)
brier = Metric(brier_terms)
accuracy = Metric(accuracy_terms)
accuracy_decided = Metric(decided_terms, _ratio)
"""Accuracy of the more likely winner, over the battles that have a winner."""

expected_calibration_error = Metric(calibration_terms, lambda mean: np.abs(mean).sum(axis=-1))
"""Mean of |confidence - accuracy| over `ECE_BINS` bins, weighted by their battles (Guo et al. 2017)."""

METRICS = {
    "log_loss": log_loss,
    "brier": brier,
    "accuracy": accuracy,
    "accuracy_decided": accuracy_decided,
    "log_loss_a": Metric(class_terms(0), _ratio),
    "log_loss_b": Metric(class_terms(1), _ratio),
    "log_loss_tie": Metric(class_terms(2), _ratio),
    "expected_calibration_error": expected_calibration_error,
}
"""Metrics by their name in metrics.json; `log_loss_a` is the log loss of the battles that A won, and so on."""


def class_prior(true: np.ndarray) -> np.ndarray:
    """Return the mean outcome, (3,): the best prediction that is the same for all battles."""
    return true.mean(axis=0)


def wilson_interval(share: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Return the score interval of a share among `count` independent cases, 95 % by default (Wilson 1927)."""
    centre = share + z * z / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return float((centre - half) / (1 + z * z / count)), float((centre + half) / (1 + z * z / count))
