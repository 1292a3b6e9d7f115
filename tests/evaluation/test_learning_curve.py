import dataclasses
import json

import numpy as np
import pytest

from rewardmodel.evaluation.learning_curve import (
    MORE,
    describe_law,
    describe_outlooks,
    fit_power_law,
    format_curve,
    law_losses,
    summarise_curve,
)

SIZES = np.array([125.0, 250, 500, 1000, 2000])
GROUPS = np.repeat(np.arange(300), 2)


def losses_of(expected, noise=0.02, draws=5, seed=0):
    """Return losses of 600 battles: the same spread of battles at each size, each draw off by some noise."""
    random = np.random.default_rng(seed)
    battles = random.normal(0, 0.3, len(GROUPS))
    battles -= battles.mean()
    return [
        one + battles + random.normal(0, noise, (draws, 1)) / np.sqrt(size)
        for size, one in zip(SIZES, expected, strict=True)
    ]


def summarise(expected, **given):
    return summarise_curve("tiny", SIZES, losses_of(expected, **given), GROUPS, 1.0986)


@pytest.mark.parametrize("law", [(0.9, 2.0, 0.5), (0.0, 2.0, 0.1), (0.95, 20.0, 1.0)])
def test_a_law_without_noise_is_found(law):
    floor, scale, exponent = law
    found = fit_power_law(SIZES, (floor + scale * SIZES**-exponent)[None])
    assert found[0, 2] == pytest.approx(exponent, rel=0.03)
    assert found[0, 0] == pytest.approx(floor, abs=0.03)
    assert law_losses(found, SIZES)[0] == pytest.approx(floor + scale * SIZES**-exponent, abs=1e-3)


def test_the_fit_is_the_least_squares_of_scipy():
    from scipy.optimize import curve_fit

    measured = 0.9 + 2 * SIZES**-0.45 + np.array([0.002, -0.003, 0.001, 0.002, -0.001])
    theirs, _ = curve_fit(lambda n, floor, scale, exponent: floor + scale * n**-exponent, SIZES, measured, (1, 1, 0.5))
    found = fit_power_law(SIZES, measured[None])
    assert law_losses(found, np.array([4000, 10_000]))[0] == pytest.approx(
        law_losses(theirs[None], np.array([4000, 10_000]))[0], abs=1e-3
    )


def test_a_loss_that_rises_has_no_scale_and_a_floor_is_not_negative():
    rising, falling = fit_power_law(SIZES, np.stack([1 + SIZES * 1e-5, 2 - 0.2 * np.log(SIZES)]))
    assert rising[1] == 0
    assert rising[0] == pytest.approx((1 + SIZES * 1e-5).mean())
    assert falling[0] >= 0


def test_more_battles_give_what_the_law_says():
    curve = summarise(0.9 + 2 * SIZES**-0.5)
    assert curve.refusal is None
    twice, more = curve.outlooks
    assert (twice.battles, more.battles) == (4000, 2000 + MORE)
    assert twice.gain.value == pytest.approx(2 * (2000**-0.5 - 4000**-0.5), abs=0.003)
    for one in curve.outlooks:
        assert one.gain.low <= 2 * (2000**-0.5 - one.battles**-0.5) <= one.gain.high
        assert one.log_loss.low <= 0.9 + 2 * one.battles**-0.5 <= one.log_loss.high
    assert abs(curve.law.left_out.value) < 0.01
    assert [one.battles for one in curve.sizes] == list(SIZES)
    assert [len(one.draws) for one in curve.sizes] == [5] * 5
    assert curve.curve[-1].battles == pytest.approx(12_000)
    text = format_curve(curve)
    assert "600 held-out battles of 300 prompts" in text
    assert describe_law(curve.law) in text
    assert "4,000 battles (2.0 times as many): a log loss of 0.93" in text
    json.dumps(dataclasses.asdict(curve))


@pytest.mark.parametrize(
    ("expected", "given", "words"),
    [
        (np.ones(5), {}, "not beyond noise"),
        (1 + SIZES * 1e-5, {}, "not beyond noise"),
        (np.array([1.1, 1.09, 1.06, 1.0, 0.9]), {"noise": 1e-3}, "fitted without the largest size, the law misses it"),
    ],
)
def test_what_cannot_be_told_is_refused(expected, given, words):
    curve = summarise(expected, **given)
    assert words in curve.refusal
    (sentence,) = describe_outlooks(curve)
    assert sentence.startswith("What more battles would give cannot be told: ")
    assert "times as many" not in format_curve(curve)


def test_few_sizes_or_prompts_are_refused():
    losses = losses_of(0.9 + 2 * SIZES**-0.5)
    curve = summarise_curve("tiny", SIZES[:3], losses[:3], GROUPS, 1.1)
    assert (curve.law, curve.outlooks, curve.curve) == (None, [], [])
    assert "needs 4 sizes; there are 3" in format_curve(curve)
    curve = summarise_curve("tiny", SIZES, losses, GROUPS % 5, 1.1)
    assert curve.refusal == "5 prompts held out; an interval needs 10"


def test_an_outlook_farther_than_the_sizes_span_is_refused():
    sizes = SIZES / 10
    losses = losses_of(0.9 + 2 * sizes**-0.5, noise=1e-3)
    twice, more = summarise_curve("tiny", sizes, losses, GROUPS, 1.1).outlooks
    assert twice.refusal is None
    assert more.refusal == "51 times as many battles as there are, but the sizes measured span only a factor of 16"


def test_an_interval_wider_than_the_measured_fall_is_refused():
    curve = summarise(1 + 0.2 * SIZES**-0.4, noise=0.2, draws=2)
    refused = [one.refusal for one in curve.outlooks if one.refusal] or [curve.refusal]
    assert all("wider than the whole fall" in one or "not beyond noise" in one for one in refused)


def test_a_fall_that_does_not_slow_down_says_that_the_gains_assume_it_goes_on():
    curve = summarise(0.3 + SIZES**-0.05, noise=1e-5)
    assert "The exponent is about the least that is fitted, 0.05: each doubling" in describe_outlooks(curve)[-1]
    assert not any("The exponent" in one for one in describe_outlooks(summarise(0.9 + 2 * SIZES**-0.5)))
