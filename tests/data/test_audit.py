import json

import numpy as np
import pytest
from builders import from_columns, make_tokenizer

from rewardmodel.battles import OUTCOMES
from rewardmodel.config.schema import PromptConfig
from rewardmodel.data.audit import audit, format_audit
from rewardmodel.data.folds import CALIBRATION_FOLD, HOLDOUT_FOLD, TRAIN_ONLY, assign_folds, assign_groups
from rewardmodel.prompt import token_counts
from rewardmodel.prompt.encoder import PromptEncoder
from rewardmodel.prompt.token_counts import count_tokens

A, B, TIE = np.eye(3).tolist()


def battles_of(prompts, first=None, second=None, winners=None, **columns):
    """Return battles of the turns given; responses are short and differ in length unless they are given."""
    columns |= {
        "id": [f"id{row}" for row in range(len(prompts))],
        "prompt": prompts,
        "response_a": first or [["a" * 5] * len(turns) for turns in prompts],
        "response_b": second or [["b" * 3] * len(turns) for turns in prompts],
    }
    if winners is not None:
        columns |= dict(zip(OUTCOMES, np.transpose(winners).tolist(), strict=True))
    return from_columns(columns, "made")


def numbered(count, winners=None, **columns):
    """Return battles whose prompts resemble each other in nothing."""
    prompts = [[f"prompt {np.random.default_rng(row).bytes(row % 30 + 8).hex()}"] for row in range(count)]
    return battles_of(prompts, winners=winners, **columns)


def tokens_of(battles, seed=0):
    config = PromptConfig(template="instruction", max_length=256)
    return count_tokens(battles, PromptEncoder(make_tokenizer(), config), seed)


def long_battles():
    """Return battles of one to three rounds, some far too long, some with empty turns."""
    random = np.random.default_rng(0)
    turns = random.integers(1, 4, 40)
    texts = [[["word " * int(random.integers(0, 300)) for _ in range(count)] for count in turns] for _ in range(3)]
    return battles_of(*texts)


def test_outcome_shares_overall_and_by_source():
    battles = numbered(4, [A, A, TIE, [0.2, 0.2, 0.6]], source=["x", "x", "y", "y"])
    facts = audit(battles)
    assert facts["battles"] == 4
    assert list(facts["outcomes"].values()) == pytest.approx([0.55, 0.05, 0.4])
    assert list(facts["sources"]) == ["x", "y"]
    assert facts["sources"]["x"] == {"battles": 2, "outcomes": dict(zip(OUTCOMES, A, strict=True))}
    assert list(facts["sources"]["y"]["outcomes"].values()) == pytest.approx([0.1, 0.1, 0.8])


def test_unlabelled_battles_have_no_outcomes():
    facts = audit(numbered(3))
    assert facts["outcomes"] is facts["position"] is facts["longer_response"] is None
    assert facts["sources"] == {"made": {"battles": 3, "outcomes": None}}
    assert facts["parts"] == {"no fold": {"battles": 3, "outcomes": None, "deviation": None}}
    assert "not labelled" in format_audit(facts)


def test_position_is_the_share_of_a_among_decided_battles_with_wilsons_interval():
    found = audit(numbered(15, [A] * 7 + [B] * 3 + [TIE] * 5))["position"]
    assert (found["decided"], found["share"]) == (10, 0.7)
    assert (found["low"], found["high"]) == pytest.approx((0.3968, 0.8922), abs=1e-4)  # Wilson (1927), n = 10, k = 7
    assert found["balanced"]


def test_position_out_of_balance_is_told():
    facts = audit(numbered(200, [A] * 120 + [B] * 80))
    assert not facts["position"]["balanced"]
    assert "A wins 60.0 % of decided battles: position is not balanced; data.swap_augm" in format_audit(facts)
    even = format_audit(audit(numbered(200, [A, B] * 100)))
    assert "not balanced" not in even
    assert "50 is inside" in even


def test_all_ties_leave_no_position():
    assert audit(numbered(3, [TIE] * 3))["position"] is None


def test_wins_of_the_longer_response():
    texts = [["xx"], ["x"], ["xx"], ["x"]], [["x"], ["xx"], ["x"], ["x"]]
    found = audit(battles_of([[f"prompt {n}"] for n in range(4)], *texts, [A, B, B, A]))["longer_response"]
    assert (found["decided"], found["share"]) == (3, pytest.approx(2 / 3))


def test_turns_and_empty_turns():
    prompts = [["p"], ["p"], ["p", "q"], ["p", "", "r", "s"]]
    first = [[""], ["x"], [" \n", "x"], ["x"] * 4]
    facts = audit(battles_of(prompts, first))
    assert facts["turns"] == {"1": 0.5, "2": 0.25, "3+": 0.25, "most": 4}
    assert facts["empty_turns"] == {"prompt": 1, "response_a": 2, "response_b": 0}


