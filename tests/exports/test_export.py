import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import battle_frame, write_csv
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file

from rewardmodel import export
from rewardmodel.battles import TEXT_COLUMNS
from rewardmodel.config.loader import load_recipe
from rewardmodel.config.schema import InferenceConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.evaluation.calibration import Calibrator, save_calibrator
from rewardmodel.exports import export as exports
from rewardmodel.exports import parity
from rewardmodel.exports.merge import merge_run
from rewardmodel.inference.battles import battles_to_compare
from rewardmodel.inference.predict import predict
from rewardmodel.kfold import train_folds
from rewardmodel.pipeline import run as run_recipe
from rewardmodel.predictions import predicted, read_predictions
from rewardmodel.run_folder import RunFolder


@pytest.fixture
def held_out(tmp_path_factory):
    """Return a file of 64 battles; an adapter is compared on battles only if some are given."""
    return write_csv(battle_frame(16, seed=8), tmp_path_factory.mktemp("battles") / "held_out.csv")


def test_an_adapter_is_a_copy_and_its_files_are_compared_without_a_prediction(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "predict_in_float32", None)
    facts = export(run_folder, tmp_path / "export", "adapter")
    model = RunFolder(run_folder).model
    assert facts == {"kind": "adapter", "files": len(list(model.iterdir()))}
    assert facts == json.loads((tmp_path / "export" / "parity.json").read_text())
    assert "byte for byte" in parity.format_parity(facts)
    assert "byte for byte" in (tmp_path / "export" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    name, copy = "adapter_model.safetensors", shutil.copytree(model, tmp_path / "copy")
    for content in (b"", (model / name).read_bytes()[:-1] + b"x"):
        (copy / name).write_bytes(content)
        with pytest.raises(FloatingPointError, match=name):
            parity.check_copy(model, copy)


@pytest.mark.parametrize(("kind", "dtype", "limit"), [("merged", "float32", 1e-4), ("adapter", None, 1e-4)])
def test_an_export_is_compared_with_its_run(kind, dtype, limit, run_folder, tmp_path, in_this_process, held_out):
    check_export(kind, dtype, limit, run_folder, tmp_path, held_out if kind == "adapter" else None)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "limit"), [("merged", "float32", 1e-4), ("adapter", None, 1e-4)])
def test_an_export_is_read_back_in_a_fresh_process(kind, dtype, limit, run_folder, tmp_path, held_out):
    check_export(kind, dtype, limit, run_folder, tmp_path, held_out if kind == "adapter" else None)


def check_export(kind, dtype, limit, run_folder, tmp_path, battles):
    facts = export(run_folder, tmp_path / "export", kind, dtype=dtype, battles=battles)
    assert facts["battles"] == 64
    assert facts["max_abs_dp"] <= limit
    assert facts == json.loads((tmp_path / "export" / "parity.json").read_text())
    assert facts["log_loss"]["export"] == pytest.approx(facts["log_loss"]["run"], abs=1e-4)
    assert (facts["plain"] is not None) == (kind == "merged")


@pytest.mark.slow
def test_predict_takes_an_export_like_a_run(run_folder, tmp_path, in_this_process):
    export(run_folder, tmp_path / "export", dtype="float32")
    battles = battle_frame(3, seed=5)
    found, expected = (predicted(predict(folder, battles)) for folder in (tmp_path / "export", run_folder))
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-4)
    made = load_recipe(tmp_path / "export" / "recipe.yaml")
    assert not made.model.load_in_4bit
    assert made.prompt == load_recipe(run_folder / "recipe.yaml").prompt


@pytest.mark.slow
def test_an_adapter_loads_with_peft_alone(untrained_run, tmp_path, in_this_process):
    folder = untrained_run("plain")
    export(folder, tmp_path / "export", "adapter")
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "export", num_labels=3)
    saved = load_file(folder / "model" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(model.get_submodule("base_model.model.score").modules_to_save["default"].weight, saved)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["rao_kupper", "davidson", "bradley_terry"])
def test_a_reward_model_keeps_its_probability_of_a_tie(objective, untrained_run, tmp_path, in_this_process):
    folder = untrained_run("rewards", objective, "response", load_in_4bit=True)
    facts = export(folder, tmp_path / "export", dtype="float32")
    assert facts["plain"]["max_abs_dp"] <= 1e-4
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["id2label"] == {"0": "reward"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"use_peft": False}, {"use_dora": True}, {"load_in_8bit": True}, {"load_in_fp8": True}]
)
def test_other_runs_are_merged(changes, untrained_run, tmp_path, in_this_process):
    folder = untrained_run("other", **changes)
    facts = export(folder, tmp_path / "export", dtype="float32")
    assert facts["limits"]["probability"] == 1e-4
    assert ("rounded_run" in facts) == bool({"load_in_8bit", "load_in_fp8"} & {*changes})
    if changes.get("load_in_fp8"):
        assert facts["max_abs_dp"] < 1e-4 < facts["rounded_run"]["max_abs_dp"]
        assert not load_recipe(tmp_path / "export" / "recipe.yaml").model.load_in_fp8
        assert "dequantised from fp8 e4m3" in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merged_4bit"])
