import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel.errors import InputError
from rewardmodel.evaluation import calibration
from rewardmodel.evaluation.calibration import (
    BLEND,
    CALIBRATION_METHODS,
    NO_CALIBRATION,
    Calibrator,
    choose_calibrator,
    cross_fit,
    fit_calibrator,
    load_calibrator,
    reliability_bins,
    save_calibrator,
)
from rewardmodel.metrics import log_loss, wilson_interval


def drawn(count, seed=0, change=lambda logits: logits):
    """Return probabilities of logits that `change` spoilt, and outcomes drawn from the true ones."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, 3))
    true = softmax(logits)
    winner = (true.cumsum(axis=1) > random.random((count, 1))).argmax(axis=1)
    return softmax(change(logits)), np.eye(3)[winner], true


def softmax(logits):
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


SPOILT = {
    "temperature": lambda logits: 2.0 * logits,
    "tie_mass": lambda logits: logits + np.array([0, 0, 0.7]),
    "vector": lambda logits: (
        (logits - logits[:, :2].mean(axis=1, keepdims=True)) * np.array([2.0, 2.0, 0.5]) + np.array([0, 0, 0.7])
    ),
}


def views(count, seed=0, noise=(1.0, 1.5), tie=0.0):
    """Return what two that see the same logits with noise of their own say of battles, and outcomes drawn from these.

    Outcomes are drawn from softmax(a log p_model + b log p_baseline + tie), a and b the noises' inverse.
    """
    random = np.random.default_rng(seed)
    pair = [softmax(size * random.normal(size=(count, 3))) for size in noise]
    logits = sum(np.log(one) / size for one, size in zip(pair, noise, strict=True)) + np.array([0, 0, tie])
    winner = (softmax(logits).cumsum(axis=1) > random.random((count, 1))).argmax(axis=1)
    return np.hstack(pair), np.eye(3)[winner], softmax(logits)


CALIBRATORS = [method for method in CALIBRATION_METHODS if method != BLEND]


@pytest.mark.parametrize("method", CALIBRATORS)
def test_a_planted_distortion_is_taken_back(method):
    spoilt, outcomes, true = drawn(20_000, change=SPOILT[method])
    calibrated = fit_calibrator(method, spoilt, outcomes)(spoilt)
    assert np.abs(spoilt - true).mean() > 0.05
    assert np.abs(calibrated - true).mean() < 0.012


def test_the_parameters_of_planted_distortions_are_found():
    spoilt, outcomes, _ = drawn(40_000, change=SPOILT["temperature"])
    assert fit_calibrator("temperature", spoilt, outcomes).parameters == pytest.approx([-np.log(2)], abs=0.03)
    spoilt, outcomes, _ = drawn(40_000, change=SPOILT["tie_mass"])
    assert fit_calibrator("tie_mass", spoilt, outcomes).parameters == pytest.approx([-0.7], abs=0.05)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(sorted(CALIBRATION_METHODS)), st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.integers(0, 99)
)
def test_calibrated_rows_sum_to_one_and_a_swap_stays_exact(method, parameters, seed):
    predicted = np.hstack(np.random.default_rng(seed).dirichlet([0.3] * 3, (2, 8)))[
        :, : CALIBRATION_METHODS[method].columns
    ]
    calibrator = Calibrator(method, tuple(parameters[: len(CALIBRATION_METHODS[method].start)]))
    exchanged = predicted[:, [1, 0, 2, 4, 3, 5][: CALIBRATION_METHODS[method].columns]]
    once, swapped = calibrator(predicted), calibrator(exchanged)[:, [1, 0, 2]]
    np.testing.assert_allclose(once.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(once, swapped, atol=1e-12)


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_the_parameters_to_start_from_change_nothing(method):
    predicted = np.hstack([drawn(20)[0], drawn(20, seed=1)[0]])
    np.testing.assert_allclose(
        Calibrator(method, CALIBRATION_METHODS[method].start)(predicted), predicted[:, :3], atol=1e-12
    )


def test_the_weights_of_a_planted_blend_are_found():
    both, outcomes, true = views(60_000, noise=(1.0, 2.0), tie=-0.4)
    calibrator = fit_calibrator(BLEND, both, outcomes)
    assert calibrator.parameters == pytest.approx((1.0, 0.5, -0.4), abs=0.04)
    assert np.abs(calibrator(both) - true).mean() < 0.01
    p = both[:1]
    by_hand = p[0, :3] ** calibrator.parameters[0] * p[0, 3:] ** calibrator.parameters[1]
    by_hand[2] *= np.exp(calibrator.parameters[2])
    np.testing.assert_allclose(calibrator(p)[0], by_hand / by_hand.sum(), atol=1e-12)


def test_two_noisy_views_of_the_truth_are_weighed_by_their_precision():
    random = np.random.default_rng(0)
    logits = random.normal(size=(60_000, 3))
    winner = (softmax(logits).cumsum(axis=1) > random.random((60_000, 1))).argmax(axis=1)
    seen = [logits + noise * random.normal(size=logits.shape) for noise in (0.5, 1.0)]
    both = np.hstack([softmax(one) for one in seen])
    model, baseline, mass = fit_calibrator(BLEND, both, np.eye(3)[winner]).parameters
    assert model / baseline == pytest.approx(4, rel=0.15)  # precisions 1 / 0.5² and 1 / 1.0²
    assert mass == pytest.approx(0, abs=0.03)
    losses = [
        log_loss(one, np.eye(3)[winner]) for one in (Calibrator(BLEND, (model, baseline, mass))(both), both[:, :3])
    ]
    assert losses[0] < losses[1] - 0.01


def test_no_weight_of_a_blend_is_below_0():
    both, outcomes, _ = views(5_000)
    both[:, 3:] = softmax(-np.log(both[:, 3:]))  # a baseline that says the contrary
    model, baseline, _ = fit_calibrator(BLEND, both, outcomes).parameters
    assert model > 0.5
    assert baseline == 0


def test_a_blend_is_chosen_only_if_it_is_asked_for_and_beats_the_calibrators():
    both, outcomes, _ = views(3_000)
    groups = np.arange(3_000)
    off, on = choose_calibrator(both, outcomes, groups), choose_calibrator(both, outcomes, groups, blend=True)
    assert set(off.tried) == set(on.tried) == set(CALIBRATION_METHODS)
    assert off.calibrator.method != BLEND
    assert on.calibrator == fit_calibrator(BLEND, both, outcomes)
    assert on.verdict.startswith("applied: blend changes the log loss by -")
    assert on.blended == off.blended
    further = log_loss(on.cross_fitted, outcomes) - log_loss(off.cross_fitted, outcomes)
    assert on.blended.value == pytest.approx(further)
    assert on.blended.high < 0
    assert choose_calibrator(both[:, :3], outcomes, groups).blended is None


def test_a_blend_with_what_knows_nothing_is_left_out_and_the_verdict_says_so():
    predicted, outcomes, _ = drawn(2_000, change=SPOILT["temperature"])
    both = np.hstack([predicted, np.random.default_rng(1).dirichlet([1] * 3, 2_000)])
    on, off = (choose_calibrator(both, outcomes, np.arange(2_000), blend) for blend in (True, False))
    assert on.calibrator == off.calibrator == choose_calibrator(predicted, outcomes, np.arange(2_000)).calibrator
    assert on.verdict == f"{off.verdict}; not blended, which is no better beyond noise"
    assert on.blended.high >= 0


def test_sure_predictions_stay_finite():
    assert np.isfinite(Calibrator("vector", (5.0, -5.0, 5.0))(np.eye(3))).all()
    assert np.isfinite(fit_calibrator("temperature", np.eye(3), np.eye(3)).parameters).all()


def test_a_distortion_is_found_and_its_correction_is_cross_fitted():
    spoilt, outcomes, _ = drawn(3_000, change=SPOILT["tie_mass"])
    choice = choose_calibrator(spoilt, outcomes, np.arange(3_000))
    assert choice.calibrator.method in ("tie_mass", "vector")
    assert choice.verdict.startswith("applied: ")
    assert list(choice.tried) == CALIBRATORS
    gain = log_loss(choice.cross_fitted, outcomes) - log_loss(spoilt, outcomes)
    assert gain == pytest.approx(choice.tried[choice.calibrator.method].value)
    assert gain < -0.01


def test_calibrated_predictions_are_left_as_they_are():
    predicted, outcomes, _ = drawn(2_000)
    choice = choose_calibrator(predicted, outcomes, np.arange(2_000))
    assert choice.calibrator == NO_CALIBRATION
    np.testing.assert_array_equal(choice.cross_fitted, predicted)
    assert "not beyond noise" in choice.verdict


def test_few_prompts_are_left_as_they_are_and_the_verdict_says_why():
    spoilt, outcomes, _ = drawn(900, change=SPOILT["temperature"])
    choice = choose_calibrator(spoilt, outcomes, np.arange(900) // 100)
    assert choice.calibrator == NO_CALIBRATION
    assert "fewer than 10 prompts" in choice.verdict


def test_no_battle_is_calibrated_by_its_own_group(monkeypatch):
    predicted, outcomes, _ = drawn(60)
    groups = np.arange(60) // 3
    seen = []

    def spy(method, predicted, true):
        seen.append({tuple(row) for row in predicted})
        return NO_CALIBRATION

    monkeypatch.setattr(calibration, "fit_calibrator", spy)
    cross_fit("temperature", predicted, outcomes, groups)
    assert len(seen) == 5
    left_out = [{row for row in map(tuple, predicted) if row not in part} for part in seen]
    assert sum(map(len, left_out)) == 60
    for part in left_out:
        members = {groups[row] for row, one in enumerate(map(tuple, predicted)) if one in part}
        assert len(part) == 3 * len(members)


def test_a_calibrator_is_saved_and_read_back(tmp_path):
    for calibrator in (NO_CALIBRATION, Calibrator("vector", (0.1, -0.2, 0.3))):
        save_calibrator(calibrator, tmp_path / "calibrator.json")
        assert load_calibrator(tmp_path / "calibrator.json") == calibrator


def test_no_file_is_no_calibrator(tmp_path):
    assert load_calibrator(tmp_path / "calibrator.json") == NO_CALIBRATION


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"method": "isotonic", "parameters": []}', '{"method": "vector", "parameters": [1]}']
)
def test_a_broken_calibrator_is_refused(tmp_path, text):
    (tmp_path / "calibrator.json").write_text(text)
    with pytest.raises(InputError, match=r"calibrator\.json: cannot read a calibrator"):
        load_calibrator(tmp_path / "calibrator.json")


def test_reliability_of_a_hand_made_case():
    predicted = np.array([[0.62, 0.2, 0.18], [0.2, 0.64, 0.16], [0.1, 0.1, 0.8]])
    bins = reliability_bins(predicted, np.eye(3)[[0, 0, 2]])
    assert [(one.low, one.high, one.battles, one.hit_rate) for one in bins] == [
        (0.6, 0.7, 2, 0.5),
        (0.8, 0.9, 1, 1.0),
    ]
    assert bins[0].confidence == pytest.approx(0.63)
    assert bins[0].hit_low < 0.5 < bins[0].hit_high


def test_wilson_interval_of_a_known_case():
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
