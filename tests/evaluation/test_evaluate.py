import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from builders import from_columns

from rewardmodel.battles import OUTCOMES
from rewardmodel.errors import InputError
from rewardmodel.evaluation.bootstrap import summarise
from rewardmodel.evaluation.calibration import NO_CALIBRATION, Calibrator, cross_fit, fit_calibrator, load_calibrator
from rewardmodel.evaluation.evaluate import (
    compare,
    evaluate,
    evaluate_run,
    evaluated_predictions,
    format_difference,
    format_evaluation,
    format_metrics,
)
from rewardmodel.evaluation.results import Difference, read_evaluation
from rewardmodel.metrics import class_prior, log_loss
from rewardmodel.predictions import (
    PROBABILITIES,
    build_predictions,
    predicted,
    read_predictions,
    true_outcomes,
    with_baseline,
    write_predictions,
)


def table_of(as_given, exchanged=None, winners=None, groups=None):
    count = len(as_given)
    texts = {name: [["text"]] * count for name in ("prompt", "response_a", "response_b")}
    columns = {"id": [str(row) for row in range(count)], "group": groups or list(range(count)), **texts}
    if winners is not None:
        columns |= dict(zip(OUTCOMES, np.eye(3)[winners].T.tolist(), strict=True))
    return build_predictions(from_columns(columns, "made"), np.array(as_given), exchanged)


@pytest.fixture
def table():
    random = np.random.default_rng(0)
    as_given, exchanged = random.dirichlet([1, 1, 1], (2, 60))
    return table_of(as_given, exchanged, random.integers(3, size=60), np.repeat(np.arange(20), 3).tolist())


def test_evaluation_of_a_table_is_the_metrics_of_its_arrays(table):
    result = evaluate(table)
    true = true_outcomes(table)
    assert result.battles == 60
    assert result.groups == 20
    assert result.metrics == summarise(predicted(table), true, table["group"].to_numpy())
    assert result.prior == log_loss(np.tile(class_prior(true), (60, 1)), true)
    assert result.baselines is result.calibration is None
    assert np.sum(result.confusion) == 60
    assert sum(one.battles for one in result.reliability.before) == 60
    assert json.loads(json.dumps(asdict(result), allow_nan=False)) == asdict(result)


def test_the_confusion_counts_true_by_predicted_outcomes():
    result = evaluate(table_of(np.eye(3)[[0, 0, 1, 2]] * 0.7 + 0.1, None, [0, 1, 1, 0]))
    assert result.confusion == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]


def test_evaluation_of_hand_made_predictions_is_known():
    result = evaluate(table_of([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], None, [0, 2]))
    assert result.metrics["log_loss"].value == pytest.approx(1.5 * np.log(2))
    assert result.metrics["accuracy"].value == 0.5
    assert result.prior == pytest.approx(np.log(2))