def test_other_exports_of_a_run_in_fp8(kind, untrained_run, tmp_path, in_this_process, held_out):
    folder = untrained_run("other", load_in_fp8=True)
    facts = export(folder, tmp_path / "export", kind, battles=held_out)
    assert load_recipe(tmp_path / "export" / "recipe.yaml").model.load_in_fp8 == (kind == "adapter")
    assert facts["max_abs_dp"] < (1e-4 if kind == "adapter" else 0.5)
    battles = battle_frame(3, seed=5)
    found, expected = (predicted(predict(one, battles)) for one in (tmp_path / "export", folder))
    assert (found == expected).all() == (kind == "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_held_to_their_limit(dtype, run_folder, tmp_path, in_this_process):
    facts = export(run_folder, tmp_path / "export", dtype=dtype)
    assert 1e-6 < facts["max_abs_dp"] <= 0.02
    assert facts["precision"] == ("float32" if dtype == "float16" else dtype)


@pytest.mark.slow
def test_a_merge_to_4_bits_is_measured_and_not_limited(run_folder, tmp_path, in_this_process):
    facts = export(run_folder, tmp_path / "export", "merged_4bit")
    assert facts["limits"] is None
    assert facts["max_abs_dp"] > 1e-4
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["quantization_config"]["load_in_4bit"]
    table = predict(tmp_path / "export", battle_frame(2))
    assert len(table) == 8


def test_an_export_that_predicts_otherwise_leaves_no_folder(run_folder, tmp_path, in_this_process, monkeypatch):
    def broken(run, folder, dtype):
        merge_run(run, folder, dtype)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"] *= 3
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setitem(exports.EXPORTS, "merged", replace(exports.EXPORTS["merged"], write=broken))
    with pytest.raises(FloatingPointError, match="does not predict as the run does"):
        export(run_folder, tmp_path / "out" / "export")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_plain_transformers_that_pools_elsewhere_is_refused_unless_accepted(
    run_folder, tmp_path, in_this_process, monkeypatch
):
    right = in_this_process.load_plain

    def another_pad(job):
        model = right(job)
        model.config.pad_token_id = 5  # so that padding counts as the last token
        return model

    monkeypatch.setattr(in_this_process, "load_plain", another_pad)
    with pytest.raises(InputError, match="--rewardmodel-only"):
        export(run_folder, tmp_path / "export", dtype="float32")
    assert not (tmp_path / "export").exists()
    facts = export(run_folder, tmp_path / "export", dtype="float32", rewardmodel_only=True)
    assert facts["plain"] is None
    assert "Only rewardmodel loads this model" in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.slow
def test_a_head_that_plain_transformers_does_not_have_needs_no_code_for_rewardmodel(
    untrained_run, tmp_path, in_this_process
):
    folder = untrained_run("responses", pooling="responses")
    facts = export(folder, tmp_path / "export", dtype="float32", rewardmodel_only=True)
    assert facts["max_abs_dp"] <= 1e-4
    assert facts["plain"] is None
    assert not list((tmp_path / "export").glob("*.py"))
    assert "Only rewardmodel loads this model" in (tmp_path / "export" / "README.md").read_text()
    assert export(folder, tmp_path / "adapter", "adapter")["files"]


@pytest.mark.slow  # a fresh process and its imports
def test_a_fresh_process_without_rewardmodel_loads_a_head_by_its_own_code(untrained_run, tmp_path):
    folder = untrained_run("separate", "davidson", "response", pooling="last_and_responses", pair_ties=True)
    assert export(folder, tmp_path / "export", dtype="float32")["plain"]["max_abs_dp"] <= 1e-5


@pytest.mark.slow
def test_the_calibrator_goes_along_without_any_text(run_folder, tmp_path, in_this_process):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    save_calibrator(Calibrator("temperature", (0.4,)), run / "calibrator.json")
    export(run, tmp_path / "export", dtype="float32")
    part = read_predictions(tmp_path / "export" / "validation.parquet")
    assert not set(TEXT_COLUMNS) & set(part.columns)
    battles = battle_frame(3, seed=5)
    found, expected = (predicted(predict(folder, battles)) for folder in (tmp_path / "export", run))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    (tmp_path / "export" / "calibrator.json").unlink()
    assert np.abs(predicted(predict(tmp_path / "export", battles)) - expected).max() > 1e-3


@pytest.mark.slow
def test_a_run_that_blends_predicts_the_same_once_exported(recipe_of, tmp_path, in_this_process):
    recipe = replace(recipe_of("blends"), inference=InferenceConfig(blend=True))
    folder, metrics = run_recipe(recipe)
    assert metrics.calibration.method == "blend"
    facts = export(folder, tmp_path / "export", dtype="float32")
    assert facts["max_abs_dp"] <= 1e-4
    battles = battle_frame(3, seed=5)
    found, expected = (predict(one, battles) for one in (tmp_path / "export", folder))
    np.testing.assert_allclose(predicted(found), predicted(expected), atol=1e-4)
    np.testing.assert_array_equal(predicted(found, "baseline"), predicted(expected, "baseline"))
    assert np.abs(predicted(expected) - predicted(expected, "ab")).max() > 1e-2
    assert "applies blend" in (tmp_path / "export" / "README.md").read_text()
    RunFolder(folder).blend_baseline.unlink()
    with pytest.raises(InputError, match=r"blend_baseline\.npz: cannot read a baseline"):
        export(folder, tmp_path / "again", "adapter")
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_without_the_runs_data_the_sample_is_compared(untrained_run, tmp_path, in_this_process):
    folder = untrained_run("moved")
    Path(load_recipe(folder / "recipe.yaml").data.train).unlink()
    assert export(folder, tmp_path / "export", dtype="float32")["battles"] == 64
    ids = set(read_battles("sample")["id"])
    assert set(battles_to_compare(folder)["id"]) <= ids


class FakeHub:
    calls: list

    def __init__(self, token=None):
        self.token = token

    def whoami(self):
        return {"name": "me"}

    def repo_exists(self, name):
        return False

    def create_repo(self, name, private, exist_ok):
        self.calls.append(("create", name, private))

    def upload_folder(self, repo_id, folder_path):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.mark.slow
def test_an_export_is_pushed_to_the_hub_by_key(run_folder, tmp_path, in_this_process, monkeypatch):
    monkeypatch.setattr(FakeHub, "calls", [], raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    export(run_folder, tmp_path / "export", "adapter", push_to_hub="me/model")
    (first, second) = FakeHub.calls
    assert first == ("create", "me/model", True)
    assert second[:2] == ("upload", "me/model")
    assert {"README.md", "adapter_model.safetensors", "recipe.yaml", "parity.json"} <= set(second[2])


@pytest.mark.slow
def test_a_hub_that_refuses_leaves_the_export_and_says_so(run_folder, tmp_path, in_this_process, monkeypatch):
    def refuse(self, name, **_):
        raise OSError("401 unauthorised")

    monkeypatch.setattr(FakeHub, "create_repo", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    with pytest.raises(InputError, match=r"401 unauthorised.*is complete, upload it with: hf upload me/model "):
        export(run_folder, tmp_path / "export", "adapter", push_to_hub="me/model")
    assert (tmp_path / "export" / "README.md").is_file()


@pytest.mark.slow
def test_of_folds_the_mean_is_exported(recipe_of, tmp_path, in_this_process):
    recipe = recipe_of("folds", load_in_4bit=True, use_rslora=True)
    folds, _ = train_folds(replace(recipe, data=replace(recipe.data, folds=2)))
    facts = export(folds, tmp_path / "soup", "soup", dtype="float32")
    assert facts["max_abs_dp"] <= 1e-4
    assert facts["probability_average"]["max_abs_dp"] > 1e-6
    assert facts["probability_average"]["battles"] == 64
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "the mean of 2 runs" in card


def test_the_public_function_is_not_shadowed_by_a_module():
    import rewardmodel

    assert rewardmodel.export is exports.export


@pytest.mark.slow
def test_the_command_prints_what_was_measured(run_folder, tmp_path, in_this_process, capsys):
    from rewardmodel.cli import main

    ours = logging.getLogger("rewardmodel")
    before = ours.level, ours.handlers, ours.propagate
    try:
        assert main(["export", str(run_folder), "--output", str(tmp_path / "one"), "--dtype", "float32"]) == 0
        assert "parity on 64 battles" in capsys.readouterr().out
        assert main(["export", str(run_folder), "--output", str(tmp_path / "one")]) == 2
        assert "already exists" in capsys.readouterr().err
        assert main(["export", str(run_folder), "--output", str(tmp_path / "two"), "--base", "x"]) == 2
        assert "--base: only for --kind kaggle" in capsys.readouterr().err
    finally:
        ours.level, ours.handlers, ours.propagate = before
        ours.setLevel(before[0])
