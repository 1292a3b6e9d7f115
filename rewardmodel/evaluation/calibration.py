"""Predictions with known outcomes in, a calibrator out: fitted across groups, used only if it helps beyond noise.

Every method treats A and B alike, so that what is exact under a swap stays so. One method, the blend, also uses what a
baseline predicts of the same battles, in three further columns.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from rewardmodel.errors import InputError
from rewardmodel.evaluation.bootstrap import paired_difference
from rewardmodel.evaluation.results import Difference, ReliabilityBin
from rewardmodel.files import write_text
from rewardmodel.metrics import wilson_interval

CALIBRATION_FOLDS = 5
"""Parts of the groups in cross-fitting; each is calibrated by what was fitted on the others."""

_FREE, _WEIGHT = (-5.0, 5.0), (0.0, 5.0)
"""Bounds of a parameter: perfectly separated battles have no best temperature."""


@dataclass(frozen=True)
class CalibrationMethod:
    """A way to calibrate, with parameters to fit.

    Attributes:
        change: (log-probabilities (n, `columns`), parameters) -> (n, 3) logits of A, B, tie.
        start: parameters that change nothing.
        bounds: least and largest value of each parameter.
        columns: 3, or 6 with the baseline's log-probabilities.
    """

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
    centred = logs - logs[:, :2].mean(axis=1, keepdims=True)
    return centred * np.exp([lead, lead, tie]) + np.array([0, 0, mass])


def _blend(logs: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    model, baseline, mass = parameters
    return model * logs[:, :3] + baseline * logs[:, 3:] + np.array([0, 0, mass])


BLEND = "blend"
"""The method that mixes in a baseline."""

BLEND_BASELINE = "tfidf"
"""The baseline that it mixes in."""

CALIBRATION_METHODS = {
    "temperature": CalibrationMethod(_temperature, (0.0,), (_FREE,)),
    "tie_mass": CalibrationMethod(_tie_mass, (0.0,), (_FREE,)),
    "vector": CalibrationMethod(_vector, (0.0, 0.0, 0.0), (_FREE, _FREE, _FREE)),
    BLEND: CalibrationMethod(_blend, (1.0, 0.0, 0.0), (_WEIGHT, _WEIGHT, _FREE), columns=6),
}
"""By name. `temperature`: the logarithm of an inverse temperature. `tie_mass`: a constant added to the tie. `vector`:
both, with one temperature for A against B and another for the tie against their mean, which is the vector scaling of
Guo et al. (2017) that treats A and B alike. `blend`: weights, from 0, of the log-probabilities of the model and of the
baseline, and a constant added to the tie: a logarithmic opinion pool (Genest & Zidek 1986)."""


@dataclass(frozen=True)
class Calibrator:
    """A fitted method.

    Attributes:
        method: a name in `CALIBRATION_METHODS`; None: probabilities stay as they are.
        parameters: of the method, fitted.
    """

    method: str | None
    parameters: tuple[float, ...] = ()

    def __call__(self, predicted: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities, (n_battles, 3) float64.

        Args:
            predicted: (n_battles, 3) probabilities; (n_battles, 6) with those of the baseline, which the blend needs.
        """
        if self.method is None:
            return predicted[:, :3]
        logs = _log_probabilities(predicted, self.method)
        return np.exp(_log_softmax(CALIBRATION_METHODS[self.method].change(logs, np.array(self.parameters))))


def _log_probabilities(predicted: np.ndarray, method: str) -> np.ndarray:
    return np.log(np.clip(predicted[:, : CALIBRATION_METHODS[method].columns], 1e-12, None))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


NO_CALIBRATION = Calibrator(None)


def fit_calibrator(method: str, predicted: np.ndarray, true: np.ndarray) -> Calibrator:
    """Return the calibrator of a method that has the least log loss on these battles.

    Args:
        method: a name in `CALIBRATION_METHODS`.
        predicted: as a `Calibrator` takes it.
        true: (n_battles, 3) outcomes.
    """
    logs, form = _log_probabilities(predicted, method), CALIBRATION_METHODS[method]

    def loss(parameters: np.ndarray) -> float:
        return -float((true * _log_softmax(form.change(logs, parameters))).sum(axis=1).mean())

    found = minimize(loss, form.start, method="L-BFGS-B", bounds=form.bounds)
    return Calibrator(method, tuple(map(float, found.x)))


