from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from rewardmodel.evaluation.bootstrap import (
    FEWEST_GROUPS,
    MAX_SLOPE,
    draw_groups,
    fit_slopes,
    interval_of,
    paired_difference,
    percentile_interval,
    summarise,
)
from rewardmodel.evaluation.results import Difference, Interval
from rewardmodel.metrics import METRICS, accuracy, accuracy_terms, log_loss

A, B, TIE = np.eye(3)


def random_predictions(count, seed=0):
    random = np.random.default_rng(seed)
    return random.dirichlet([1, 1, 1], count), np.eye(3)[random.integers(3, size=count)]


def bootstrap_interval(metric, predicted, true, groups, samples=1000, level=0.95, seed=0):
    means = draw_groups(groups, samples, seed).means(metric.columns(predicted, true))
    return percentile_interval(metric.of_mean(means[1:]), len(np.unique(groups)), level)


def bernoulli(hits, count):
    predicted = np.tile([0.8, 0.1, 0.1], (count, 1))
    return predicted, np.array([A] * hits + [B] * (count - hits))


def test_bootstrap_with_one_battle_a_group_is_the_normal_interval_of_a_bernoulli_mean():
    predicted, true = bernoulli(280, 400)
    low, high = bootstrap_interval(accuracy, predicted, true, np.arange(400), samples=4000)
    half = 1.96 * np.sqrt(0.7 * 0.3 / 400)
    assert low == pytest.approx(0.7 - half, abs=0.005)
    assert high == pytest.approx(0.7 + half, abs=0.005)


def test_bootstrap_level_sets_the_width():
    predicted, true = bernoulli(280, 400)
    low, high = bootstrap_interval(accuracy, predicted, true, np.arange(400), samples=4000, level=0.6827)
    assert high - low == pytest.approx(2 * np.sqrt(0.7 * 0.3 / 400), abs=0.005)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_bootstrap_of_copies_in_one_group_is_the_interval_of_the_originals(metric):
    predicted, true = random_predictions(50)
    copied, copied_true, groups = (np.repeat(array, 4, axis=0) for array in (predicted, true, np.arange(50)))
    once = bootstrap_interval(metric, predicted, true, np.arange(50))
    assert bootstrap_interval(metric, copied, copied_true, groups) == pytest.approx(once)


def test_bootstrap_interval_widens_when_identical_rows_share_a_group():
    predicted, true = (np.repeat(array, 4, axis=0) for array in bernoulli(70, 100))
    grouped, single = (
        np.diff(bootstrap_interval(accuracy, predicted, true, groups))[0]
        for groups in (np.repeat(np.arange(100), 4), np.arange(400))
    )
    assert grouped / single == pytest.approx(2, abs=0.25)  # sqrt(4 copies)


def test_bootstrap_reads_groups_as_labels_in_any_order():
    predicted, true = random_predictions(30)
    groups = np.repeat(np.arange(10), 3)
    order = np.random.default_rng(1).permutation(30)
    expected = bootstrap_interval(log_loss, predicted, true, groups)
    assert bootstrap_interval(log_loss, predicted, true, groups * 7 - 5) == expected
    assert bootstrap_interval(log_loss, predicted[order], true[order], groups[order]) == pytest.approx(expected)


@pytest.mark.parametrize("groups", [1, FEWEST_GROUPS - 1, FEWEST_GROUPS])
def test_of_few_groups_there_is_no_interval(groups):
    predicted, true = random_predictions(40)
    low, high = bootstrap_interval(log_loss, predicted, true, np.arange(40) % groups)
    assert (low is None) == (high is None) == (groups < FEWEST_GROUPS)


def test_where_all_groups_are_alike_there_is_no_interval():
    predicted, true = bernoulli(60, 60)
    groups = np.repeat(np.arange(12), 5)
    assert bootstrap_interval(accuracy, predicted, true, groups) == (None, None)


def test_bootstrap_divides_by_the_battles_drawn_where_groups_differ_in_size():
    predicted, true = bernoulli(60, 60)
    groups = np.repeat(np.arange(4), [1, 2, 7, 50])
    assert draw_groups(groups).means(accuracy_terms(predicted, true)[:, None])[:, 0] == pytest.approx(1)


def test_bootstrap_is_deterministic_by_seed():
    arguments = (log_loss, *random_predictions(30), np.arange(30))
    assert bootstrap_interval(*arguments, seed=1) == bootstrap_interval(*arguments, seed=1)
    assert bootstrap_interval(*arguments, seed=1) != bootstrap_interval(*arguments, seed=2)


def test_summary_has_every_metric_with_its_interval():
    predicted, true = random_predictions(60)
    groups = np.repeat(np.arange(20), 3)
    result = summarise(predicted, true, groups)
    assert list(result) == list(METRICS)
    for name, entry in result.items():
        low, high = bootstrap_interval(METRICS[name], predicted, true, groups)
        expected = METRICS[name](predicted, true), low, high
        assert astuple(entry) == pytest.approx(expected, rel=1e-12)
        assert {type(value) for value in astuple(entry)} == {float}


@pytest.mark.parametrize("name", ["log_loss", "brier", "accuracy"])
def test_summary_value_lies_in_its_interval(name):
    entry = summarise(*random_predictions(200), np.arange(200))[name]
    assert entry.low < entry.value < entry.high