def test_characters_are_those_of_all_turns():
    prompts = [["é" * number, "x"] for number in range(1, 100)]
    found = audit(battles_of(prompts))["characters"]
    assert found["prompt"]["mean"] == found["prompt"]["50"] == 51
    assert (found["prompt"]["5"], found["prompt"]["max"]) == (pytest.approx(5.9 + 1), 100)
    assert found["response_a"]["99"] == 10
    assert found["response_b"]["mean"] == 6


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello", "Latin"),
        ("Grüß Gott", "Latin"),
        ("你好世界 ok", "Han"),
        ("日本語漢字の文", "Japanese"),
        ("カタカナ", "Japanese"),
        ("안녕하세요", "Hangul"),
        ("Привет, world of мир и труд", "Cyrillic"),
        ("مرحبا", "Arabic"),
        ("नमस्ते", "Devanagari"),
        ("שלום", "Hebrew"),
        ("สวัสดี", "Thai"),
        ("Γειά σου", "Greek"),
        ("გამარჯობა", "other"),
        ("1 + 1 = 2", "none"),
        ("😀 ½", "none"),
        ("", "none"),
        ("a very long English text with の in it", "Latin"),
    ],
)
def test_script_of_a_prompt(text, script):
    assert audit(battles_of([[text]]))["scripts"] == {script: 1.0}


def test_scripts_are_shares_of_battles_over_all_turns():
    found = audit(battles_of([["hi", "你好世界你好"], ["hello"], ["hello there"], ["?"]]))["scripts"]
    assert found == {"Latin": 0.5, "Han": 0.25, "none": 0.25}
    assert next(iter(found)) == "Latin"


def test_groups():
    battles = battles_of([["one"], ["two"], ["One"], ["three"], ["two"], ["two"]])
    assert audit(battles)["groups"] is None
    assert audit(assign_groups(battles))["groups"] == {"number": 3, "shared": pytest.approx(5 / 6), "largest": 3}


def test_a_group_of_many_battles_is_told():
    battles = assign_groups(battles_of([["one"]] * 60 + [[f"prompt {n}"] for n in range(60)]))
    assert "One prompt group has 50 % of the battles" in format_audit(audit(battles))


def test_parts_and_how_far_their_outcomes_are_off():
    folds = [0, 0, 1, 1, CALIBRATION_FOLD, HOLDOUT_FOLD, TRAIN_ONLY, -1]
    parts = audit(numbered(8, [A, A, A, B, B, B, TIE, TIE], fold=folds))["parts"]
    assert list(parts) == ["fold 0", "fold 1", "no fold", "train only", "calibration", "holdout"]
    assert parts["fold 1"]["battles"] == 2
    assert list(parts["fold 1"]["outcomes"].values()) == [0.5, 0.5, 0]
    assert parts["fold 1"]["deviation"] == pytest.approx(0.25)
    assert parts["fold 0"]["deviation"] == pytest.approx(0.625)


def test_a_part_unlike_the_whole_is_told_unless_chance_explains_it():
    winners = [A, B] * 400 + [A] * 150 + [B] * 50
    lines = format_audit(audit(numbered(1000, winners, fold=[0] * 800 + [1] * 200)))
    assert "An outcome's share in fold 1 is 20.0 points off" in lines
    small = format_audit(audit(numbered(10, [A, B] * 4 + [A, A], fold=[0] * 8 + [1] * 2)))
    assert "points off" not in small


def test_a_source_without_ties_is_told():
    lines = format_audit(audit(numbered(120, [A, B] * 30 + [A, B, TIE] * 20, source=["x"] * 60 + ["y"] * 60)))
    assert "There are ties, but none in x:" in lines
    assert "There are ties" not in format_audit(audit(numbered(60, [A, B] * 30)))


def test_duplicates_and_near_duplicates_are_told_with_examples():
    text = "Write a short poem about the sea, the wind and the harbour where grandfather mended nets"
    prompts = [["same"], ["same"], [text], [text + "!"], ["one"], ["one"]]
    first = [["x"], ["x"], ["x"], ["x"], ["y"], ["y"]]
    facts = audit(assign_groups(battles_of(prompts, first, [["z"]] * 4 + [["y"]] * 2, [A, B, A, A, A, A])))
    assert facts["duplicates"]["battles"] == 2
    assert facts["near_duplicates"]["pairs"] == 1
    lines = format_audit(facts)
    assert "Exact duplicates, with A and B exchanged or not: 2 battles." in lines
    assert "with different winners: 1 battle, in 2 rows, e.g. id0 and id1." in lines
    assert "in different groups: at least 1 (2 battles), e.g. id" in lines
    assert "A winner although both responses are the same: 2 battles." in lines


