import numpy as np
import pyarrow as pa
import pytest

from rewardmodel.texts import SCRIPTS, count_characters, detect_scripts

COLUMN = pa.array([["abc"], ["你好", "ok"], ["при", ""], ["1"], ["", ""]])


def scripts_of(*texts):
    return np.array(SCRIPTS)[detect_scripts(pa.array([[text] for text in texts]))].tolist()


def test_characters_are_counted_over_all_turns():
    assert count_characters(COLUMN).tolist() == [3, 4, 3, 1, 0]


def test_a_slice_of_a_column_has_its_own_characters_and_scripts():
    assert count_characters(COLUMN.slice(1, 2)).tolist() == [4, 3]
    assert (
        detect_scripts(COLUMN.slice(1, 2)).tolist() == detect_scripts(pa.array([["你好", "ok"], ["при", ""]])).tolist()
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
    assert detect_scripts(empty).tolist() == count_characters(empty).tolist() == []
