import itertools

import numpy as np
import pytest
import torch
from builders import pack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from rewardmodel.model import batching
from rewardmodel.model.batching import pad, padded_tokens, plan_packed, plan_padded, to_device
from rewardmodel.model.heads import POOLINGS
from rewardmodel.model.layout import arrange_varlen

PAD = 0

ALONE = {"input_ids": [5, 6, 7], "segment_ids": [0, 1, 2], "branches": [0, 3], "length": 3}
"""One sequence, of which the last token is of the second response."""

SHARED = {
    "input_ids": [9, 8, 11, 12, 21, 22, 23],
    "segment_ids": [0, 1, 2, 0, 0, 2, 2],
    "branches": [2, 2, 3],
    "length": 7,
}
"""Two sequences, 9 8 11 12 and 9 8 21 22 23."""


def test_rows_are_packed_as_by_hand():
    batch = pack([ALONE, SHARED])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 8, 11, 12, 21, 22, 23]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 2, 3, 4]]
    assert batch["packing"].outputs.tolist() == [10, 11, 12, 0, 1, 2, 3, 7, 8, 9]
    assert batch["last"].tolist() == [2, 6, 9]
    assert batch["responses"].tolist() == [1, 2, 4, 5, 4, 8, 9]
    assert batch["response_of"].tolist() == [0, 1, 2, 3, 4, 5, 5]


def test_rows_are_padded_as_by_hand():
    batch = pad([ALONE, SHARED], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [9, 8, 11, 12, 0], [9, 8, 21, 22, 23]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["last"].tolist() == [2, 8, 14]
    assert batch["responses"].tolist() == [1, 2, 6, 7, 11, 13, 14]
    assert batch["response_of"].tolist() == [0, 1, 2, 3, 4, 5, 5]
    assert set(batch) == {"input_ids", "attention_mask", "last", "responses", "response_of"}


def test_padding_is_masked_whatever_its_id():
    batch = pad([ALONE, SHARED], 7)
    assert batch["input_ids"][0].tolist() == [5, 6, 7, 7, 7]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]
    assert batch["last"].tolist() == [2, 8, 14]


@pytest.mark.parametrize("collate", [pack, lambda rows: pad(rows, PAD)], ids=["packed", "padded"])
@pytest.mark.parametrize("as_array", [False, True], ids=["lists", "arrays"])
def test_all_tensors_are_int64_whatever_the_rows_hold(collate, as_array):
    rows = [ALONE, SHARED]
    if as_array:
        types = {"input_ids": np.int32, "segment_ids": np.int8}
        rows = [{**row, **{name: np.array(row[name], kind) for name, kind in types.items()}} for row in rows]
    batch = collate(rows)
    batch.pop("packing", None)
    assert {value.dtype for value in batch.values()} == {torch.int64}
    again = collate([ALONE, SHARED])
    assert all(torch.equal(again[name], value) for name, value in batch.items())


def test_a_sequence_without_responses_is_read_by_its_last_token_alone():
    silent = {**ALONE, "segment_ids": [0, 0, 0]}
    for batch in (pack([silent, ALONE]), pad([silent, ALONE], PAD)):
        assert batch["last"].tolist() == [2, 5]
        assert batch["responses"].tolist() == [4, 5]
        assert batch["response_of"].tolist() == [2, 3]


def test_a_row_costs_its_sequences_filled_up_to_the_longest_when_padded():
    assert padded_tokens(ALONE) == 3
    assert padded_tokens(SHARED) == 2 * (2 + 3)
    assert padded_tokens(SHARED) == pad([SHARED], PAD)["input_ids"].numel()


def test_a_batch_on_the_cpu_stays_what_it_is():
    batch = pack([ALONE])
    assert to_device(batch, torch.device("cpu")) is batch


@st.composite
def rows(draw):
    """Draw a few rows with the same number of sequences each."""
    sequences = draw(st.integers(1, 3))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        branches = [draw(st.integers(0, 5)), *(draw(st.integers(1, 5)) for _ in range(sequences))]
        tokens = st.lists(st.integers(1, 99), min_size=sum(branches), max_size=sum(branches))
        segments = st.lists(st.integers(0, 2), min_size=sum(branches), max_size=sum(branches))
        found.append(
            {
                "input_ids": draw(tokens),
                "segment_ids": draw(segments),
                "branches": branches,
                "length": sum(branches),
            }
        )
    return found


def places_of(rows):
    """Return the place of each token in the packed row, a list for each sequence."""
    found, begin = [], 0
    for row in rows:
        shared, *branches = row["branches"]
        ends = list(itertools.accumulate(branches, initial=begin + shared))
        for first, end in itertools.pairwise(ends):
            found.append([*range(begin, begin + shared), *range(first, end)])
        begin += row["length"]
    return found


@settings(deadline=None, max_examples=100)
@given(rows())
def test_positions_count_the_tokens_of_each_sequence(rows):
    batch = pack(rows)
    for places in places_of(rows):
        assert batch["position_ids"][0, places].tolist() == list(range(len(places)))


