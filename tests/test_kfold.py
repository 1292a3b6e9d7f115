import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from builders import battle_frame, write_csv
from safetensors.torch import load_file

from rewardmodel import files
from rewardmodel import kfold as crossfit
from rewardmodel.battles import OUTCOMES
from rewardmodel.cli import main
from rewardmodel.config.loader import dump_recipe
from rewardmodel.config.schema import (
    DataConfig,
    InferenceConfig,
    ModelConfig,
    ObjectiveConfig,
    PromptConfig,
    Recipe,
    Source,
)
from rewardmodel.data.formats import read_battles
from rewardmodel.data.splits import find_seen_battles, load_battles, split
from rewardmodel.errors import InputError
from rewardmodel.evaluation.baselines import baseline
from rewardmodel.evaluation.calibration import load_calibrator
from rewardmodel.evaluation.evaluate import compare, evaluate
from rewardmodel.evaluation.report import report
from rewardmodel.evaluation.results import read_evaluation
from rewardmodel.evaluation.text_regression import load_regression, predict_each
from rewardmodel.inference.predict import predict
from rewardmodel.kfold import GATHERED, train_fold, train_folds
from rewardmodel.predictions import predicted, read_predictions, write_predictions
from rewardmodel.run_folder import RunFolder, check_run, load_run_recipe
from rewardmodel.training.train import train
from rewardmodel.training.trainer import PreferenceTrainer

pytestmark = pytest.mark.slow  # every test trains, predicts with or exports a whole run

FOLDS = 3


def riddles(prompts, seed):
    """Return battles that share neither a prompt nor a pair of responses with others."""
    frame = battle_frame(prompts, seed)
    for name, old, new in (
        ("prompt", "question", "riddle"),
        ("response_a", "answer", "reply"),
        ("response_b", "answer", "reply"),
    ):
        frame[name] = frame[name].str.replace(old, new)
    return frame


def planted_frame():
    """Return battles of which some repeat the responses of another prompt, or its prompt in other letters."""
    frame = battle_frame(10)
    essay = json.dumps(["a long answer, word for word the same under two prompts, " * 3])
    frame.loc[[0, 21], "response_a"] = essay
    frame.loc[[0, 21], "response_b"] = json.dumps(["and another one that is the same under both of them, " * 3])
    frame.loc[5, "prompt"] = json.dumps(["QUESTION  number 8"])
    return frame


def recipe_in(folder, backbone, **data):
    return Recipe(
        data=DataConfig(**{"train": str(folder / "train.csv"), "folds": FOLDS, **data}),
        prompt=PromptConfig(max_length=160),
        model=ModelConfig(model_name_or_path=str(backbone("llama")), device="cpu", dtype="float32", lora_r=4),
        trainer={"output_dir": str(folder / "run"), "disable_tqdm": True, "learning_rate": 0.1, "max_steps": 4},
    )


@pytest.fixture
def small(backbone, tmp_path):
    """Return a recipe of three folds on a file of its own."""
    write_csv(planted_frame(), tmp_path / "train.csv")
    return recipe_in(tmp_path, backbone)


@pytest.fixture(autouse=True)
def no_charts(monkeypatch):
    """Write reports without their charts, which are most of the time; `finished` has real ones."""
    monkeypatch.setattr("rewardmodel.evaluation.report.render_run", lambda *_: "page")


@pytest.fixture(scope="module")
def finished(backbone, tmp_path_factory):
    """Return the recipe of a k-fold run, its folder and what train_folds found."""
    folder = tmp_path_factory.mktemp("crossfit")
    write_csv(planted_frame(), folder / "train.csv")
    recipe = recipe_in(folder, backbone, fold=2)
    return recipe, *train_folds(recipe)


def with_data(recipe, **keys):
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **keys))


def with_folder(recipe, folder):
    return dataclasses.replace(recipe, trainer={**recipe.trainer, "output_dir": str(folder)})


def weights(folder):
    return load_file(RunFolder(folder).model / "adapter_model.safetensors")


def test_the_folder_holds_a_run_a_fold_and_what_is_asked_of_a_run(finished):
    recipe, folder, _ = finished
    assert folder == recipe.run_folder
    names = {path.name for path in folder.iterdir()}
    gathered = {getattr(RunFolder(folder), name).name for name in GATHERED if name != "calibration"}
    assert names == {"recipe.yaml", *(f"fold-{fold}" for fold in range(FOLDS)), *gathered}
    for fold in range(FOLDS):
        own = RunFolder(folder).fold(fold).path
        assert load_run_recipe(own).data.fold == fold
        assert {"model", "validation.parquet", "metrics.json", "report.html", "training_keys.npy"} <= {
            path.name for path in own.iterdir()
        }
    assert load_run_recipe(folder).data.fold == 0
    facts = json.loads(RunFolder(folder).environment.read_text())
    assert facts["backbone"] == json.loads(RunFolder(folder / "fold-1").environment.read_text())["backbone"]


