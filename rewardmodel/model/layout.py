"""The layout of a packed row -> index tensors for attention, made once a micro-batch on the CPU.

A row holds several battles without padding. The sequences of a battle may share a prefix, which is in the row once:
`[shared | branch A | branch B]`. A sequence is the shared prefix followed by one branch. T is the tokens of a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

Layout = Sequence[Sequence[int]]
"""Tokens of each battle of a row: [shared by its branches, first branch, second branch, ...].

Example: `[[0, 3], [2, 2, 3]]` is a battle of one sequence of 3 tokens, and one of two sequences of 4 and 5 tokens that
share their first 2; the row has 3 + 7 tokens.
"""

GROUP_RATIO = 0.75
"""Padded attention puts sequences into groups whose lengths differ by at most this factor, as far as `GROUPS` reach."""

GROUPS = 4
"""Groups of a padded row; the last has all shorter sequences."""

BLOCK = 128
"""Tokens of a block of `flex_attention`'s masks."""


class Segment(NamedTuple):
    """A shared prefix or a branch: tokens of the row from `start` to `stop`, and the prefix that they follow."""

    start: int
    stop: int
    prefix: range
    """Indices of the shared prefix that comes before a branch in its sequence; empty: none."""


def segments(layout: Layout) -> Iterator[Segment]:
    """Yield the shared prefixes and branches of a row in order, those without tokens left out.

    Example: [[0, 3], [2, 2, 3]] -> tokens 0 to 3, 3 to 5, 5 to 7 after the prefix 3 to 5, 7 to 10 after the same.
    """
    start = 0
    for shared, *branches in layout:
        prefix = range(start, start + shared)
        if shared:
            yield Segment(start, start + shared, range(0))
        start += shared
        for branch in branches:
            if branch:
                yield Segment(start, start + branch, prefix)
            start += branch


def sequence_indices(layout: Layout) -> list[np.ndarray]:
    """Return the row's token indices of each sequence: [[0, 1, 2], [3, 4, 5, 6], [3, 4, 7, 8, 9]] of the example."""
    found, start = [], 0
    for shared, *branches in layout:
        prefix = np.arange(start, start + shared)
        start += shared
        for branch in branches:
            found.append(np.concatenate([prefix, np.arange(start, start + branch)]))
            start += branch
    return found


class Varlen(NamedTuple):
    """Arrangement for variable-length kernels: each segment's queries attend to its prefix and to itself.

    The kernels align queries with the last keys of their segment, so a shared prefix is computed once.
    """

    query_ends: torch.Tensor
    """(n_segments + 1,) int32 cumulative queries: [0, 3, 5, 7, 10]."""
    key_ends: torch.Tensor
    """(n_segments + 1,) int32 cumulative keys: [0, 3, 5, 9, 14]."""
    keys: torch.Tensor | None
    """(n_keys,) int64 index in the row of each key: [0, 1, 2, 3, 4, 3, 4, 5, 6, ...]; None: the row as it is."""
    most_queries: int
    """Queries of the longest segment."""
    most_keys: int
    """Keys of the longest segment."""


def arrange_varlen(layout: Layout, _windows: Iterable[int | None] = (), _multiple: int = 1) -> Varlen:
    """Return the arrangement of a row for variable-length kernels, which need no masks and no padding."""
    parts = list(segments(layout))
    queries = [part.stop - part.start for part in parts]
    keys = [len(part.prefix) + count for part, count in zip(parts, queries, strict=True)]
    query_ends, key_ends = (torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32) for counts in (queries, keys))
    indices = None
    if queries != keys:
        spans = [span for part in parts for span in (part.prefix, range(part.start, part.stop))]
        indices = torch.from_numpy(np.concatenate([np.arange(span.start, span.stop) for span in spans]))
    return Varlen(query_ends, key_ends, indices, max(queries), max(keys))


class Padded(NamedTuple):
    """Arrangement for dense kernels: sequences padded on the right, in at most `GROUPS` groups of similar lengths."""

    tokens: list[torch.Tensor]
    """For each group (n_sequences, longest) int64: the row's index of each token; padding has index 0."""
    outputs: torch.Tensor
    """(T,) int64: index of each token of the row in all groups, flattened, one after another.

    The outputs of a shared prefix are taken from the first of its sequences: they are the same in the others.
    """
    masks: dict[int | None, list[torch.Tensor | None]]
    """Window -> for each group (longest, longest) bool, whether a query (row) attends to a key (column); None: plain
    causal attention, which needs no mask: padding comes after all tokens that count."""


