import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss

from rewardmodel.metrics import (
    METRICS,
    accuracy,
    accuracy_decided,
    accuracy_terms,
    bootstrap_interval,
    bootstrap_means,
    brier,
    brier_terms,
    calibration_terms,
    class_prior,
    expected_calibration_error,
    log_loss,
    log_loss_terms,
    paired_difference,
    summarise,
)

A, B, TIE = np.eye(3)


def random_predictions(count, seed=0, dtype=np.float64):
    random = np.random.default_rng(seed)
    return random.dirichlet([1, 1, 1], count).astype(dtype), np.eye(3)[random.integers(3, size=count)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40))
def test_log_loss_equals_scikit_learn(dtype, seed, count):
    predicted, true = random_predictions(count, seed, dtype)
    expected = sklearn_log_loss(true.argmax(axis=1), predicted, labels=[0, 1, 2])
    assert log_loss(predicted, true) == pytest.approx(expected, rel=1e-5 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("labels", [[0, 1, 2], [1, 1, 1], [2, 0, 0]])
def test_log_loss_of_exact_zeros_and_ones_equals_scikit_learn(dtype, labels):
    predicted = np.array([A, B, TIE], dtype=dtype)
    expected = sklearn_log_loss(labels, predicted, labels=[0, 1, 2])
    assert np.isfinite(expected)
    assert log_loss(predicted, np.eye(3)[labels]) == pytest.approx(expected, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize(("dtype", "worst"), [(np.float64, 52), (np.float32, 23)])
def test_log_loss_of_a_sure_mistake_is_bounded_by_the_epsilon_of_its_dtype(dtype, worst):
    assert log_loss(np.array([A], dtype), np.array([B])) == pytest.approx(worst * np.log(2), rel=1e-6)


def test_log_loss_of_uniform_predictions_is_log_3():
    assert log_loss(np.full((5, 3), 1 / 3), np.eye(3)[[0, 1, 2, 0, 1]]) == pytest.approx(np.log(3))


def test_log_loss_of_soft_outcomes_is_their_cross_entropy():
    predicted = np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    true = np.array([[0.5, 0.25, 0.25], [0, 0.5, 0.5]])
    assert log_loss_terms(predicted, true) == pytest.approx(np.array([1.5, 2]) * np.log(2))
    assert log_loss(predicted, true) == pytest.approx(1.75 * np.log(2))


def test_log_loss_normalises_rows():
    predicted, true = random_predictions(20)
    scale = np.arange(1, 21)[:, None]
    np.testing.assert_allclose(log_loss_terms(predicted * scale, true), log_loss_terms(predicted, true))


def test_brier_is_0_for_sure_and_right_2_for_sure_and_wrong():
    assert brier_terms(np.array([A, A]), np.array([A, B])).tolist() == [0, 2]


def test_brier_of_a_hand_made_case():
    predicted = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    assert brier(predicted, np.array([A, TIE])) == pytest.approx(((0.25 + 0.09 + 0.04) + (0.04 + 0.04 + 0.16)) / 2)


def test_accuracy_counts_ties_as_a_class():
    predicted = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1]])
    true = np.array([A, TIE, TIE, B])
    assert accuracy_terms(predicted, true).tolist() == [1, 1, 0, 0]
    assert accuracy(predicted, true) == 0.5


def test_calibration_error_of_sure_predictions_is_their_error_rate():
    assert expected_calibration_error(np.array([A, A, A, B]), np.array([A, A, B, B])) == pytest.approx(0.25)


def test_calibration_error_is_0_where_confidence_is_the_hit_rate():
    predicted = np.tile([0.75, 0.15, 0.1], (4, 1))
    assert expected_calibration_error(predicted, np.array([A, A, A, B])) == pytest.approx(0)


def test_calibration_error_weights_the_gaps_of_bins_by_their_battles():
    predicted = np.array([[0.9, 0.05, 0.05]] * 3 + [[0.5, 0.3, 0.2]])
    true = np.array([A, A, B, B])  # bins: 3 battles of .9, of which 2 hit; 1 battle of .5, which misses
    assert expected_calibration_error(predicted, true) == pytest.approx(3 / 4 * (0.9 - 2 / 3) + 1 / 4 * 0.5)


def test_calibration_errors_of_opposite_sign_cancel_in_a_bin_but_not_across_bins():
    in_one_bin = np.array([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]])
    in_two_bins = np.array([[0.5, 0.3, 0.2], [0.6, 0.2, 0.2]])
    true = np.array([A, B])
    assert expected_calibration_error(in_one_bin, true) == pytest.approx(0)
    assert expected_calibration_error(in_two_bins, true) == pytest.approx((0.5 + 0.6) / 2)


def test_calibration_terms_stand_in_the_bin_of_the_confidence():
    terms = calibration_terms(np.array([[0.5, 0.3, 0.2], A]), np.array([A, B]))
    assert terms.shape == (2, 15)
    assert np.argwhere(terms).tolist() == [[0, 7], [1, 14]]
    assert terms[0, 7] == pytest.approx(-0.5)
    assert terms[1, 14] == 1


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 30))
def test_metrics_do_not_depend_on_the_order_of_battles(seed, count):
    predicted, true = random_predictions(count, seed)
    order = np.random.default_rng(seed).permutation(count)
    for metric in METRICS.values():
        assert metric(predicted[order], true[order]) == pytest.approx(metric(predicted, true), nan_ok=True)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 30))
