import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import from_columns

from rewardmodel.battles import OUTCOMES
from rewardmodel.errors import InputError
from rewardmodel.metrics import class_prior, log_loss, summary
from rewardmodel.predictions import predicted, predictions_table, true_outcomes, write_predictions
from rewardmodel.report import evaluate, format_metrics


def table_of(as_given, exchanged=None, winners=None, groups=None):
    count = len(as_given)
    texts = {name: [["text"]] * count for name in ("prompt", "response_a", "response_b")}
    columns = {"id": [str(row) for row in range(count)], "group": groups or list(range(count)), **texts}
    if winners is not None:
        columns |= dict(zip(OUTCOMES, np.eye(3)[winners].T.tolist(), strict=True))
    return predictions_table(from_columns(columns, "made"), np.array(as_given), exchanged)


@pytest.fixture
def table():
    random = np.random.default_rng(0)
    as_given, exchanged = random.dirichlet([1, 1, 1], (2, 60))
    return table_of(as_given, exchanged, random.integers(3, size=60), np.repeat(np.arange(20), 3).tolist())


def test_evaluation_of_a_table_is_the_metrics_of_its_arrays(table):
    result = evaluate(table)
    true = true_outcomes(table)
    assert result["battles"] == 60
    assert result["groups"] == 20
    assert result["metrics"] == summary(predicted(table), true, table["group"].to_numpy())
    assert result["prior"] == log_loss(np.tile(class_prior(true), (60, 1)), true)
    assert result["orders"]["log_loss_ab"] == log_loss(predicted(table, "ab"), true)
    assert result["orders"]["log_loss_ba"] == log_loss(predicted(table, "ba"), true)
    assert list(result) == ["battles", "groups", "metrics", "prior", "orders"]


def test_evaluation_of_hand_made_predictions_is_known():
    result = evaluate(table_of([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], None, [0, 2]))
    assert result["metrics"]["log_loss"]["value"] == pytest.approx(1.5 * np.log(2))
    assert result["metrics"]["accuracy"]["value"] == 0.5
    assert result["prior"] == pytest.approx(np.log(2))


def test_flip_rate_is_how_often_the_likeliest_outcome_changes_with_the_order():
    as_given = np.array([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    exchanged = np.array([[0.5, 0.4, 0.1], [0.3, 0.6, 0.1], [0.3, 0.4, 0.3], [0.1, 0.2, 0.7]])
    assert evaluate(table_of(as_given, exchanged, [0, 1, 2, 0]))["orders"]["flip_rate"] == 0.25


def test_one_order_has_no_orders_to_compare():
    assert "orders" not in evaluate(table_of([[0.5, 0.3, 0.2]], None, [0]))


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


def test_run_folder_is_evaluated_on_its_validation_and_keeps_the_metrics(tmp_path, table):
    write_predictions(table, tmp_path / "validation.parquet")
    result = evaluate(str(tmp_path))
    assert result == evaluate(table)
    assert json.loads((tmp_path / "metrics.json").read_text()) == result


def test_predictions_file_is_evaluated_and_nothing_written(tmp_path, table):
    path = tmp_path / "some.parquet"
    write_predictions(table, path)
    assert evaluate(path) == evaluate(table)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["", "absent.parquet"], ids=["folder without a run", "no file"])
def test_missing_predictions_are_refused_and_nothing_written(tmp_path, name):
    with pytest.raises(InputError, match=r"no predictions can be read there"):
        evaluate(tmp_path / name)
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
    gain = abs(result["prior"] - result["metrics"]["log_loss"]["value"])
    assert line.endswith(f"{result['prior']:.4f}   the model is {gain:.4f} {verdict}")


def test_report_has_a_line_for_each_metric_and_order(table):
    result = evaluate(table)
    first, *lines = format_metrics(result).splitlines()
    assert first == "60 battles of 20 prompts"
    starts = [
        "log_loss",
        "brier",
        "accuracy",
        "expected_calibration_error",
        "class prior",
        "log_loss, A",
        "verdict",
    ]
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f"  {start}")
    accuracy = result["metrics"]["accuracy"]
    assert f"{accuracy['value']:.4f}   95 % [{accuracy['low']:.4f}, {accuracy['high']:.4f}]" in lines[2]
    assert lines[-1].endswith(f" {100 * result['orders']['flip_rate']:.1f} %")


def test_evaluating_in_a_fresh_process_never_imports_torch(tmp_path, table):
    write_predictions(table, tmp_path / "validation.parquet")
    code = """if True:
        import sys
        from rewardmodel.report import evaluate, format_metrics
        print(format_metrics(evaluate(sys.argv[1])))
        print({"torch", "transformers", "trl"} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    *report, imported = done.stdout.splitlines()
    assert "\n".join(report) == format_metrics(evaluate(table))
    assert imported == "set()"


def test_table_may_come_from_elsewhere():
    columns = {
        "id": ["1"],
        "group": [0],
        **{name: [value] for name, value in zip(OUTCOMES, [1, 0, 0], strict=True)},
    }
    table = pd.DataFrame({**columns, "p_model_a": [0.5], "p_model_b": [0.25], "p_tie": [0.25]})
    assert evaluate(table)["metrics"]["log_loss"]["value"] == pytest.approx(np.log(2))
