import json
from dataclasses import asdict, fields, is_dataclass, replace
from typing import get_type_hints

import pytest

from rewardmodel.errors import InputError
from rewardmodel.evaluation import results
from rewardmodel.evaluation.results import (
    BaselineResult,
    CalibrationResult,
    Difference,
    Evaluation,
    Interval,
    ModelBias,
    PositionBias,
    Reliability,
    ReliabilityBin,
    Slice,
    VerbosityBias,
    WinRate,
    read_evaluation,
)

INTERVAL, DIFFERENCE = Interval(0.5, 0.4, 0.6), Difference(-0.1, -0.2, 0.0, 0.05)
SLICE = Slice(name="arena", battles=3, log_loss=INTERVAL, accuracy=INTERVAL, accuracy_decided=None, prior=1.0)
WHOLE = Evaluation(
    battles=3,
    groups=2,
    metrics={"log_loss": INTERVAL},
    prior=1.05,
    baselines={"tfidf": BaselineResult(INTERVAL, DIFFERENCE)},
    calibration=CalibrationResult(
        "vector",
        [0.1, 0.2, 0.3],
        True,
        "calibration part",
        {"vector": DIFFERENCE},
        "applied",
        None,
        {"brier": 0.5},
        None,
    ),
    reliability=Reliability([ReliabilityBin(0.3, 0.4, 3, 0.35, 0.5, 0.2, 0.8)], None),
    spread=0.2,
    mean_probabilities=[0.3, 0.3, 0.4],
    confusion=[[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    position=PositionBias(INTERVAL, INTERVAL, INTERVAL, dict.fromkeys(("ab", "ba", "average"), INTERVAL), INTERVAL),
    verbosity=VerbosityBias(3, INTERVAL, None, None, "more", {"humans": INTERVAL}, replace(SLICE, prior_all=1.1)),
    models=ModelBias([WinRate("gpt", 3, 0.5, 0.6, INTERVAL)], [], [WinRate("a", 3, 0.5, 0.6, INTERVAL, against="b")]),
    slices={"source": [SLICE], "turns": None},
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.json"


@pytest.mark.parametrize("evaluation", [WHOLE, Evaluation(0, 0)], ids=["every part", "no part"])
def test_an_evaluation_is_read_back_as_it_was_written(path, evaluation):
    path.write_text(json.dumps(asdict(evaluation), allow_nan=False))
    assert read_evaluation(path) == evaluation


def test_every_part_is_in_the_example_above():
    assert all(getattr(WHOLE, one.name) is not None for one in fields(Evaluation))


def test_the_metrics_of_an_earlier_release_are_read(path):
    content = asdict(WHOLE)
    content["floors"], content["stated"] = content.pop("baselines"), content.pop("mean_probabilities")
    for name in ("name", "prior_all"):
        del content["verbosity"]["matched"][name]
    for row in content["models"]["families"]:
        del row["against"]
    content["further"] = 1
    path.write_text(json.dumps(content))
    matched = replace(WHOLE.verbosity.matched, name="", prior_all=None)
    assert read_evaluation(path) == replace(WHOLE, verbosity=replace(WHOLE.verbosity, matched=matched))


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"battles": 1, "groups": 1, "metrics": {"log_loss": {}}}'])
def test_what_is_no_evaluation_is_refused(path, text):
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"metrics\.json: cannot read an evaluation; run `rewardmodel evaluate`"):
        read_evaluation(path)


def test_every_type_is_frozen_and_of_what_json_holds():
    kinds = [kind for kind in vars(results).values() if isinstance(kind, type) and is_dataclass(kind)]
    assert len(kinds) > 10
    for kind in kinds:
        assert kind.__dataclass_params__.frozen
        for hint in get_type_hints(kind).values():
            assert not any(word in str(hint) for word in ("tuple", "ndarray", "DataFrame"))


def test_an_interval_is_a_cell_of_a_table():
    assert str(Interval(0.5, 0.25, 0.75)) == " 0.5000   95 % [0.2500, 0.7500]"
    assert str(Interval(0.5, None, None)) == " 0.5000   no interval"
    assert str(Interval(-0.5, -0.75, 0.25)) == "-0.5000   95 % [-0.7500, 0.2500]"
    assert DIFFERENCE.describe() == "changes the log loss by -0.1000 [-0.2000, +0.0000]"