def test_every_battle_is_predicted_once_in_order_by_the_fold_that_held_it_out(finished):
    recipe, folder, _ = finished
    battles = load_battles(recipe.data)
    table = read_predictions(RunFolder(folder).validation)
    assert table["id"].tolist() == battles["id"][:] == planted_frame()["id"].tolist()
    assert table["fold"].tolist() == battles["fold"][:]
    assert set(table["fold"]) == set(range(FOLDS))
    for fold in range(FOLDS):
        own = read_predictions(RunFolder(folder).fold(fold).validation)
        rows = table[table["fold"] == fold]
        assert rows["id"].tolist() == own["id"].tolist()
        np.testing.assert_array_equal(predicted(rows), predicted(own))


def test_no_battle_is_predicted_by_a_fold_that_trained_on_its_group(finished):
    recipe, folder, _ = finished
    battles = load_battles(recipe.data)
    group, fold = (np.array(battles[name][:]) for name in ("group", "fold"))
    assert group[0] == group[21]
    assert group[5] == group[32]
    seen = find_seen_battles([RunFolder(folder).fold(number).path for number in range(FOLDS)], battles)
    np.testing.assert_array_equal(seen, fold != np.arange(FOLDS)[:, None])


def test_baselines_are_out_of_fold_too(finished):
    recipe, folder, metrics = finished
    expected, found = baseline(load_battles(recipe.data)), pd.read_parquet(RunFolder(folder).baselines)
    assert found["id"].tolist() == expected["id"].tolist()
    names = [name for name in found if name != "id"]
    np.testing.assert_allclose(found[names], expected[names], atol=1e-5)
    assert set(metrics.baselines) == {"prior", "length", "tfidf"}


def test_it_is_evaluated_reported_and_compared_as_any_run(finished):
    _, folder, metrics = finished
    assert metrics.battles == 40
    assert evaluate(folder) == metrics == read_evaluation(RunFolder(folder).metrics)
    assert report(folder) == RunFolder(folder).report
    assert compare(folder, folder).value == 0


def test_its_own_battles_are_predicted_by_the_fold_that_did_not_see_them(finished):
    recipe, folder, _ = finished
    table = read_predictions(RunFolder(folder).validation)
    for battles in ("validation", recipe.data.train):
        again = predict(folder, battles)
        assert again["id"].tolist() == table["id"].tolist()
        assert not again["seen"].any()
        np.testing.assert_allclose(predicted(again), predicted(table), atol=1e-6)
        np.testing.assert_allclose(predicted(again, "ba"), predicted(table, "ba"), atol=1e-6)


def test_new_battles_are_predicted_by_the_mean_of_the_folds(finished):
    _, folder, _ = finished
    new = riddles(3, seed=9)
    table = predict(folder, new)
    each = [predict(RunFolder(folder).fold(fold).path, new) for fold in range(FOLDS)]
    assert np.abs(predicted(each[0]) - predicted(each[1])).max() > 1e-3
    for order in ("", "ab", "ba"):
        mean = np.mean([predicted(one, order) for one in each], axis=0)
        np.testing.assert_allclose(predicted(table, order), mean, atol=1e-6)
    assert table["id"].tolist() == new["id"].tolist()
    assert not table["seen"].any()


def test_a_gathered_run_that_is_resumed_is_not_gathered_again(finished, monkeypatch):
    recipe, folder, metrics = finished
    monkeypatch.setattr(crossfit, "gather", None)
    assert train_folds(recipe, resume=True) == (folder, metrics)


@pytest.fixture(scope="module")
def blending(backbone, tmp_path_factory):
    """Return the folder of a k-fold run that blends, and what train_folds found."""
    folder = tmp_path_factory.mktemp("blending")
    write_csv(battle_frame(14), folder / "train.csv")
    recipe = dataclasses.replace(recipe_in(folder, backbone), inference=InferenceConfig(blend=True))
    return train_folds(recipe)


