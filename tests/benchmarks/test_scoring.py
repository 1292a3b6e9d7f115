from functools import partial

import numpy as np
import pytest

from rewardmodel.benchmarks.figures import draw_values
from rewardmodel.benchmarks.questions import Question
from rewardmodel.benchmarks.scoring import (
    best_of_n_chance,
    best_of_n_figures,
    best_of_n_terms,
    category_figures,
    instruction_figures,
    judgement_figures,
    judgement_terms,
    pair_chance,
    pair_terms,
    score_pairs,
    score_rewards,
    style_chance,
    style_figures,
    style_terms,
)
from rewardmodel.benchmarks.table import REWARDBENCH2_SUBSETS, REWARDBENCH_CATEGORIES, RM_BENCH_DOMAINS
from rewardmodel.evaluation.bootstrap import draw_groups


def question(subset, correct, name="1", row=1):
    responses = ["a response"] * len(correct)
    return Question(row, name, subset, f"prompt {row}", responses, np.array(correct, bool), f"prompt {row}")


def values(figures):
    draws = draw_groups(np.arange(len(figures[0].columns)), samples=1)
    return {one.name: drawn[0] for one, drawn in zip(figures, draw_values(figures, draws), strict=True)}


@pytest.mark.parametrize(
    ("scores", "win"),
    [
        ([3, 1, 2, 0], 1),
        ([1, 3, 2, 0], 0),
        ([2, 2, 1, 0], 1 / 2),
        ([2, 2, 2, 0], 1 / 3),
        ([0, 0, 0, 0], 1 / 4),
        ([0, 1, 1, 1], 0),
    ],
)
def test_equal_scores_share_the_win_of_one_of_four(scores, win):
    terms = best_of_n_terms([question("Math", [1, 0, 0, 0])], [score_rewards(np.array(scores))])
    assert terms["win"].tolist() == [win]


def test_any_of_several_right_responses_wins():
    scored = [score_rewards(np.array(scores)) for scores in ([1, 5, 2, 3], [1, 5, 5, 3], [5, 5, 1, 1])]
    terms = best_of_n_terms([question("Math", [1, 1, 0, 0])] * 3, scored)
    assert terms["win"].tolist() == [1, 0.5, 1]


def ties(tied, reference):
    """Return the score of Ties for one tied question with three right answers of five, and its reference."""
    questions = [question("Ties", [1, 1, 1, 0, 0], "tied:7"), question("Ties", [1, 0, 0], "ref:7")]
    scored = [score_rewards(np.array(one, float)) for one in (tied, reference)]
    figures = best_of_n_figures(questions, best_of_n_terms(questions, scored), REWARDBENCH2_SUBSETS)
    return values(figures)["Ties"]


def test_ties_are_scored_by_accuracy_and_margins():
    # margin 4 above the spread 1, the reference's 3 too; the lesser margin is three times the spread
    assert ties([6, 5, 5, 1, 0], [4, 1, 0]) == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01 * np.tanh(3 - 1))
    # the reference's margin of 1 is below the spread of 2
    assert ties([7, 5, 5, 1, 0], [2, 1, 0]) == pytest.approx(0.3 + 0.3 + 0.2 + 0.01 * np.tanh(1 / 2 - 1))
    # right answers differ by more than they lead by: no margin
    assert ties([9, 5, 5, 4, 0], [9, 1, 0]) == pytest.approx(0.3 + 0.3 + 0.01 * np.tanh(1 / 4 - 1))
    # one wrong answer above a right one
    assert ties([6, 5, 2, 3, 0], [4, 1, 0]) == pytest.approx(0.3 + 0.01 * np.tanh(-1 / 4 - 1))


def test_ties_of_equal_scores():
    assert ties([1, 1, 1, 1, 1], [1, 1, 1]) == 0
    assert ties([5, 5, 5, 1, 0], [4, 1, 0]) == pytest.approx(1.01)  # no spread: the bonus is tanh(inf)


