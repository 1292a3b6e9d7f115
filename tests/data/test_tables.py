import numpy as np
import pandas as pd
import pytest

from rewardmodel.battles import TEXT_COLUMNS
from rewardmodel.data.formats import read_battles
from rewardmodel.data.tables import rows_as_table
from rewardmodel.errors import InputError

ONE = {"prompt": "2 + 2?", "response_a": ["4"], "response_b": "5"}


def test_a_dict_is_one_battle_and_a_list_of_dicts_several():
    assert len(rows_as_table(ONE)) == 1
    assert len(rows_as_table([ONE, ONE | {"id": "x"}])) == 2
    read = read_battles([ONE, ONE], role="test")
    assert [read[name][1] for name in TEXT_COLUMNS] == [["2 + 2?"], ["4"], ["5"]]
    assert read["id"][:] == ["1", "2"]


TWO = {"prompt": ["one?", "two?"], "response_a": ["1", "2"], "response_b": ["2", "3"]}


@pytest.mark.parametrize(
    "given",
    [
        TWO | {"id": ["x", "y"]},
        TWO | {"winner_tie": np.ones(2), "winner_model_a": np.zeros(2), "winner_model_b": np.zeros(2)},
        {name: pd.Series(values) for name, values in TWO.items()},
        {name: [[one] for one in values] for name, values in TWO.items()},
        read_battles(pd.DataFrame(TWO))[:],
    ],
    ids=["ids", "outcomes", "Series", "lists of turns", "slice of a data set"],
)
def test_a_dict_of_columns_is_a_table(given):
    read = read_battles(given, role="test")
    assert [read[name][1] for name in TEXT_COLUMNS] == [["two?"], ["2"], ["3"]]


@pytest.mark.parametrize(
    "given",
    [
        TWO | {"id": "x"},
        [TWO],
        {"prompt": "one?", "chosen": [{"role": "assistant", "content": "1"}], "rejected": "2"},
        {"prompt": "one?", "answers": ["1", "2"], "ranks": [1, 2]},
        {"conversation_a": [{"role": "user"}] * 2, "conversation_b": [{"role": "user"}] * 2},
        {},
    ],
)
def test_a_battle_of_several_turns_or_answers_is_one(given):
    assert len(rows_as_table(given)) == 1


def test_a_dict_that_may_be_columns_or_turns_is_refused_with_both_ways_to_say_it():
    with pytest.raises(InputError, match=r"lists of 2 texts: 2 battles, or .* turns; give pandas.*or \[battles\]"):
        read_battles(TWO, role="test")


def test_columns_of_several_lengths_are_refused():
    with pytest.raises(InputError, match=r"a dict of columns that make no table .*same length"):
        read_battles(TWO | {"id": ["x"]})


@pytest.mark.parametrize("given", ["train.csv", ["a.csv", "b.csv"], pd.DataFrame(), []])
def test_anything_else_stays_as_it_is(given):
    assert rows_as_table(given) is given


@pytest.mark.parametrize(("given", "kind"), [([ONE, 3], "int"), ([ONE, "a.csv"], "str"), (b"x", "bytes")])
def test_a_mixture_is_a_type_error_with_a_sentence(given, kind):
    with pytest.raises(TypeError, match=f"battles are .*{kind}.*; give a"):
        read_battles(given)
