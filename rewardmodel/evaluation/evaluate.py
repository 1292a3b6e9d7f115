"""Predictions with known outcomes in, everything that is measured of them out; needs no torch."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from rewardmodel import metrics
from rewardmodel.config.schema import InferenceConfig
from rewardmodel.errors import InputError
from rewardmodel.evaluation.bias import audit_bias, format_bias
from rewardmodel.evaluation.calibration import BLEND, BLENDED, NONE, Choice, choose, reliability, save
from rewardmodel.files import write_json
from rewardmodel.metrics import class_prior, log_loss, paired_difference, summarise
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

Facts = dict[str, Any]


def evaluate(predictions: str | Path | pd.DataFrame) -> Facts:
    """Return what is measured of predictions; of a run, its calibrator is chosen, too, and both are written to it.

    A run's calibrator is fitted on its calibration part, or across the groups of its validation fold; what is measured
    is what the run will predict: calibrated if that helps beyond noise, each battle by a calibrator that has not seen
    it.

    Args:
        predictions: a run folder (its validation predictions), a predictions file, or a table.

    Returns:
        `battles`, `groups`; `metrics`: name -> value, low, high (95 %, clustered by prompt group); `prior`: the log
        loss of these battles' own outcome shares; `floors`: name -> log_loss and difference (model minus floor) on the
        same battles; `calibration`, `reliability`, `confusion` (true by predicted outcome, battles), `spread` (the
        largest standard deviation over battles of a probability), `stated` (the mean probabilities); and the audits of
        `evaluation.bias`: `position`, `verbosity`, `models`, `slices`. None where it cannot be told.

    Raises:
        InputError: no such predictions, or outcomes that are not known.
    """
    if isinstance(predictions, pd.DataFrame):
        return _measure(check_columns(predictions, "predictions"), "predictions")
    path = Path(predictions)
    if not path.is_dir():
        return _measure(read_predictions(path), str(path))
    return measure_run(path)[0]


def measure_run(run: Path) -> tuple[Facts, pd.DataFrame]:
    """Return what `evaluate` does, and the table that was measured; write metrics.json and calibrator.json."""
    table = read_predictions(RunFolder(run).validation)
    require_outcomes(table, str(RunFolder(run).validation))
    choice, calibration = _calibrate(run, table)
    before = reliability(predicted(table), true_outcomes(table))
    table[list(PROBABILITIES)] = choice.cross_fitted
    facts = _measure(table, str(run), RunFolder(run).baselines)
    facts["calibration"] = calibration
    after = facts["reliability"]["before"] if calibration["applied"] else None
    facts["reliability"] = {"before": before, "after": after}
    save(choice.calibrator, RunFolder(run).calibrator)
    write_json(RunFolder(run).metrics, facts)
    return facts, table


def compare(first: str | Path | pd.DataFrame, second: str | Path | pd.DataFrame) -> dict[str, float]:
    """Return the log loss of the first predictions minus the second's on the same battles: value, low, high, p.

    Raises:
        InputError: the two are not of the same labelled battles.
    """
    tables = [_table(one) for one in (first, second)]
    other = tables[1].set_index("id")
    if len(tables[0]) != len(other) or set(tables[0]["id"]) != set(other.index):
        raise InputError(f"{_named(first)} and {_named(second)} are of different battles; predict the same with both")
    ids = tables[0]["id"]
    tables[1] = other.loc[ids].assign(id=ids.to_numpy()).reset_index(drop=True)
    true = true_outcomes(tables[0])
    if not np.allclose(true, true_outcomes(tables[1])):
        raise InputError(f"{_named(first)} and {_named(second)} have other outcomes; predict the same file with both")
    return paired_difference(predicted(tables[0]), predicted(tables[1]), true, tables[0]["group"].to_numpy())


def _named(given: str | Path | pd.DataFrame) -> str:
    return "a table" if isinstance(given, pd.DataFrame) else str(given)


def _table(given: str | Path | pd.DataFrame) -> pd.DataFrame:
    if isinstance(given, pd.DataFrame):
        table = check_columns(given, "predictions")
        require_outcomes(table)
        return table
    path = Path(given)
    table = read_predictions(RunFolder(path).validation if path.is_dir() else path)
    require_outcomes(table, str(path))
    if path.is_dir():
        table[list(PROBABILITIES)] = _calibrate(path, table)[0].cross_fitted
    return table


def _calibrate(run: Path, table: pd.DataFrame) -> tuple[Choice, Facts]:
    """Return the run's calibration, with `cross_fitted` of the table's battles, and what is told about it."""
    raw, true = predicted(table), true_outcomes(table)
    own_part = RunFolder(run).calibration.is_file()
    asked = _inference(run)
    part = read_predictions(RunFolder(run).calibration) if own_part else table
    known, beside = (_known(run, one) for one in (part, table))
    if asked["calibrate"] and asked["blend"] and 3 in (known.shape[1], beside.shape[1]):
        raise InputError(
            f"{run}: inference.blend: the floor {BLENDED} did not predict its battles; train again with --resume, or "
            "set it to false"
        )
    choice = choose(known, true_outcomes(part), part["group"].to_numpy(), asked["blend"])
    if own_part:
        choice = replace(choice, cross_fitted=choice.calibrator(beside))
    if not asked["calibrate"]:
        verdict = f"switched off by inference.calibrate; else {choice.verdict}"
        choice = replace(choice, calibrator=NONE, verdict=verdict, cross_fitted=raw)
    applied = choice.calibrator != NONE
    groups = table["group"].to_numpy()
    return choice, {
        "method": choice.calibrator.method,
        "parameters": list(choice.calibrator.parameters),
        "applied": applied,
        "fitted_on": "calibration part" if own_part else "cross-fitted on validation",
        "tried": choice.tried,
        "verdict": choice.verdict,
        "blended": choice.blended,
        "before": {name: value for name, metric in metrics.METRICS.items() if np.isfinite(value := metric(raw, true))},
        "gain": paired_difference(choice.cross_fitted, raw, true, groups) if applied else None,
    }


def _inference(run: Path) -> dict[str, Any]:
    """Return the recipe's inference, read as YAML, because the recipe's own reader needs torch."""
    defaults = asdict(InferenceConfig())
    try:
        recipe = yaml.safe_load(RunFolder(run).recipe.read_text(encoding="utf-8"))
        return defaults | recipe["inference"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return defaults


def _known(run: Path, table: pd.DataFrame) -> np.ndarray:
    """Return what a run predicts of a table's battles, with the floor's beside where it is known, (n, 3) or (n, 6)."""
    if "floor_p_tie" in table:
        return stack_baseline(table)
    if not RunFolder(run).baselines.is_file():
        return predicted(table)
    floors = _read_floors(RunFolder(run).baselines)
    if f"{BLENDED}_p_tie" not in floors or not table["id"].isin(floors.index).all():
        return predicted(table)
    return stack_baseline(with_baseline(table, predicted(floors.loc[table["id"]], BLENDED)))


def _measure(table: pd.DataFrame, where: str, floors: Path | None = None) -> Facts:
    true, probabilities, groups = require_outcomes(table, where), predicted(table), table["group"].to_numpy()
    likeliest = 3 * true.argmax(axis=1) + probabilities.argmax(axis=1)
    return {
        "battles": len(table),
        "groups": int(table["group"].nunique()),
        "metrics": summarise(probabilities, true, groups),
        "prior": log_loss(np.broadcast_to(class_prior(true), true.shape), true),
        "floors": _floors(table, floors) if floors is not None and floors.is_file() else None,
        "calibration": None,
        "reliability": {"before": reliability(probabilities, true), "after": None},
        "spread": float(probabilities.std(axis=0).max()),
        "stated": probabilities.mean(axis=0).tolist(),
        "confusion": np.bincount(likeliest, minlength=9).reshape(3, 3).tolist(),
        **audit_bias(table),
    }


def _floors(table: pd.DataFrame, path: Path) -> Facts:
    """Return the floors' log loss on the table's battles, and the model's difference to each."""
    floors = _read_floors(path)
    if not table["id"].isin(floors.index).all():
        raise InputError(f"{path}: not of the battles that were validated; delete it, or run again")
    floors = floors.loc[table["id"]]
    true, model, groups = true_outcomes(table), predicted(table), table["group"].to_numpy()
    result = {}
    for name in sorted({column.removesuffix("_p_tie") for column in floors.columns if column.endswith("_p_tie")}):
        floor = predicted(floors, name)
        measured = summarise(floor, true, groups)["log_loss"]
        result[name] = {"log_loss": measured, "difference": paired_difference(model, floor, true, groups)}
    return dict(sorted(result.items(), key=lambda item: -item[1]["log_loss"]["value"]))