def test_random_scores_have_exact_expectations():
    questions = [
        question("Math", [1, 0, 0, 0]),
        question("Ties", [1, 1, 0], "tied:1"),
        question("Ties", [1, 0], "ref:1"),
    ]
    terms = best_of_n_chance(questions)
    assert terms["win"].tolist() == pytest.approx([1 / 4, 2 / 3, 1 / 2])
    assert terms["hit"].tolist() == pytest.approx([np.nan, 1 / 3, 1 / 2], nan_ok=True)
    # both right scores above the wrong one, by more than they differ: a sixth of uniform gaps, about so of normal ones
    assert 0.1 < terms["preferred"][1] < 0.25
    assert terms["preferred_hard"][1] < terms["preferred"][1]
    assert pair_chance(questions)["win"].tolist() == [0.5] * 3
    assert style_chance(questions)["hard"].tolist() == [0.5] * 3


def test_the_mean_of_subsets_needs_all_of_them():
    questions = [question(name, [1, 0, 0, 0]) for name in REWARDBENCH2_SUBSETS[:5]]
    scored = [score_rewards(np.array([place % 2, 0.5, 0, 0])) for place in range(5)]
    found = best_of_n_figures(questions, best_of_n_terms(questions, scored), REWARDBENCH2_SUBSETS)
    assert values(found) == dict(zip(REWARDBENCH2_SUBSETS[:5], [0, 1, 0, 1, 0], strict=True))
    questions += [question("Ties", [1, 1, 0], "tied:1"), question("Ties", [1, 0], "ref:1")]
    scored += [score_rewards(np.array([4.0, 3, 0])), score_rewards(np.array([0.0, 1]))]
    found = values(best_of_n_figures(questions, best_of_n_terms(questions, scored), REWARDBENCH2_SUBSETS))
    assert found["Ties"] == pytest.approx(0.3 + 0.2 + 0.01 * np.tanh(-2))
    assert found["mean of subsets"] == pytest.approx((2 + found["Ties"]) / 6)


def test_categories_have_their_published_weights():
    questions = [question(name, [1, 0]) for name in ("math-prm", "hep-cpp", "hep-go", "alpacaeval-easy")]
    scored = [score_rewards(np.array(one)) for one in ([1, 0], [0, 1], [0, 0], [2, 1])]
    found = values(category_figures(questions, pair_terms(questions, scored), REWARDBENCH_CATEGORIES))
    assert found["hep-go"] == 0  # equal scores are no win
    assert found["Reasoning"] == pytest.approx(984 / (984 + 2 * 164))
    assert found["Chat"] == 1
    assert "mean of categories" not in found
    everything = [question(name, [1, 0]) for one in REWARDBENCH_CATEGORIES.values() for name in one]
    scored = [score_rewards(np.array([float(one.subset != "mt-bench-hard"), 0.5])) for one in everything]
    found = values(category_figures(everything, pair_terms(everything, scored), REWARDBENCH_CATEGORIES))
    assert found["Chat Hard"] == pytest.approx(1 - 37 / 456)
    assert found["mean of categories"] == pytest.approx((3 + 1 - 37 / 456) / 4)


def test_a_judgement_in_both_orders_needs_both():
    nan = np.nan
    cases = {
        "right twice": ([[nan, 0.2], [-0.1, nan]], 1, 1),
        "right as A only": ([[nan, 0.2], [0.1, nan]], 1, 0),
        "right as B only": ([[nan, -0.2], [-0.1, nan]], 0, 0),
        "wrong twice": ([[nan, -0.2], [0.1, nan]], 0, 0),
        "equal": ([[nan, 0.0], [0.0, nan]], 0, 0),
    }
    questions = [question("math", [1, 0])] * len(cases)
    terms = judgement_terms(questions, [score_pairs(np.array(first)) for first, _, _ in cases.values()])
    assert terms["one_order"].tolist() == [one for _, one, _ in cases.values()]
    assert terms["both_orders"].tolist() == [both for _, _, both in cases.values()]
    equal = judgement_terms([question("math", [0, 1])], [score_rewards(np.array([1.0, 1.0]))])
    assert (equal["one_order"][0], equal["both_orders"][0]) == (1, 0)  # equal scores are no win for A
    found = values(judgement_figures(questions, terms, ["knowledge", "math"]))
    assert found == {"math": 0.4, "all pairs": 0.4, "math, both orders": 0.2, "all pairs, both orders": 0.2}


