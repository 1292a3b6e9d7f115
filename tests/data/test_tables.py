import pandas as pd
import pytest

from rewardmodel.battles import TEXT_COLUMNS
from rewardmodel.data.formats import read_battles
from rewardmodel.data.tables import rows_as_table

ONE = {"prompt": "2 + 2?", "response_a": ["4"], "response_b": "5"}


def test_a_dict_is_one_battle_and_a_list_of_dicts_several():
    assert len(rows_as_table(ONE)) == 1
    assert len(rows_as_table([ONE, ONE | {"id": "x"}])) == 2
    read = read_battles([ONE, ONE], role="test")
    assert [read[name][1] for name in TEXT_COLUMNS] == [["2 + 2?"], ["4"], ["5"]]
    assert read["id"][:] == ["1", "2"]


@pytest.mark.parametrize("given", ["train.csv", ["a.csv", "b.csv"], pd.DataFrame(), []])
def test_anything_else_stays_as_it_is(given):
    assert rows_as_table(given) is given


@pytest.mark.parametrize(("given", "kind"), [([ONE, 3], "int"), ([ONE, "a.csv"], "str"), (b"x", "bytes")])
def test_a_mixture_is_a_type_error_with_a_sentence(given, kind):
    with pytest.raises(TypeError, match=f"battles are .*{kind}.*; give a"):
        read_battles(given)