@settings(deadline=None, max_examples=100)
@given(rows())
def test_padded_sequences_are_those_of_the_packed_row(rows):
    packed, padded = pack(rows), pad(rows, PAD)
    alike = zip(places_of(rows), padded["input_ids"], padded["attention_mask"], strict=True)
    for places, ids, mask in alike:
        assert mask.tolist() == [1] * len(places) + [0] * (len(ids) - len(places))
        assert ids[: len(places)].tolist() == packed["input_ids"][0, places].tolist()
        assert (ids[len(places) :] == PAD).all()


@pytest.mark.slow  # seconds a case
@pytest.mark.parametrize("pooling", POOLINGS)
@settings(deadline=None, max_examples=100)
@given(rows=rows(), seed=st.integers(0, 9))
def test_the_head_reads_the_same_of_packed_and_of_padded_rows(pooling, rows, seed):
    packed, padded = pack(rows), pad(rows, PAD)
    width = padded["input_ids"].shape[1]
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(packed["input_ids"].numel(), 3, generator=random)
    spread = torch.randn(padded["input_ids"].numel(), 3, generator=random)  # padding has states too
    for number, places in enumerate(places_of(rows)):
        spread[number * width : number * width + len(places)] = hidden[places]
    names = ("last", "responses", "response_of")
    read = [
        POOLINGS[pooling](states, *(batch[name] for name in names))
        for states, batch in ((hidden, packed), (spread, padded))
    ]
    assert len(read[0]) == len(padded["input_ids"])
    assert torch.equal(*read)


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_a_row_is_filled_up_with_a_sequence_that_nothing_reads(multiple):
    rows = [ALONE, SHARED]
    found, expected = batching.pack(rows, list, multiple), batching.pack(rows, list)
    filling = -10 % multiple
    assert found["packing"] == [*expected["packing"], *([[0, filling]] if filling else [])]
    for name in ("input_ids", "position_ids"):
        assert torch.equal(found[name][:, :10], expected[name])
        assert found[name].shape == (1, 10 + filling)
    assert found["position_ids"][0, 10:].tolist() == list(range(filling))
    assert all(torch.equal(found[name], expected[name]) for name in ("last", "responses", "response_of"))


def test_a_batch_is_sent_to_another_device_in_one_copy():
    batch = {
        "packing": arrange_varlen([[0, 3], [2, 2, 3]]),
        "masks": {None: [None], 4: [torch.tensor([True, False, True])]},
        "labels": torch.rand(2, 3, generator=torch.Generator().manual_seed(0)),
        "empty": torch.empty(0),
        "transposed": torch.arange(6).view(2, 3).t(),
        "ids": ["one", "two"],
    }
    buffers = []
    sent = batching._through_buffer(batch, lambda buffer: buffers.append(buffer) or buffer.clone(), pinned=False)
    assert len(buffers) == 1
    assert sent["ids"] == batch["ids"]
    assert type(sent["packing"]) is type(batch["packing"])
    for found, expected in zip(tree_leaves(sent), tree_leaves(batch), strict=True):
        if isinstance(expected, torch.Tensor):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
            assert found.data_ptr() % 16 == 0
        else:
            assert found == expected


def test_a_batch_for_the_cpu_stays_as_it_is():
    batch = pack([ALONE, SHARED])
    assert to_device(batch, torch.device("cpu")) is batch
    assert to_device(batch, torch.device("meta"))["last"].device.type == "meta"


PLANS = {"packed": plan_packed, "padded": plan_padded}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)

plans = given(
    lengths=st.lists(st.integers(1, 60), max_size=30), budget=st.integers(1, 150), processes=st.integers(1, 5)
)


def micro_batches(dealt):
    return [micro for share in dealt for micro in share]


def tokens_of(plan, lengths, micro):
    """Return what a micro-batch costs: the sum of its rows, or as many times its longest."""
    found = [lengths[row] for row in micro]
    return sum(found) if plan is plan_packed else len(found) * max(found, default=0)


@each_plan
@settings(deadline=None, max_examples=150)
@plans
def test_every_row_is_dealt_once_and_every_process_has_as_many_micro_batches(plan, lengths, budget, processes):
    dealt = plan(lengths, budget, processes)
    assert len(dealt) == processes
    assert len({len(share) for share in dealt}) == 1
    assert len(dealt[0]) > 0
    assert sorted(row for micro in micro_batches(dealt) for row in micro) == list(range(len(lengths)))
    assert plan(np.array(lengths, int), budget, processes) == dealt


@each_plan
@settings(deadline=None, max_examples=150)
@plans
def test_micro_batches_keep_the_budget_unless_a_row_alone_is_over_it(plan, lengths, budget, processes):
    most = max([budget, *lengths])
    for micro in micro_batches(plan(lengths, budget, processes)):
        assert tokens_of(plan, lengths, micro) <= most


