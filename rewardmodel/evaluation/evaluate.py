"""Predictions with known outcomes in, an `Evaluation` out; of a run also its calibrator. Needs no torch."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from rewardmodel.config.schema import InferenceConfig
from rewardmodel.errors import InputError, plural
from rewardmodel.evaluation.bias import audit_bias, format_bias
from rewardmodel.evaluation.bootstrap import paired_difference, summarise
from rewardmodel.evaluation.calibration import (
    BLEND,
    BLEND_BASELINE,
    NO_CALIBRATION,
    CalibrationChoice,
    Calibrator,
    choose_calibrator,
    cross_fit,
    reliability_bins,
    save_calibrator,
)
from rewardmodel.evaluation.results import BaselineResult, CalibrationResult, Difference, Evaluation, Reliability
from rewardmodel.evaluation.slices import constant_log_loss
from rewardmodel.files import write_json
from rewardmodel.metrics import METRICS, class_prior
from rewardmodel.predictions import (
    PROBABILITIES,
    check_columns,
    predicted,
    read_predictions,
    require_outcomes,
    stack_baseline,
    true_outcomes,
    with_baseline,
)
from rewardmodel.run_folder import RunFolder


def evaluate(predictions: str | Path | pd.DataFrame) -> Evaluation:
    """Evaluate predictions with known outcomes; write nothing.

    A run is evaluated as it will predict: a calibrator is fitted on the run's calibration part, or across the prompt
    groups of its validation fold, and applied if it helps beyond noise. Each battle is calibrated by a calibrator that
    has not seen it. The run's baselines are measured on the same battles.

    Args:
        predictions: a run folder (its validation predictions), a predictions file, or a table.

    Raises:
        InputError: no such predictions, or outcomes that are not known.
    """
    if isinstance(predictions, pd.DataFrame):
        return _measure(check_columns(predictions, "predictions"), "predictions")
    path = _as_path(predictions)
    if path.is_dir():
        return _evaluate_folder(RunFolder(path))[0]
    return _measure(read_predictions(path), str(path))


def evaluate_run(run: str | Path) -> Evaluation:
    """Evaluate a run folder as `evaluate` does, and write metrics.json and calibrator.json there.

    Raises:
        InputError: no such run, or outcomes that are not known.
    """
    files = RunFolder(Path(run))
    evaluation, calibrator = _evaluate_folder(files)
    save_calibrator(calibrator, files.calibrator)
    write_json(files.metrics, asdict(evaluation))
    return evaluation


def evaluated_predictions(run: str | Path, evaluation: Evaluation) -> pd.DataFrame:
    """Return the validation predictions of a run as its evaluation measured them: calibrated where that was applied."""
    files, calibration = RunFolder(Path(run)), evaluation.calibration
    table = read_predictions(files.validation)
    if calibration is None or calibration.method is None:
        return table
    stacked = _stacked_predictions(files, table)
    if files.calibration.is_file():
        return _with_probabilities(table, Calibrator(calibration.method, tuple(calibration.parameters))(stacked))
    crossed = cross_fit(calibration.method, stacked, true_outcomes(table), table["group"].to_numpy())
    return _with_probabilities(table, crossed)


def compare(first: str | Path | pd.DataFrame, second: str | Path | pd.DataFrame) -> Difference:
    """Return the log loss of the first predictions minus the second's on the same battles.

    Args:
        first: a run folder (its validation predictions, calibrated), a predictions file, or a table.
        second: the same of another model.

    Raises:
        InputError: the two are not of the same labelled battles.
    """
    one, other = (_predictions_of(given) for given in (first, second))
    if len(one) != len(other) or set(one["id"]) != set(other["id"]):
        raise InputError(f"{_name(first)} and {_name(second)} are of different battles; predict one file with both")
    other = other.set_index("id").loc[one["id"]]
    true = true_outcomes(one)
    if not np.allclose(true, true_outcomes(other)):
        raise InputError(f"{_name(first)} and {_name(second)} have different outcomes; predict one file with both")
    return paired_difference(predicted(one), predicted(other), true, one["group"].to_numpy())


def _as_path(given: str | Path) -> Path:
    """Return the path of predictions.

    Raises:
        TypeError: something else was given.
    """
    if not isinstance(given, str | Path):
        kind = type(given).__name__
        raise TypeError(f"predictions are a run folder, a predictions file or a DataFrame, not {kind}")
    return Path(given)


def _name(given: str | Path | pd.DataFrame) -> str:
    return "a table" if isinstance(given, pd.DataFrame) else str(given)


def _predictions_of(given: str | Path | pd.DataFrame) -> pd.DataFrame:
    """Return labelled predictions; those of a run folder are calibrated as `evaluate` does it."""
    if isinstance(given, pd.DataFrame):
        table = check_columns(given, "predictions")
        require_outcomes(table)
        return table
    path = _as_path(given)
    table = read_predictions(RunFolder(path).validation if path.is_dir() else path)
    require_outcomes(table, str(path))
    return _with_probabilities(table, _calibrate(RunFolder(path), table)[0].cross_fitted) if path.is_dir() else table


def _with_probabilities(table: pd.DataFrame, probabilities: np.ndarray) -> pd.DataFrame:
    return table.assign(**dict(zip(PROBABILITIES, probabilities.T, strict=True)))


def _evaluate_folder(files: RunFolder) -> tuple[Evaluation, Calibrator]:
    """Return the evaluation of a run's validation predictions, and the calibrator that was chosen for the run."""
    table = read_predictions(files.validation)
    true = require_outcomes(table, str(files.validation))
    choice, calibration = _calibrate(files, table)
    calibrated = _with_probabilities(table, choice.cross_fitted)
    before, after = (reliability_bins(predicted(one), true) for one in (table, calibrated))
    evaluation = replace(
        _measure(calibrated, str(files.path)),
        baselines=_compare_with_baselines(calibrated, files.baselines) if files.baselines.is_file() else None,
        calibration=calibration,
        reliability=Reliability(before, after if calibration.applied else None),
    )
    return evaluation, choice.calibrator


