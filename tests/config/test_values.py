from typing import Any, Literal

import pytest

from rewardmodel.config.schema import Source
from rewardmodel.config.values import convert, convert_text, read_yaml


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("-2.5E3", -2500.0), (".5e0", 0.5), ("3", 3), ("1.5", 1.5)]
)
def test_numbers_of_yaml_1_2_are_numbers(text, number):
    assert read_yaml(f"a: [{text}]") == {"a": [number]}
    assert type(read_yaml(text)) is type(number)


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("7", int, 7),
        ("7", float, 7.0),
        ("1e-4", float, 1e-4),
        ("7", str, "7"),
        ("7", str | None, "7"),
        ("null", str | None, None),
        ("null", str, "null"),
        ("null", int | None, None),
        ("no", Literal["no", "steps"], "no"),
        ("no", bool, False),
        ("true", bool | Literal["auto"], True),
        ("[q_proj,v_proj]", list[str] | None, ["q_proj", "v_proj"]),
        ("b.csv", str | Source | list[str | Source], "b.csv"),
        ("[a.csv, {path: b.csv, weight: 2}]", str | list[str | Source], ["a.csv", Source("b.csv", weight=2.0)]),
        ("{{ prompt }} # not: a comment", str | None, "{{ prompt }} # not: a comment"),
        ("'quoted'", str, "'quoted'"),
        ("", str | None, ""),
        ("2026-01-31", str | None, "2026-01-31"),
        ("{a: 1}", str | Source, "{a: 1}"),
        ("{num_cycles: 2, rate: 1e-3}", dict[str, Any] | str, {"num_cycles": 2, "rate": 1e-3}),
        ("[1, x]", Any, [1, "x"]),
    ],
)
def test_a_typed_text_is_read_by_the_type_of_its_key(text, hint, value):
    found = convert_text(text, hint)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3.0),
        ("3", str | None, "3"),
        ("3", int, 3),
        ("1e-4", float | None, 1e-4),
        ({"path": "a.csv", "columns": {"id": None}}, str | Source, Source("a.csv", columns={"id": None})),
        ([1, 2], list, [1, 2]),
    ],
)
def test_a_value_of_a_file_is_taken_in_the_type_of_its_key(value, hint, expected):
    assert convert(value, hint) == expected


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("many", int, "'many'; give a whole number"),
        (1.5, int, "1.5; give a whole number"),
        (True, int, "True; give a whole number; YAML reads an unquoted no"),
        (None, int, "null; give a value, or delete the line"),
        ("x", float | None, "'x'; give a number or null"),
        (3, str | None, "3; give a text or null"),
        ("twice", Literal["none", "both"], "'twice'; give one of ['none', 'both']"),
        (1, Literal[True, "a"], "give one of"),
        ("one", list[str], "'one'; give a list of texts"),
        ({"rope": "x"}, dict[str, bool] | None, "give a mapping of true or false or null"),
        ({"weight": 2}, Source, "give a Source"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_to_give(value, hint, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared below)
        convert(value, hint)
    assert message in str(caught.value)