def _read_floors(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path).set_index("id")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: no floors can be read there; delete it, or run again") from error


def format_metrics(facts: Facts) -> str:
    """Return what `evaluate` found as lines for a terminal."""
    lines = [f"{facts['battles']} battles of {facts['groups']} prompts"]
    for name, metric in facts["metrics"].items():
        lines.append(f"  {name:<28}{metric['value']:.4f}   95 % [{metric['low']:.4f}, {metric['high']:.4f}]")
    if facts["floors"] is None:
        gain = facts["prior"] - facts["metrics"]["log_loss"]["value"]
        verdict = f"the model is {abs(gain):.4f} {'better' if gain >= 0 else 'WORSE'}"
        lines.append(f"  {'class prior, log_loss':<28}{facts['prior']:.4f}   {verdict}")
    for name, floor in (facts["floors"] or {}).items():
        lines.append(
            f"  {f'floor {name}, log_loss':<28}{floor['log_loss']['value']:.4f}   {_verdict(floor['difference'])}"
        )
    if facts["calibration"]:
        lines.append(f"  calibration: {facts['calibration']['verdict']}")
        if change := facts["calibration"]["blended"]:
            used = "applied" if facts["calibration"]["method"] == BLEND else "not applied"
            lines.append(f"  blended with the {BLENDED} floor: {_change(change)} against calibration alone; {used}")
    if facts["position"]:
        lines.append(f"  {'verdict flips with order':<28}{100 * facts['position']['flip_rate']['value']:.1f} %")
    return "\n".join(lines)