def test_a_k_fold_run_blends_with_the_baselines_of_its_folds(blending):
    folder, metrics = blending
    assert metrics.calibration.method == "blend"
    baselines = [load_regression(RunFolder(folder).fold(fold).blend_baseline) for fold in range(FOLDS)]
    assert not RunFolder(folder).blend_baseline.exists()
    new = riddles(3, seed=9)
    table, each = predict(folder, new), predict_each(baselines, read_battles(new))
    assert np.abs(each[0] - each[1]).max() > 1e-3
    np.testing.assert_allclose(predicted(table, "baseline"), each.mean(axis=0), atol=1e-12)
    model = (predicted(table, "ab") + predicted(table, "ba")) / 2
    calibrator = load_calibrator(RunFolder(folder).calibrator)
    np.testing.assert_allclose(predicted(table), calibrator(np.hstack([model, each.mean(axis=0)])), atol=1e-6)


def test_a_baseline_predicts_the_battles_alone_that_its_model_does(blending):
    folder, _ = blending
    table, baselines = predict(folder, "validation"), pd.read_parquet(RunFolder(folder).baselines)
    assert table["id"].tolist() == baselines["id"].tolist()
    np.testing.assert_allclose(predicted(table, "baseline"), predicted(baselines, "tfidf"), atol=1e-12)
    np.testing.assert_allclose(predicted(table), predicted(read_predictions(RunFolder(folder).validation)), atol=1e-6)


def test_folds_that_were_trained_without_a_baseline_get_one_when_they_are_to_blend(blending, tmp_path):
    folder = shutil.copytree(blending[0], tmp_path / "copy")
    kept = RunFolder(folder / "fold-0").blend_baseline.read_bytes()
    RunFolder(folder / "fold-1").blend_baseline.unlink()
    with pytest.raises(InputError, match=r"fold-1/blend_baseline\.npz: cannot read a baseline"):
        predict(folder, riddles(3, seed=9))
    recipe = with_folder(load_run_recipe(folder), folder)
    assert train_folds(recipe, resume=True)[1] == blending[1]
    assert RunFolder(folder / "fold-1").blend_baseline.is_file()
    assert RunFolder(folder / "fold-0").blend_baseline.read_bytes() == kept


