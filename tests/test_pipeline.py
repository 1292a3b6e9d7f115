import dataclasses
import json
import platform
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import battle_frame, write_csv

from rewardmodel import pipeline
from rewardmodel.battles import OUTCOMES
from rewardmodel.config.schema import DataConfig, InferenceConfig, ModelConfig, PromptConfig, Recipe
from rewardmodel.data import folds
from rewardmodel.data.formats import read_battles
from rewardmodel.data.splits import fingerprint_parts, load_battles, split
from rewardmodel.errors import InputError
from rewardmodel.evaluation.calibration import load_calibrator
from rewardmodel.evaluation.results import read_evaluation
from rewardmodel.evaluation.text_regression import load_regression, predict_each
from rewardmodel.inference.predict import predict
from rewardmodel.predictions import average_probabilities, predicted, read_predictions
from rewardmodel.run_folder import RunFolder, load_run_recipe
from rewardmodel.training.train import train

pytestmark = pytest.mark.slow  # every test trains, predicts with or exports a whole run

IDS = ["0900", "7", "x-3", "0033", "12345678901234567890", "00", "a,b", "猫"]
"""Ids that would not survive being read as numbers, in no order."""


def unlabelled_frame():
    return battle_frame(2, seed=1).drop(columns=[*OUTCOMES, "model_a", "model_b"]).assign(id=IDS)


def sample_frame(ids):
    return pd.DataFrame({"id": ids, **dict.fromkeys(OUTCOMES, 1 / 3)})


@pytest.fixture(scope="module")
def finished(backbone, tmp_path_factory):
    """Return the recipe of a run with a test file and a sample submission, and what run() returned."""
    folder = tmp_path_factory.mktemp("pipeline")
    recipe = Recipe(
        data=DataConfig(
            train=str(write_csv(battle_frame(), folder / "train.csv")),
            test=str(write_csv(unlabelled_frame(), folder / "test.csv")),
            sample_submission=str(write_csv(sample_frame(IDS[::-1]), folder / "sample_submission.csv")),
            folds=4,
        ),
        prompt=PromptConfig(max_length=160),
        model=ModelConfig(model_name_or_path=str(backbone("llama")), device="cpu", dtype="float32", lora_r=4),
        trainer={"output_dir": str(folder / "run"), "disable_tqdm": True, "learning_rate": 0.1},
    )
    return recipe, *pipeline.run(recipe)


def with_data(recipe, **keys):
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **keys))


def quick(recipe, **keys):
    return dataclasses.replace(recipe, trainer={**recipe.trainer, "max_steps": 1, **keys})


def test_a_run_folder_holds_all_that_is_promised(finished):
    recipe, folder, _ = finished
    assert folder == recipe.run_folder
    names = {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")}
    evidence = {
        "validation.parquet",
        "baselines.parquet",
        "blend_baseline.npz",
        "calibrator.json",
        "metrics.json",
        "report.html",
    }
    assert (
        names
        == {"recipe.yaml", "environment.json", "training_keys.npy", "model", "predictions.parquet", "submission.csv"}
        | evidence
    )
    assert {"adapter_model.safetensors", "tokenizer.json"} <= {path.name for path in RunFolder(folder).model.iterdir()}
    assert load_run_recipe(folder) == recipe


def test_the_environment_tells_the_machine_the_backbone_and_the_data(finished):
    recipe, folder, _ = finished
    environment = json.loads(RunFolder(folder).environment.read_text())
    parts = split(load_battles(recipe.data), recipe.data.fold)
    assert environment["data"] == fingerprint_parts(parts)
    assert environment["backbone"]["name"] == recipe.model.model_name_or_path
    assert environment["compute"]["dtype"] == "float32"
    assert environment["compute"]["device"] == platform.machine()
    assert environment["training"]["battles"] == len(parts.training)
    assert environment["training"]["seconds"] > 0
    assert datetime.fromisoformat(environment["training"]["started"]).tzinfo is not None
    assert {"torch", "transformers", "trl", "peft"} <= set(environment["packages"])


def test_the_submission_has_the_ids_in_the_order_of_the_test_file_and_rows_that_sum_to_one(finished):
    submission = pd.read_csv(RunFolder(finished[1]).submission, dtype={"id": str})
    assert list(submission) == ["id", *OUTCOMES]
    assert submission["id"].tolist() == IDS
    values = submission[list(OUTCOMES)].to_numpy()
    assert ((values > 0) & (values < 1)).all()
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-9)


