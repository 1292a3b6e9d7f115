import json
from collections import Counter
from datetime import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from rewardmodel.data.raw_row import RawRow, shorten
from rewardmodel.data.text_lists import looks_like_list
from rewardmodel.errors import InputError

BROKEN = "\N{REPLACEMENT CHARACTER}"


def row_of(value, json_texts=True):
    return RawRow("file.csv", 7, {"c": value}, Counter(), json_texts, 0)


def message_of(call):
    with pytest.raises(InputError) as caught:
        call("c") if call.__name__ != "read_dialogue" else call("c", "user")
    message = str(caught.value)
    assert message.startswith("file.csv: row 7, column 'c': ")
    assert "\n" not in message
    return message


MISSING = [None, float("nan"), np.nan, pd.NA, pd.NaT]


@pytest.mark.parametrize("value", [*MISSING, "", " \n"])
def test_missing_text_is_empty(value):
    assert row_of(value).read_text("c") == ""
    assert RawRow("f", 1, {}, Counter(), True, 0).read_text("c") == ""


@pytest.mark.parametrize(
    ("value", "text"), [(" gpt-4\n", "gpt-4"), (7, "7"), (0, "0"), (True, "True"), ("nan", "nan"), ("0030", "0030")]
)
def test_text_is_stripped_and_otherwise_as_it_stands(value, text):
    assert row_of(value).read_text("c") == text


@pytest.mark.parametrize("value", [*MISSING, "", " "])
def test_missing_share_is_none(value):
    assert row_of(value).read_number("c") is None


@pytest.mark.parametrize(
    ("value", "share"),
    [("0.25", 0.25), (" .5 ", 0.5), (1, 1), (True, 1), (np.float32(0.5), 0.5), (Decimal("0.1"), 0.1)],
)
def test_share_is_the_number_that_stands_there(value, share):
    assert row_of(value).read_number("c") == share


@pytest.mark.parametrize(
    "value", ["yes", "0,5", [1], {"a": 1}, np.array([0.5, 0.5]), datetime(2024, 1, 1), b"x", 10**400]
)
def test_share_that_is_no_number_is_refused(value):
    assert "is not a number; give 1, 0 or a probability" in message_of(row_of(value).read_number)


TURNS = {
    "JSON": ('["a", "b"]', ["a", "b"]),
    "list": (["a", "b"], ["a", "b"]),
    "tuple": (("a",), ["a"]),
    "array": (np.array(["a", "b"], dtype=object), ["a", "b"]),
    "JSON with newlines": ('\n[\n "a\nb"\n]\n', ["a\nb"]),
    "nothing": (None, []),
    "blank": ("  ", []),
    "null": ("null", []),
    "nan": (float("nan"), []),
    "empty list": ([], []),
    "white space in turns": ([" a\n"], [" a\n"]),
}


@pytest.mark.parametrize(("value", "turns"), TURNS.values(), ids=TURNS)
def test_turns_are_the_texts_of_a_list(value, turns):
    row = row_of(value)
    assert row.read_turns("c") == turns
    assert not row.notes


@pytest.mark.parametrize("value", ["[null]", [None], [pd.NA]])
def test_null_turn_is_empty_and_counted(value):
    row = row_of(value)
    assert row.read_turns("c") == [""]
    assert row.notes == {("null turn", "read as empty"): 1}


@pytest.mark.parametrize("text", ["Hi there", "", " ", "[not JSON", "5", "null", '"quoted"'])
def test_text_is_one_turn_where_the_file_has_plain_strings(text):
    assert row_of(text, json_texts=False).read_turns("c") == [text]


def test_list_is_a_list_of_turns_where_the_file_has_plain_strings():
    assert row_of(["a", "b"], json_texts=False).read_turns("c") == ["a", "b"]