def format_evaluation(facts: Facts) -> str:
    """Return what `evaluate` found, audits of bias included, as lines for a terminal."""
    return "\n\n".join([format_metrics(facts), *_by_subset(facts), format_bias(facts)])


def _by_subset(facts: Facts) -> list[str]:
    """Return the accuracy by source of chosen/rejected data, which has no ties, as RewardBench states it."""
    subsets = [one for one in (facts["slices"]["source"] or []) if one["accuracy_decided"]]
    if sum(facts["confusion"][2]) or not subsets:
        return []
    lines = ["how often what was chosen is likelier, by source"]
    for one in subsets:
        value, low, high = (one["accuracy_decided"][name] for name in ("value", "low", "high"))
        lines.append(f"  {one['name']:<28}{value:.4f}   95 % [{low:.4f}, {high:.4f}]   {one['battles']} battles")
    return ["\n".join(lines)]


def format_difference(difference: dict[str, float]) -> str:
    """Return what `compare` found as a line for a terminal."""
    value, low, high = (difference[name] for name in ("value", "low", "high"))
    word = "better" if value < 0 else "worse"
    noise = "beyond noise" if high < 0 or low > 0 else "within noise"
    measured = f"{value:+.4f}, 95 % [{low:+.4f}, {high:+.4f}], p = {difference['p']:.3f}"
    return f"log loss {measured}: the first is {word}, {noise}"


def _change(difference: dict[str, float]) -> str:
    value, low, high = (difference[name] for name in ("value", "low", "high"))
    return f"changes the log loss by {value:+.4f} [{low:+.4f}, {high:+.4f}]"


def _verdict(difference: dict[str, float]) -> str:
    """Return a paired difference as words: negative means that the model is better."""
    value, low, high = (difference[name] for name in ("value", "low", "high"))
    word = "better" if value < 0 else "WORSE"
    noise = "" if high < 0 or low > 0 else ", within noise"
    return f"the model is {abs(value):.4f} {word} [{low:+.4f}, {high:+.4f}]{noise}"
