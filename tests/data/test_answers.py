import json

import numpy as np
import pandas as pd
import pytest

from rewardmodel.battles import outcomes
from rewardmodel.config.schema import Source
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError


def read(tmp_path, *rows, **options):
    path = tmp_path / "b.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return read_battles(Source(str(path), **options))


def message_of(tmp_path, *rows, **options):
    with pytest.raises(InputError) as caught:
        read(tmp_path, *rows, **options)
    return str(caught.value).removeprefix(str(tmp_path / "b.jsonl: "))


def judged(battles):
    """Return (better, worse) of each battle, or (first, second, "tie")."""
    found = []
    for battle, (a, b, tie) in zip(battles, outcomes(battles), strict=True):
        pair = [battle["response_a"][-1], battle["response_b"][-1]]
        assert sorted([a, b, tie]) == [0, 0, 1]
        found.append((*sorted(pair), "tie") if tie else tuple(pair if a else pair[::-1]))
    return found


def ranked(*pairs, key="rank"):
    return [{"answer": text, key: grade, "model": f"m-{text}"} for text, grade in pairs]


def said(text, role="assistant"):
    return [{"role": role, "content": text}]


CHOICES = {
    **{"id": "r0", "prompt": "q", "chosen": ["good"], "rejected": ["bad", "worse", "worst"]},
    **{"num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["m1", "m2", "m3", "m4"]},
}


def test_each_chosen_answer_meets_each_rejected_one(tmp_path):
    battles = read(
        tmp_path,
        CHOICES,
        {
            **CHOICES,
            "id": "r1",
            "chosen": ["good", "fine"],
            "rejected": ["bad", "x"],
            "num_correct": 2,
            "num_incorrect": 2,
        },
    )
    assert battles["id"][:] == [f"r0/1-{n}" for n in (2, 3, 4)] + [f"r1/{n}" for n in ("1-3", "1-4", "2-3", "2-4")]
    assert judged(battles)[:3] == [("good", "bad"), ("good", "worse"), ("good", "worst")]
    assert judged(battles)[3:] == [("good", "bad"), ("good", "x"), ("fine", "bad"), ("fine", "x")]
    assert {battles[1]["model_a"], battles[1]["model_b"]} == {"m1", "m3"}
    np.testing.assert_allclose(battles["weight"][:], [1 / 3] * 3 + [1 / 4] * 4)


def test_a_single_chosen_and_rejected_keeps_its_id(tmp_path):
    assert read(tmp_path, {"id": "r", "prompt": "q", "chosen": ["good"], "rejected": ["bad"]})["id"][:] == ["r"]


def test_lists_in_csv_are_lists_where_their_length_is_given(tmp_path):
    pd.DataFrame([CHOICES]).to_csv(tmp_path / "b.csv", index=False)  # as Python prints them
    assert judged(read_battles(tmp_path / "b.csv")) == [("good", "bad"), ("good", "worse"), ("good", "worst")]


RANKINGS = {
    "nectar": {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": ranked(("b", 2), ("a", 1), ("c", 3))},
    "NeMo": {
        "context": said("q", "user"),
        "completions": [{"rank": n, "completion": said(text)} for n, text in enumerate("abc")],
    },
    "UltraFeedback": {
        "instruction": "q",
        "completions": [
            {"response": text, "overall_score": s, "model": "m"} for text, s in zip("cab", (1, 9.5, 3), strict=True)
        ],
    },
    "scores": {"prompt": "q", "responses": ["c", "a", "b"], "scores": [-1, 5, "0.5"]},
    "ranks": {"prompt": "q", "answers": ["c", "a", "b"], "ranks": [3, 1, 2]},
    "a prompt of messages": {"prompt": said("q", "user"), "completions": ranked(("b", 2), ("a", 1), ("c", 3))},
    "messages with a rank": {"prompt": "q", "answers": [{**said(text)[0], "rank": n} for n, text in enumerate("abc")]},
}


@pytest.mark.parametrize("row", RANKINGS.values(), ids=RANKINGS)
def test_ranked_and_scored_answers_meet_each_other(tmp_path, row):
    battles = read(tmp_path, row)
    assert battles["prompt"][:] == [["q"]] * 3
    assert judged(battles) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert sum(battles["weight"][:]) == pytest.approx(1)
    assert len(set(battles["id"][:])) == 3


@pytest.mark.parametrize(
    ("pairs", "met"),
    [
        ("all", [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c", "tie"), ("b", "d"), ("c", "d")]),
        ("adjacent", [("a", "b"), ("b", "c", "tie"), ("c", "d")]),
        ("best", [("a", "b"), ("a", "c"), ("a", "d")]),
    ],
)
def test_pairs_says_which_answers_meet_and_equal_ranks_are_ties(tmp_path, pairs, met):
    row = {"prompt": "q", "answers": ranked(("d", 4), ("a", 1), ("b", 2), ("c", 2))}
    battles = read(tmp_path, row, pairs=pairs)
    assert judged(battles) == met
    assert battles["weight"][:] == pytest.approx([1 / len(met)] * len(met))
    models = [{battle["model_a"], battle["model_b"]} for battle in battles]
    assert models == [{f"m-{one[0]}", f"m-{one[1]}"} for one in met]


def p_of_better(battles):
    """Return P(the better one wins) and P(tie) of each battle; the better text comes first in the alphabet."""
    return [
        (one["winner_model_a"] if one["response_a"] < one["response_b"] else one["winner_model_b"], one["winner_tie"])
        for one in battles
    ]


@pytest.mark.parametrize("key", ["score", "rating", "overall_score"])
def test_scores_make_soft_outcomes_at_a_scale(tmp_path, key):
    row = {"prompt": "q", "answers": ranked(("a", 9), ("b", 5), ("c", 5), ("d", -2000), key=key)}
    assert [p for p, _ in p_of_better(read(tmp_path, row))] == [1, 1, 1, 0, 1, 1]
    found = p_of_better(read(tmp_path, row, score_scale=2.0))
    assert found == [pytest.approx(one) for one in [(0.880797, 0), (0.880797, 0), (1, 0), (0, 1), (1, 0), (1, 0)]]


def test_scores_of_a_chosen_and_a_rejected_one_make_soft_outcomes_too(tmp_path):
    rows = [
        {"prompt": f"q{n}", "chosen": "a", "rejected": "b", "score_chosen": one, "score_rejected": other}
        for n, (one, other) in enumerate([(3, 1), (2, 2), (1, 2), ("inf", "inf"), ("inf", 2)])
    ]
    found = p_of_better(read(tmp_path, *rows, score_scale=1.0))
    expected = [(0.880797, 0), (0, 1), (0.268941, 0), (0, 1), (1, 0)]
    assert found == [pytest.approx(one, abs=1e-6) for one in expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "answers": ranked(("a", 1), ("b", 2))},
            "column 'answers': score_scale: the answers have a rank",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "score_scale: the format preference has no scores here; lea"),
        (CHOICES, "score_scale: the format preference has no scores here; leave it out"),
        (
            CHOICES | {"score_chosen": 2, "score_rejected": 1},
            "score_scale: lists of chosen and rejected answers have no",
        ),
        (
            {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a", "score_chosen": 1},
            "the format competit",
        ),
    ],
)
def test_a_scale_of_scores_is_refused_where_there_are_none(tmp_path, row, message):
    assert message in message_of(tmp_path, row, score_scale=1.0)


def test_a_scale_is_above_zero(tmp_path):
    row = {"prompt": "q", "answers": ranked(("a", 1), ("b", 2), key="score")}
    assert "score_scale: 0.0; give a number above 0" in message_of(tmp_path, row, score_scale=0.0)


def test_labels_are_grades_without_ties(tmp_path):
    row = {"prompt": "q", "answers": ranked(("a", "chosen"), ("b", "rejected"), ("c", "rejected"), key="label")}
    assert judged(read(tmp_path, row)) == [("a", "b"), ("a", "c")]


def test_the_coin_depends_on_the_seed_and_the_texts_alone(tmp_path):
    rows = [{"prompt": f"q{n}", "answers": ranked(("a", 1), ("b", 2))} for n in range(200)]
    first = read(tmp_path, *rows)["response_a"][:]
    assert 60 < first.count(["a"]) < 140
    assert read(tmp_path, *rows[::-1])["response_a"][:] == first[::-1]


BAD = {
    "no chosen": ({**CHOICES, "chosen": []}, "row 2, column 'chosen': no answers; a battle needs one chosen and one"),
    "null chosen": ({**CHOICES, "chosen": None}, "row 2, column 'chosen': no answers"),
    "other number": ({**CHOICES, "num_correct": 2}, "row 2, column 'num_correct': 2, but the row has 1; correct the"),
    "other total": ({**CHOICES, "total_completions": 5}, "row 2, column 'total_completions': 5, but the row has 4"),
    "an answer of null": ({**CHOICES, "rejected": ["x", None, "y"]}, "row 2, column 'rejected': answer 3 is empty"),
}
BAD_RANKS = {
    "one": (ranked(("a", 1)), "row 2, column 'answers': 1 answers, and no two to compare; give two, or leave"),
    "none": ([], "row 2, column 'answers': 0 answers, and no two to compare"),
    "no rank": ([{"answer": "a"}, {"answer": "b"}], "row 2, column 'answers': answer 1 has no rank or score"),
    "rank missing": ([*ranked(("a", 1)), {"answer": "b"}], "row 2, column 'answers': answer 2 has no rank; give each"),
    "a word": (ranked(("a", 1), ("b", "best")), "row 2, column 'answers': answer 2: rank 'best' is not a number"),
    "nan": (ranked(("a", 1), ("b", "nan")), "row 2, column 'answers': answer 2: rank 'nan' is not a number"),
    "another label": (
        ranked(("a", "chosen"), ("b", "maybe"), key="label"),
        "row 2, column 'answers': answer 2: label 'maybe' is neither chosen nor rejected",
    ),
    "no text": ([*ranked(("a", 1)), {"rank": 2}], "row 2, column 'answers': answer 2: {'rank': 2} has no text"),
    "no list": ("a", "row 2, column 'answers': 'a' is not a JSON list; give a list of answers, like"),
}


@pytest.mark.parametrize(("row", "fragment"), BAD.values(), ids=BAD)
def test_bad_lists_of_answers_are_named_by_row(tmp_path, row, fragment):
    assert message_of(tmp_path, CHOICES, {**row, "id": "2"}).startswith(fragment)


@pytest.mark.parametrize(("answers", "fragment"), BAD_RANKS.values(), ids=BAD_RANKS)
def test_bad_rankings_are_named_by_row(tmp_path, answers, fragment):
    good = {"prompt": "q", "answers": ranked(("a", 1), ("b", 2))}
    assert message_of(tmp_path, good, {"prompt": "q", "answers": answers}).startswith(fragment)


def test_numbers_beside_the_answers_are_as_many(tmp_path):
    row = {"prompt": "q", "responses": ["a", "b"], "scores": [1]}
    assert message_of(tmp_path, row).startswith("row 1, column 'scores': 1 for 2 answers; give one number for each")


def test_unknown_pairs_are_refused(tmp_path):
    row = {"prompt": "q", "answers": ranked(("a", 1), ("b", 2))}
    assert "pairs: worst; known: all, adjacent, best" in message_of(tmp_path, row, pairs="worst")


def test_one_response_a_row_is_refused_as_what_it_is(tmp_path):
    message = message_of(tmp_path, {"prompt": "q", "response": "a", "score": 0.1})
    assert message.startswith("one response a row, in column 'response', and no second one to compare it with; put two")
