"""Predictions with known outcomes in, a calibrator out: fitted across groups, and used only if it helps beyond noise.

Every method treats A and B alike, so that what was exact under a swap stays so. One, the blend, also reads what a floor
predicts of the same battles; it stands beside, in three further columns.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from rewardmodel.errors import InputError
from rewardmodel.files import write_text
from rewardmodel.metrics import paired_difference, wilson_interval

FOLDS = 5
"""Parts of the groups; each is calibrated by what was fitted on the others."""

FLOOR = 1e-12
"""Probabilities below it count as it, where their logarithm is taken."""


BOUND = 5.0
"""No parameter leaves [-BOUND, BOUND]: a perfect separation has no best temperature."""

FREE, WEIGHT = (-BOUND, BOUND), (0.0, BOUND)
"""Bounds of a parameter."""


@dataclass(frozen=True)
class Method:
    """Changes log-probabilities, (n, `columns`), by parameters within `bounds`; `start` changes nothing."""

    change: Callable[[np.ndarray, np.ndarray], np.ndarray]
    start: tuple[float, ...]
    bounds: tuple[tuple[float, float], ...]
    columns: int = 3


def _temperature(logs: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    return logs * np.exp(parameters[0])


def _tie_mass(logs: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    return logs + np.array([0, 0, parameters[0]])


def _vector(logs: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    lead, tie, mass = parameters
    over = logs - logs[:, :2].mean(axis=1, keepdims=True)
    return over * np.exp([lead, lead, tie]) + np.array([0, 0, mass])


def _blend(logs: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    model, floor, mass = parameters
    return model * logs[:, :3] + floor * logs[:, 3:] + np.array([0, 0, mass])


BLEND = "blend"

BLENDED = "tfidf"
"""The baseline that it blends in."""

METHODS = {
    "temperature": Method(_temperature, (0.0,), (FREE,)),
    "tie_mass": Method(_tie_mass, (0.0,), (FREE,)),
    "vector": Method(_vector, (0.0, 0.0, 0.0), (FREE, FREE, FREE)),
    BLEND: Method(_blend, (1.0, 0.0, 0.0), (WEIGHT, WEIGHT, FREE), columns=6),
}
"""Methods by name. `temperature`: the logarithm of an inverse one. `tie_mass`: a constant added to the tie. `vector`:
both, with one temperature for A against B and another for the tie against their mean, which is the vector scaling of
Guo et al. (2017) that treats A and B alike. `blend`: weights of the model's and of the floor's log-probabilities, from
0, and a constant added to the tie: a logarithmic opinion pool (Genest & Zidek 1986)."""


@dataclass(frozen=True)
class Calibrator:
    """A fitted method; without one, probabilities stay as they are."""

    method: str | None
    parameters: tuple[float, ...] = ()

    def __call__(self, predicted: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities, (n_battles, 3) float64, of predicted ones.

        Args:
            predicted: (n_battles, 3), or with the floor's beside (n_battles, 6), which the blend needs.
        """
        if self.method is None:
            return predicted[:, :3]
        logs = _logs(predicted, self.method)
        return np.exp(_log_softmax(METHODS[self.method].change(logs, np.array(self.parameters))))


def _logs(predicted: np.ndarray, method: str) -> np.ndarray:
    return np.log(np.clip(predicted[:, : METHODS[method].columns], FLOOR, None))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


NONE = Calibrator(None)


def fit(method: str, predicted: np.ndarray, true: np.ndarray) -> Calibrator:
    """Return the calibrator of a method that has the least log loss on these battles.

    Args:
        method: a name out of `METHODS`.
        predicted: as a `Calibrator` takes it.
        true: (n_battles, 3) outcomes.
    """
    logs, how = _logs(predicted, method), METHODS[method]

    def loss(parameters: np.ndarray) -> float:
        return -float((true * _log_softmax(how.change(logs, parameters))).sum(axis=1).mean())

    found = minimize(loss, how.start, method="L-BFGS-B", bounds=how.bounds)
    return Calibrator(method, tuple(map(float, found.x)))


