"""Predictions of labelled battles in, figures of their probabilities out: log loss, accuracy, calibration, by source.

Ties are outcomes like the others here, which no other benchmark measures. Needs no torch.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from rewardmodel.benchmarks.figures import Figure
from rewardmodel.metrics import METRICS, class_prior
from rewardmodel.predictions import predicted, true_outcomes

MEASURED = {
    "log loss": ("log_loss", False),
    "accuracy of decided": ("accuracy_decided", True),
    "calibration error": ("expected_calibration_error", False),
}
"""Name -> metric of `metrics.METRICS`, and whether it is a share: of the battles with a winner, how often that one is
likelier to win."""


def probability_figures(table: pd.DataFrame, probabilities: np.ndarray, names: Sequence[str] = ()) -> list[Figure]:
    """Return what is measured of probabilities, over each source of several, then over all battles.

    Args:
        table: predictions of n labelled battles.
        probabilities: (n, 3) float64 of these battles: A, B, tie.
        names: of `MEASURED`; default: all.
    """
    sources = table["source"].fillna("").replace("", "unknown").to_numpy(str)
    several = dict.fromkeys(sources.tolist()) if len(set(sources)) > 1 else {}
    true, everywhere = true_outcomes(table), np.ones(len(table), bool)
    found = [
        _figure(f"{source}, {name}", name, probabilities, true, sources == source)
        for source in several
        for name in names or MEASURED
    ]
    found += [_figure(name, name, probabilities, true, everywhere, summary=True) for name in names or MEASURED]
    return [one for one in found if one.rows.any()]


def _figure(
    name: str, measured: str, probabilities: np.ndarray, true: np.ndarray, rows: np.ndarray, summary: bool = False
) -> Figure:
    """Return a metric of some battles, `rows` (n,) bool."""
    key, percent = MEASURED[measured]
    metric = METRICS[key]
    terms = metric.columns(probabilities, true)
    counted = rows & (true[:, :2].max(axis=1) > true[:, 2]) if key == "accuracy_decided" else rows
    columns = np.column_stack([terms, np.ones(len(true))]) * rows[:, None]

    def of_sums(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return metric.of_mean(sums[:, :-1] / sums[:, -1:])

    return Figure(name, columns, of_sums, (counted,), summary, percent)


def probability_baselines(table: pd.DataFrame, tfidf: np.ndarray | None) -> dict[str, list[Figure]]:
    """Return the figures of baselines by name: even odds, the battles' own shares of outcomes, the longer, TF-IDF.

    Args:
        table: predictions of n labelled battles.
        tfidf: (n, 3) that a run's TF-IDF baseline predicts; None: it has none.
    """
    count, lengths = len(table), table[["response_a_chars", "response_b_chars"]].to_numpy(np.float64)
    longer = np.stack([lengths[:, 0] > lengths[:, 1], lengths[:, 0] < lengths[:, 1]], axis=1)
    found = {
        "random": probability_figures(table, np.full((count, 3), 1 / 3)),
        "class prior": probability_figures(table, np.tile(class_prior(true_outcomes(table)), (count, 1))),
        "longer": probability_figures(table, np.column_stack([longer, np.zeros(count)]), ("accuracy of decided",)),
    }
    return found if tfidf is None else {**found, "TF-IDF": probability_figures(table, tfidf)}


def model_figures(table: pd.DataFrame) -> list[Figure]:
    """Return the figures of the predictions themselves."""
    return probability_figures(table, predicted(table))
