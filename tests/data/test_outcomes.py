import pandas as pd
import pytest

from rewardmodel.battles import outcomes
from rewardmodel.config.schema import Source
from rewardmodel.data.formats import read_battles
from rewardmodel.data.outcomes import parse_outcome
from rewardmodel.data.raw_row import RawRow
from rewardmodel.errors import InputError

A, B, TIE = [1, 0, 0], [0, 1, 0], [0, 0, 1]


def outcome_of(values, **options):
    row = RawRow("file.csv", 7, values, {}, False, 0, Source("file.csv", **options))
    return list(parse_outcome(row).values())


def message_of(values, **options):
    with pytest.raises(InputError) as caught:
        outcome_of(values, **options)
    return str(caught.value)


WORDS = {
    **dict.fromkeys(["Model A", "model-a", "response_a", "left", "First", "A>B", "A >> B", "[[A]]", "b < a"], A),
    **dict.fromkeys(["model_1", "Answer 1", "assistant_1", "A wins", "Response A is much better"], A),
    **dict.fromkeys(["response_b", "right", "second", "B>A", "[[B>>A]]", "a<b", "model_2", "Option 2"], B),
    **dict.fromkeys(["A=B", "tie (both bad)", "Tie (bothbad)", "tie (inconsistent)", "draw", "both_good"], TIE),
}


@pytest.mark.parametrize(("word", "outcome"), WORDS.items(), ids=WORDS)
def test_words_that_name_a_side_are_read(word, outcome):
    assert outcome_of({"winner": word}) == outcome


@pytest.mark.parametrize("code", [0, 1, 2, "1", 1.0, True, "false", "model_0", "C", "A>"])
def test_codes_that_could_mean_either_are_refused_with_what_to_write(code):
    message = message_of({"winner": code})
    assert message.startswith("file.csv: row 7, column 'winner': ")
    assert "say what each value means in the source's key outcomes, {" in message


@pytest.mark.parametrize("code", [1, "1", 1.0, "1.0"])
def test_outcomes_of_the_source_say_what_codes_mean(code):
    meant = {1: "model_b", 0: "model_a", "half": "tie"}  # as YAML reads unquoted numbers
    assert outcome_of({"winner": code}, outcomes=meant) == B
    assert outcome_of({"winner": "Half"}, outcomes=meant) == TIE


def test_with_outcomes_every_value_is_named_there():
    assert "'model_1' is not among the source's outcomes: model_0; add it there" in message_of(
        {"winner": "model_1"}, outcomes={"model_0": "model_a"}
    )


def test_a_boolean_has_a_meaning_by_outcomes():
    meant = {True: "model_a", False: "model_b"}
    assert [outcome_of({"winner": value}, outcomes=meant) for value in (True, "False")] == [A, B]


def test_a_winner_may_be_named_by_its_model_or_by_the_files_column():
    row = {"model_a": "gpt", "model_b": "llama", "winner": "llama"}
    assert outcome_of(row) == B
    assert "is not an outcome by name" in message_of({**row, "model_a": "llama"})
    columns = {"response_a": "response_0", "response_b": "response_1"}
    assert outcome_of({"winner": "response_1"}, columns=columns) == B  # not the first one


@pytest.mark.parametrize(("number", "outcome"), [(-3, A), (-1, A), (0, TIE), (1, B), ("3", B), (2.0, B)])
def test_preferences_of_helpsteer_are_a_known_scale(number, outcome):
    assert outcome_of({"winner": number}, columns={"winner": "overall_preference"}) == outcome


@pytest.mark.parametrize("number", [-100, 4, 0.5])
def test_preferences_beyond_the_scale_are_refused_and_the_files_column_is_named(number):
    message = message_of({"winner": number}, columns={"winner": "overall_preference"})
    assert message.startswith("file.csv: row 7, column 'overall_preference': ")


@pytest.mark.parametrize(("true", "false"), [("True", "False"), ("TRUE", "FALSE"), (True, False)])
def test_booleans_are_votes(true, false):
    row = {"winner_model_a": false, "winner_model_b": true, "winner_tie": false}
    assert outcome_of(row) == B


ROW = {"prompt": "q", "response_a": "a", "response_b": "b", "label": 1}


def test_outcomes_of_a_file_are_read(tmp_path):
    pd.DataFrame([ROW, {**ROW, "label": 0}]).to_csv(tmp_path / "b.csv", index=False)
    source = Source(str(tmp_path / "b.csv"), columns={"winner": "label"}, outcomes={"1": "model_a", "0": "tie"})
    assert outcomes(read_battles(source)).tolist() == [A, TIE]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"outcomes": {"1": "model_a"}}, "outcomes: the file has no column 'winner'"),
        (
            {"columns": {"winner": "label"}, "outcomes": {"1": "modela"}},
            "outcomes.1: 'modela' is not an outcome (did you mean 'model_a'?); write model_a, model_b, tie",
        ),
    ],
)
def test_outcomes_that_cannot_be_used_are_refused(tmp_path, options, fragment):
    pd.DataFrame([ROW]).to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(InputError) as caught:
        read_battles(Source(str(tmp_path / "b.csv"), **options))
    assert fragment in str(caught.value)
