import json
import logging

import pandas as pd
import pytest

from rewardmodel.battles import outcomes
from rewardmodel.config.schema import Source
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError

S = {"role": "system", "content": "Be kind."}
VOTED = {"response_a": "a", "response_b": "b", "winner": "A>B"}
CHOSEN = {"chosen": "good", "rejected": "bad"}


def said(*texts, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


def read(tmp_path, *rows, **options):
    path = tmp_path / "b.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return read_battles(Source(str(path), **options))


def turns_of(battles):
    """Return prompt, better and worse of the only battle; of a tie, A and B."""
    [battle] = battles
    a, b = battle["response_a"], battle["response_b"]
    return (battle["prompt"], b, a) if battle["winner_model_b"] else (battle["prompt"], a, b)


MESSAGES = {
    "prompt of messages": ({"prompt": [S, *said("q")], **VOTED}, ["Be kind.\n\nq"], ["a"], ["b"]),
    "in JSON": ({"prompt": json.dumps(said("q")), **VOTED}, ["q"], ["a"], ["b"]),
    "as Python prints them": ({"prompt": str(said("q")), **VOTED}, ["q"], ["a"], ["b"]),
    "rounds before": ({"prompt": said("q", "x", "r"), **VOTED}, ["q", "r"], ["x", "a"], ["x", "b"]),
    "responses of messages": (
        {
            **{"prompt": "q", "response_a": said("a", first="assistant")},
            **{"response_b": said("b", first="assistant")[0], "winner": "b"},
        },
        *(["q"], ["b"], ["a"]),
    ),
    "ShareGPT": (
        {
            "prompt": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        *(["q"], ["good"], ["bad"]),
    ),
    "a text next to a conversation": (
        {"chosen": [S, *said("q", "x", "r", "good")], "rejected": "bad"},
        *(["Be kind.\n\nq", "r"], ["x", "good"], ["x", "bad"]),
    ),
    "the same the other way round": ({"chosen": "good", "rejected": said("q", "bad")}, ["q"], ["good"], ["bad"]),
    "a prompt that ends in an empty answer": (
        {"prompt": "\n\nHuman: q\n\nAssistant: ", **CHOSEN},
        ["q"],
        ["good"],
        ["bad"],
    ),
}


@pytest.mark.parametrize(("row", "prompt", "better", "worse"), MESSAGES.values(), ids=MESSAGES)
def test_messages_and_texts_become_turns(tmp_path, row, prompt, better, worse):
    assert turns_of(read(tmp_path, row)) == (prompt, better, worse)


@pytest.mark.parametrize("answer", ['["red", "blue"]', '[{"role": "chef", "name": "Ann"}]', "[{ from: 1 }]", "['a']"])
def test_an_answer_that_looks_like_a_list_stays_as_it_is(tmp_path, answer):
    assert turns_of(read(tmp_path, {"prompt": "q", **VOTED, "response_a": answer})) == (["q"], [answer], ["b"])


CONTEXT = {
    "system": ({"prompt": "q", "system": " Be kind.", **CHOSEN}, ["Be kind.\n\nq"], ["good"], ["bad"]),
    "system of lists": (
        {"prompt": ["q", "r"], "system": "Be kind.", **VOTED, "response_a": ["x", "a"], "response_b": ["y", "b"]},
        *(["Be kind.\n\nq", "r"], ["x", "a"], ["y", "b"]),
    ),
    "system said twice": (
        {"system": "Be kind.", "prompt": [S, *said("q")], **CHOSEN},
        ["Be kind.\n\nq"],
        ["good"],
        ["bad"],
    ),
    "history": (
        {"prompt": "q", "system": "S", "history": [["Hi", "Hello"], ["1", "2"]], **CHOSEN},
        *(["S\n\nHi", "1", "q"], ["Hello", "2", "good"], ["Hello", "2", "bad"]),
    ),
    "history of messages": (
        {"prompt": "q", "history": said("Hi", "Hello"), **VOTED},
        *(["Hi", "q"], ["Hello", "a"], ["Hello", "b"]),
    ),
    "history in JSON": (
        {"prompt": "q", "history": '[["Hi", "Hello"]]', **VOTED},
        ["Hi", "q"],
        ["Hello", "a"],
        ["Hello", "b"],
    ),
    "history that the conversations have": (
        {"history": [["q", "x"]], "chosen": said("q", "x", "r", "good"), "rejected": said("q", "x", "r", "bad")},
        *(["q", "r"], ["x", "good"], ["x", "bad"]),
    ),
    "nothing": ({"prompt": "q", "system": "", "history": [], **CHOSEN}, ["q"], ["good"], ["bad"]),
    "null": ({"prompt": "q", "system": None, "history": None, **CHOSEN}, ["q"], ["good"], ["bad"]),
}


@pytest.mark.parametrize(("row", "prompt", "better", "worse"), CONTEXT.values(), ids=CONTEXT)
def test_system_and_history_are_part_of_the_prompt(tmp_path, row, prompt, better, worse, caplog):
    caplog.set_level(logging.INFO)
    assert turns_of(read(tmp_path, row)) == (prompt, better, worse)
    assert any("columns that become part of the prompt: " in line for line in caplog.messages)


def test_input_follows_the_instruction(tmp_path):
    row = {"instruction": "Translate.", "input": "猫\n", **CHOSEN}
    assert turns_of(read(tmp_path, row, columns={"prompt": "instruction"}))[0] == ["Translate.\n猫\n"]
    assert turns_of(read(tmp_path, {**row, "input": ""}, columns={"prompt": "instruction"}))[0] == ["Translate."]
    assert turns_of(read(tmp_path, row, columns={"prompt": "input"}))[0] == ["猫\n"]
    named = {"prompt": "instruction", "input": "passage"}
    assert turns_of(read(tmp_path, {**row, "passage": "p"}, columns=named))[0] == ["Translate.\np"]


def test_a_history_that_is_the_prompt_is_not_the_history_too(tmp_path):
    assert turns_of(read(tmp_path, {"history": "q", **VOTED}, columns={"prompt": "history"})) == (["q"], ["a"], ["b"])


@pytest.mark.parametrize("history", ["what was said", [["Hi"]], ["Hi"], [["Hi", 5]], 5])
def test_a_history_of_another_shape_is_refused_with_what_to_write(tmp_path, history):
    with pytest.raises(
        InputError, match=r"row 1, column 'history': .*\{prompt: history\}, and if it is something else"
    ):
        read(tmp_path, {"prompt": "q", "history": history, **CHOSEN})
    assert turns_of(read(tmp_path, {"prompt": "q", "history": history, **CHOSEN}, columns={"history": None}))[0] == [
        "q"
    ]


def conversations(turn):
    texts = {"conversation_a": said("q", "a", "r", "x"), "conversation_b": said("q", "b", "r", "y")}
    return {**texts, "winner": "model_a", "turn": turn}


@pytest.mark.parametrize(("turn", "rounds"), [(1, 1), (2, 2), (3, 2), (None, 2), ("1", 1)])
def test_rounds_after_the_judged_one_are_left_out_and_counted(tmp_path, caplog, turn, rounds):
    prompt, better, worse = turns_of(read(tmp_path, conversations(turn)))
    assert (prompt, better, worse) == (["q", "r"][:rounds], ["a", "x"][:rounds], ["b", "y"][:rounds])
    said_so = [line for line in caplog.messages if "1 battle judged before the last round" in line]
    assert len(said_so) == (rounds == 1)


@pytest.mark.parametrize("turn", [0, -1, 1.5, "first"])
def test_a_turn_that_is_no_round_is_refused(tmp_path, turn):
    with pytest.raises(InputError, match="row 1, column 'turn': "):
        read(tmp_path, conversations(turn))


def test_equal_scores_are_a_tie_and_contrary_ones_are_counted(tmp_path, caplog):
    scores = [(8.5, 8.5), (9, 2), (2, 9), (None, None)]
    rows = [{"prompt": f"q{a}", **CHOSEN, "score_chosen": a, "score_rejected": b, "margin": 0} for a, b in scores]
    battles = read(tmp_path, *rows)
    assert outcomes(battles)[:, 2].tolist() == [1, 0, 0, 0]
    found = " ".join(caplog.messages)
    assert "1 pair with equal scores, read as tied" in found
    assert "1 pair whose rejected response has the higher score, read as labelled" in found


def test_messages_out_of_a_data_frame_are_read(tmp_path):
    frame = pd.DataFrame([{"prompt": said("q"), "history": [["Hi", "Hello"]], **VOTED}])
    frame.to_parquet(tmp_path / "b.parquet")  # lists become arrays
    for source in (frame, pd.read_parquet(tmp_path / "b.parquet")):
        assert turns_of(read_battles(source)) == (["Hi", "q"], ["Hello", "a"], ["Hello", "b"])


def test_messages_name_the_files_column(tmp_path):
    with pytest.raises(InputError, match="row 1, column 'answer': empty; give the response"):
        read(tmp_path, {"prompt": "q", "answer": None, "rejected": "bad"}, columns={"chosen": "answer"})
