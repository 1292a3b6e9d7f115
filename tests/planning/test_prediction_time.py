import dataclasses
from types import SimpleNamespace

import pytest

from rewardmodel.planning import prediction_time
from rewardmodel.planning.doctor import doctor
from rewardmodel.planning.estimate import Hours
from rewardmodel.planning.prediction_time import describe_prediction_time, describe_training_time


@pytest.fixture
def swapped(recipe):
    """Return the tiny recipe, which predicts both orders on a device that is found."""
    model = dataclasses.replace(recipe.model, device="auto", dtype="auto")
    return dataclasses.replace(
        recipe, model=model, inference=dataclasses.replace(recipe.inference, swap_tta="both"), trainer={}
    )


@pytest.fixture
def hours(monkeypatch):
    """Return a function that sets the hours of prediction in both orders and in one, and whether memory suffices."""

    def give(both, one, fits=True, problems=()):
        def answer(recipe, device, launch, **given):
            found = doctor(recipe, device, launch, **given)
            if problems:
                return dataclasses.replace(found, estimate=None, problems=list(problems))
            time = both if recipe.inference.swap_tta == "both" else one
            estimate = dataclasses.replace(
                found.estimate,
                hours=dataclasses.replace(found.estimate.hours, prediction=time),
                inference=dataclasses.replace(found.estimate.inference, fits=fits),
                workload=dataclasses.replace(found.estimate.workload, validation=25_000),
            )
            return dataclasses.replace(found, estimate=estimate)

        monkeypatch.setattr(prediction_time, "doctor", answer)

    return give


@pytest.mark.slow  # seconds a case
def test_the_time_is_that_of_doctor_for_more_battles(swapped):
    launch = prediction_time.Launch(2, "ddp")
    estimate = doctor(swapped, "T4", launch, others=False).estimate
    wanted = estimate.hours.prediction / estimate.workload.validation * 1e9
    text = describe_prediction_time([swapped], "T4", 2, 1_000_000_000, 1e9)
    assert text.startswith(f"1,000,000,000 battles on 2 x T4: about {wanted:.1f} h in both orders, assuming 35%")
    alone = doctor(swapped, "T4", prediction_time.Launch(), others=False).estimate.hours.prediction
    assert alone >= estimate.hours.prediction


@pytest.mark.slow
@pytest.mark.parametrize(
    ("both", "one", "words"),
    [
        (8.4, 4.5, ["about 8.4 h in both orders", "of the GPU's speed"]),
        (12.0, 6.4, ["over 8.5 h: one order takes 6.4 h, which leaves time for 33% of the other", "prompt.max_length"]),
        (20.0, 10.5, ["over 8.5 h, and so is one order (10.5 h): ", "the GPU faster"]),
    ],
)
def test_what_to_change_follows_from_what_fits(both, one, words, swapped, hours):
    hours(both, one)
    text = describe_prediction_time([swapped], "T4", 2, 25_000, 8.5)
    for part in words:
        assert part in text
    assert ("; that is over" in text) == (both > 8.5)


@pytest.mark.slow
def test_one_order_is_all_there_is_to_shorten(swapped, hours):
    hours(20, 10)
    recipe = dataclasses.replace(swapped, inference=dataclasses.replace(swapped.inference, swap_tta="none"))
    text = describe_prediction_time([recipe], "T4", 2, 25_000, 8.5)
    assert "10.0 h in one order" in text
    assert "over 8.5 h: prompt.max_length or the backbone must be smaller" in text


@pytest.mark.slow
def test_what_does_not_work_there_is_said(swapped, hours):
    hours(1, 1, problems=["model.dtype: bfloat16 is emulated; set auto"])
    text = describe_prediction_time([swapped], "T4", 2, 25_000, 8.5)
    assert text == "25,000 battles on 2 x T4: not possible: model.dtype: bfloat16 is emulated; set auto"
    hours(1, 1, fits=False)
    assert "not possible: prediction needs " in describe_prediction_time([swapped], "T4", 2, 25_000, 8.5)


def test_training_that_takes_too_long_is_shared_out_or_shortened():
    workload = SimpleNamespace(training=54_603, validation=2_874)
    estimate = SimpleNamespace(hours=Hours(training=15, evaluation=3, prediction=1.5, head_fit=0.5), workload=workload)
    assert describe_training_time(SimpleNamespace(estimate=estimate), 20) == "limit      fits: about 20.0 h of 20.0 h"
    assert describe_training_time(SimpleNamespace(estimate=estimate), 8.5) == (
        "limit      too long: about 20.0 h, and there are 8.5; continue it with --resume, in 3 sessions, or train on "
        "fewer battles: data.limit 24000"
    )
    with pytest.raises(ValueError, match="no estimate"):
        describe_training_time(SimpleNamespace(estimate=None), 1)
