import numpy as np
import pytest

from rewardmodel.benchmarks.figures import (
    average_figure,
    compare_figures,
    correct_holm,
    draw_values,
    fewest_groups,
    mean_figure,
    two_sided_p,
    weighted_figure,
)
from rewardmodel.evaluation.bootstrap import draw_groups, interval_of

EVERYTHING = np.ones(60, bool)


def test_a_mean_is_over_the_rows_that_count():
    terms, rows = np.array([1.0, 0, np.nan, 1]), np.array([True, True, False, True])
    draws = draw_groups(np.arange(4), samples=3)
    assert draw_values([mean_figure("", terms, rows)], draws)[0][0] == pytest.approx(2 / 3)
    weights = np.array([3.0, 1, 9, 0])
    assert draw_values([mean_figure("", terms, rows, weights=weights)], draws)[0][0] == pytest.approx(3 / 4)


def test_weights_add_up():
    terms = np.arange(60) % 2.0
    halves = [mean_figure("", terms, np.arange(60) < 20), mean_figure("", terms * 2, np.arange(60) >= 20)]
    draws = draw_groups(np.arange(60))
    weighted, mean = draw_values([weighted_figure("", halves, [0.1, 2]), average_figure("mean", halves)], draws)
    parts = draw_values(halves, draws)
    assert weighted == pytest.approx(0.1 * parts[0] + 2 * parts[1])
    assert mean[0] == pytest.approx((0.5 + 1) / 2)


def test_intervals_are_clustered_by_prompt():
    random = np.random.default_rng(0)
    shared = np.repeat(random.integers(0, 2, 20).astype(float), 3)  # three rows a prompt, all alike
    alone, together = (draw_groups(groups) for groups in (np.arange(60), np.repeat(np.arange(20), 3)))
    figure = mean_figure("", shared, EVERYTHING)
    narrow, wide = (interval_of(draw_values([figure], draws)[0], draws.groups) for draws in (alone, together))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_there_is_no_interval_below_ten_prompts():
    few = mean_figure("few", np.arange(60) % 2.0, np.arange(60) < 9)
    draws = draw_groups(np.arange(60))
    assert fewest_groups(few, draws) == 9
    assert fewest_groups(average_figure("", [few, mean_figure("", np.ones(60), EVERYTHING)]), draws) == 9
    values = draw_values([few], draws)
    compared = compare_figures([few], values, [one * 0 for one in values], draws)[0]
    assert (compared.difference.low, compared.p, compared.p_holm) == (None, None, None)


def test_holm_worked_example():
    assert correct_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert correct_holm([]) == []


def test_runs_are_compared_pair_by_pair():
    random = np.random.default_rng(1)
    first = random.integers(0, 2, 200).astype(float)
    second = first.copy()
    second[:20] = 0  # worse on some of the rows of one subset, the same elsewhere
    rows = np.arange(200) < 100
    draws = draw_groups(np.arange(200))

    def figures(terms):
        return [mean_figure("one", terms, rows), mean_figure("other", terms, ~rows),
                mean_figure("all", terms, rows | ~rows, summary=True)]  # fmt: skip

    values = [draw_values(figures(terms), draws) for terms in (first, second)]
    one, other, whole = compare_figures(figures(first), *values, draws)
    lost = first[:20].sum()
    assert one.difference.value == pytest.approx(lost / 100)
    assert one.difference.low > 0
    assert one.p == pytest.approx(2 / 1001)
    assert one.p_holm == one.p  # the only subset that has an interval
    assert (other.difference.value, other.difference.low, other.p) == (0, None, None)
    assert whole.difference.value == pytest.approx(lost / 200)
    assert whole.p_holm is None


def test_p_is_one_where_there_is_no_difference():
    random = np.random.default_rng(0)
    assert two_sided_p(np.concatenate([[0], random.normal(size=1000)]), 50) > 0.8
