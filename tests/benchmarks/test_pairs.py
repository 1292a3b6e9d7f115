import numpy as np
import pytest

from rewardmodel.battles import outcomes
from rewardmodel.benchmarks.pairs import list_pairs, number_groups, pair_battles, score_lengths, score_questions
from rewardmodel.benchmarks.questions import Question

QUESTIONS = [
    Question(1, "a", "Math", "What is 2 + 2?", ["4", "five", "six"], np.array([True, False, False]), "one"),
    Question(2, "b", "Focus", "Greet me.", ["hi", "hello", "no", "go"], np.array([True, True, False, False]), "two"),
    Question(3, "c", "Math", "What is 2 + 2?", ["four", "5"], np.array([False, True]), "one"),
]


def test_all_pairs_are_battles():
    battles = pair_battles(QUESTIONS, across=False, where="here")
    assert len(battles) == 3 + 6 + 1
    assert battles[0]["prompt"] == ["What is 2 + 2?"]
    assert (battles[1]["response_a"], battles[1]["response_b"], battles[1]["id"]) == (["4"], ["six"], "0:0:2")
    assert outcomes(battles)[[0, 2, 9]].tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert battles["source"][3] == "Focus"
    assert len(set(battles["group"])) == 2
    assert [list_pairs(one, across=True) for one in QUESTIONS[:2]] == [
        [(0, 1), (0, 2)],
        [(0, 2), (0, 3), (1, 2), (1, 3)],
    ]
    assert len(pair_battles(QUESTIONS, across=True, where="here")) == 2 + 4 + 1


@pytest.mark.parametrize("across", [False, True])
def test_predictions_of_pairs_become_scores(across):
    count = sum(len(list_pairs(one, across)) for one in QUESTIONS)
    given, exchanged = np.arange(1, count + 1) / 100, np.arange(1, count + 1) / 50
    scored = score_questions(QUESTIONS, across, given, exchanged)
    first = scored[0].first
    assert (first[0, 1], first[1, 0], first[0, 2]) == (0.01, -0.02, 0.02)
    assert np.isnan(first[1, 2]) == across
    assert scored[2].lead[0, 1] == pytest.approx(0.015 * count)
    assert scored[0].lead[0, 1] == pytest.approx(-scored[0].lead[1, 0])


def test_longer_responses_and_groups():
    assert [one.scores.tolist() for one in score_lengths(QUESTIONS)] == [[1, 4, 3], [2, 5, 2, 2], [4, 1]]
    assert number_groups(QUESTIONS).tolist() == [0, 1, 0]
