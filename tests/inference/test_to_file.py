import shutil

import pandas as pd
import pytest
from builders import battle_frame, write_csv

from rewardmodel.battles import OUTCOMES
from rewardmodel.config.loader import dump_recipe
from rewardmodel.errors import InputError
from rewardmodel.inference import predict as inference
from rewardmodel.inference.battles import battles_to_predict, check_time_limit, check_weights
from rewardmodel.inference.to_file import predict_to_file
from rewardmodel.predictions import build_predictions, read_predictions


@pytest.fixture
def run(recipe):
    """Return a folder that looks like a run until its model is loaded."""
    (recipe.run_folder / "model").mkdir(parents=True)
    (recipe.run_folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return recipe.run_folder


@pytest.fixture
def battles(tmp_path):
    return write_csv(battle_frame(3, seed=1), tmp_path / "battles.csv")


@pytest.fixture
def predicted(monkeypatch):
    """Let `predict` return a table without a model, and return what it was called with."""
    calls = []

    def predict(runs, battles, recipes, weights, *, work, time_limit):
        calls.append((runs, recipes, weights, time_limit))
        (work / ("0" * 16 + "-" + "0" * 16)).mkdir(parents=True)
        return build_predictions(battles, pd.DataFrame([[0.5, 0.3, 0.2]] * len(battles)).to_numpy())

    monkeypatch.setattr(inference, "predict", predict)
    return calls


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_predictions_are_returned_and_written_and_shards_are_removed(run, battles, predicted, tmp_path, ending):
    output = tmp_path / "out" / f"x{ending}"
    overrides = ["--inference.swap_tta", "none"]
    table = predict_to_file(str(run), str(battles), output, overrides=overrides, weights=[2], time_limit=5)
    [(runs, recipes, weights, limit)] = predicted
    assert (runs, weights, limit, recipes[0].inference.swap_tta) == ([run], [2], 5, "none")
    assert list(output.parent.iterdir()) == [output]
    if ending == ".parquet":
        pd.testing.assert_frame_equal(read_predictions(output), table)
    else:
        written = pd.read_csv(output, dtype={"id": str})
        assert list(written) == ["id", *OUTCOMES]
        assert written["id"].tolist() == table["id"].tolist()


def test_what_is_wrong_is_found_before_anything_is_predicted_in_the_order_it_is_given(
    run, battles, predicted, tmp_path
):
    sample = tmp_path / "sample.csv"
    write_csv(pd.DataFrame({"id": ["other"], **dict.fromkeys(OUTCOMES, 0.3)}), sample)
    nowhere, output = tmp_path / "nowhere", tmp_path / "x.csv"
    given = {"runs": nowhere, "battles": tmp_path / "none.csv", "output": tmp_path / "x.json", "weights": [1, 2]}
    given |= {"sample_submission": sample, "time_limit": -1, "overrides": ["--inference.swap_tt=none"]}
    steps = [
        ("neither .parquet nor .csv", {"output": tmp_path}),
        ("neither .parquet nor .csv", {"output": output}),
        ("weights: 2 for 1 run", {"weights": [1]}),
        ("time limit: -1", {"time_limit": 1}),
        ("nowhere: no recipe.yaml there", {"runs": run}),
        ("did you mean 'inference.swap_tta'", {"overrides": []}),
        ("none.csv: no such file", {"battles": battles}),
        ("sample.csv: id '", {"sample_submission": None}),
    ]
    for message, change in steps:
        with pytest.raises(InputError, match=message.replace(".", r"\.")):
            predict_to_file(**given)
        given |= change
    assert not predicted
    predict_to_file(**given)
    assert output.is_file()


def test_a_folder_is_not_written_over(run, battles, predicted, tmp_path):
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        predict_to_file(run, battles, tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("weights", "message"), [([1], "1 for 2 runs"), ([0, 0], "not all of them 0"), ([1, float("nan")], "from 0")]
)
def test_weights_that_make_no_mean_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        check_weights(weights, 2)


def test_weights_are_equal_by_default():
    assert check_weights(None, 3) == [1, 1, 1]
    assert check_weights([2, 0], 2) == [2, 0]


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_a_time_limit_is_a_number_of_seconds(seconds):
    with pytest.raises(InputError, match="give seconds, from 0"):
        check_time_limit(seconds)
    check_time_limit(None)
    check_time_limit(0)


def test_a_part_that_was_not_kept_is_refused(run):
    with pytest.raises(InputError, match=r"its data\.holdout is 0"):
        battles_to_predict(run, "holdout")
    assert len(battles_to_predict(run, "validation")) == 12
    shutil.rmtree(run)


def test_a_csv_of_chosen_and_rejected_says_which_response_is_chosen(run, predicted, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pd.DataFrame({"prompt": list("pqr"), "chosen": "good", "rejected": "bad"}).to_json(
        pairs, orient="records", lines=True
    )
    predict_to_file(run, str(pairs), tmp_path / "x.csv")
    written = pd.read_csv(tmp_path / "x.csv")
    assert list(written) == ["id", *OUTCOMES, "chosen", "p_chosen"]
    likely = written["chosen"].map({"model_a": 0.5, "model_b": 0.3})
    assert written["p_chosen"].tolist() == likely.tolist()


def test_a_sample_of_winners_is_answered_with_winners(run, battles, predicted, tmp_path):
    ids = pd.read_csv(battles, dtype={"id": str})["id"]
    sample = write_csv(pd.DataFrame({"id": ids, "winner": "model_b"}), tmp_path / "sample.csv")
    predict_to_file(run, str(battles), tmp_path / "x.csv", sample_submission=sample)
    written = pd.read_csv(tmp_path / "x.csv", dtype={"id": str})
    assert list(written) == ["id", "winner"]
    assert written["winner"].tolist() == ["model_a"] * len(ids)
    assert written["id"].tolist() == ids.tolist()
