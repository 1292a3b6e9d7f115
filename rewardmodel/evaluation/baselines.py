"""Battles in, predictions of scikit-learn baselines out: what a language model has to beat. Needs no torch.

Each baseline treats A and B alike, so that p(swap(x)) == swap(p(x)) exactly.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from datasets import Dataset

from rewardmodel.battles import OUTCOMES, outcomes, select_labelled, weights
from rewardmodel.data.folds import train_mask
from rewardmodel.errors import InputError
from rewardmodel.evaluation.bootstrap import summarise
from rewardmodel.evaluation.results import Interval
from rewardmodel.evaluation.text_regression import TextCounts, count_texts, fit_lengths, fit_tfidf, predict_each
from rewardmodel.predictions import PROBABILITIES, predicted, true_outcomes

FittedBaseline = Callable[[TextCounts], np.ndarray]
"""What is counted in the texts of battles -> (n_battles, 3) float64: A, B, tie."""


def fit_baselines(training: Dataset) -> dict[str, FittedBaseline]:
    """Return the baselines of `BASELINES`, trained on some battles, by name.

    Args:
        training: labelled battles; soft outcomes and `weight` count. Those without an outcome are left out.

    Raises:
        InputError: no training battles, or training battles without outcomes.
    """
    training = select_labelled(training)
    if not len(training):
        raise InputError("baselines: no training battle has an outcome; label them, or give others")
    return _fit(count_texts(training), _weighted_outcomes(training))


def predict_baselines(baselines: dict[str, FittedBaseline], battles: Dataset) -> pd.DataFrame:
    """Return what fitted baselines predict of battles, labelled or not.

    Returns:
        One row a battle, in their order: `id`, and for each baseline its name before `_p_model_a`, `_p_model_b` and
        `_p_tie` (`tfidf_p_tie`), float64; each three sum to 1.
    """
    table = pd.DataFrame({"id": np.asarray(battles.with_format(None)["id"][:], dtype=object)})
    return table.assign(**_columns(baselines, predict_each(list(baselines.values()), battles)))


def baseline(battles: Dataset) -> pd.DataFrame:
    """Return what each baseline predicts for battles of a fold when it is trained on the other folds.

    Args:
        battles: labelled battles with `group` and `fold` set. Those that only train are not predicted; the calibration
            and holdout parts neither train nor are predicted, nor do those without an outcome.

    Returns:
        One row a predicted battle, in their order: `id`, `group`, the outcomes, and the columns of
        `predict_baselines`.

    Raises:
        InputError: battles without outcomes, or a fold that no other battles can be trained for.
    """
    battles = select_labelled(battles)
    if not len(battles):
        raise InputError("baselines: none of these battles has an outcome; give labelled battles")
    fold = np.asarray(battles.with_format(None)["fold"][:])
    rows = np.flatnonzero((fold >= 0) | train_mask(fold, -1))
    battles, fold = battles.select(rows), fold[rows]
    held_out = fold[fold >= 0]
    if not len(held_out) or (fold == held_out[0]).all():
        raise InputError("baselines: the battles are not in two or more folds; assign them with assign_folds")

    # texts are counted once, for all folds
    counts, mass = count_texts(battles), _weighted_outcomes(battles)
    parts = []
    for number in np.unique(held_out):
        own, others = np.flatnonzero(fold == number), np.flatnonzero(train_mask(fold, number))
        fitted = _fit(counts.rows(others), mass[others])
        found = np.stack([predict(counts.rows(own)) for predict in fitted.values()])
        parts.append(pd.DataFrame(_columns(fitted, found), index=own))

    plain = battles.with_format(None)
    known = {name: np.asarray(plain[name][:]) for name in ("id", "group")}
    known |= dict(zip(OUTCOMES, outcomes(battles).T, strict=True))
    return pd.DataFrame(known).join(pd.concat(parts), how="right").sort_index().reset_index(drop=True)


def measure_baselines(table: pd.DataFrame) -> dict[str, dict[str, Interval]]:
    """Return the metrics of what `baseline` predicts, by baseline: {"prior": {"log_loss": ..., "accuracy": ...}}."""
    true, groups = true_outcomes(table), table["group"].to_numpy()
    found = {name: summarise(predicted(table, name), true, groups) for name in BASELINES}
    return {name: {metric: one[metric] for metric in ("log_loss", "accuracy")} for name, one in found.items()}


def format_baseline(measured: dict[str, dict[str, Interval]]) -> str:
    """Return what `measure_baselines` found as lines for a terminal."""
    lines = [f"{'baseline':<10}{'log loss':>8}   {'95 %':<18}{'accuracy':>8}   95 %"]
    for name, metrics in measured.items():
        cells = (f"{one.value:>8.4f}   {one.bracket()}" for one in (metrics["log_loss"], metrics["accuracy"]))
        lines.append(f"{name:<10}{'  '.join(cells)}")
    return "\n".join(lines)


def _weighted_outcomes(battles: Dataset) -> np.ndarray:
    """Return outcomes times weight, (n_battles, 3) float64."""
    return outcomes(battles) * weights(battles).astype(np.float64)[:, None]


def _fit(counts: TextCounts, mass: np.ndarray) -> dict[str, FittedBaseline]:
    return {name: fit_one(counts, mass) for name, fit_one in BASELINES.items()}


def _columns(baselines: dict[str, FittedBaseline], found: np.ndarray) -> dict[str, np.ndarray]:
    """Return columns by name of what baselines predict, (n_baselines, n_battles, 3)."""
    return {
        f"{name}_{outcome}": column
        for name, probabilities in zip(baselines, found, strict=True)
        for outcome, column in zip(PROBABILITIES, probabilities.T, strict=True)
    }


def _fit_prior(counts: TextCounts, mass: np.ndarray) -> FittedBaseline:
    """Return the outcome shares of the training battles in both orders: A and B have the same."""
    shares = mass.sum(axis=0) / mass.sum()
    decided = (shares[0] + shares[1]) / 2
    return lambda judged: np.tile([decided, decided, shares[2]], (len(judged.sizes), 1))


BASELINES: dict[str, Callable[[TextCounts, np.ndarray], FittedBaseline]] = {
    "prior": _fit_prior,
    "length": fit_lengths,
    "tfidf": fit_tfidf,
}
"""By name: what is counted in n battles, and their outcomes times weight, (n, 3) float64 -> the fitted baseline."""
