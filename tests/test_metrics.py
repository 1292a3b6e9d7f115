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
    brier,
    brier_terms,
    calibration_terms,
    class_prior,
    expected_calibration_error,
    log_loss,
    log_loss_terms,
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