def test_a_run_killed_between_folds_goes_on_to_the_same_result(small, finished, monkeypatch, tmp_path):
    ran = crossfit.run

    def killed(recipe, **how):
        if recipe.data.fold == 1:
            raise KeyboardInterrupt
        return ran(recipe, **how)

    with monkeypatch.context() as patch:
        patch.setattr(crossfit, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            train_folds(small)
    with pytest.raises(InputError, match="its folds are not gathered; finish with rewardmodel train RECIPE --fold all"):
        predict(small.run_folder, small.data.train)
    with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
        train_folds(small)
    before = (RunFolder(small.run_folder / "fold-0").model / "adapter_model.safetensors").stat().st_mtime_ns
    folder, metrics = train_folds(small, resume=True)
    assert (RunFolder(folder / "fold-0").model / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert metrics == finished[2]
    expected, found = (read_predictions(RunFolder(run).validation) for run in (finished[1], folder))
    pd.testing.assert_frame_equal(found, expected)
    for fold in range(FOLDS):
        one, other = (weights(RunFolder(run).fold(fold).path) for run in (finished[1], folder))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def copied(finished, tmp_path):
    recipe, folder, _ = finished
    shutil.copytree(folder, tmp_path / "copy")
    return with_folder(recipe, tmp_path / "copy")


def test_folds_that_machines_share_are_gathered(finished, tmp_path):
    recipe = copied(finished, tmp_path)
    for path in recipe.run_folder.iterdir():
        if path.name not in ("fold-0", "fold-2"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train_fold(recipe, 1) == recipe.run_folder / "fold-1"
    folder, metrics = train_folds(recipe, resume=True)
    assert metrics == finished[2]
    assert train_fold(recipe, 1, resume=True) == folder / "fold-1"  # done, and so nothing is touched
    assert RunFolder(folder).metrics.is_file()
    with pytest.raises(InputError, match=r"fold-1 already holds a run; continue it with --resume"):
        train_fold(recipe, 1)
    train_fold(recipe, 1, overwrite=True)
    assert not RunFolder(folder).metrics.exists()  # what was gathered was of another fold 1


def test_what_does_not_belong_together_is_refused(finished, tmp_path, monkeypatch):
    recipe = copied(finished, tmp_path)
    monkeypatch.setattr(crossfit, "run", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(InputError, match=r"the run there has data\.seed: 0, not 1"):
        train_folds(with_data(recipe, seed=1), resume=True)
    with pytest.raises(InputError, match=r"the run there has data\.seed: 0, not 1"):
        train_fold(with_data(recipe, seed=1), 0, overwrite=True)
    with pytest.raises(InputError, match=r"data\.fold: 3, but data\.folds makes folds 0 to 2"):
        train_fold(recipe, 3)
    with pytest.raises(
        InputError, match="the run there is of all folds; continue it with rewardmodel train --fold all"
    ):
        train(recipe, resume=True)
    environment = json.loads(RunFolder(recipe.run_folder / "fold-2").environment.read_text())
    environment["backbone"]["fingerprint"] = "another"
    RunFolder(recipe.run_folder / "fold-2").environment.write_text(json.dumps(environment))
    with pytest.raises(InputError, match=r"fold-2: trained on another backbone than .*fold-0"):
        train_folds(recipe, resume=True)
    table = read_predictions(RunFolder(recipe.run_folder / "fold-0").validation)
    environment["backbone"] = json.loads(RunFolder(recipe.run_folder / "fold-0").environment.read_text())["backbone"]
    RunFolder(recipe.run_folder / "fold-2").environment.write_text(json.dumps(environment))
    write_predictions(table, RunFolder(recipe.run_folder / "fold-2").validation)
    with pytest.raises(InputError, match="its folds did not predict each battle once"):
        train_folds(recipe, resume=True)


def test_battles_that_changed_since_a_fold_was_trained_are_refused(finished, tmp_path):
    recipe = copied(finished, tmp_path)
    changed = planted_frame()
    changed.loc[3, "response_a"] = json.dumps(["something else"])
    original = write_csv(planted_frame(), recipe.data.train)
    write_csv(changed, original)
    try:
        with pytest.raises(InputError, match="the run there was started with another data"):
            train_folds(recipe, resume=True)
    finally:
        write_csv(planted_frame(), original)


def test_a_run_of_one_fold_and_one_of_all_do_not_share_a_folder(small):
    train(small)
    with pytest.raises(InputError, match="already holds a run"):
        train_folds(small)
    for call in (lambda: train_folds(small, resume=True), lambda: train_fold(small, 1)):
        with pytest.raises(InputError, match=r"the run there is of one fold; name another folder .* --fold all"):
            call()
    with pytest.raises(InputError, match="replace it with --fold all --overwrite"):
        train_fold(small, 1, overwrite=True)


def test_overwriting_replaces_all_folds_and_a_mistake_costs_none(finished, tmp_path):
    recipe = copied(finished, tmp_path)
    broken = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, lora_first_layer=9))
    before = sorted(recipe.run_folder.rglob("*"))
    with pytest.raises(InputError, match="lora_first_layer"):
        train_folds(broken, overwrite=True)
    assert sorted(recipe.run_folder.rglob("*")) == before
    folder, metrics = train_folds(with_data(recipe, folds=2), overwrite=True)
    assert {path.name for path in folder.glob("fold-*")} == {"fold-0", "fold-1"}
    assert metrics.battles == 40
    assert load_run_recipe(folder).data.folds == 2


def die(*_, **__):
    raise KeyboardInterrupt


def die_at_folder(path, **_):
    if path.exists():
        die()


KILLS = {
    "while the old folds are removed": (files.shutil, "rmtree", die_at_folder),
    "before the run has a recipe": (crossfit, "write_text", die),
    "before the fold has a recipe": ("rewardmodel.run_folder.write_text", die),
    "before the fold knows its data": ("rewardmodel.training.train.write_environment", die),
    "in training": (PreferenceTrainer, "train", die),
}


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_an_overwriting_that_is_killed_leaves_nothing_of_the_old_folds_and_is_resumed(
    kill, finished, tmp_path, monkeypatch
):
    recipe = copied(finished, tmp_path)
    for fold in range(FOLDS):
        (RunFolder(recipe.run_folder).fold(fold).path / "old").write_text("")
    new = with_data(recipe, seed=1, fold=0)
    monkeypatch.setattr(*kill)
    with pytest.raises(KeyboardInterrupt):
        train_folds(new, overwrite=True)
    assert not list(recipe.run_folder.rglob("old"))
    assert not {path.name for path in recipe.run_folder.iterdir()} - {"recipe.yaml", "fold-0"}
    check_run(new, resume=True, overwrite=False, all_folds=True)
    if RunFolder(recipe.run_folder).fold(0).path.exists():
        check_run(with_folder(new, RunFolder(recipe.run_folder).fold(0).path), resume=True, overwrite=False)
        with pytest.raises(InputError, match=r"data\.seed: 1, not 0"):
            check_run(with_data(recipe, fold=0), resume=True, overwrite=False, all_folds=True)


def test_an_overwriting_that_is_killed_is_resumed_to_new_folds_alone(finished, tmp_path, monkeypatch):
    recipe = copied(finished, tmp_path)
    new = dataclasses.replace(with_data(recipe, folds=2), trainer={**recipe.trainer, "seed": 7})
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "train", die)
        with pytest.raises(KeyboardInterrupt):
            train_folds(new, overwrite=True)
    folder, metrics = train_folds(new, resume=True)
    assert metrics.battles == 40
    assert {path.name for path in folder.glob("fold-*")} == {"fold-0", "fold-1"}
    for run in (folder, *(RunFolder(folder).fold(fold).path for fold in range(2))):
        assert load_run_recipe(run).trainer["seed"] == 7
    assert (read_predictions(RunFolder(folder).validation)["fold"] < 2).all()


def test_one_fold_is_not_overwritten_by_another_recipe_than_the_others_have(finished, tmp_path, capsys):
    recipe = copied(finished, tmp_path)
    before = sorted(recipe.run_folder.rglob("*"))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = ["train", str(tmp_path / "recipe.yaml"), "--data.seed", "1", "--fold", "2", "--overwrite"]
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {recipe.run_folder}: the run there has data.seed: 0, not 1; folds share one recipe: give that one, or "
        "train all folds again with --fold all --overwrite"
    )
    assert sorted(recipe.run_folder.rglob("*")) == before


