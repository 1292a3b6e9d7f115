from concurrent.futures import CancelledError
from threading import Event

import numpy as np
import pytest
import torch

from rewardmodel.model.batching import plan_packed
from rewardmodel.model.forward import Batching
from rewardmodel.serving.batcher import Batcher, TooBusyError


def row(number, length=4, sequences=1):
    return {"input_ids": [number] * length, "branches": [0, *[length] * sequences], "length": length}


class Model:
    """Computes a row's first id for each of its sequences; waits for `open` before each batch."""

    def __init__(self, budget=12):
        self.budget, self.open, self.batches, self.started = budget, Event(), [], Event()
        self.batching = Batching(None, lambda row: row["length"], plan_packed)

    def compute(self, rows):
        self.started.set()
        assert self.open.wait(20)
        self.batches.append([row["input_ids"][0] for row in rows])
        if any(row["input_ids"][0] < 0 for row in rows):
            raise RuntimeError("a row that cannot be computed")
        return torch.tensor([[float(row["input_ids"][0])] for row in rows for _ in row["branches"][1:]])


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batcher(model):
    batcher = Batcher(model, 8)
    yield batcher
    model.open.set()
    batcher.close()


def begin(model, batcher):
    """Let the model begin with a row, so that what comes next waits."""
    (first,) = batcher.submit([row(0)])
    assert model.started.wait(20)
    return first


def test_what_waits_while_the_model_computes_is_batched_by_tokens_in_order(model, batcher):
    first = begin(model, batcher)
    answers = [batcher.submit([row(number)])[0] for number in range(1, 6)]
    model.open.set()
    assert [float(one.result(20)[0, 0]) for one in [first, *answers]] == [0, 1, 2, 3, 4, 5]
    sizes = list(map(len, model.batches))
    assert sizes[0] == 1
    assert sum(sizes) == 6
    assert max(sizes) <= 3  # of 4 tokens each, 12 fit
    assert len(sizes) == 3


def test_each_row_gets_the_logits_of_its_own_sequences_and_pairs_come_first(model, batcher):
    begin(model, batcher)
    answers = batcher.submit([row(1, 2, 3), row(2, 2, 2), row(3, 2, 1), row(4, 2, 2)])
    model.open.set()
    assert [one.result(20).ravel().tolist() for one in answers] == [[1] * 3, [2] * 2, [3], [4] * 2]
    assert set(model.batches[1][:2]) == {2, 4}


def test_a_row_that_cannot_be_computed_fails_alone(model, batcher):
    begin(model, batcher)
    answers = batcher.submit([row(1), row(-2), row(3)])
    model.open.set()
    assert [float(answers[number].result(20)[0, 0]) for number in (0, 2)] == [1, 3]
    with pytest.raises(RuntimeError, match="cannot be computed"):
        answers[1].result(20)
    assert float(batcher.submit([row(5)])[0].result(20)[0, 0]) == 5


def test_rows_whose_client_left_are_not_computed(model, batcher):
    begin(model, batcher)
    kept, left = batcher.submit([row(1), row(2)])
    assert left.cancel()
    model.open.set()
    assert float(kept.result(20)[0, 0]) == 1
    assert 2 not in np.concatenate(model.batches)
    with pytest.raises(CancelledError):
        left.result(1)


def test_more_than_may_wait_is_refused_with_the_time_to_come_again(model, batcher):
    begin(model, batcher)
    batcher.submit([row(number) for number in range(8)])
    with pytest.raises(TooBusyError, match="too many battles wait for the model; try again in 1 s") as caught:
        batcher.submit([row(9)])
    assert caught.value.seconds == 1


def test_what_was_begun_is_finished_at_the_end_and_nothing_more_is_taken(model):
    batcher = Batcher(model, 8)
    begin(model, batcher)
    answers = batcher.submit([row(number) for number in range(1, 7)])
    model.open.set()
    batcher.close()
    assert all(one.done() for one in answers)
    assert not batcher.thread.is_alive()
    with pytest.raises(TooBusyError):
        batcher.submit([row(9)])


def test_rows_longer_than_a_batch_are_computed_alone(model, batcher):
    model.open.set()
    assert batcher.submit([row(1, 50), row(2)])[0].result(20).shape == (1, 1)