def _calibrate(files: RunFolder, table: pd.DataFrame) -> tuple[CalibrationChoice, CalibrationResult]:
    """Return a run's calibration and the result to report; `cross_fitted` of the first is its validation battles."""
    raw, true = predicted(table), true_outcomes(table)
    inference = _inference_settings(files)

    # what the calibrator is fitted on: the calibration part, or the validation battles themselves
    separate = files.calibration.is_file()
    part = read_predictions(files.calibration) if separate else table
    fitted_on, stacked = (_stacked_predictions(files, one) for one in (part, table))
    if inference["calibrate"] and inference["blend"] and 3 in (fitted_on.shape[1], stacked.shape[1]):
        raise InputError(
            f"{files.path}: inference.blend: the baseline {BLEND_BASELINE} did not predict its battles; train again "
            "with --resume, or set it to false"
        )
    choice = choose_calibrator(fitted_on, true_outcomes(part), part["group"].to_numpy(), inference["blend"])
    if separate:
        choice = replace(choice, cross_fitted=choice.calibrator(stacked))
    if not inference["calibrate"]:
        verdict = f"switched off by inference.calibrate; else {choice.verdict}"
        choice = replace(choice, calibrator=NO_CALIBRATION, verdict=verdict, cross_fitted=raw)

    applied, groups = choice.calibrator != NO_CALIBRATION, table["group"].to_numpy()
    return choice, CalibrationResult(
        method=choice.calibrator.method,
        parameters=list(choice.calibrator.parameters),
        applied=applied,
        fitted_on="calibration part" if separate else "cross-fitted on validation",
        tried=choice.tried,
        verdict=choice.verdict,
        blended=choice.blended,
        before={name: value for name, metric in METRICS.items() if np.isfinite(value := metric(raw, true))},
        gain=paired_difference(choice.cross_fitted, raw, true, groups) if applied else None,
    )


