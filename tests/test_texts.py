import numpy as np
import pyarrow as pa
import pytest

from rewardmodel.texts import SCRIPTS, characters_of, script_numbers

COLUMN = pa.array([["abc"], ["你好", "ok"], ["при", ""], ["1"], ["", ""]])


def scripts_of(*texts):
    return np.array(SCRIPTS)[script_numbers(pa.array([[text] for text in texts]))].tolist()


def test_characters_are_counted_over_all_turns():
    assert characters_of(COLUMN).tolist() == [3, 4, 3, 1, 0]


def test_a_slice_of_a_column_has_its_own_characters_and_scripts():
    assert characters_of(COLUMN.slice(1, 2)).tolist() == [4, 3]
    assert (
        script_numbers(COLUMN.slice(1, 2)).tolist() == script_numbers(pa.array([["你好", "ok"], ["при", ""]])).tolist()
    )


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello, world", "Latin"),
        ("Привет, world", "Cyrillic"),
        ("你好 ok", "Latin"),
        ("你好吗 ok", "Han"),
        ("日本語です", "Japanese"),
        ("안녕하세요", "Hangul"),
        ("مرحبا", "Arabic"),
        ("नमस्ते", "Devanagari"),
        ("שלום", "Hebrew"),
        ("สวัสดี", "Thai"),
        ("Καλημέρα", "Greek"),
        ("ամենաշատ", "other"),
        ("12 + 30 = ?", "none"),
        ("", "none"),
    ],
)
def test_the_script_is_the_one_of_most_letters(text, script):
    assert scripts_of(text) == [script]


def test_no_battles_have_no_scripts():
    empty = pa.array([], pa.list_(pa.string()))
    assert script_numbers(empty).tolist() == characters_of(empty).tolist() == []
