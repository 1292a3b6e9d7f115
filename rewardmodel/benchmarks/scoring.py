"""Questions and a model's scores of their responses in, the terms and figures of each published benchmark out.

Terms are numbers by question, whose means (or functions of their sums) are the figures. For each benchmark there is
also what a scorer without knowledge is expected to reach. Needs no torch.
"""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np

from rewardmodel.benchmarks.figures import Figure, average_figure, mean_figure, weighted_figure
from rewardmodel.benchmarks.questions import RM_BENCH_STYLES, TIES, Question
from rewardmodel.evaluation.bootstrap import divide

Terms = dict[str, np.ndarray]
"""(n_questions,) float64 by name; NaN where a term is not defined for a question."""

TIES_SHARES = {"tied": 0.3, "reference": 0.3, "preferred": 0.2, "preferred_hard": 0.2, "bonus": 0.01}
"""Shares of the terms of RewardBench 2's subset Ties: `process_single_model` in `rewardbench/utils.py` of
allenai/reward-bench, commit 05a9005."""

RANDOM_DRAWS = 1000
"""Draws of random scores behind the expected margins of Ties; the other expectations are exact."""

DIFFICULTIES = {"hard": np.triu(np.ones((3, 3)), 1), "normal": np.eye(3), "easy": np.tril(np.ones((3, 3)), -1)}
"""Difficulty -> cells of RM-Bench's matrix, chosen (row) against rejected (column), by style: a chosen response against
a plainer rejected one is easy, against a more elaborate one hard."""


class Scored(NamedTuple):
    """What a model says of the n responses of a question.

    Attributes:
        scores: (n,) float64: rewards, or of a model that compares two responses the mean over opponents of P(wins)
            minus P(loses), both orders averaged.
        first: (n, n) float64: how much the response of the row is preferred to that of the column when it is shown
            first; NaN for pairs that were not played.
    """

    scores: np.ndarray
    first: np.ndarray

    @property
    def lead(self) -> np.ndarray:
        """The same with both orders averaged, (n, n) float64, antisymmetric."""
        return (self.first - self.first.T) / 2


def score_rewards(rewards: np.ndarray) -> Scored:
    """Return what rewards, (n,), say; the order in which responses are shown does not matter."""
    values = np.asarray(rewards, np.float64)
    return Scored(values, values[:, None] - values[None, :])


def score_pairs(first: np.ndarray) -> Scored:
    """Return what comparisons say, (n, n), NaN where two responses were not compared."""
    lead = (first - first.T) / 2
    played = np.isfinite(lead) & ~np.eye(len(lead), dtype=bool)
    return Scored(divide(np.where(played, lead, 0).sum(axis=1), played.sum(axis=1)), first)


# RewardBench 2


def best_of_n_terms(questions: Sequence[Question], scored: Sequence[Scored]) -> Terms:
    """Return the terms of RewardBench 2.

    `win`: 1 where a right response has the highest score; responses that share it share the win, so that one right
    response among k at the top counts 1/k (`reroll_and_score_dataset` in `rewardbench/utils.py`). The others are of the
    subset Ties, see `add_ties_terms`.
    """
    wins = []
    for question, one in zip(questions, scored, strict=True):
        top = one.scores == one.scores.max()
        wins.append((top & question.correct).sum() / top.sum())
    margins = [measure_margins(one.scores, question.correct) for question, one in zip(questions, scored, strict=True)]
    return {"win": np.array(wins), **add_ties_terms(questions, *map(np.array, zip(*margins, strict=True)))}


