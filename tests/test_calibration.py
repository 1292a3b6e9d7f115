import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel import calibration
from rewardmodel.calibration import METHODS, NONE, Calibrator, choose, cross_fit, fit, load, reliability, save, wilson
from rewardmodel.errors import InputError
from rewardmodel.metrics import log_loss


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


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_distortion_is_taken_back(method):
    spoilt, outcomes, true = drawn(20_000, change=SPOILT[method])
    mended = fit(method, spoilt, outcomes)(spoilt)
    assert np.abs(spoilt - true).mean() > 0.05
    assert np.abs(mended - true).mean() < 0.012


def test_the_parameters_of_planted_distortions_are_found():
    spoilt, outcomes, _ = drawn(40_000, change=SPOILT["temperature"])
    assert fit("temperature", spoilt, outcomes).parameters == pytest.approx([-np.log(2)], abs=0.03)
    spoilt, outcomes, _ = drawn(40_000, change=SPOILT["tie_mass"])
    assert fit("tie_mass", spoilt, outcomes).parameters == pytest.approx([-0.7], abs=0.05)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(sorted(METHODS)), st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.integers(0, 99))
def test_calibrated_rows_sum_to_one_and_a_swap_stays_exact(method, parameters, seed):
    predicted = np.random.default_rng(seed).dirichlet([0.3] * 3, 8)
    calibrator = Calibrator(method, tuple(parameters[: METHODS[method].size]))
    once, swapped = calibrator(predicted), calibrator(predicted[:, [1, 0, 2]])[:, [1, 0, 2]]
    np.testing.assert_allclose(once.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(once, swapped, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_0_change_nothing(method):
    predicted = drawn(20)[0]
    np.testing.assert_allclose(Calibrator(method, (0.0,) * METHODS[method].size)(predicted), predicted, atol=1e-12)


def test_sure_predictions_stay_finite():
    assert np.isfinite(Calibrator("vector", (5.0, -5.0, 5.0))(np.eye(3))).all()
    assert np.isfinite(fit("temperature", np.eye(3), np.eye(3)).parameters).all()


def test_a_distortion_is_found_and_its_mend_is_cross_fitted():
    spoilt, outcomes, _ = drawn(3_000, change=SPOILT["tie_mass"])
    choice = choose(spoilt, outcomes, np.arange(3_000))
    assert choice.calibrator.method in ("tie_mass", "vector")
    assert choice.verdict.startswith("applied: ")
    assert set(choice.tried) == set(METHODS)
    gain = log_loss(choice.cross_fitted, outcomes) - log_loss(spoilt, outcomes)
    assert gain == pytest.approx(choice.tried[choice.calibrator.method]["value"])
    assert gain < -0.01


def test_calibrated_predictions_are_left_as_they_are():
    predicted, outcomes, _ = drawn(2_000)
    choice = choose(predicted, outcomes, np.arange(2_000))
    assert choice.calibrator == NONE
    assert choice.cross_fitted is predicted
    assert "not beyond noise" in choice.verdict


def test_few_prompts_are_left_as_they_are_and_the_verdict_says_why():
    spoilt, outcomes, _ = drawn(900, change=SPOILT["temperature"])
    choice = choose(spoilt, outcomes, np.arange(900) // 100)
    assert choice.calibrator == NONE
    assert "fewer than 10 prompts" in choice.verdict


def test_no_battle_is_calibrated_by_its_own_group(monkeypatch):
    predicted, outcomes, _ = drawn(60)
    groups = np.arange(60) // 3
    seen = []

    def spy(method, predicted, true):
        seen.append({tuple(row) for row in predicted})
        return NONE

    monkeypatch.setattr(calibration, "fit", spy)
    cross_fit("temperature", predicted, outcomes, groups)
    assert len(seen) == 5
    left_out = [{row for row in map(tuple, predicted) if row not in part} for part in seen]
    assert sum(map(len, left_out)) == 60
    for part in left_out:
        members = {groups[row] for row, one in enumerate(map(tuple, predicted)) if one in part}
        assert len(part) == 3 * len(members)


def test_a_calibrator_is_saved_and_read_back(tmp_path):
    for calibrator in (NONE, Calibrator("vector", (0.1, -0.2, 0.3))):
        save(calibrator, tmp_path / "calibrator.json")
        assert load(tmp_path / "calibrator.json") == calibrator


def test_no_file_is_no_calibrator(tmp_path):
    assert load(tmp_path / "calibrator.json") == NONE


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"method": "isotonic", "parameters": []}', '{"method": "vector", "parameters": [1]}']
)
def test_a_broken_calibrator_is_refused(tmp_path, text):
    (tmp_path / "calibrator.json").write_text(text)
    with pytest.raises(InputError, match=r"calibrator\.json: no calibrator can be read there"):
        load(tmp_path / "calibrator.json")


def test_reliability_of_a_hand_made_case():
    predicted = np.array([[0.62, 0.2, 0.18], [0.2, 0.64, 0.16], [0.1, 0.1, 0.8]])
    bins = reliability(predicted, np.eye(3)[[0, 0, 2]])
    assert [(one["low"], one["high"], one["battles"], one["hit_rate"]) for one in bins] == [
        (0.6, 0.7, 2, 0.5),
        (0.8, 0.9, 1, 1.0),
    ]
    assert bins[0]["confidence"] == pytest.approx(0.63)
    assert bins[0]["hit_low"] < 0.5 < bins[0]["hit_high"]


def test_wilson_interval_of_a_known_case():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
