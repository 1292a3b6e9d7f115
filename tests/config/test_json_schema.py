from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from rewardmodel.config.json_schema import choices, help_text, recipe_keys, recipe_schema, type_name
from rewardmodel.config.loader import dump_recipe
from rewardmodel.config.schema import Recipe
from rewardmodel.data.formats import FORMATS
from rewardmodel.model.families import IMPLEMENTATIONS
from rewardmodel.model.weights import PACKAGED
from rewardmodel.objectives import OBJECTIVES
from rewardmodel.prompt.template import CHAT, TEMPLATES

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


@pytest.fixture(scope="module")
def validator():
    return Draft202012Validator(recipe_schema())


def test_the_schema_is_one():
    Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if path.parent.name != "accelerate"], ids=lambda path: path.stem
)
def test_every_recipe_is_valid(path, validator):
    validator.validate(yaml.safe_load(path.read_text()))


def test_a_resolved_recipe_is_valid(validator):
    validator.validate(yaml.safe_load(dump_recipe(Recipe())))


@pytest.mark.parametrize(
    "text",
    [
        "modle: {lora_r: 3}",
        "model: {lora_rr: 3}",
        "model: {lora_init: pissa}",
        "model: {lora_r: many}",
        "model: {lora_r: 1.5}",
        "model: {dtype: float8}",
        "trainer: {learning_rat: 1.0}",
        "trainer: {bf16: true}",
        "trainer: {seed: null}",
        "data: {train: [{paht: a.csv}]}",
        "data: {train: [{weight: 2}]}",
        "data: train.csv",
    ],
)
def test_wrong_keys_and_values_are_not(text, validator):
    assert not validator.is_valid(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        "data: {train: [a.csv, {path: b.csv, columns: {prompt: question, id: null}}], test: null}",
        "trainer: {lr_scheduler_type: one of a newer release, lr_scheduler_kwargs: {num_cycles: 2}, max_steps: 5}",
        "model: {lora_target_modules: [q_proj]}",
        "{}",
    ],
)
def test_what_the_loader_takes_is_valid(text, validator):
    validator.validate(yaml.safe_load(text))


def test_types_choices_defaults_and_texts_are_there():
    model = recipe_schema()["properties"]["model"]["properties"]
    assert model["lora_r"] == {"type": "integer", "default": 16, "description": "Rank of LoRA."}
    assert model["dtype"]["enum"] == ["auto", "bfloat16", "float16", "float32"]
    trainer = recipe_schema()["properties"]["trainer"]["properties"]
    assert (trainer["learning_rate"]["default"], trainer["learning_rate"]["type"]) == (2e-4, "number")
    assert "cosine" in choices(trainer["lr_scheduler_type"])


def test_the_text_of_a_key_names_what_its_table_has():
    keys = recipe_keys()
    tables = {
        ("objective", "name"): OBJECTIVES,
        ("prompt", "template"): [*TEMPLATES, CHAT],
        ("model", "model_name_or_path"): PACKAGED,
        ("model", "attn_implementation"): IMPLEMENTATIONS,
    }
    texts = {place: keys[place[0]]["properties"][place[1]]["description"] for place in tables}
    source = recipe_schema()["$defs"]["Source"]["properties"]["format"]["description"]
    for text, names in [*((texts[place], tables[place]) for place in tables), (source, FORMATS)]:
        assert [name for name in names if name not in text] == []
        assert "rewardmodel." not in text


def test_a_key_is_described_for_help():
    model = recipe_schema()["properties"]["model"]["properties"]
    assert help_text(model["bnb_4bit_quant_type"]) == "4-bit data type. (one of nf4, fp4; default: nf4)"
    assert help_text(model["lora_r"]) == "Rank of LoRA. (default: 16)"
    assert help_text(model["lora_target_modules"]).endswith(
        "default: all of attention and MLP, by the backbone's family."
    )
    names = ("dtype", "lora_r", "lora_target_modules", "use_dora")
    assert [type_name(model[name]) for name in names] == ["CHOICE", "INT", "LIST|all-linear|null", "BOOL"]
    assert choices(model["use_dora"]) == ["true", "false"]
    assert choices(model["lora_r"]) is None
