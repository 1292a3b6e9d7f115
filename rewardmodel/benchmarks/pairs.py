"""Questions in, their pairs of responses as battles out, and scores of the responses from predictions of these pairs.

Also the baselines that need no language model: the longer response, and a run's TF-IDF regression. Needs no torch.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from datasets import Dataset

from rewardmodel.battles import OUTCOMES, build_table, store
from rewardmodel.benchmarks.questions import Question
from rewardmodel.benchmarks.scoring import Scored, score_pairs, score_rewards
from rewardmodel.data.folds import assign_groups

PAIRS_PER_TABLE = 5_000
"""Pairs that are Python objects at a time."""


def list_pairs(question: Question, across: bool) -> list[tuple[int, int]]:
    """Return the pairs of a question's responses, as indices, the first below the second.

    Args:
        question: with n responses.
        across: only pairs of a right one and a wrong one.
    """
    pairs = combinations(range(len(question.responses)), 2)
    return [(a, b) for a, b in pairs if not across or question.correct[a] != question.correct[b]]


def pair_battles(questions: Sequence[Question], across: bool, where: str) -> Dataset:
    """Return the pairs of all questions as battles, in order, with groups by prompt.

    Args:
        questions: each with n responses.
        across: as of `list_pairs`.
        where: the name of the file or data set.
    """
    rows = (_battle(place, one, pair) for place, one in enumerate(questions) for pair in list_pairs(one, across))

    def tables() -> Any:
        batch = []
        for row in rows:
            batch.append(row)
            if len(batch) == PAIRS_PER_TABLE:
                yield build_table(batch)
                batch = []
        yield build_table(batch)

    return assign_groups(store(tables(), where))


def _battle(place: int, question: Question, pair: tuple[int, int]) -> dict[str, Any]:
    a, b = pair
    won = float(question.correct[a]) - float(question.correct[b])
    outcome = (float(won > 0), float(won < 0), float(won == 0))
    return {
        "id": f"{place}:{a}:{b}",
        "prompt": [question.prompt],
        "response_a": [question.responses[a]],
        "response_b": [question.responses[b]],
        "source": question.subset,
        **dict(zip(OUTCOMES, outcome, strict=True)),
    }


def score_questions(
    questions: Sequence[Question], across: bool, as_given: np.ndarray, exchanged: np.ndarray
) -> list[Scored]:
    """Return the scores that predictions of all pairs give the responses.

    Args:
        questions: n of them.
        across: as the pairs were made.
        as_given: (n_pairs,) float64, P(A wins) minus P(B wins) with A shown first, in the order of `pair_battles`.
        exchanged: the same with B shown first; still A minus B.
    """
    found, start = [], 0
    for one in questions:
        pairs = list_pairs(one, across)
        stop, count = start + len(pairs), len(one.responses)
        first = np.full((count, count), np.nan)
        a, b = np.array(pairs).T
        first[a, b], first[b, a] = as_given[start:stop], -exchanged[start:stop]
        found.append(score_pairs(first))
        start = stop
    return found


def score_lengths(questions: Sequence[Question]) -> list[Scored]:
    """Return scores that are the characters of each response: the longer one wins."""
    return [score_rewards(np.array([len(text) for text in one.responses])) for one in questions]


def number_groups(questions: Sequence[Question]) -> np.ndarray:
    """Return the number of each question's group, (n_questions,) int64."""
    return np.unique([one.group for one in questions], return_inverse=True)[1]