NO_TURNS = {
    "plain text": ("hello", "'hello' is not a JSON list; write a list of turns"),
    "JSON text": ('"hello"', "'hello' is not a list"),
    "JSON object": ('{"a": 1}', "{'a': 1} is not a list"),
    "number": (5, "5 is not a list"),
    "dict": ({"a": 1}, "{'a': 1} is not a list"),
    "bytes": (b"x", "b'x' is not a list"),
    "number in it": ([5], "the turn 5 is not text; put it in quotes, or write null"),
    "list in it": ([["a"]], "the turn ['a'] is not text"),
    "dict in it": ([{"a": 1}], "the turn {'a': 1} is not text"),
    "nan in it": ([float("nan")], "the turn nan is not text"),
    "depth": ("[" * 100_000, "is not a JSON list"),
}


@pytest.mark.parametrize(("value", "fragment"), NO_TURNS.values(), ids=NO_TURNS)
def test_what_is_no_list_of_texts_is_refused(value, fragment):
    assert fragment in message_of(row_of(value).read_turns)


SAID = [("user", "q"), ("assistant", "a")]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
DIALOGUES = {
    "messages": (MESSAGES, SAID),
    "JSON": (json.dumps(MESSAGES), SAID),
    "JSON after white space": ("\n " + json.dumps(MESSAGES), SAID),
    "array of messages": (np.array(MESSAGES, dtype=object), SAID),
    "array of contents": ([{"role": "user", "content": np.array(["q"], dtype=object).tolist()}], SAID[:1]),
    "from and value": ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], SAID),
    "other names": ([{"role": "Prompter", "content": "q"}, {"role": "CHATBOT", "content": "a"}], SAID),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}],
        [("user", "one\n\ntwo")],
    ),
    "as Python prints them": (str(MESSAGES), SAID),
    "one message": (MESSAGES[1], SAID[1:]),
    "the parts of one": ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], [("user", "one\n\ntwo")]),
    "one message in JSON": (json.dumps(MESSAGES[1]), SAID[1:]),
    "text": ("What?", [("user", "What?")]),
    "a list of other objects": ('[{"role": "chef", "name": "Ann"}]', [("user", '[{"role": "chef", "name": "Ann"}]')]),
    "code": ("[{ from: 1 }]", [("user", "[{ from: 1 }]")]),
    "list of one text": (["What?"], [("user", "What?")]),
    "transcript": ("\n\nHuman: q\n\nAssistant: a", SAID),
    "long transcript": (
        "\n\nHuman: one\nline\n\nAssistant: a\n\nHuman: two\n\nAssistant:",
        [("user", "one\nline"), ("assistant", "a"), ("user", "two"), ("assistant", "")],
    ),
    "text that quotes a transcript": ("Go on: \n\nHuman: q", [("user", "Go on: \n\nHuman: q")]),
    "nothing": (None, []),
    "no messages": ([], []),
    "empty text": ("", [("user", "")]),
}


@pytest.mark.parametrize(("value", "said"), DIALOGUES.values(), ids=DIALOGUES)
def test_dialogue_is_who_said_what(value, said):
    row = row_of(value)
    assert row.read_dialogue("c", "user") == said
    assert not row.notes


@pytest.mark.parametrize(
    "text", [json.dumps(MESSAGES, indent=1), json.dumps(MESSAGES).replace("[", "[ ", 1)], ids=["lines", "a space"]
)
def test_messages_in_indented_json_are_messages(text):
    assert row_of(text).read_dialogue("c", "user") == SAID


def test_plain_text_is_said_by_the_speaker_that_is_asked_for():
    assert row_of("a").read_dialogue("c", "assistant") == [("assistant", "a")]


def test_images_are_left_out_of_a_message_and_counted():
    parts = [{"type": "text", "text": "q"}, {"type": "image", "image": {"path": "x"}, "text": None}]
    row = row_of([{"role": "user", "content": parts}, {"role": "assistant", "content": None}])
    assert row.read_dialogue("c", "user") == [("user", "q"), ("assistant", "")]
    assert row.notes == {
        ("part", "of messages, not text (image), left out"): 1,
        ("message", "without content (null), read as empty"): 1,
    }