def test_the_submission_states_the_predictions(finished):
    _, folder, _ = finished
    table = read_predictions(RunFolder(folder).predictions)
    assert table["id"].tolist() == IDS
    submission = pd.read_csv(RunFolder(folder).submission, dtype={"id": str})
    np.testing.assert_allclose(submission[list(OUTCOMES)], predicted(table), rtol=1e-12)


def test_the_predictions_are_those_of_the_saved_model(finished):
    recipe, folder, _ = finished
    again = predict(folder, recipe.data.test)
    np.testing.assert_allclose(predicted(again), predicted(read_predictions(RunFolder(folder).predictions)), atol=1e-7)
    assert predicted(again).std(axis=0).max() > 1e-4


def test_validation_is_the_held_out_fold(finished):
    recipe, folder, _ = finished
    validation = split(load_battles(recipe.data), recipe.data.fold).validation
    table = read_predictions(RunFolder(folder).validation)
    assert table["id"].tolist() == validation["id"][:]
    assert len(table) == 12
    assert table[list(OUTCOMES)].to_numpy().sum() == 12


def test_metrics_are_returned_and_written_and_are_the_log_loss_of_the_validation_table(finished):
    _, folder, metrics = finished
    assert read_evaluation(RunFolder(folder).metrics) == metrics
    table = read_predictions(RunFolder(folder).validation)
    likelihood = (predicted(table) * table[list(OUTCOMES)].to_numpy()).sum(axis=1)
    assert metrics.metrics["log_loss"].value == pytest.approx(-np.log(likelihood).mean(), abs=1e-9)
    assert (metrics.battles, metrics.groups) == (12, 3)


def test_a_finished_run_is_judged_again_without_training(finished):
    recipe, folder, metrics = finished
    weights = (RunFolder(folder).model / "adapter_model.safetensors").stat().st_mtime_ns
    submission = RunFolder(folder).submission.read_bytes()
    RunFolder(folder).submission.unlink()
    assert pipeline.run(recipe, resume=True) == (folder, metrics)
    assert (RunFolder(folder).model / "adapter_model.safetensors").stat().st_mtime_ns == weights
    assert RunFolder(folder).submission.read_bytes() == submission


def test_without_a_test_file_there_is_no_submission(recipe):
    folder, metrics = pipeline.run(quick(recipe))
    assert metrics.battles == 12
    assert not RunFolder(folder).submission.exists()
    assert not RunFolder(folder).predictions.exists()


@pytest.mark.parametrize("key", ["train", "test", "sample_submission"])
def test_a_file_that_is_not_there_is_refused_before_anything_is_trained(recipe, tmp_path, key):
    keys = {"test": str(write_csv(unlabelled_frame(), tmp_path / "test.csv")), key: str(tmp_path / "nowhere.csv")}
    with pytest.raises(InputError, match=r"nowhere\.csv"):
        pipeline.run(with_data(recipe, **keys))
    assert not recipe.run_folder.exists()


def with_other_sample(recipe, tmp_path):
    test = write_csv(unlabelled_frame(), tmp_path / "test.csv")
    sample = write_csv(sample_frame([*IDS[1:], "other"]), tmp_path / "sample.csv")
    return with_data(quick(recipe), test=str(test), sample_submission=str(sample))


def test_a_sample_submission_of_other_ids_leaves_no_submission(recipe, tmp_path):
    with pytest.raises(InputError, match=r"sample\.csv: id '(0900|other)'"):
        pipeline.run(with_other_sample(recipe, tmp_path))
    assert not list(tmp_path.rglob("*submission.csv*"))