def _inference_settings(files: RunFolder) -> dict[str, Any]:
    """Return the recipe's inference section; the defaults where the run has no recipe that can be read."""
    defaults = asdict(InferenceConfig())
    try:
        recipe = yaml.safe_load(files.recipe.read_text(encoding="utf-8"))
        return defaults | recipe["inference"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return defaults


def _stacked_predictions(files: RunFolder, table: pd.DataFrame) -> np.ndarray:
    """Return a run's predictions of a table's battles, (n, 3), or (n, 6) with those of the baseline, where known."""
    if "baseline_p_tie" in table:
        return stack_baseline(table)
    if not files.baselines.is_file():
        return predicted(table)
    baselines = _read_baselines(files.baselines)
    if f"{BLEND_BASELINE}_p_tie" not in baselines or not table["id"].isin(baselines.index).all():
        return predicted(table)
    return stack_baseline(with_baseline(table, predicted(baselines.loc[table["id"]], BLEND_BASELINE)))


def _measure(table: pd.DataFrame, where: str) -> Evaluation:
    """Return the evaluation of a table alone."""
    true, probabilities = require_outcomes(table, where), predicted(table)
    cells = 3 * true.argmax(axis=1) + probabilities.argmax(axis=1)  # of the confusion matrix
    return replace(
        audit_bias(table),
        metrics=summarise(probabilities, true, table["group"].to_numpy()),
        prior=constant_log_loss(class_prior(true), true),
        reliability=Reliability(reliability_bins(probabilities, true)),
        spread=float(probabilities.std(axis=0).max()),
        mean_probabilities=probabilities.mean(axis=0).tolist(),
        confusion=np.bincount(cells, minlength=9).reshape(3, 3).tolist(),
    )


def _compare_with_baselines(table: pd.DataFrame, path: Path) -> dict[str, BaselineResult]:
    """Return the baselines on the table's battles, the worst first."""
    baselines = _read_baselines(path)
    if not table["id"].isin(baselines.index).all():
        raise InputError(f"{path}: not of the battles that were validated; delete it, or run again")
    baselines = baselines.loc[table["id"]]
    true, model, groups = true_outcomes(table), predicted(table), table["group"].to_numpy()
    result = {}
    for name in sorted(name.removesuffix("_p_tie") for name in baselines.columns if name.endswith("_p_tie")):
        other = predicted(baselines, name)
        log_loss = summarise(other, true, groups)["log_loss"]
        result[name] = BaselineResult(log_loss, paired_difference(model, other, true, groups))
    return dict(sorted(result.items(), key=lambda item: -item[1].log_loss.value))


def _read_baselines(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path).set_index("id")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot read predictions of baselines; delete it, or run again") from error


def format_metrics(evaluation: Evaluation) -> str:
    """Return the metrics of an evaluation, compared with the baselines, as lines for a terminal."""
    lines = [f"{plural(evaluation.battles, 'battle')} of {plural(evaluation.groups, 'prompt')}"]
    metrics = evaluation.metrics or {}
    lines += [_line(name, str(metric)) for name, metric in metrics.items()]
    if evaluation.baselines is None and evaluation.prior is not None and "log_loss" in metrics:
        loss = metrics["log_loss"]
        gain = evaluation.prior - loss.value
        verdict = f"the model is {abs(gain):.4f} {'better' if gain >= 0 else 'WORSE'}"
        verdict += "; too few prompts to tell" if loss.low is None else ""
        lines.append(_line("class prior, log_loss", f" {evaluation.prior:.4f}   {verdict}"))
    for name, baseline in (evaluation.baselines or {}).items():
        cells = f" {baseline.log_loss.value:.4f}   {_describe_gain(baseline.difference)}"
        lines.append(_line(f"baseline {name}, log_loss", cells))
    if calibration := evaluation.calibration:
        lines.append(f"  calibration: {calibration.verdict}")
        if change := calibration.blended:
            used = "applied" if calibration.method == BLEND else "not applied"
            compared = f"{change.describe()} compared with calibration alone"
            lines.append(f"  blended with the baseline {BLEND_BASELINE}: {compared}; {used}")
    if evaluation.position:
        lines.append(_line("verdict flips with order", f" {100 * evaluation.position.flip_rate.value:.1f} %"))
    return "\n".join(lines)


def _line(name: str, cells: str) -> str:
    return f"  {name:<27}{cells}"


def format_evaluation(evaluation: Evaluation) -> str:
    """Return an evaluation, audits of bias included, as lines for a terminal."""
    return "\n\n".join([format_metrics(evaluation), *_format_sources(evaluation), format_bias(evaluation)])


def _format_sources(evaluation: Evaluation) -> list[str]:
    """Return the accuracy by source of chosen/rejected data, which has no ties, as RewardBench reports it."""
    sources = [one for one in (evaluation.slices or {}).get("source") or [] if one.accuracy_decided]
    ties = sum(evaluation.confusion[2]) if evaluation.confusion else 0
    if ties or not sources:
        return []
    lines = ["accuracy (the chosen response is the likelier one) by source"]
    lines += [_line(one.name, f"{one.accuracy_decided}   {plural(one.battles, 'battle')}") for one in sources]
    return ["\n".join(lines)]


def format_difference(difference: Difference) -> str:
    """Return what `compare` found as a line for a terminal."""
    word = "better" if difference.value < 0 else "worse"
    if difference.low is None:
        verdict = difference.judge() if difference.value == 0 else f"the first is {word}; {difference.judge()}"
        return f"log loss {difference.value:+.4f}: {verdict}"
    measured = f"{difference.value:+.4f}, 95 % {difference.bracket('+')}, p = {difference.p:.3f}"
    return f"log loss {measured}: the first is {word}, {difference.judge()}"


def _describe_gain(difference: Difference) -> str:
    """Return the difference to a baseline as words: negative means that the model is better."""
    word = "better" if difference.value < 0 else "WORSE"
    found = f"the model is {abs(difference.value):.4f} {word}"
    if difference.low is None:
        return difference.judge() if difference.value == 0 else f"{found}; {difference.judge()}"
    return f"{found} {difference.bracket('+')}{'' if difference.excludes() else ', within noise'}"