@each_plan
@settings(deadline=None, max_examples=50)
@plans
def test_the_micro_batches_of_a_round_follow_one_another_by_size(plan, lengths, budget, processes):
    """Out of memory is met at once, and processes that compute together have about as much to do."""
    dealt = plan(lengths, budget, processes)
    in_turn = [share[number] for number in range(len(dealt[0])) for share in dealt]
    if plan is plan_packed:
        sizes = [tokens_of(plan, lengths, micro) for micro in in_turn]
    else:
        sizes = [max((lengths[row] for row in micro), default=0) for micro in in_turn]
    assert sizes == sorted(sizes, reverse=True)


def longest_first(lengths, count):
    """Return the loads of micro-batches by longest processing time first, the plainest way."""
    loads = [0] * count
    for length in sorted(lengths, reverse=True):
        loads[loads.index(min(loads))] += length
    return sorted(loads, reverse=True)


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    budget=st.integers(60, 150),
    processes=st.integers(1, 4),
)
def test_packed_micro_batches_are_as_few_as_longest_first_allows(lengths, budget, processes):
    dealt = plan_packed(lengths, budget, processes)
    fewest = max(1, -(-sum(lengths) // (budget * processes)))
    rounds = next(
        number for number in itertools.count(fewest) if longest_first(lengths, number * processes)[0] <= budget
    )
    assert len(dealt[0]) == rounds
    loads = sorted((sum(lengths[row] for row in micro) for micro in micro_batches(dealt)), reverse=True)
    assert loads == longest_first(lengths, rounds * processes)
    count = len(loads)
    assert loads[0] <= sum(lengths) / count + (1 - 1 / count) * max(lengths)  # Graham 1969


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    budget=st.integers(60, 150),
    processes=st.integers(1, 4),
)
def test_no_micro_batch_would_be_smaller_than_another_without_its_smallest_row(lengths, budget, processes):
    micros = micro_batches(plan_packed(lengths, budget, processes))
    loads = [sum(lengths[row] for row in micro) for micro in micros]
    for micro, load in zip(micros, loads, strict=True):
        assert load - min((lengths[row] for row in micro), default=0) <= min(loads)


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), budget=st.integers(1, 150))
def test_padded_micro_batches_hold_rows_of_about_a_length_and_as_many_as_fit(lengths, budget):
    (micros,) = plan_padded(lengths, budget)
    in_order = [lengths[row] for micro in micros for row in micro]
    assert in_order == sorted(lengths, reverse=True)
    for micro in micros[:-1]:
        assert (len(micro) + 1) * lengths[micro[0]] > budget


@pytest.mark.parametrize(
    ("lengths", "budget", "processes", "expected"),
    [
        ([10, 7, 5, 3], 13, 1, [[[0, 3], [1, 2]]]),  # 13 and 12 tokens
        ([3, 5, 7, 10], 13, 1, [[[3, 0], [2, 1]]]),
        ([10, 7, 5, 3], 13, 2, [[[0, 3]], [[1, 2]]]),
        ([10, 7, 5, 3], 25, 1, [[[0, 1, 2, 3]]]),
        ([10, 7, 5, 3], 12, 1, [[[0], [2, 3], [1]]]),  # 13 is over it: 10, 8 and 7
        ([10, 7, 5, 3], 8, 1, [[[0], [2, 3], [1]]]),
        ([4, 9], 20, 3, [[[1]], [[0]], [[]]]),
        ([], 20, 2, [[[]], [[]]]),
    ],
)
def test_packed_plans_of_known_examples(lengths, budget, processes, expected):
    assert plan_packed(lengths, budget, processes) == expected


@pytest.mark.parametrize(
    ("lengths", "budget", "processes", "expected"),
    [
        ([3, 10, 5, 7], 20, 1, [[[1, 3], [2, 0]]]),
        ([3, 10, 5, 7], 14, 1, [[[1], [3, 2], [0]]]),
        ([3, 10, 5, 7], 14, 2, [[[1], [0]], [[3, 2], []]]),
        ([3, 10, 5, 7], 2, 1, [[[1], [3], [2], [0]]]),
        ([4, 9], 40, 3, [[[1, 0]], [[]], [[]]]),
        ([], 20, 2, [[[]], [[]]]),
    ],
)
def test_padded_plans_of_known_examples(lengths, budget, processes, expected):
    assert plan_padded(lengths, budget, processes) == expected


def test_five_thousand_battles_are_dealt_to_eight_processes_evenly():
    lengths = np.clip(np.random.default_rng(0).lognormal(6.3, 0.8, 5000), 20, 4096).astype(int).tolist()
    dealt = plan_packed(lengths, 16_384, 8)
    assert sorted(row for micro in micro_batches(dealt) for row in micro) == list(range(5000))
    loads = np.array([[sum(lengths[row] for row in micro) for micro in share] for share in dealt])
    assert loads.max() <= 16_384
    assert loads.shape[1] == -(-sum(lengths) // (16_384 * 8))
    assert loads.min() > 0.99 * loads.max()
    assert loads.ravel(order="F").tolist() == sorted(loads.ravel(), reverse=True)


@each_plan
def test_a_process_without_rows_has_empty_micro_batches(plan):
    dealt = plan([5, 6], 100, 4)
    assert [len(share) for share in dealt] == [1] * 4
    assert sum(micro == [] for micro in micro_batches(dealt)) >= 2