def cross_fit(method: str, predicted: np.ndarray, true: np.ndarray, groups: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return calibrated probabilities, (n_battles, 3), each battle's by a calibrator that saw no battle of its group.

    Args:
        method: a name in `CALIBRATION_METHODS`.
        predicted: as a `Calibrator` takes it.
        true: (n_battles, 3) outcomes.
        groups: (n_battles,) integer labels.
        seed: of the groups' assignment to folds.
    """
    _, members = np.unique(groups, return_inverse=True)
    folds = (np.random.default_rng(seed).permutation(members.max() + 1) % CALIBRATION_FOLDS)[members]
    result = np.empty((len(predicted), 3))
    for fold in range(CALIBRATION_FOLDS):
        rows = folds == fold
        result[rows] = fit_calibrator(method, predicted[~rows], true[~rows])(predicted[rows])
    return result


@dataclass(frozen=True)
class CalibrationChoice:
    """What was tried, and the calibrator that is used.

    Attributes:
        calibrator: fitted on all battles; `NO_CALIBRATION` where none helps.
        tried: cross-fitted log loss minus that before, by method.
        verdict: the reason in words.
        cross_fitted: (n_battles, 3) probabilities of the chosen method, or those given where none is used.
        blended: cross-fitted log loss of the blend minus that of what is chosen without it; None: not tried.
    """

    calibrator: Calibrator
    tried: dict[str, Difference]
    verdict: str
    cross_fitted: np.ndarray
    blended: Difference | None = None


def choose_calibrator(
    predicted: np.ndarray, true: np.ndarray, groups: np.ndarray, blend: bool = False
) -> CalibrationChoice:
    """Return the method with the least cross-fitted log loss, if its gain is beyond noise, fitted on all battles.

    The blend is tried where there is a baseline to blend with, and chosen if it is allowed and is better, beyond noise,
    than what is chosen without it.

    Args:
        predicted: (n_battles, 3) probabilities; (n_battles, 6) with those of the baseline.
        true: (n_battles, 3) outcomes.
        groups: (n_battles,) integer labels; no group is calibrated by itself.
        blend: whether the blend may be chosen.
    """
    uncalibrated = predicted[:, :3]
    if len(np.unique(groups)) < 2 * CALIBRATION_FOLDS:
        verdict = f"left as it is: fewer than {2 * CALIBRATION_FOLDS} prompts to fit on"
        return CalibrationChoice(NO_CALIBRATION, {}, verdict, uncalibrated)

    # every method that has its columns
    methods = [name for name, method in CALIBRATION_METHODS.items() if method.columns <= predicted.shape[1]]
    crossed = {method: cross_fit(method, predicted, true, groups) for method in methods}
    tried = {method: paired_difference(crossed[method], uncalibrated, true, groups) for method in methods}

    # the best without the blend
    best = min((method for method in methods if method != BLEND), key=lambda method: tried[method].value)
    if tried[best].below():
        verdict = f"applied: {best} {tried[best].describe()}"
        choice = CalibrationChoice(fit_calibrator(best, predicted, true), tried, verdict, crossed[best])
    else:
        verdict = f"left as it is: at best, {best} {tried[best].describe()}, which is not beyond noise"
        choice = CalibrationChoice(NO_CALIBRATION, tried, verdict, uncalibrated)
    if BLEND not in methods:
        return choice

    # the blend against it
    further = paired_difference(crossed[BLEND], choice.cross_fitted, true, groups)
    if blend and further.below():
        verdict = f"applied: {BLEND} {tried[BLEND].describe()}"
        return CalibrationChoice(fit_calibrator(BLEND, predicted, true), tried, verdict, crossed[BLEND], further)
    verdict = f"{choice.verdict}; not blended, which is no better beyond noise" if blend else choice.verdict
    return replace(choice, verdict=verdict, blended=further)


def save_calibrator(calibrator: Calibrator, path: Path) -> None:
    """Write a calibrator as JSON, e.g. {"method": "temperature", "parameters": [-0.1]}."""
    write_text(path, json.dumps(asdict(calibrator)) + "\n")


def load_calibrator(path: Path) -> Calibrator:
    """Return the calibrator of a file; `NO_CALIBRATION` where there is no file.

    Raises:
        InputError: the file does not hold a calibrator.
    """
    if not path.is_file():
        return NO_CALIBRATION
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        calibrator = Calibrator(content["method"], tuple(map(float, content["parameters"])))
        expected = CALIBRATION_METHODS[calibrator.method].start if calibrator.method is not None else ()
        if len(calibrator.parameters) != len(expected):
            raise ValueError(f"{len(calibrator.parameters)} parameters")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot read a calibrator; run `rewardmodel evaluate` on the run again") from error
    return calibrator


def reliability_bins(predicted: np.ndarray, true: np.ndarray, bins: int = 10) -> list[ReliabilityBin]:
    """Return the reliability diagram of the likeliest outcome: its confidence and hit rate by equal-width bins.

    Args:
        predicted: (n_battles, 3) probabilities.
        true: (n_battles, 3) outcomes.
        bins: of the confidence from 0 to 1; those without battles are left out.
    """
    confidence, hit = predicted.max(axis=1), predicted.argmax(axis=1) == true.argmax(axis=1)
    numbers = np.minimum((confidence * bins).astype(int), bins - 1)
    result = []
    for number in np.unique(numbers).tolist():
        here = numbers == number
        count, rate, mean = int(here.sum()), float(hit[here].mean()), float(confidence[here].mean())
        ends, wilson = (number / bins, (number + 1) / bins), wilson_interval(rate, count)
        result.append(ReliabilityBin(*ends, count, mean, rate, *wilson))
    return result
