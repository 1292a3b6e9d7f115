"""Battles in, what scikit-learn makes of them without a language model out: the floors that a model has to beat.

Each treats A and B alike, so that p(swap(x)) == swap(p(x)) exactly. Needs no torch.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from datasets import Dataset

from rewardmodel.battles import OUTCOMES, outcomes, select_labelled, weights
from rewardmodel.data.folds import train_mask
from rewardmodel.errors import InputError
from rewardmodel.evaluation.text_regression import Reading, fit_lengths, fit_tfidf, predict_each, read
from rewardmodel.metrics import summarise
from rewardmodel.predictions import PROBABILITIES, true_outcomes

Predict = Callable[[Reading], np.ndarray]
"""A fitted floor: what is read of battles -> (n_battles, 3) float64: A, B, tie."""


def fit(training: Dataset) -> dict[str, Predict]:
    """Return the floors by name, trained on some battles.

    Args:
        training: labelled battles; soft outcomes and `weight` count. Those without an outcome are left out.

    Raises:
        InputError: no training battles, or training battles without outcomes.
    """
    training = select_labelled(training)
    if not len(training):
        raise InputError("the floors need training battles with outcomes; label them, or give others")
    return _fitted(read(training), _mass(training))


def predictions(floors: dict[str, Predict], judged: Dataset) -> pd.DataFrame:
    """Return what fitted floors predict of battles, labelled or not.

    Returns:
        One row a judged battle, in their order: `id`, and for each of the floors its name before `_p_model_a`,
        `_p_model_b` and `_p_tie`, float64, of sum 1.
    """
    table = pd.DataFrame({"id": np.asarray(judged.with_format(None)["id"][:], dtype=object)})
    return table.assign(**_columns(floors, predict_each(list(floors.values()), judged)))


def fit_predict(training: Dataset, judged: Dataset) -> pd.DataFrame:
    """Return the `predictions` of some battles by floors that are fitted to others, as `fit` takes them."""
    return predictions(fit(training), judged)


def baseline(battles: Dataset) -> pd.DataFrame:
    """Return what each floor predicts for battles of a fold when it is trained on the other folds.

    Args:
        battles: labelled battles with `group` and `fold` set. Those that only train are not judged; the calibration
            and holdout parts neither train nor are judged, nor do those without an outcome.

    Returns:
        One row a judged battle, in their order: `id`, `group`, the outcomes, and the columns of `predictions`.

    Raises:
        InputError: battles without outcomes, or a fold that no other battles can be trained for.
    """
    battles = select_labelled(battles)
    if not len(battles):
        raise InputError("the floors are judged on labelled battles, but these have no outcomes; label them")
    fold = np.asarray(battles.with_format(None)["fold"][:])
    rows = np.flatnonzero((fold >= 0) | train_mask(fold, -1))
    battles, fold = battles.select(rows), fold[rows]
    judged = np.flatnonzero(fold >= 0)
    if not len(judged) or (fold == fold[judged[0]]).all():
        raise InputError("the floors need battles in at least two folds; set them with assign_folds")
    reading, mass = read(battles), _mass(battles)
    parts = []
    for number in np.unique(fold[judged]):
        own, others = np.flatnonzero(fold == number), np.flatnonzero(train_mask(fold, number))
        floors = _fitted(reading.rows(others), mass[others])
        found = np.stack([predict(reading.rows(own)) for predict in floors.values()])
        parts.append(pd.DataFrame(_columns(floors, found), index=own))
    plain = battles.with_format(None)
    known = {name: np.asarray(plain[name][:]) for name in ("id", "group")}
    known |= dict(zip(OUTCOMES, outcomes(battles).T, strict=True))
    return pd.DataFrame(known).join(pd.concat(parts), how="right").sort_index().reset_index(drop=True)


def measure(table: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """Return floor -> log_loss and accuracy -> value, low, high (95 %, whole groups drawn again) of `baseline`."""
    true, groups = true_outcomes(table), table["group"].to_numpy()
    facts = {}
    for floor in FLOORS:
        found = summarise(table[[f"{floor}_{name}" for name in PROBABILITIES]].to_numpy(np.float64), true, groups)
        facts[floor] = {name: found[name] for name in ("log_loss", "accuracy")}
    return facts


def format_baseline(facts: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return what `measure` found as lines for a terminal."""
    lines = [f"{'floor':<10}{'log loss':>8}   {'95 %':<18}{'accuracy':>8}   95 %"]
    for floor, found in facts.items():
        loss, hits = (
            f"{metric['value']:>8.4f}   [{metric['low']:.4f}, {metric['high']:.4f}]"
            for metric in (found["log_loss"], found["accuracy"])
        )
        lines.append(f"{floor:<10}{loss}  {hits}")
    return "\n".join(lines)


def _mass(battles: Dataset) -> np.ndarray:
    return outcomes(battles) * weights(battles).astype(np.float64)[:, None]


def _fitted(reading: Reading, mass: np.ndarray) -> dict[str, Predict]:
    return {floor: fit_one(reading, mass) for floor, fit_one in FLOORS.items()}


def _columns(floors: dict[str, Predict], found: np.ndarray) -> dict[str, np.ndarray]:
    """Return columns by name of what floors predict, (n_floors, n_battles, 3)."""
    return {
        f"{floor}_{name}": column
        for floor, probabilities in zip(floors, found, strict=True)
        for name, column in zip(PROBABILITIES, probabilities.T, strict=True)
    }


def _prior(reading: Reading, mass: np.ndarray) -> Predict:
    """Return what says the outcome shares of the training battles in both orders: A and B have the same."""
    shares = mass.sum(axis=0) / mass.sum()
    decided = (shares[0] + shares[1]) / 2
    return lambda judged: np.tile([decided, decided, shares[2]], (len(judged.sizes), 1))


FLOORS: dict[str, Callable[[Reading, np.ndarray], Predict]] = {
    "prior": _prior,
    "length": fit_lengths,
    "tfidf": fit_tfidf,
}
"""Floors by name: what is read of n battles, and their outcomes times weight, (n, 3) float64 -> the fitted floor."""