def test_a_fold_that_is_overwritten_and_killed_leaves_no_gathered_files_and_the_other_folds(
    finished, tmp_path, monkeypatch
):
    recipe = copied(finished, tmp_path)
    monkeypatch.setattr(PreferenceTrainer, "train", die)
    with pytest.raises(KeyboardInterrupt):
        train_fold(recipe, 2, overwrite=True)
    assert {path.name for path in recipe.run_folder.iterdir()} == {"recipe.yaml", "fold-0", "fold-1", "fold-2"}
    assert not RunFolder(recipe.run_folder / "fold-2").model.exists()
    with pytest.raises(InputError, match="its folds are not gathered"):
        predict(recipe.run_folder, recipe.data.train)


def test_nothing_is_written_for_a_recipe_that_cannot_be_trained(small):
    broken = dataclasses.replace(small, model=dataclasses.replace(small.model, lora_first_layer=9))
    with pytest.raises(InputError, match="lora_first_layer"):
        train_folds(broken)
    assert not small.run_folder.exists()


def test_a_data_frame_is_noted_and_its_calibration_part_predicted_by_the_mean_of_the_folds(small):
    folder, _ = train_folds(with_data(small, train="nowhere.csv", folds=2, calibration=0.3), planted_frame())
    assert load_run_recipe(folder / "fold-1").data.train == "<DataFrame>"
    kept = read_predictions(RunFolder(folder).calibration)
    each = [read_predictions(RunFolder(folder).fold(fold).calibration) for fold in range(2)]
    assert kept["id"].tolist() == each[0]["id"].tolist()
    np.testing.assert_allclose(predicted(kept), (predicted(each[0]) + predicted(each[1])) / 2, atol=1e-9)
    assert not set(kept["id"]) & set(read_predictions(RunFolder(folder).validation)["id"])


def test_a_student_learns_from_out_of_fold_labels_and_from_battles_without_votes(finished, backbone, tmp_path):
    recipe, teacher, _ = finished
    new = riddles(4, seed=5).drop(columns=list(OUTCOMES))
    files = [recipe.data.train, write_csv(new, tmp_path / "new.csv")]
    sources = []
    for number, file in enumerate(files):
        write_predictions(predict(teacher, str(file)), tmp_path / f"soft{number}.parquet")
        sources.append(Source(str(file), teacher=str(tmp_path / f"soft{number}.parquet")))
    student = with_data(with_folder(recipe, tmp_path / "student"), train=sources, fold=0)
    student = dataclasses.replace(student, objective=ObjectiveConfig("distillation", weight_votes=0.2))
    folder, parts = train(student)
    assert set(parts.training["source"]) == {"train", "new"}
    assert set(parts.validation["source"]) == {"train"}
    assert find_seen_battles([folder], split(load_battles(student.data), 0).training).all()
    assert load_run_recipe(folder).data.train == sources


def test_a_teacher_that_saw_a_group_is_refused(finished, tmp_path):
    recipe, teacher, _ = finished
    table = predict(RunFolder(teacher).fold(0).path, recipe.data.train)
    assert 0 < table["seen"].sum() < len(table)
    write_predictions(table, tmp_path / "soft.parquet")
    source = Source(recipe.data.train, teacher=str(tmp_path / "soft.parquet"))
    message = rf"trained on the prompts or responses of {table['seen'].sum()} of 40 battles"
    with pytest.raises(InputError, match=message):
        train(with_data(with_folder(recipe, tmp_path / "student"), train=source))