def test_a_sample_submission_of_other_ids_is_refused_before_anything_is_trained(recipe, tmp_path):
    with pytest.raises(InputError):
        pipeline.run(with_other_sample(recipe, tmp_path))
    assert not recipe.run_folder.exists()


def test_a_sample_submission_without_a_test_file_is_refused_before_anything_is_trained(recipe, tmp_path):
    sample = write_csv(sample_frame(IDS), tmp_path / "sample.csv")
    with pytest.raises(InputError, match=r"^data\.sample_submission: there is no data\.test to submit"):
        pipeline.run(with_data(quick(recipe), sample_submission=str(sample)))
    assert not recipe.run_folder.exists()


def test_a_finished_run_resumed_with_a_test_file_predicts_it_without_training(recipe, tmp_path):
    folder, metrics = pipeline.run(quick(recipe))
    weights = (RunFolder(folder).model / "adapter_model.safetensors").stat().st_mtime_ns
    test = write_csv(unlabelled_frame(), tmp_path / "test.csv")
    sample = write_csv(sample_frame(IDS), tmp_path / "sample.csv")
    wider = with_data(quick(recipe), test=str(test), sample_submission=str(sample))
    assert pipeline.run(wider, resume=True) == (folder, metrics)
    assert (RunFolder(folder).model / "adapter_model.safetensors").stat().st_mtime_ns == weights
    assert pd.read_csv(RunFolder(folder).submission, dtype={"id": str})["id"].tolist() == IDS


def test_a_finished_run_that_is_resumed_does_no_work_and_what_changed_is_done_again(finished, tmp_path, monkeypatch):
    recipe, folder, evaluation = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr("rewardmodel.model.loading.load_predictor", None)
        patch.setattr("rewardmodel.training.train.train", None)
        assert pipeline.run(recipe, resume=True) == (folder, evaluation)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    parts, test = pipeline.split(pipeline.load_battles(recipe.data), recipe.data.fold), pipeline.read_test(recipe.data)
    assert pipeline.is_trained(recipe, parts)
    assert pipeline.is_finished(recipe, parts, test)
    assert not pipeline.is_finished(recipe, parts, None)  # submission.csv would be removed
    assert not pipeline.is_finished(recipe, parts, test.select(range(4)))
    single = dataclasses.replace(recipe, inference=InferenceConfig(swap_tta="none"))
    assert not pipeline.is_trained(single, parts)
    with pytest.raises(InputError, match="started with another data"):
        pipeline.is_trained(recipe, parts._replace(training=parts.validation))
    report = RunFolder(folder).report
    moved = report.rename(tmp_path / "report.html")
    assert not pipeline.is_finished(recipe, parts, test)
    moved.rename(report)


def test_as_a_library_a_data_frame_is_trained_on_and_predicted(recipe, frame):
    recipe = with_data(quick(recipe), train="nowhere.csv")
    folder, parts = train(recipe, frame)
    assert len(parts.validation) == 12
    table = predict(folder, frame.head(5))
    assert table["id"].tolist() == frame["id"].head(5).tolist()


def test_the_package_offers_each_command_as_a_function():
    import rewardmodel

    assert rewardmodel.run is pipeline.run
    assert rewardmodel.train is train
    assert rewardmodel.predict is predict
    assert rewardmodel.InputError is InputError
    for name in rewardmodel.__all__:
        assert callable(getattr(rewardmodel, name)), name


def test_prepare_writes_the_battles_as_they_are_dealt_and_what_is_in_them(recipe, tmp_path):
    recipe = with_data(recipe, calibration=0.25)
    facts = pipeline.prepare(recipe, tmp_path / "prepared")
    assert {path.name for path in (tmp_path / "prepared").iterdir()} == {"battles.parquet", "audit.json"}
    assert json.loads((tmp_path / "prepared" / "audit.json").read_text()) == facts
    assert facts["battles"] == 48
    battles = pd.read_parquet(tmp_path / "prepared" / "battles.parquet")
    sizes = battles["fold"].value_counts()
    assert sizes.pop(folds.CALIBRATION_FOLD) == 12
    assert sorted(sizes) == [8, 8, 8, 12]