def cross_fit(method: str, predicted: np.ndarray, true: np.ndarray, groups: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return calibrated probabilities, each battle's by a calibrator that saw no battle of its group."""
    _, members = np.unique(groups, return_inverse=True)
    part = (np.random.default_rng(seed).permutation(members.max() + 1) % FOLDS)[members]
    result = np.empty((len(predicted), 3))
    for number in range(FOLDS):
        judged = part == number
        result[judged] = fit(method, predicted[~judged], true[~judged])(predicted[judged])
    return result


@dataclass(frozen=True)
class Choice:
    """What was tried, and the calibrator that is used.

    `tried` is method -> cross-fitted log loss minus that before (value, low, high, p); `cross_fitted` are the chosen
    method's probabilities, (n_battles, 3), or those given, where none is used; `blended` is the cross-fitted log loss
    of the blend minus that of what is chosen without it (value, low, high, p), None where it was not tried.
    """

    calibrator: Calibrator
    tried: dict[str, dict[str, float]]
    verdict: str
    cross_fitted: np.ndarray
    blended: dict[str, float] | None = None


def choose(predicted: np.ndarray, true: np.ndarray, groups: np.ndarray, blend: bool = False) -> Choice:
    """Return the method with the least cross-fitted log loss, if its gain is beyond noise, fitted on all battles.

    The blend is tried where there is a floor to blend with, and chosen if it is asked for and beats beyond noise what
    is chosen without it.

    Args:
        predicted: (n_battles, 3) probabilities, or with the floor's beside (n_battles, 6).
        true: (n_battles, 3) outcomes.
        groups: (n_battles,) labels; a group is never calibrated by itself.
        blend: whether it is asked for.
    """
    stated = predicted[:, :3]
    if len(np.unique(groups)) < 2 * FOLDS:
        return Choice(NONE, {}, f"left as it is: fewer than {2 * FOLDS} prompts to fit on", stated)
    methods = [method for method in METHODS if METHODS[method].columns <= predicted.shape[1]]
    crossed = {method: cross_fit(method, predicted, true, groups) for method in methods}
    tried = {method: paired_difference(crossed[method], stated, true, groups) for method in methods}
    best = min((method for method in methods if method != BLEND), key=lambda method: tried[method]["value"])
    if tried[best]["high"] < 0:
        choice = Choice(fit(best, predicted, true), tried, f"applied: {_told(best, tried[best])}", crossed[best])
    else:
        verdict = f"left as it is: at best, {_told(best, tried[best])}, which is not beyond noise"
        choice = Choice(NONE, tried, verdict, stated)
    if BLEND not in methods:
        return choice
    further = paired_difference(crossed[BLEND], choice.cross_fitted, true, groups)
    if blend and further["high"] < 0:
        return Choice(
            fit(BLEND, predicted, true), tried, f"applied: {_told(BLEND, tried[BLEND])}", crossed[BLEND], further
        )
    verdict = f"{choice.verdict}; not blended, which is no better beyond noise" if blend else choice.verdict
    return replace(choice, verdict=verdict, blended=further)


def _told(method: str, change: dict[str, float]) -> str:
    return f"{method} changes the log loss by {change['value']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]"


def save(calibrator: Calibrator, path: Path) -> None:
    """Write a calibrator as JSON."""
    write_text(path, json.dumps(asdict(calibrator)) + "\n")


def load(path: Path) -> Calibrator:
    """Return the calibrator of a file; none where there is no file.

    Raises:
        InputError: not such a file.
    """
    if not path.is_file():
        return NONE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        calibrator = Calibrator(content["method"], tuple(map(float, content["parameters"])))
        if calibrator != NONE and len(calibrator.parameters) != len(METHODS[calibrator.method or ""].start):
            raise ValueError(f"{len(calibrator.parameters)} parameters")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: no calibrator can be read there; run `rewardmodel evaluate` on the run again"
        ) from error
    return calibrator


def reliability(predicted: np.ndarray, true: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """Return confidence against hit rate of the likeliest outcome, by equal-width bins that hold battles.

    Returns:
        For each bin `low`, `high` (of confidence), `battles`, mean `confidence`, `hit_rate` and its Wilson interval
        `hit_low`, `hit_high` (95 %).
    """
    confidence, hit = predicted.max(axis=1), predicted.argmax(axis=1) == true.argmax(axis=1)
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    result = []
    for one in np.unique(number):
        here = number == one
        count, rate = int(here.sum()), float(hit[here].mean())
        low, high = wilson_interval(rate, count)
        facts = {"low": one / bins, "high": (one + 1) / bins, "battles": count}
        result.append(
            {**facts, "confidence": float(confidence[here].mean()), "hit_rate": rate, "hit_low": low, "hit_high": high}
        )
    return result
