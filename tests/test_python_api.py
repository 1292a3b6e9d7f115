"""What Python callers may give: paths, names, dicts, tables; and what they get for something else."""

from pathlib import Path

import pandas as pd
import pytest
from builders import battle_frame, small_recipe, with_trainer

import rewardmodel
from rewardmodel import load_recipe, predict
from rewardmodel.config.loader import as_recipe, dump_recipe
from rewardmodel.config.schema import Recipe
from rewardmodel.errors import InputError


@pytest.fixture(scope="module")
def run(backbone, tmp_path_factory):
    """Return the folder of a run that was trained from the path of a recipe, on a list of dicts."""
    folder = tmp_path_factory.mktemp("api")
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(with_trainer(small_recipe(backbone("llama"), folder), max_steps=1)))
    return rewardmodel.train(path, battle_frame().to_dict("records"))[0]


def test_a_run_is_trained_from_a_path_on_dicts_and_predicts_dicts(run, capsys):
    battles = battle_frame(2, seed=3).drop(columns=["winner_model_a", "winner_model_b", "winner_tie"])
    table = predict(run, battles)
    pd.testing.assert_frame_equal(predict(run, battles.to_dict("records")), table)
    one = predict(str(run), battles.to_dict("records")[3])
    assert one["p_tie"].tolist() == pytest.approx(table["p_tie"].tolist()[3:4], abs=1e-5)
    assert load_recipe(run / "recipe.yaml").data.train == "<list>"
    assert capsys.readouterr().err == "", "bars of libraries"


@pytest.mark.parametrize("name", ["train", "run", "prepare", "doctor", "train_folds", "train_fold"])
@pytest.mark.parametrize("given", [3, None, pd.DataFrame(), ["quickstart"]])
def test_what_is_no_recipe_is_a_type_error_with_a_sentence(name, given, tmp_path):
    more = {"prepare": [tmp_path], "train_fold": [0]}.get(name, [])
    with pytest.raises(
        TypeError, match=f"a path, the name of a packaged recipe or a dict, not {type(given).__name__}$"
    ):
        getattr(rewardmodel, name)(given, *more)


@pytest.mark.parametrize(
    "call",
    [
        lambda given: predict(given, "sample"),
        lambda given: rewardmodel.predict_to_file(given, "sample", "x.csv"),
        rewardmodel.report,
        lambda given: rewardmodel.export(given, "x"),
        rewardmodel.reward_function,
    ],
)
@pytest.mark.parametrize("given", [3, None, Recipe(), [Path("x"), 3]])
def test_what_is_no_run_is_a_type_error_with_a_sentence(call, given):
    with pytest.raises(TypeError, match="a run is given as the path of its folder, or several as a list, not "):
        call(given)


def test_no_runs_are_refused():
    with pytest.raises(InputError, match="runs: an empty list; give at least one run folder"):
        predict([], "sample")


@pytest.mark.parametrize("given", [3, None, {"p_tie": [1]}])
def test_what_are_no_predictions_is_a_type_error_with_a_sentence(given):
    for call in (rewardmodel.evaluate, lambda given: rewardmodel.compare(given, given)):
        with pytest.raises(TypeError, match="predictions are a run folder, a predictions file or a DataFrame, not "):
            call(given)


def test_a_recipe_is_its_path_its_name_its_sections_or_itself(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {lora_r: 3}\n")
    assert as_recipe(path) == as_recipe(str(path)) == load_recipe(path)
    assert as_recipe("quickstart") == load_recipe("quickstart")
    assert as_recipe({"model": {"lora_r": 3}, "data": {"train": tmp_path}}).data.train == str(tmp_path)
    recipe = Recipe()
    assert as_recipe(recipe) is recipe
    with pytest.raises(InputError, match=r"^recipe: unknown key 'model\.lora_rr' \(did you mean 'model\.lora_r'"):
        as_recipe({"model": {"lora_rr": 3}})


@pytest.mark.parametrize(
    "overrides", [{"trainer.max_steps": 3}, {"trainer": {"max_steps": 3}}, ["--trainer.max_steps", "3"]]
)
def test_overrides_are_words_or_a_dict(overrides):
    assert load_recipe({}, overrides).trainer["max_steps"] == 3


def test_an_override_may_be_a_source():
    recipe = load_recipe("quickstart", {"data.train": {"path": Path("x.csv"), "weight": 2}})
    assert (recipe.data.train.path, recipe.data.train.weight) == ("x.csv", 2.0)


@pytest.mark.parametrize("overrides", ["--trainer.max_steps 3", 3])
def test_other_overrides_are_a_type_error_with_a_sentence(overrides):
    with pytest.raises(TypeError, match=r"overrides are a dict, like .*, or a list of words, like "):
        load_recipe({}, overrides)