def test_a_metric_of_battles_that_are_not_there_is_left_out():
    predicted, true = np.full((4, 3), 1 / 3), np.array([A, A, A, A])
    assert set(METRICS) - set(summarise(predicted, true, np.arange(4))) == {"log_loss_b", "log_loss_tie"}
    ties = np.array([TIE, TIE, TIE, TIE])
    assert "accuracy_decided" not in summarise(predicted, ties, np.arange(4))


def test_bootstrap_means_are_drawn_in_whole_groups():
    means = draw_groups(np.array([7, 7, 9]), samples=400).means(np.array([[0.0], [0.0], [3.0]]))[1:]
    assert set(np.round(means[:, 0], 9)) == {0.0, 1.0, 3.0}  # both groups, or one of them twice
    assert means.shape == (400, 1)


def test_a_paired_difference_of_a_model_to_itself_is_nothing():
    predicted, true = random_predictions(50)
    assert paired_difference(predicted, predicted, true, np.arange(50)) == Difference(0, None, None, None)


def test_a_paired_difference_changes_its_sign_when_the_models_are_exchanged():
    first, true = random_predictions(80)
    second, _ = random_predictions(80, 1)
    there, back = (paired_difference(*pair, true, np.arange(80)) for pair in ((first, second), (second, first)))
    assert there.value == pytest.approx(log_loss(first, true) - log_loss(second, true))
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert there.p == back.p


def test_a_paired_difference_is_sharper_than_the_intervals_of_both_models():
    first, true = random_predictions(300)
    second = 0.95 * first + 0.05 / 3
    found = paired_difference(second, first, true, np.arange(300))
    low, high = bootstrap_interval(log_loss, first, true, np.arange(300))
    assert found.high - found.low < 0.5 * (high - low)
    assert found.high < 0
    assert found.p < 0.01


def test_the_p_value_of_a_difference_that_is_noise_is_large():
    first, true = random_predictions(300)
    second = np.random.default_rng(3).permutation(first)
    assert paired_difference(first, second, true, np.arange(300)).p > 0.05


def test_the_first_draw_is_the_table_itself():
    random = np.random.default_rng(0)
    terms, groups = random.random((90, 3)), random.integers(30, size=90) * 7 - 5
    draws = draw_groups(groups)
    means = draws.sums(terms) / draws.sums(np.ones((90, 1)))
    np.testing.assert_allclose(means[0], terms.mean(axis=0))
    np.testing.assert_allclose(means, draws.means(terms))


def test_draws_are_those_of_groups_with_replacement():
    """Known answer: a bootstrap of three groups, written out."""
    terms, groups = np.array([[1.0], [2.0], [4.0], [8.0]]), np.array([5, 5, 6, 9])
    sums, sizes, random = np.array([3.0, 4.0, 8.0]), np.array([2, 1, 1]), np.random.default_rng(0)
    drawn = [random.integers(3, size=3) for _ in range(50)]
    expected = [sums[rows].sum() / sizes[rows].sum() for rows in drawn]
    np.testing.assert_allclose(draw_groups(groups, samples=50).means(terms)[1:, 0], expected)


def test_without_draws_there_is_no_interval():
    assert interval_of(np.array([3, np.nan, np.nan]), 100) == Interval(3, None, None)


@pytest.mark.parametrize(
    ("low", "high", "outside"),
    [(0.1, 0.2, True), (-0.2, -0.1, True), (0, 0.1, False), (-0.1, 0.1, False), (None, None, False)],
)
def test_an_interval_excludes_what_is_outside_and_none_excludes_nothing(low, high, outside):
    found = Interval(1, low, high)
    assert found.excludes() == outside == (found.above() or found.below())
    assert not (high is not None and found.excludes(high))


def regression(x, won, weight):
    """Return scikit-learn's slope of the same regression, each battle as two weighted rows."""
    rows = np.concatenate([x, x])[:, None], np.repeat([1, 0], len(x))
    model = LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10)
    return model.fit(*rows, np.concatenate([weight * won, weight * (1 - won)])).coef_.item()


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), soft=st.booleans())
def test_slopes_are_those_of_scikit_learn(seed, soft):
    random = np.random.default_rng(seed)
    x, weight, share = random.normal(size=60), random.random(60), random.random(60)
    share = share if soft else share.round()
    times = np.stack([np.ones(60), *random.integers(0, 4, (3, 60))]).astype(np.uint8)
    expected = [regression(x, share, weight * row) for row in times]
    assert fit_slopes(x, share, weight, times) == pytest.approx(np.array(expected), abs=1e-5)


def test_slopes_without_a_finite_value_are_held():
    times = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 1], [0, 0, 0]])
    found = fit_slopes(np.array([1.0, -2.0, 1.0]), np.array([1.0, 0.0, 0.0]), np.ones(3), times)
    assert 0 < found[0] < 5
    assert found[1:].tolist()[:2] == [MAX_SLOPE, -MAX_SLOPE]
    assert np.isnan(found[3])


def test_slopes_of_lopsided_data_are_found():
    x = np.concatenate([np.full(2000, 1e-3), [12.0]])
    share = np.concatenate([np.full(2000, 0.51), [0.2]])
    assert fit_slopes(x, share, np.ones(2001), np.ones((1, 2001)))[0] == pytest.approx(
        regression(x, share, np.ones(2001))
    )


def test_slopes_of_draws_far_from_the_table_are_found():
    found = fit_slopes(np.ones(2), np.array([1.0, 0.0]), np.ones(2), np.array([[200, 1], [1, 1], [1, 200]]))
    assert found == pytest.approx(np.array([np.log(200), 0, -np.log(200)]), abs=1e-6)