def test_metrics_do_not_change_when_a_and_b_are_exchanged(seed, count):
    predicted, true = random_predictions(count, seed)
    exchanged = {"log_loss_a": "log_loss_b", "log_loss_b": "log_loss_a"}
    for name, metric in METRICS.items():
        there = METRICS[exchanged.get(name, name)](predicted, true)
        assert metric(predicted[:, [1, 0, 2]], true[:, [1, 0, 2]]) == pytest.approx(there, nan_ok=True)


def test_class_prior_is_the_outcome_shares():
    assert class_prior(np.array([A, A, B, TIE])).tolist() == [0.5, 0.25, 0.25]
    assert class_prior(np.array([[0.5, 0.5, 0], [0, 0.5, 0.5]])).tolist() == [0.25, 0.5, 0.25]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_constant_prediction_has_less_log_loss_than_the_class_prior(seed):
    constant, true = random_predictions(20, seed)
    prior = np.broadcast_to(class_prior(true), true.shape)
    other = np.broadcast_to(constant[0], true.shape)
    assert log_loss(prior, true) <= log_loss(other, true) + 1e-12


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


def test_bootstrap_of_one_group_is_a_point():
    predicted, true = random_predictions(10)
    low, high = bootstrap_interval(log_loss, predicted, true, np.zeros(10, int))
    assert (low, high) == pytest.approx((log_loss(predicted, true),) * 2)


def test_bootstrap_divides_by_the_battles_drawn_where_groups_differ_in_size():
    predicted, true = bernoulli(60, 60)
    groups = np.repeat(np.arange(4), [1, 2, 7, 50])
    assert bootstrap_interval(accuracy, predicted, true, groups) == (1, 1)


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
        expected = {"value": METRICS[name](predicted, true), "low": low, "high": high}
        assert entry == pytest.approx(expected, rel=1e-12)
        assert {type(value) for value in entry.values()} == {float}


@pytest.mark.parametrize("name", ["log_loss", "brier", "accuracy"])
def test_summary_value_lies_in_its_interval(name):
    entry = summarise(*random_predictions(200), np.arange(200))[name]
    assert entry["low"] < entry["value"] < entry["high"]


def test_a_metric_of_battles_that_are_not_there_is_left_out():
    predicted, true = np.full((4, 3), 1 / 3), np.array([A, A, A, A])
    assert set(METRICS) - set(summarise(predicted, true, np.arange(4))) == {"log_loss_b", "log_loss_tie"}
    ties = np.array([TIE, TIE, TIE, TIE])
    assert "accuracy_decided" not in summarise(predicted, ties, np.arange(4))


def test_accuracy_on_decided_battles_leaves_ties_out_and_reads_who_is_ahead():
    predicted = np.array([[0.3, 0.2, 0.5], [0.1, 0.2, 0.7], [0.6, 0.2, 0.2], [0.4, 0.4, 0.2]])
    assert accuracy_decided(predicted, np.array([A, A, TIE, B])) == pytest.approx((1 + 0 + 0.5) / 3)


def test_a_soft_outcome_is_decided_where_somebody_is_likelier_than_the_tie():
    predicted = np.array([[0.6, 0.2, 0.2], [0.6, 0.2, 0.2]])
    true = np.array([[0.5, 0.1, 0.4], [0.3, 0.1, 0.6]])
    assert accuracy_decided(predicted, true) == 1.0
    assert np.isnan(accuracy_decided(predicted[1:], true[1:]))


def test_log_losses_of_the_outcomes_average_to_the_log_loss():
    predicted, true = random_predictions(100)
    parts = [METRICS[f"log_loss_{name}"](predicted, true) for name in ("a", "b", "tie")]
    assert np.dot(parts, true.mean(axis=0)) == pytest.approx(log_loss(predicted, true))


def test_log_loss_of_an_outcome_is_that_of_its_battles():
    predicted, true = random_predictions(100)
    ties = true[:, 2] == 1
    assert METRICS["log_loss_tie"](predicted, true) == pytest.approx(log_loss(predicted[ties], true[ties]))


def test_bootstrap_means_are_drawn_in_whole_groups():
    means = bootstrap_means(np.array([[0.0], [0.0], [3.0]]), np.array([7, 7, 9]), samples=400)
    assert set(np.round(means[:, 0], 9)) == {0.0, 1.0, 3.0}  # both groups, or one of them twice
    assert means.shape == (400, 1)


def test_a_paired_difference_of_a_model_to_itself_is_nothing():
    predicted, true = random_predictions(50)
    assert paired_difference(predicted, predicted, true, np.arange(50)) == {"value": 0, "low": 0, "high": 0, "p": 1}


def test_a_paired_difference_changes_its_sign_when_the_models_are_exchanged():
    first, true = random_predictions(80)
    second, _ = random_predictions(80, 1)
    there, back = (paired_difference(*pair, true, np.arange(80)) for pair in ((first, second), (second, first)))
    assert there["value"] == pytest.approx(log_loss(first, true) - log_loss(second, true))
    assert (there["value"], there["low"], there["high"]) == pytest.approx((-back["value"], -back["high"], -back["low"]))
    assert there["p"] == back["p"]


def test_a_paired_difference_is_sharper_than_the_intervals_of_both_models():
    first, true = random_predictions(300)
    second = 0.95 * first + 0.05 / 3
    found = paired_difference(second, first, true, np.arange(300))
    low, high = bootstrap_interval(log_loss, first, true, np.arange(300))
    assert found["high"] - found["low"] < 0.5 * (high - low)
    assert found["high"] < 0
    assert found["p"] < 0.01


def test_the_p_value_of_a_difference_that_is_noise_is_large():
    first, true = random_predictions(300)
    second = np.random.default_rng(3).permutation(first)
    assert paired_difference(first, second, true, np.arange(300))["p"] > 0.05