def measure_margins(scores: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the worst right score minus the best wrong one, and the best right score minus the worst right one.

    Args:
        scores: (..., n) float64.
        correct: (n,) bool.
    """
    right, wrong = scores[..., correct], scores[..., ~correct]
    return right.min(axis=-1) - wrong.max(axis=-1), right.max(axis=-1) - right.min(axis=-1)


def add_ties_terms(questions: Sequence[Question], margin: np.ndarray, spread: np.ndarray) -> Terms:
    """Return the terms of the subset Ties, whose questions `tied:7` and `ref:7` belong together.

    `hit`: every right answer has a higher score than every wrong one. Of a tied question whose reference is there:
    `preferred`, its margin is above the spread of its right answers; `preferred_hard`, so is the reference's too;
    `bonus`, tanh(lesser margin / spread - 1), 0 for 0 / 0. (`process_single_model` in `rewardbench/utils.py`.)

    Args:
        questions: n of them.
        margin: (n,) or (n, draws), of `measure_margins`; of questions outside Ties it is not read.
        spread: the same.
    """
    references = {one.id: n for n, one in enumerate(questions) if one.subset == TIES and one.id.startswith("ref:")}
    terms = {name: np.full(np.shape(margin), np.nan) for name in ("hit", "preferred", "preferred_hard", "bonus")}
    for number, one in enumerate(questions):
        if one.subset != TIES:
            continue
        terms["hit"][number] = margin[number] > 0
        reference = references.get(f"ref:{one.id.partition(':')[2]}")
        if one.id.startswith("tied:") and reference is not None:
            lesser = np.minimum(margin[number], margin[reference])
            terms["preferred"][number] = margin[number] > spread[number]
            terms["preferred_hard"][number] = lesser > spread[number]
            with np.errstate(divide="ignore", invalid="ignore"):
                terms["bonus"][number] = np.nan_to_num(np.tanh(lesser / spread[number] - 1), nan=0.0)
    return terms


def best_of_n_chance(questions: Sequence[Question]) -> Terms:
    """Return the expected terms of RewardBench 2 for random scores; of the margins of Ties, by normal ones."""
    wins = np.array([one.correct.mean() for one in questions])
    random = np.random.default_rng(0)
    scores = [random.standard_normal((RANDOM_DRAWS, len(one.correct))) for one in questions]
    margins = [measure_margins(drawn, one.correct) for drawn, one in zip(scores, questions, strict=True)]
    terms = add_ties_terms(questions, *map(np.array, zip(*margins, strict=True)))
    expected = {name: values.mean(axis=1) for name, values in terms.items()}
    ties = np.array([one.subset == TIES for one in questions])
    hits = np.array([1 / comb(len(one.correct), int(one.correct.sum())) for one in questions])
    return {"win": wins, **expected, "hit": np.where(ties, hits, np.nan)}


def best_of_n_figures(questions: Sequence[Question], terms: Terms, subsets: Sequence[str]) -> list[Figure]:
    """Return RewardBench 2's score of each subset, and their mean where all are there."""
    member = _members(questions)
    found = [
        ties_figure(questions, terms) if name == TIES else mean_figure(name, terms["win"], member[name])
        for name in subsets
        if name in member
    ]
    return [*found, average_figure("mean of subsets", found)] if len(found) == len(subsets) else found


def ties_figure(questions: Sequence[Question], terms: Terms) -> Figure:
    """Return RewardBench 2's score of the subset Ties."""
    ties = np.array([one.subset == TIES for one in questions])
    tied = ties & np.array([one.id.startswith("tied:") for one in questions])
    linked = tied & np.isfinite(terms["preferred"])
    means = {
        "tied": mean_figure("", terms["hit"], tied),
        "reference": mean_figure("", terms["hit"], ties & ~tied),
        **{name: mean_figure("", terms[name], linked) for name in ("preferred", "preferred_hard", "bonus")},
    }
    return weighted_figure(TIES, [means[name] for name in TIES_SHARES], list(TIES_SHARES.values()))


# Pairs: RewardBench, LLMBar, JudgeBench


def pair_terms(questions: Sequence[Question], scored: Sequence[Scored]) -> Terms:
    """Return `win`: 1 where the right response of a pair has the higher score, 0 where it is lower or equal."""
    signs = [2 * one.correct[0] - 1.0 for one in questions]
    return {"win": np.array([float(sign * one.lead[0, 1] > 0) for sign, one in zip(signs, scored, strict=True)])}


def pair_chance(questions: Sequence[Question]) -> Terms:
    """Return what a coin reaches."""
    return {"win": np.full(len(questions), 0.5)}


def category_figures(
    questions: Sequence[Question], terms: Terms, categories: dict[str, dict[str, int]]
) -> list[Figure]:
    """Return RewardBench's accuracies by subset, by category, and the mean of the categories where all are there.

    Args:
        questions: n of them.
        terms: of `pair_terms`.
        categories: category -> its subsets, each with its weight; subsets that are not there do not count.
    """
    member = _members(questions)
    found, summaries = [], []
    for category, weights in categories.items():
        here = [mean_figure(name, terms["win"], member[name]) for name in weights if name in member]
        if here:
            counts = np.array([weights[one.name] for one in here], np.float64)
            summaries.append(weighted_figure(category, here, list(counts / counts.sum()), summary=True))
        found += here
    overall = [average_figure("mean of categories", summaries)] if len(summaries) == len(categories) else []
    return [*found, *summaries, *overall]


def instruction_figures(questions: Sequence[Question], terms: Terms, subsets: Sequence[str]) -> list[Figure]:
    """Return LLMBar's accuracies by subset, the mean of the adversarial ones, and the accuracy on all instances."""
    member = _members(questions)
    found = [mean_figure(name, terms["win"], member[name]) for name in subsets if name in member]
    adversarial = [one for one in found if one.name.startswith("Adversarial")]
    means = [average_figure("mean of adversarial", adversarial)] if len(adversarial) > 1 else []
    return [*found, *means, _overall("all instances", terms["win"])]


def judgement_terms(questions: Sequence[Question], scored: Sequence[Scored]) -> Terms:
    """Return JudgeBench's terms.

    `one_order`: A shown first; A wins if its score is higher, else B. `both_orders`: each order is a verdict for A or
    B, +1 if it is the label's and -1 if not, and the question counts if the sum is above 0 (`utils/metrics.py` of
    ScalerLab/JudgeBench). Rewards differ between the two only where they are equal.
    """
    one_order, both = [], []
    for question, one in zip(questions, scored, strict=True):
        verdicts = np.array([one.first[0, 1] > 0, not one.first[1, 0] > 0])  # whether A wins, in each order
        right = verdicts == question.correct[0]
        one_order.append(right[0])
        both.append(right.all())
    return {"one_order": np.array(one_order, np.float64), "both_orders": np.array(both, np.float64)}


def judgement_chance(questions: Sequence[Question]) -> Terms:
    """Return what random rewards reach; a coin for each order would be right in both in a quarter."""
    return dict.fromkeys(("one_order", "both_orders"), np.full(len(questions), 0.5))


def judgement_figures(questions: Sequence[Question], terms: Terms, categories: Sequence[str]) -> list[Figure]:
    """Return JudgeBench's accuracies by category and on all pairs, in one order and in both."""
    member = _members(questions)
    found = []
    for term, added in (("one_order", ""), ("both_orders", ", both orders")):
        found += [mean_figure(f"{name}{added}", terms[term], member[name]) for name in categories if name in member]
        found.append(_overall(f"all pairs{added}", terms[term]))
    return found


# RM-Bench


def style_terms(questions: Sequence[Question], scored: Sequence[Scored]) -> Terms:
    """Return RM-Bench's terms: of each cell of the matrix whether the chosen response wins, and the three difficulties.

    A cell is called by its styles, `concise > markdown`: the concise chosen response has a higher score than the
    rejected one with markdown (`compute_accuracy` in `scripts/utils.py` of THU-KEG/RM-Bench, commit 73c52d7).
    """
    return _style_columns(np.array([one.lead[:3, 3:] > 0 for one in scored], np.float64))


def style_chance(questions: Sequence[Question]) -> Terms:
    """Return what random scores reach: half of everything."""
    return _style_columns(np.full((len(questions), 3, 3), 0.5))


def _style_columns(matrix: np.ndarray) -> Terms:
    """Return the terms of matrices, (n_questions, 3, 3)."""
    terms = {name: (matrix * cells).sum(axis=(1, 2)) / cells.sum() for name, cells in DIFFICULTIES.items()}
    for row, chosen in enumerate(RM_BENCH_STYLES):
        terms |= {f"{chosen} > {rejected}": matrix[:, row, column] for column, rejected in enumerate(RM_BENCH_STYLES)}
    return terms


def style_figures(questions: Sequence[Question], terms: Terms, domains: Sequence[str]) -> list[Figure]:
    """Return RM-Bench's accuracies by domain and difficulty, the means over domains, and the matrix of all questions.

    A domain's score is the mean of its three difficulties, a difficulty's score the mean over domains.
    """
    member = _members(questions)
    here = [name for name in domains if name in member]
    cells = {
        (domain, level): mean_figure(f"{domain}, {level}", terms[level], member[domain])
        for domain in here
        for level in DIFFICULTIES
    }
    by_domain = [average_figure(name, [cells[name, level] for level in DIFFICULTIES]) for name in here]
    by_level = [average_figure(level, [cells[name, level] for name in here]) for level in DIFFICULTIES]
    matrix = [_overall(name, values) for name, values in terms.items() if " > " in name]
    return [*cells.values(), *by_domain, *by_level, average_figure("mean of domains", by_domain), *matrix]


def _overall(name: str, terms: np.ndarray) -> Figure:
    return mean_figure(name, terms, np.ones(len(terms), bool), summary=True)


def _members(questions: Sequence[Question]) -> dict[str, np.ndarray]:
    """Return which questions are of each subset, by its name."""
    names = np.array([one.subset for one in questions])
    return {name: names == name for name in dict.fromkeys(names.tolist())}
