import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel.model import layout as module
from rewardmodel.model.attention import block_masks
from rewardmodel.model.layout import (
    GROUPS,
    arrange_blocks,
    arrange_padded,
    arrange_varlen,
    segments,
    sequence_indices,
)

EXAMPLE = [[0, 3], [2, 2, 3]]

layouts = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(1, 20), min_size=1, max_size=3)).map(
        lambda drawn: [drawn[0], *drawn[1]]
    ),
    min_size=1,
    max_size=6,
)
windows = st.none() | st.integers(1, 12)
quickly = settings(deadline=None, max_examples=80)


def attends(layout, window):
    """Return which query attends to which key, (T, T) bool, sequence by sequence."""
    total = sum(map(sum, layout))
    seen = np.zeros((total, total), dtype=bool)
    for sequence in sequence_indices(layout):
        distance = np.arange(len(sequence))[:, None] - np.arange(len(sequence))
        seen[np.ix_(sequence, sequence)] |= (distance >= 0) & (distance < (window or np.inf))
    return seen


def test_the_sequences_and_segments_of_the_example():
    assert [one.tolist() for one in sequence_indices(EXAMPLE)] == [[0, 1, 2], [3, 4, 5, 6], [3, 4, 7, 8, 9]]
    found = [(part.start, part.stop, list(part.prefix)) for part in segments(EXAMPLE)]
    assert found == [(0, 3, []), (3, 5, []), (5, 7, [3, 4]), (7, 10, [3, 4])]


def test_the_arrangement_of_the_example_for_variable_length():
    found = arrange_varlen(EXAMPLE)
    assert found.query_ends.tolist() == [0, 3, 5, 7, 10]
    assert found.key_ends.tolist() == [0, 3, 5, 9, 14]
    assert found.keys.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 3, 4, 7, 8, 9]
    assert (found.most_queries, found.most_keys) == (3, 5)
    assert found.query_ends.dtype == found.key_ends.dtype == torch.int32


def test_rows_without_shared_prefixes_are_attended_to_as_they_are():
    found = arrange_varlen([[0, 3], [0, 5]])
    assert found.keys is None
    assert found.query_ends.tolist() == found.key_ends.tolist() == [0, 3, 8]


@quickly
@given(layouts, windows)
def test_queries_aligned_with_the_last_keys_of_their_segment_attend_as_their_sequence_does(layout, window):
    found, total = arrange_varlen(layout), sum(map(sum, layout))
    keys = np.arange(total) if found.keys is None else found.keys.numpy()
    seen = np.zeros((total, total), dtype=bool)
    for (first, last), (begin, end) in zip(
        itertools.pairwise(found.query_ends.tolist()), itertools.pairwise(found.key_ends.tolist()), strict=True
    ):
        distance = np.arange(end - begin - (last - first), end - begin)[:, None] - np.arange(end - begin)
        seen[np.ix_(range(first, last), keys[begin:end])] = (distance >= 0) & (distance < (window or np.inf))
    assert np.array_equal(seen, attends(layout, window))


@quickly
@given(layouts, st.sampled_from([1, 4, 64]))
def test_padded_groups_hold_every_sequence_and_give_every_token_back(layout, multiple):
    found = arrange_padded(layout, multiple=multiple)
    flat = torch.cat([tokens.flatten() for tokens in found.tokens])
    assert torch.equal(flat[found.outputs], torch.arange(sum(map(sum, layout))))
    assert len(found.tokens) <= GROUPS
    assert all(tokens.shape[1] % multiple == 0 for tokens in found.tokens)
    rows = [row.tolist() for tokens in found.tokens for row in tokens]
    sequences = [one.tolist() for one in sequence_indices(layout)]
    assert len(rows) == len(sequences)
    for sequence in sequences:
        row = next(row for row in rows if row[: len(sequence)] == sequence and not any(row[len(sequence) :]))
        rows.remove(row)


def test_lengths_of_a_group_are_similar():
    lengths = range(100, 20, -1)
    grids = arrange_padded([[0, length] for length in lengths]).tokens
    assert [grid.shape[1] for grid in grids] == [100, 75, 56, 42]
    assert sum(grid.numel() ** 2 / len(grid) for grid in grids[:3]) <= 1.4 * sum(n * n for n in lengths if n > 42)


@pytest.mark.parametrize(("window", "masked", "expected"), [
    (None, False, None), (3, False, None), (2, False, [[1, 0, 0], [1, 1, 0], [0, 1, 1]]),
    (None, True, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]), (9, True, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
])  # fmt: skip
def test_padded_groups_have_the_masks_that_their_kernel_needs(window, masked, expected):
    [mask] = arrange_padded([[0, 3]], [window], masked=masked).masks[window]
    assert mask is None if expected is None else mask.int().tolist() == expected


@settings(deadline=None, max_examples=150)
@given(layouts, windows, st.sampled_from([1, 4, 8]))
def test_blocks_of_tokens_attend_where_a_pair_of_them_does(layout, window, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", size)
        found = arrange_blocks(layout, [window])
    seen, total = attends(layout, window), sum(map(sum, layout))
    count = -(-total // size)
    some, every = (np.zeros((count, count), dtype=bool) for _ in range(2))
    numbers, indices, full_numbers, full_indices = (one[0, 0].numpy() for one in found.blocks[window])
    for block in range(count):
        some[block, indices[block, : numbers[block]]] = True
        every[block, full_indices[block, : full_numbers[block]]] = True
    assert not (some & every).any()
    padded = np.zeros((count * size, count * size), dtype=bool)
    padded[:total, :total] = seen
    by_block = padded.reshape(count, size, count, size)
    assert np.array_equal(some | every, by_block.any(axis=(1, 3)))
    inside = np.zeros((count * size, count * size), dtype=bool)
    inside[:total] = True  # queries after the end of the row do not matter, keys do
    assert not (every[:, None, :, None] & ~by_block & inside.reshape(by_block.shape)).any()


@quickly
@given(layouts, windows)
def test_the_mask_of_tokens_is_that_of_their_sequences(layout, window):
    mask = block_masks(arrange_blocks(layout, [window]))[window]
    tokens = torch.arange(sum(map(sum, layout)))
    assert np.array_equal(mask.mask_mod(0, 0, tokens[:, None], tokens).numpy(), attends(layout, window))
    assert mask.seq_lengths == (len(tokens), len(tokens))


def test_full_blocks_are_found_where_a_long_sequence_attends_to_its_beginning():
    found = arrange_blocks([[0, 4 * module.BLOCK]])
    numbers, indices, full_numbers, full_indices = (one[0, 0] for one in found.blocks[None])
    assert numbers.tolist() == [1, 1, 1, 1]
    assert indices[:, 0].tolist() == [0, 1, 2, 3]
    assert full_numbers.tolist() == [0, 1, 2, 3]
    assert full_indices[3, :3].tolist() == [0, 1, 2]