def test_flip_rate_is_how_often_the_likeliest_outcome_changes_with_the_order():
    as_given = np.array([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    exchanged = np.array([[0.5, 0.4, 0.1], [0.3, 0.6, 0.1], [0.3, 0.4, 0.3], [0.1, 0.2, 0.7]])
    assert evaluate(table_of(as_given, exchanged, [0, 1, 2, 0])).position.flip_rate.value == 0.25


def test_one_order_has_no_orders_to_compare():
    assert evaluate(table_of([[0.5, 0.3, 0.2]], None, [0])).position is None


@pytest.mark.parametrize("unknown", [slice(None), slice(1, 2)], ids=["all", "one"])
def test_unknown_outcomes_are_refused(table, unknown):
    table.loc[table.index[unknown], list(OUTCOMES)] = np.nan
    with pytest.raises(InputError, match=r"^predictions: the outcomes of these battles are not known"):
        evaluate(table)


def test_unlabelled_file_is_refused_by_its_name(tmp_path):
    path = tmp_path / "predictions.parquet"
    write_predictions(table_of([[0.5, 0.3, 0.2]]), path)
    with pytest.raises(InputError) as caught:
        evaluate(path)
    assert str(caught.value).startswith(f"{path}: the outcomes of these battles are not known")


def test_run_folder_is_evaluated_on_its_validation_and_nothing_written(tmp_path, table):
    write_predictions(table, tmp_path / "validation.parquet")
    result = evaluate(str(tmp_path))
    assert replace(result, calibration=None) == evaluate(table)
    assert not result.calibration.applied
    assert [path.name for path in tmp_path.iterdir()] == ["validation.parquet"]


def test_evaluating_a_run_writes_what_is_returned(tmp_path, table):
    write_predictions(table, tmp_path / "validation.parquet")
    result = evaluate_run(str(tmp_path))
    assert result == evaluate(tmp_path) == read_evaluation(tmp_path / "metrics.json")
    assert load_calibrator(tmp_path / "calibrator.json") == NO_CALIBRATION
    assert {path.name for path in tmp_path.iterdir()} == {"validation.parquet", "metrics.json", "calibrator.json"}


def test_predictions_file_is_evaluated_and_nothing_written(tmp_path, table):
    path = tmp_path / "some.parquet"
    write_predictions(table, path)
    assert evaluate(path) == evaluate(table)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["", "absent.parquet"], ids=["folder without a run", "no file"])
def test_missing_predictions_are_refused_and_nothing_written(tmp_path, name):
    for verb in (evaluate, evaluate_run):
        with pytest.raises(InputError, match=r"cannot be read as predictions"):
            verb(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_does_not_depend_on_the_index_of_the_table(table):
    assert evaluate(table.set_index(np.arange(60) * 2 + 7)) == evaluate(table)


def test_table_without_rows_is_refused(table):
    with pytest.raises(InputError):
        evaluate(table[:0])


@pytest.mark.parametrize(("sure_of", "verdict"), [([0, 1, 2, 0], "better"), ([1, 2, 0, 1], "WORSE")])
def test_report_says_whether_the_model_is_better_or_worse_than_the_prior(sure_of, verdict):
    result = evaluate(table_of(np.eye(3)[sure_of] * 0.7 + 0.1, None, [0, 1, 2, 0]))
    line = next(line for line in format_metrics(result).splitlines() if "class prior" in line)
    gain = abs(result.prior - result.metrics["log_loss"].value)
    assert line.endswith(f"{result.prior:.4f}   the model is {gain:.4f} {verdict}; too few prompts to tell")


def test_every_metric_has_a_line_with_its_interval(table):
    result = evaluate(table)
    lines = format_metrics(result).splitlines()
    assert lines[0] == "60 battles of 20 prompts"
    for (name, metric), line in zip(result.metrics.items(), lines[1:], strict=False):
        assert line.split()[0] == name
        assert line.endswith(f"{metric.value:.4f}   95 % [{metric.low:.4f}, {metric.high:.4f}]")


@pytest.fixture
def run(tmp_path):
    """Return a run folder whose 400 predictions put too little on the tie, with a prior for a baseline."""
    random = np.random.default_rng(5)
    logits = random.normal(size=(400, 3))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    winners = (true.cumsum(axis=1) > random.random((400, 1))).argmax(axis=1)
    spoilt = true * [1, 1, 0.2]
    spoilt /= spoilt.sum(axis=1, keepdims=True)
    table = table_of(spoilt, spoilt, winners)
    write_predictions(table, tmp_path / "validation.parquet")
    prior = np.tile(np.bincount(winners) / 400, (400, 1))
    baselines = pd.DataFrame(prior, columns=[f"prior_{name}" for name in PROBABILITIES])
    baselines.assign(id=table["id"])[::-1].to_parquet(tmp_path / "baselines.parquet")
    return tmp_path


def test_a_run_is_measured_with_the_calibration_that_helps_it(run):
    facts = evaluate_run(run)
    calibration = facts.calibration
    assert calibration.applied
    assert calibration.fitted_on == "cross-fitted on validation"
    raw = read_predictions(run / "validation.parquet")
    assert calibration.before["log_loss"] == log_loss(predicted(raw), true_outcomes(raw))
    gain = facts.metrics["log_loss"].value - calibration.before["log_loss"]
    assert gain == pytest.approx(calibration.gain.value)
    assert calibration.gain.below()
    assert facts.reliability.after is not None
    assert load_calibrator(run / "calibrator.json") == Calibrator(calibration.method, tuple(calibration.parameters))
    assert read_evaluation(run / "metrics.json") == facts
    measured = evaluated_predictions(run, facts)
    assert facts.metrics["log_loss"].value == log_loss(predicted(measured), true_outcomes(measured))


def test_a_calibration_part_is_what_the_calibrator_is_fitted_on(run):
    raw = read_predictions(run / "validation.parquet")
    write_predictions(raw[:200], run / "calibration.parquet")
    write_predictions(raw[200:], run / "validation.parquet")
    facts = evaluate_run(run)
    assert facts.battles == 200
    assert facts.calibration.fitted_on == "calibration part"
    calibrated = load_calibrator(run / "calibrator.json")(predicted(raw[200:]))
    np.testing.assert_array_equal(predicted(evaluated_predictions(run, facts)), calibrated)
    assert facts.metrics["log_loss"].value == pytest.approx(log_loss(calibrated, true_outcomes(raw[200:])))


def test_a_calibration_that_the_recipe_switches_off_is_not_measured(run):
    (run / "recipe.yaml").write_text("inference: {calibrate: false}\n")
    facts = evaluate_run(run)
    raw = read_predictions(run / "validation.parquet")
    assert facts.metrics["log_loss"].value == pytest.approx(log_loss(predicted(raw), true_outcomes(raw)))
    assert facts.calibration.verdict.startswith("switched off by inference.calibrate; else applied: ")
    assert evaluated_predictions(run, facts).equals(raw)
    assert load_calibrator(run / "calibrator.json") == NO_CALIBRATION


@pytest.fixture
def blended(run):
    """Return the run with a recipe that asks for the blend, and a baseline that knows what the model does not."""
    random = np.random.default_rng(1)
    raw = read_predictions(run / "validation.parquet")
    noisy = np.log(predicted(raw)) + random.normal(size=(400, 3))
    raw[list(PROBABILITIES)] = np.exp(noisy) / np.exp(noisy).sum(axis=1, keepdims=True)
    write_predictions(raw, run / "validation.parquet")
    baseline = 0.5 * true_outcomes(raw) + 0.5 * random.dirichlet([1, 1, 1], 400)
    baselines = pd.DataFrame(baseline, columns=[f"tfidf_{name}" for name in PROBABILITIES]).assign(id=raw["id"])
    baselines[::-1].to_parquet(run / "baselines.parquet")
    (run / "recipe.yaml").write_text("inference: {blend: true}\n")
    return run


def test_what_blending_changes_is_reported_whether_it_is_asked_for_or_not(blended):
    on = evaluate(blended)
    (blended / "recipe.yaml").write_text("inference: {blend: false}\n")
    off = evaluate(blended)
    change = on.calibration.blended
    assert off.calibration.blended == change
    assert change.below()
    losses = [facts.metrics["log_loss"].value for facts in (on, off)]
    assert losses[0] - losses[1] == pytest.approx(change.value)
    line = f"changes the log loss by {change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
    for facts, used in ((on, "applied"), (off, "not applied")):
        lines = format_metrics(facts).splitlines()
        assert f"  blended with the baseline tfidf: {line} compared with calibration alone; {used}" in lines
    (blended / "baselines.parquet").unlink()
    without = evaluate(blended)
    assert without.calibration.blended is None
    assert "blended" not in format_metrics(without)


def test_a_blend_is_measured_cross_fitted_and_written_down(blended):
    facts = evaluate_run(blended)
    raw, baselines = read_predictions(blended / "validation.parquet"), pd.read_parquet(blended / "baselines.parquet")
    both = np.hstack([predicted(raw), predicted(baselines.set_index("id").loc[raw["id"]], "tfidf")])
    expected = cross_fit("blend", both, true_outcomes(raw), raw["group"].to_numpy())
    assert facts.metrics["log_loss"].value == log_loss(expected, true_outcomes(raw))
    assert load_calibrator(blended / "calibrator.json") == fit_calibrator("blend", both, true_outcomes(raw))
    assert facts.calibration.method == "blend"
    assert compare(blended, raw).value == pytest.approx(facts.calibration.gain.value)
    (blended / "recipe.yaml").write_text("inference: {blend: true, calibrate: false}\n")
    assert evaluate_run(blended).calibration.verdict.startswith("switched off by inference.calibrate; else applied: b")
    assert load_calibrator(blended / "calibrator.json") == NO_CALIBRATION


def test_a_calibration_part_has_its_baseline_too(blended):
    raw, baselines = read_predictions(blended / "validation.parquet"), pd.read_parquet(blended / "baselines.parquet")
    baseline = predicted(baselines.set_index("id").loc[raw["id"]], "tfidf")
    write_predictions(raw[:200], blended / "calibration.parquet")
    write_predictions(raw[200:], blended / "validation.parquet")
    baselines[baselines["id"].isin(raw["id"][200:])].to_parquet(blended / "baselines.parquet")
    with pytest.raises(InputError, match=r"inference\.blend: the baseline tfidf did not predict its battles"):
        evaluate_run(blended)
    write_predictions(with_baseline(raw[:200], baseline[:200]), blended / "calibration.parquet")
    facts = evaluate_run(blended)
    both = np.hstack([predicted(raw), baseline])
    calibrator = fit_calibrator("blend", both[:200], true_outcomes(raw)[:200])
    assert load_calibrator(blended / "calibrator.json") == calibrator
    assert facts.metrics["log_loss"].value == log_loss(calibrator(both[200:]), true_outcomes(raw)[200:])


def test_baselines_of_other_battles_are_refused(run):
    baselines = pd.read_parquet(run / "baselines.parquet")
    baselines.assign(id=baselines["id"] + "x").to_parquet(run / "baselines.parquet")
    with pytest.raises(InputError, match=r"baselines\.parquet: not of the battles that were validated"):
        evaluate(run)


def test_a_table_without_a_column_is_refused_by_its_name(table):
    with pytest.raises(InputError, match="predictions: column 'group' is missing"):
        evaluate(table.drop(columns="group"))


def test_baselines_are_measured_on_the_same_battles_in_whatever_order_they_stand(run):
    facts = evaluate(run)
    baseline = facts.baselines["prior"]
    assert baseline.log_loss.value == pytest.approx(facts.prior)
    difference = facts.metrics["log_loss"].value - facts.prior
    assert baseline.difference.value == pytest.approx(difference)
    assert "baseline prior, log_loss" in format_metrics(facts)


def test_accuracy_by_source_is_reported_of_battles_that_were_all_decided(table):
    decided = pd.concat([table] * 2, ignore_index=True)
    decided["source"] = ["easy"] * 60 + ["hard"] * 60
    ahead = np.arange(120) < 60
    decided["winner_tie"], decided["winner_model_a"], decided["winner_model_b"] = 0.0, 1.0 * ahead, 1.0 * ~ahead
    decided[["p_model_a", "p_model_b", "p_tie"]] = [0.5, 0.3, 0.2]
    lines = format_evaluation(evaluate(decided)).splitlines()
    assert "  easy                        1.0000   no interval   60 battles" in lines
    assert "  hard                        0.0000   no interval   60 battles" in lines
    assert not any("by source" in line for line in format_evaluation(evaluate(table)).splitlines())


def test_a_comparison_is_paired_by_id(run, tmp_path):
    raw = read_predictions(run / "validation.parquet")
    worse = raw.copy()
    worse[list(PROBABILITIES)] = 0.5 * predicted(raw) + 0.5 / 3
    difference = compare(raw, worse[::-1])
    expected = log_loss(predicted(raw), true_outcomes(raw)) - log_loss(predicted(worse), true_outcomes(raw))
    assert difference.value == pytest.approx(expected)
    assert compare(run, run).value == 0
    assert format_difference(compare(run, run)) == "log loss +0.0000: no difference"


def test_differences_are_described_as_what_they_are():
    shown = {
        Difference(
            -0.02, -0.03, -0.01, 0.002
        ): "log loss -0.0200, 95 % [-0.0300, -0.0100], p = 0.002: the first is better, beyond noise",
        Difference(
            0.02, -0.03, 0.04, 0.4
        ): "log loss +0.0200, 95 % [-0.0300, +0.0400], p = 0.400: the first is worse, within noise",
        Difference(0.0169, None, None, None): "log loss +0.0169: the first is worse; too few prompts to tell",
        Difference(0.0, None, None, None): "log loss +0.0000: no difference",
    }
    for difference, line in shown.items():
        assert format_difference(difference) == line


def test_of_one_prompt_nothing_is_claimed(table):
    few = evaluate(table.assign(group=0))
    assert few.metrics["log_loss"].low is None
    assert "too few prompts to tell" in format_metrics(few)
    assert "no interval" in format_metrics(few)
    assert "[" not in format_metrics(few)


@pytest.mark.parametrize("change", [lambda table: table[1:], lambda table: table.assign(id=table["id"] + "x")])
def test_predictions_of_other_battles_are_not_compared(run, change):
    raw = read_predictions(run / "validation.parquet")
    with pytest.raises(InputError, match="different battles"):
        compare(raw, change(raw))


def test_predictions_with_other_outcomes_are_not_compared(run):
    raw = read_predictions(run / "validation.parquet")
    other = raw.assign(winner_model_a=raw["winner_model_b"], winner_model_b=raw["winner_model_a"])
    with pytest.raises(InputError, match="different outcomes"):
        compare(raw, other)


@pytest.mark.slow
def test_evaluating_in_a_fresh_process_never_imports_torch(tmp_path, table):
    write_predictions(table, tmp_path / "validation.parquet")
    code = """if True:
        import sys
        from rewardmodel.evaluation.evaluate import evaluate, format_evaluation
        print(format_evaluation(evaluate(sys.argv[1])))
        print({"torch", "transformers", "trl"} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    *report, imported = done.stdout.splitlines()
    assert "\n".join(report) == format_evaluation(evaluate(tmp_path))
    assert imported == "set()"


def test_table_may_come_from_elsewhere():
    columns = {
        "id": ["1"],
        "group": [0],
        **{name: [value] for name, value in zip(OUTCOMES, [1, 0, 0], strict=True)},
    }
    table = pd.DataFrame({**columns, "p_model_a": [0.5], "p_model_b": [0.25], "p_tie": [0.25]})
    assert evaluate(table).metrics["log_loss"].value == pytest.approx(np.log(2))