CALL = {"function": {"name": "look_up", "arguments": '{"topic": "tea"}'}}
CALLED = '<tool_call>\n{"name": "look_up", "arguments": {"topic": "tea"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "assistant", "tool_calls": [CALL]}, ("assistant", CALLED)),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, ("assistant", CALLED)),
        ({"role": "assistant", "content": "Wait.", "tool_calls": [CALL]}, ("assistant", f"Wait.\n\n{CALLED}")),
        ({"role": "assistant", "content": "", "function_call": CALL["function"]}, ("assistant", CALLED)),
        (
            {"role": "assistant", "tool_calls": ["ping"]},
            ("assistant", CALLED.replace('look_up", "arguments": {"topic": "tea"}', 'ping", "arguments": null')),
        ),
        ({"role": "assistant", "text": "a"}, ("assistant", "a")),
        (
            {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"},
            ("assistant", "<think>\n2 + 2\n</think>\n\n4"),
        ),
        ({"role": "assistant", "content": "4", "reasoning_content": ""}, ("assistant", "4")),
        ({"role": "developer", "content": "Be kind."}, ("system", "Be kind.")),
        ({"role": "tool", "content": "18 °C"}, ("user", "18 °C")),
    ],
)
def test_calls_of_tools_thoughts_and_other_keys_are_kept_as_text(message, said):
    row = row_of([message])
    assert row.read_dialogue("c", "user") == [said]
    assert not row.notes


def test_an_answer_whose_parts_are_all_left_out_is_refused():
    with pytest.raises(InputError, match=r"row 7, column 'c': the answer .* has no text; leave the row out"):
        row_of([{"role": "assistant", "content": [{"type": "image", "image": "x"}]}]).read_dialogue("c", "user")


NO_DIALOGUES = {
    "a message without text": ([{"role": "user", "body": "q"}], "has no text; give it as 'content'"),
    "number": (5, "5 is not a list; write a text, or messages like"),
    "broken JSON": ('[{"role": "user"', "is not a JSON list; write a text, or messages like"),
    "numpy's own": (
        "[{'role': 'user', 'content': 'q'}\n {'role': 'x'}]",
        "as Python or numpy prints it: write it with",
    ),
    "dict": ({"a": "q"}, "is not a list"),
    "two texts": (["a", "b"], "'a' is not a message; give one text, or objects with role and content"),
    "number in it": ([1], "1 is not a message"),
    "unknown role": ([{"role": "judge", "content": "q"}], "the role 'judge' is unknown; known: user, human"),
    "no role": ([{"content": "q"}], "the role None is unknown"),
    "role that is no text": ([{"role": ["user"], "content": "q"}], "the role ['user'] is unknown"),
    "number for content": ([{"role": "user", "content": 5}], "the content 5 is not text; put it in quotes"),
    "list in content": ([{"role": "user", "content": [["q"]]}], "the content ['q'] is not text"),
}


@pytest.mark.parametrize(("value", "fragment"), NO_DIALOGUES.values(), ids=NO_DIALOGUES)
def test_what_is_no_dialogue_is_refused(value, fragment):
    assert fragment in message_of(row_of(value).read_dialogue)


@pytest.mark.parametrize(("text", "mended"), [("cut \ud83d", f"cut {BROKEN}"), ("\ude00 off", f"{BROKEN} off")])
def test_lone_surrogate_is_replaced_and_counted(text, mended):
    row = row_of([text])
    assert row.read_turns("c") == [mended]
    assert row.notes == {("turn", f"with broken characters, replaced by {BROKEN}"): 1}


def test_lone_surrogate_is_replaced_in_short_texts_and_messages():
    assert row_of("m\ud83d").read_text("c") == f"m{BROKEN}"
    assert row_of([{"role": "user", "content": "q\ud83d"}]).read_dialogue("c", "user") == [("user", f"q{BROKEN}")]


@pytest.mark.parametrize(
    ("text", "is_list"),
    [
        ('["a"]', True),
        ("[]", True),
        (" \n[1, 2]", True),
        ("[a]", False),
        ("{}", False),
        ("", False),
        ("[" * 99999, False),
    ],
)
def test_json_list_is_told_from_other_texts(text, is_list):
    assert looks_like_list(text) is is_list


def test_long_value_is_cut_in_messages():
    assert shorten("x" * 100) == "'" + "x" * 39 + "…"
    assert shorten("a\nb") == r"'a\nb'"