def test_prepared_battles_train_like_the_file_they_came_from(recipe, tmp_path):
    pipeline.prepare(recipe, tmp_path)
    again = with_data(recipe, train=str(tmp_path / "battles.parquet"))
    before, after = (split(load_battles(one.data), 0) for one in (recipe, again))
    assert fingerprint_parts(before) == fingerprint_parts(after)


def test_prepare_without_a_tokenizer_tells_the_rest(recipe, tmp_path, caplog):
    missing = dataclasses.replace(recipe, model=ModelConfig("nobody/nothing"))
    facts = pipeline.prepare(missing, tmp_path)
    assert "no tokenizer, so tokens are not counted: model.model_name_or_path: hub id 'nobody/nothing'" in caplog.text
    assert facts["battles"] == 48


def test_nothing_is_prepared_of_a_file_that_is_refused(recipe, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        pipeline.prepare(with_data(recipe, train="nowhere.csv"), tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


def test_battles_kept_for_calibration_are_predicted_and_the_holdout_only_when_asked(recipe):
    recipe = with_data(quick(recipe), folds=2, calibration=0.25, holdout=0.25)
    folder, _ = pipeline.run(recipe)
    parts = split(load_battles(recipe.data), 0)
    assert read_predictions(RunFolder(folder).calibration)["id"].tolist() == parts.calibration["id"][:]
    assert not list(folder.glob("*holdout*"))
    table = predict(folder, "holdout")
    assert table["id"].tolist() == parts.holdout["id"][:]
    again = predict(folder, "validation")
    assert not again["seen"].any()
    assert again.drop(columns="seen").equals(read_predictions(RunFolder(folder).validation))


@pytest.mark.parametrize("calibration", [0.0, 0.4])
def test_a_run_that_blends_does_so_with_its_test_battles(recipe, tmp_path, calibration):
    frame = battle_frame(60)
    recipe = with_data(
        quick(recipe),
        train=str(write_csv(frame, tmp_path / "many.csv")),
        test=str(write_csv(unlabelled_frame(), tmp_path / "test.csv")),
        calibration=calibration,
    )
    folder, metrics = pipeline.run(dataclasses.replace(recipe, inference=InferenceConfig(blend=True)))
    assert metrics.calibration.method == "blend"  # one step of a random model against words that tell it all
    assert metrics.calibration.gain.value < -0.5
    table = read_predictions(RunFolder(folder).predictions)
    battles = read_battles(recipe.data.test)
    np.testing.assert_array_equal(
        predicted(table, "baseline"), predict_each([load_regression(RunFolder(folder).blend_baseline)], battles)[0]
    )
    calibrator = load_calibrator(RunFolder(folder).calibrator)
    model = average_probabilities([predicted(table, "ab"), predicted(table, "ba")])
    both = np.hstack([model, predicted(table, "baseline")])
    np.testing.assert_allclose(predicted(table), calibrator(both), atol=1e-6)
    again = predict(folder, battles)
    np.testing.assert_allclose(predicted(again), predicted(table), atol=1e-6)
    baselines = pd.read_parquet(RunFolder(folder).baselines)
    own = predict(folder, "validation")
    np.testing.assert_allclose(predicted(own, "baseline"), predicted(baselines, "tfidf"), atol=1e-12)
    assert ("calibration.parquet" in {path.name for path in folder.iterdir()}) == bool(calibration)
    fitted = own if not calibration else predict(folder, "calibration")
    np.testing.assert_allclose(
        predicted(fitted), average_probabilities([predicted(fitted, "ab"), predicted(fitted, "ba")]), atol=1e-6
    )


def test_a_part_that_was_not_kept_cannot_be_predicted(finished):
    with pytest.raises(InputError, match=r"its data\.holdout is 0"):
        predict(finished[1], "holdout")


def test_a_part_of_battles_that_changed_since_is_refused(recipe):
    folder, _ = pipeline.run(quick(recipe))
    write_csv(battle_frame(13), Path(recipe.data.train))
    with pytest.raises(InputError, match="was started with another data"):
        predict(folder, "validation")
