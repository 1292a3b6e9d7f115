from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest

from rewardmodel.serving.answers import describe_predictions
from rewardmodel.serving.tables import Tables


def battle(name: str):
    return {"id": name, "prompt": ["a"], "response_a": ["b"], "response_b": ["c"]}


def test_requests_that_wait_share_a_table_and_each_gets_its_own_answers(joint_judge):
    started, go, sizes = Event(), Event(), []

    def predictions(battles, logits):
        sizes.append(len(battles))
        started.set()
        assert go.wait(60)
        return joint_judge.predictions(battles, logits)

    random = np.random.default_rng(0)
    logits = [random.normal(size=(count, 2, 3)).astype(np.float32) for count in (1, 2, 1)]
    with ThreadPoolExecutor(1) as thread:
        tables = Tables(predictions, thread)
        first = tables.submit([battle("x")], logits[0])
        assert started.wait(60)
        rest = [tables.submit([battle("x")] * len(one), one) for one in logits[1:]]
        left: Future = tables.submit([battle("gone")], logits[0])
        assert left.cancel()
        go.set()
        found = [one.result(60) for one in (first, *rest)]
    assert sizes == [1, 3]
    for answers, one in zip(found, logits, strict=True):
        alone = describe_predictions(joint_judge.predictions([battle("x")] * len(one), one))
        for answer, expected in zip(answers, alone, strict=True):
            assert answer == pytest.approx(expected, abs=1e-6)


def test_a_battle_whose_prediction_is_nan_fails_alone(joint_judge):
    good, bad = np.zeros((1, 2, 3), np.float32), np.full((1, 2, 3), np.nan, np.float32)
    go = Event()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(go.wait, 60)
        tables = Tables(joint_judge.predictions, thread)
        found = [tables.submit([battle(name)], one) for name, one in (("a", good), ("b", bad), ("c", good))]
        go.set()
        assert [one.exception(60) is None for one in found] == [True, False, True]
    assert isinstance(found[1].exception(), FloatingPointError)
    assert found[0].result()[0]["p_tie"] == pytest.approx(1 / 3)