def test_llmbar_has_a_mean_of_its_adversarial_subsets():
    questions = [question(name, [0, 1]) for name in ("Natural", "Adversarial_GPTOut", "Adversarial_Manual", "Natural")]
    scored = [score_rewards(np.array(one)) for one in ([0, 1], [1, 0], [0, 1], [0, 1])]
    subsets = ("Natural", "Adversarial_GPTOut", "Adversarial_Manual")
    found = values(instruction_figures(questions, pair_terms(questions, scored), subsets))
    assert (found["Natural"], found["mean of adversarial"], found["all instances"]) == (1, 0.5, 0.75)


def test_rm_bench_worked_example():
    # the chosen beat the rejected of the same or a plainer style; one concise chosen response beats all
    questions = [question("chat", [1, 1, 1, 0, 0, 0]), question("math", [1, 1, 1, 0, 0, 0])]
    scored = [score_rewards(np.array(one)) for one in ([3, 5, 7, 2, 4, 6], [9, 0, 0, 1, 1, 1])]
    terms = style_terms(questions, scored)
    assert terms["hard"].tolist() == pytest.approx([0, 2 / 3])
    assert terms["normal"].tolist() == pytest.approx([1, 1 / 3])
    assert terms["easy"].tolist() == pytest.approx([1, 0])
    assert terms["concise > markdown"].tolist() == [0, 1]
    assert terms["markdown > concise"].tolist() == [1, 0]
    found = values(style_figures(questions, terms, RM_BENCH_DOMAINS))
    assert found["chat, hard"] == 0
    assert found["chat"] == pytest.approx(2 / 3)
    assert found["math"] == pytest.approx(1 / 3)
    assert (found["hard"], found["normal"], found["easy"]) == pytest.approx((1 / 3, 2 / 3, 1 / 2))
    assert found["mean of domains"] == pytest.approx(0.5)
    assert found["concise > markdown"] == 0.5


def test_a_planted_length_bias_shows_as_easy_far_above_hard():
    random = np.random.default_rng(0)
    style = np.array([0, 10, 20] * 2)  # the elaborate styles are longer
    questions = [question("chat", [1, 1, 1, 0, 0, 0], row=number) for number in range(200)]
    biased = [score_rewards(style + random.normal(0, 3, 6)) for _ in questions]
    found = values(style_figures(questions, style_terms(questions, biased), RM_BENCH_DOMAINS))
    assert found["easy"] > 0.98
    assert found["hard"] < 0.02
    assert found["normal"] == pytest.approx(0.5, abs=0.06)


def test_pairs_give_the_mean_margin_over_opponents():
    nan = np.nan
    first = np.array([[nan, 0.6, 0.8], [-0.2, nan, 0.1], [-0.4, 0.1, nan]])
    scored = score_pairs(first)
    assert scored.lead[0, 1] == pytest.approx(0.4)
    assert scored.lead[1, 2] == 0
    assert scored.scores == pytest.approx([(0.4 + 0.6) / 2, (-0.4 + 0) / 2, (-0.6 + 0) / 2])
    across = score_pairs(np.array([[nan, nan, 0.8], [nan, nan, 0.1], [-0.4, 0.1, nan]]))
    assert across.scores == pytest.approx([0.6, 0, -0.3])


def test_the_order_of_responses_does_not_matter_to_rewards():
    rewards = np.array([1.5, -2, 0.25])
    scored = score_rewards(rewards)
    assert (scored.first == scored.lead).all()
    assert scored.scores.tolist() == rewards.tolist()
    wins = partial(best_of_n_terms, [question("Math", [1, 0, 0])])
    assert wins([scored])["win"].tolist() == wins([score_pairs(scored.first)])["win"].tolist() == [1]
