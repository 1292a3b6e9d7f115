import json

import pytest

from rewardmodel.config.json_schema import recipe_keys
from rewardmodel.config.loader import as_recipe, load_recipe
from rewardmodel.config.ranges import RANGES
from rewardmodel.config.schema import DataConfig, Recipe
from rewardmodel.errors import InputError


def test_ranges_are_of_keys_that_are_there_and_hold_their_defaults():
    keys = recipe_keys()
    for key, allowed in RANGES.items():
        section, name = key.split(".")
        default = keys[section]["properties"][name]["default"]
        assert default is None or allowed.holds(default), key
        assert not allowed.holds(float("nan")), key


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.learning_rate", "-1e-4", r"trainer\.learning_rate: -0\.0001; give a finite number from 0"),
        ("trainer.learning_rate", ".inf", "trainer.learning_rate: inf; give a finite number"),
        ("trainer.max_steps", "0", "trainer.max_steps: 0; give at least 1, or -1"),
        ("trainer.battles_per_step", "0", "trainer.battles_per_step: 0; give at least 1"),
        ("data.folds", "0", "data.folds: 0; give at least 2"),
        ("data.fold", "-1", "data.fold: -1; give a number from 0"),
        ("data.holdout", "1.5", "data.holdout: 1.5; give a share from 0 to below 1"),
        ("data.limit", "-2", "data.limit: -2; give a positive number"),
        ("model.lora_dropout", "1", "model.lora_dropout: 1.0; give a share"),
        ("model.num_hidden_layers", "0", "model.num_hidden_layers: 0; give at least 1"),
        ("objective.temperature", "0", "objective.temperature: 0.0; give a number above 0"),
        ("prompt.max_length", "0", "prompt.max_length: 0; give at least 1"),
        ("inference.batch_tokens", "-5", "inference.batch_tokens: -5; give at least 1"),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused_as_the_recipe_is_read(key, value, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("")
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(path, [f"--{key}", value])
    assert str(caught.value).startswith(f"{path}: {key}: ")


def test_parts_that_leave_nothing_to_train_on_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"data\.calibration and data\.holdout: together 1 or more"):
        load_recipe({"data": {"calibration": 0.5, "holdout": 0.5}})


def test_a_recipe_in_python_is_checked_when_it_is_used():
    with pytest.raises(InputError, match=r"^recipe: data\.folds: 1; give at least 2"):
        as_recipe(Recipe(data=DataConfig(folds=1)))


@pytest.mark.parametrize("content", [{"num_hidden_layers": 30}, {"text_config": {"num_hidden_layers": 30}}])
def test_more_layers_than_the_backbones_folder_has_are_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = {"model_name_or_path": str(tmp_path), "num_hidden_layers": 99}
    with pytest.raises(InputError, match=r"model\.num_hidden_layers: 99, but the backbone has 30; set at most that"):
        load_recipe({"model": model})
    assert load_recipe({"model": model | {"num_hidden_layers": 30}}).model.num_hidden_layers == 30


@pytest.mark.parametrize("content", ["", "[]", '{"num_hidden_layers": "many"}', None])
def test_a_backbone_whose_layers_are_not_known_is_left_to_what_loads_it(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert load_recipe({"model": {"model_name_or_path": str(tmp_path), "num_hidden_layers": 99}})
