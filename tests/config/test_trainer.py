import json
from dataclasses import MISSING
from enum import Enum
from typing import Any, Literal

import pytest

from rewardmodel.config import trainer
from rewardmodel.config.loader import load_recipe
from rewardmodel.config.schema import Source
from rewardmodel.config.trainer import (
    OWN_KEYS,
    TRAINER_DEFAULTS,
    TRAINER_REFUSED,
    find_trl_keys,
    installed_versions,
    property_of,
    read_trl_keys,
    trainer_default,
    trainer_keys,
)
from rewardmodel.config.types import schema_to_type, type_to_schema
from rewardmodel.errors import InputError


class Colour(Enum):
    RED = "red"
    GREEN = "green"


@pytest.mark.parametrize(
    ("hint", "schema", "back"),
    [
        (int, {"type": "integer"}, int),
        (bool | None, {"type": ["boolean", "null"]}, bool | None),
        (dict | str | None, {"type": ["object", "string", "null"]}, dict | str | None),
        (list[str], {"type": "array", "items": {"type": "string"}}, list[str]),
        (dict[str, bool], {"type": "object", "additionalProperties": {"type": "boolean"}}, dict[str, bool]),
        (dict[str, Any], {"type": "object"}, dict),
        (Any, {}, Any),
        (Literal["a", 1, False], {"enum": ["a", 1, False]}, Literal["a", 1, False]),
        (Colour | str, {"anyOf": [{"enum": ["red", "green"]}, {"type": "string"}]}, Literal["red", "green"] | str),
        (list[Colour], {"type": "array", "items": {"enum": ["red", "green"]}}, list[Literal["red", "green"]]),
        (slice | None, {"type": ["object", "null"]}, dict | None),
    ],
    ids=str,
)
def test_types_become_json_schema_and_come_back(hint, schema, back):
    assert type_to_schema(hint) == schema
    assert schema_to_type(schema) == back


def test_a_dataclass_of_ours_is_a_reference():
    assert type_to_schema(Source) == {"$ref": "#/$defs/Source"}


def test_a_property_has_its_default_unless_there_is_none():
    assert property_of(int, None, " some\n text") == {"type": "integer", "default": None, "description": "some text"}
    assert "default" not in property_of(int, MISSING, "text")


def test_the_table_is_that_of_the_installed_trl():
    table = read_trl_keys()
    if table["versions"] != installed_versions():
        pytest.skip(f"the table is of {table['versions']}, installed are {installed_versions()}")
    assert table["keys"] == find_trl_keys(), "rewrite it with rewardmodel.config.trainer.write_trl_keys"


def test_the_keys_are_ours_and_trls_with_our_defaults_and_without_those_refused():
    keys, trl = trainer_keys(), read_trl_keys()["keys"]
    assert keys.keys() == {*OWN_KEYS, *trl} - TRAINER_REFUSED.keys()
    assert {key: keys[key]["default"] for key in TRAINER_DEFAULTS} == TRAINER_DEFAULTS
    assert all(
        keys[key]["default"] == trl[key]["default"] for key in keys.keys() & trl.keys() - TRAINER_DEFAULTS.keys()
    )
    assert all(schema["description"] for schema in keys.values())


def test_defaults_are_known_by_key():
    assert trainer_default("learning_rate") == 2e-4
    assert trainer_default("adam_beta1") == 0.9
    assert trainer_default("no_such_key") is None


def test_a_key_of_another_trl_is_looked_up_there(monkeypatch, tmp_path):
    keys = {
        key: schema for key, schema in read_trl_keys()["keys"].items() if key not in ("optim", "lr_scheduler_kwargs")
    }
    older = {"versions": {**installed_versions(), "trl": "1.0.0"}, "keys": keys}
    monkeypatch.setattr(trainer, "read_trl_keys", lambda: older)
    path = tmp_path / "recipe.yaml"
    path.write_text("trainer:\n  optim: adafactor\n  lr_scheduler_kwargs: {num_cycles: 2}\n")
    recipe = load_recipe(path)
    assert (recipe.trainer["optim"], recipe.trainer["lr_scheduler_kwargs"]) == ("adafactor", {"num_cycles": 2})
    path.write_text("trainer:\n  optin: adafactor\n")
    with pytest.raises(InputError, match=r"unknown key 'trainer\.optin' \(did you mean 'trainer\.optim"):
        load_recipe(path)


def test_a_key_that_is_in_no_table_is_not_looked_up_where_the_table_is_of_the_installed_trl(monkeypatch, tmp_path):
    same = {"versions": installed_versions(), "keys": read_trl_keys()["keys"]}
    monkeypatch.setattr(trainer, "read_trl_keys", lambda: same)
    monkeypatch.setattr(trainer, "find_trl_keys", lambda: pytest.fail("trl was imported"))
    path = tmp_path / "recipe.yaml"
    path.write_text("trainer:\n  optin: adafactor\n")
    with pytest.raises(InputError, match="unknown key"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("learning_rate: 2e-4", 2e-4),
        ("optim: adamw_torch", "adamw_torch"),
        ("debug: [underflow_overflow]", ["underflow_overflow"]),
        ("lr_scheduler_kwargs: {num_cycles: 2}", {"num_cycles": 2}),
        ("report_to: [tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("include_num_input_tokens_seen: true", True),
        ("trackio_static_space_id: false", False),
        ("save_total_limit: null", None),
        ("num_train_epochs: 2", 2),
        ("run_name: '3'", "3"),
    ],
)
def test_values_are_read_by_the_types_of_the_table(text, value, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"trainer:\n  {text}\n")
    read = load_recipe(path).trainer[text.partition(":")[0]]
    assert read == value
    assert type(read) is type(value) or isinstance(value, int)


@pytest.mark.parametrize(
    "text", ["max_steps: 5.5", "seed: one", "seed: null", "label_names: one", "liger_kernel_config: {rope: x}"]
)
def test_values_of_another_type_are_refused(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"trainer:\n  {text}\n")
    with pytest.raises(InputError, match=f"trainer.{text.partition(':')[0]}"):
        load_recipe(path)


def test_the_table_is_written_as_it_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "TRL_KEYS_FILE", tmp_path / "keys.json")
    monkeypatch.setattr(trainer, "find_trl_keys", lambda: read_trl_keys()["keys"])
    trainer.write_trl_keys()
    written = json.loads((tmp_path / "keys.json").read_text())
    assert written == {"versions": installed_versions(), "keys": read_trl_keys()["keys"]}