def test_nothing_wrong_is_said_so():
    battles = assign_folds(assign_groups(numbered(60, [A, B, TIE] * 20)), 3)
    facts = audit(battles)
    assert facts["near_duplicates"]["pairs"] == 0
    assert format_audit(facts).endswith("no problems found")


def test_facts_are_json_the_same_each_time_and_do_not_depend_on_row_order():
    battles = assign_groups(long_battles())
    facts = audit(battles, tokens_of(battles, seed=1))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts == audit(battles, tokens_of(battles, seed=1))
    turned = battles.select(range(len(battles))[::-1])
    backwards = audit(turned, tokens_of(turned, seed=2))
    for name in ("sources", "turns", "empty_turns", "scripts", "groups"):
        assert backwards[name] == facts[name]
    assert flat(backwards["tokens"]) == pytest.approx(flat(facts["tokens"]))


def flat(tokens):
    return [value for row in tokens["retention"] for way in ("kept", "right_cut") for value in row[way].values()]


def test_batches_do_not_change_what_is_found():
    battles = numbered(2500, [A, B] * 1250, source=[f"source {row % 3}" for row in range(2500)])
    facts = audit(battles)
    assert [row["battles"] for row in facts["sources"].values()] == [834, 833, 833]
    lengths = [len(turns[0]) for turns in battles["prompt"]]
    assert facts["characters"]["prompt"]["mean"] == pytest.approx(np.mean(lengths))
    assert facts["characters"]["prompt"]["75"] == np.percentile(lengths, 75)


def test_lengths_of_tokens_become_percentiles():
    battles = long_battles()
    tokens = tokens_of(battles)
    facts = audit(battles, tokens)["tokens"]
    lengths = tokens["lengths"]
    assert facts["battles"] == 40
    assert facts["lengths"]["prompt"]["max"] == lengths["prompt"].max()
    assert facts["lengths"]["both_responses"]["mean"] == pytest.approx(lengths["both_responses"].mean())
    assert facts["lengths"]["longer_response"]["50"] == np.median(lengths["longer_response"])
    assert facts["lengths"]["sequence"]["95"] == np.percentile(lengths["sequence"], 95)
    assert {**facts, "lengths": 0} == {**tokens, "lengths": 0}


def test_lines_say_how_many_battles_were_tokenised(monkeypatch):
    monkeypatch.setattr(token_counts, "COUNTED_BATTLES", 10)
    battles = long_battles()
    assert "tokens of 10 battles" in format_audit(audit(battles, tokens_of(battles)))


def test_without_counted_tokens_there_are_none():
    facts = audit(numbered(3, [A, B, TIE]))
    assert facts["tokens"] is None
    assert "tokens" not in format_audit(facts)


def test_columns_that_are_not_read_are_facts_and_a_line():
    battles = numbered(3, [A, B, TIE])
    facts = audit(battles, unread={"train.csv": ["margin", "language"], "b.jsonl": ["x"]})
    assert facts["unread_columns"] == {"train.csv": ["margin", "language"], "b.jsonl": ["x"]}
    assert "columns not read  train.csv: margin, language; b.jsonl: x" in format_audit(facts)
    assert "columns not read" not in format_audit(audit(battles))


def test_lines_fit_a_terminal():
    names = [f"a_source_with_a_rather_long_name_number_{number}" for number in range(20)]
    battles = numbered(1200, [A, B, A] * 400, source=[names[row % 20] for row in range(1200)])
    unread = {name: ["a_column_that_is_not_read"] * 9 for name in names}
    facts = audit(assign_folds(assign_groups(battles), 20, holdout=0.1), tokens_of(battles), unread)
    facts["near_duplicates"] |= {
        "pairs": 3,
        "battles": 6,
        "examples": [{"ids": ["x" * 70, "y" * 70], "similarity": 0.9}],
    }
    lines = format_audit(facts).splitlines()
    assert len(lines) <= 75
    assert max(map(len, lines)) <= 120
    assert "  and 8 more" in lines
    assert any(line.startswith("*") for line in lines)


def test_shares_are_of_the_battles_that_have_an_outcome():
    unknown = [np.nan] * 3
    fold = [0, 0, 1, 1, TRAIN_ONLY, TRAIN_ONLY]
    battles = numbered(6, [A, B, A, TIE, unknown, unknown], fold=fold, group=list(range(6)))
    facts = audit(battles)
    assert list(facts["outcomes"].values()) == [0.5, 0.25, 0.25]
    assert facts["parts"]["fold 0"]["deviation"] == pytest.approx(0.25)
    assert facts["parts"]["train only"] == {"battles": 2, "outcomes": None, "deviation": None}
    assert "not labelled" in format_audit(facts)