def arrange_padded(
    layout: Layout, windows: Iterable[int | None] = (None,), multiple: int = 1, masked: bool = False
) -> Padded:
    """Return the arrangement of a row for dense kernels.

    Args:
        layout: of the row.
        windows: of the model's layers: a query attends to itself and the `window - 1` tokens before it; None: to all
            tokens before it.
        multiple: lengths of groups are rounded up to multiples of this.
        masked: whether plain causal attention needs a mask, too.
    """
    sequences = sequence_indices(layout)
    lengths = np.array([len(one) for one in sequences])
    group_of = np.minimum(np.log(lengths / lengths.max()) / np.log(GROUP_RATIO), GROUPS - 1).astype(int)

    # a grid for each group, and where each sequence begins in all grids, flattened
    tokens, starts, offset = [], np.empty(len(sequences), dtype=np.int64), 0
    for group in np.unique(group_of):
        members = np.flatnonzero(group_of == group)
        longest = -(-lengths[members].max() // multiple) * multiple
        grid = np.zeros((len(members), longest), dtype=np.int64)
        for place, number in enumerate(members):
            grid[place, : lengths[number]] = sequences[number]
        starts[members] = offset + longest * np.arange(len(members))
        offset += grid.size
        tokens.append(torch.from_numpy(grid))

    outputs = np.empty(sum(map(sum, layout)), dtype=np.int64)
    for start, sequence in zip(reversed(starts), reversed(sequences), strict=True):  # a prefix is the first one's
        outputs[sequence] = start + np.arange(len(sequence))
    masks = {window: [_window_mask(grid.shape[1], window, masked) for grid in tokens] for window in windows}
    return Padded(tokens, torch.from_numpy(outputs), masks)


def _window_mask(length: int, window: int | None, masked: bool) -> torch.Tensor | None:
    """Return whether each query (row) attends to each key (column), (length, length) bool; None: to all before it."""
    limited = window is not None and window < length
    if not (limited or masked):
        return None
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal.triu(1 - window) if limited and window else causal


KeyBlocks = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Numbers and indices of the key blocks of each query block, in the order of `BlockMask.from_kv_blocks`: those where
some pairs of tokens attend, then those where all do."""


class Blocks(NamedTuple):
    """Arrangement for `flex_attention`: which blocks of queries attend to which blocks of keys, and their tokens."""

    segment: torch.Tensor
    """(T,) int32 number of the segment of each token."""
    prefix: torch.Tensor
    """(T,) int32 number of the segment that is the token's shared prefix; its own segment where there is none."""
    position: torch.Tensor
    """(T,) int32 position of each token in its sequence."""
    blocks: dict[int | None, KeyBlocks]
    """By the window of a layer."""


def arrange_blocks(layout: Layout, windows: Iterable[int | None] = (None,), _multiple: int = 1) -> Blocks:
    """Return the arrangement of a row for `flex_attention`; windows as of `arrange_padded`."""
    parts = list(segments(layout))
    total = parts[-1].stop
    segment, prefix, position = (np.empty(total, dtype=np.int32) for _ in range(3))
    number_at = {part.start: number for number, part in enumerate(parts)}
    for number, part in enumerate(parts):
        inside = slice(part.start, part.stop)
        segment[inside] = number
        prefix[inside] = number_at[part.prefix.start] if part.prefix else number
        position[inside] = len(part.prefix) + np.arange(part.stop - part.start)
    blocks = {window: _key_blocks(parts, total, window) for window in windows}
    return Blocks(torch.from_numpy(segment), torch.from_numpy(prefix), torch.from_numpy(position), blocks)


def _key_blocks(parts: list[Segment], total: int, window: int | None) -> KeyBlocks:
    """Return `Blocks.blocks` of a window."""
    count = -(-total // BLOCK)
    some, every = (np.zeros((count, count), dtype=bool) for _ in range(2))
    for part in parts:
        shared = len(part.prefix)
        for block in range(part.start // BLOCK, -(-part.stop // BLOCK)):
            # the queries of this segment in this block: from first to last, at these positions of their sequence
            first, last = max(part.start, block * BLOCK), min(part.stop, (block + 1) * BLOCK) - 1
            low, high = (shared + token - part.start for token in (first, last))
            lowest = 0 if window is None else max(0, low - window + 1)
            whole = last - first + 1 == BLOCK or (part.stop == total and first == block * BLOCK)
            # keys in the prefix, and in the segment up to the last query, each with the position of its first token
            for start, stop, position in (
                (part.prefix.start, part.prefix.stop, 0),
                (part.start, last + 1, shared),
            ):
                begin = max(start, start + lowest - position)
                if begin >= stop:
                    continue
                some[block, begin // BLOCK : -(-stop // BLOCK)] = True
                if whole:  # blocks of keys that lie in the segment, before all queries and in the window of all
                    end = min(stop, start + low - position + 1)
                    begin = start if window is None else max(start, start + high - window + 1 - position)
                    every[block, -(-begin // BLOCK) : max(0, end // BLOCK)] = True
    return (*_ordered(some & ~every), *_ordered(every))


def _ordered(seen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many key blocks each query block sees, (1, 1, n) int32, and which, in front, (1, 1, n, n) int32."""
    indices = np.argsort(~seen, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(seen.sum(axis=1, dtype=np.int32))[None, None], torch.from_numpy(indices)[None, None]
