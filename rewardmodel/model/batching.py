"""Token rows -> batches of tensors, packed or padded; and plans that fill batches by tokens instead of by rows."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import Sampler

from rewardmodel.model.layout import Layout

Batch = dict[str, Any]
"""Arguments of a classifier's forward pass (`model.heads.PooledHead`)."""

Span = tuple[int, int]
"""First index and number of tokens."""


def pack(rows: Sequence[dict[str, Any]], arrange: Callable[[Layout], Any], multiple: int = 1) -> Batch:
    """Concatenate token rows into one packed row.

    Args:
        rows: of `prompt.tokenization.TOKEN_ROW_FEATURES`.
        arrange: layout -> index tensors for attention (`model.attention.Kernel.arrange`).
        multiple: the row gets tokens of id 0 at its end, a sequence that nothing reads, up to a multiple of this.

    Returns:
        input_ids and position_ids (1, T) int64, the positions of each sequence counted from 0; packing, what `arrange`
        makes of the row's layout; and `pooling_indices`.
    """
    layout = [list(row["branches"]) for row in rows]  # [[0, 3], [2, 2, 3]]
    ids = [np.asarray(row["input_ids"], np.int64) for row in rows]
    positions, spans = [], []
    start = 0
    for row in rows:
        positions.append(np.arange(row["branches"][0]))
        for (_, shared), (first, branch) in _sequence_spans(row["branches"]):
            positions.append(np.arange(shared, shared + branch))
            spans.append([(start, shared), (start + first, branch)])
        start += row["length"]
    filling = -start % multiple
    if filling:
        layout.append([0, filling])
        ids.append(np.zeros(filling, np.int64))
        positions.append(np.arange(filling))
    return {
        "input_ids": torch.from_numpy(np.concatenate(ids))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        "packing": arrange(layout),
        **pooling_indices(np.concatenate([row["segment_ids"] for row in rows]), spans),
    }


def pad(rows: Sequence[dict[str, Any]], pad_token_id: int) -> Batch:
    """Unpack the sequences of token rows into a batch, padded on the right to the longest.

    Args:
        rows: of `prompt.tokenization.TOKEN_ROW_FEATURES`.
        pad_token_id: id of padding.

    Returns:
        input_ids and attention_mask (n_sequences, longest) int64; and `pooling_indices`.
    """
    ids, segments = [], []
    for row in rows:
        for spans in _sequence_spans(row["branches"]):
            index = _span_indices(spans)
            ids.append(torch.from_numpy(np.asarray(row["input_ids"], np.int64)[index]))
            segments.append(torch.from_numpy(np.asarray(row["segment_ids"])[index]))
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    flat_segments = pad_sequence(segments, batch_first=True).flatten().numpy()
    spans_of = [[(number * input_ids.shape[1], len(sequence))] for number, sequence in enumerate(ids)]
    return {
        "input_ids": input_ids,
        "attention_mask": pad_sequence([torch.ones_like(sequence) for sequence in ids], batch_first=True),
        **pooling_indices(flat_segments, spans_of),
    }


def pooling_indices(segment_ids: np.ndarray, sequences: Sequence[Sequence[Span]]) -> Batch:
    """Return which tokens of a batch the head pools, as indices into its flattened tokens.

    Args:
        segment_ids: (n_tokens,) of the flattened batch: 0 prompt and template, 1 first response, 2 second response.
        sequences: the spans of each sequence, in order: [[(0, 0), (0, 3)], [(3, 2), (5, 2)], [(3, 2), (7, 3)]].

    Returns:
        last (n_sequences,) int64, the last token of each sequence; responses (m,) int64, all tokens of responses; and
        response_of (m,) int64, the response that each is of: 2 * sequence, or 2 * sequence + 1 for the second.
    """
    responses, response_of = [], []
    for number, spans in enumerate(sequences):
        index = _span_indices(spans)
        segments = segment_ids[index]
        responses.append(index[segments > 0])
        response_of.append(2 * number + segments[segments > 0].astype(np.int64) - 1)
    last = np.array([first + tokens - 1 for *_, (first, tokens) in sequences])
    return {
        "last": torch.from_numpy(last),
        "responses": torch.from_numpy(np.concatenate(responses)),
        "response_of": torch.from_numpy(np.concatenate(response_of)),
    }


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on the device; whatever is nested in it is sent in one asynchronous copy.

    Args:
        batch: dicts, lists and named tuples of tensors and other values.
        device: where to send the tensors.
    """
    if device.type == "cpu":
        return batch
    pinned = device.type == "cuda"  # page-locking one buffer takes less than page-locking each tensor
    return _through_buffer(batch, lambda buffer: buffer.to(device, non_blocking=True), pinned)


def _through_buffer(batch: Any, send: Callable[[torch.Tensor], torch.Tensor], pinned: bool) -> Any:
    """Return the batch with its tensors as views of what `send` makes of one buffer of all their bytes."""
    values, structure = tree_flatten(batch)
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    starts = np.cumsum([0, *(-(-tensor.nbytes // 16) * 16 for tensor in tensors)]).tolist()  # aligned to 16 bytes
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    places = [(start, start + tensor.nbytes) for start, tensor in zip(starts, tensors, strict=False)]
    for tensor, (start, stop) in zip(tensors, places, strict=True):
        buffer[start:stop] = tensor.reshape(-1).view(torch.uint8)
    sent = send(buffer)
    moved = (
        sent[start:stop].view(tensor.dtype).view(tensor.shape)
        for tensor, (start, stop) in zip(tensors, places, strict=True)
    )
    return tree_unflatten([next(moved) if isinstance(value, torch.Tensor) else value for value in values], structure)


def padded_tokens(row: dict[str, Any]) -> int:
    """Return the tokens that a row's sequences take when they are padded to the longest of them."""
    shared, *branches = row["branches"]
    return (shared + max(branches)) * len(branches)


def _sequence_spans(branches: Sequence[int]) -> Iterator[tuple[Span, Span]]:
    """Yield the spans of each sequence in its row, of the shared prefix and of the branch.

    Example: branches [2, 2, 3] -> ((0, 2), (2, 2)), ((0, 2), (4, 3)).
    """
    shared, *lengths = branches
    start = shared
    for length in lengths:
        yield (0, shared), (start, length)
        start += length


def _span_indices(spans: Sequence[Span]) -> np.ndarray:
    """Return the indices in spans one after another: ((0, 2), (4, 3)) -> [0, 1, 4, 5, 6]."""
    return np.concatenate([np.arange(first, first + tokens) for first, tokens in spans])


def plan_packed(lengths: Sequence[int], budget: int, processes: int = 1) -> list[list[list[int]]]:
    """Assign rows to as few micro-batches of at most `budget` tokens as possible, of about equal size.

    Rows are placed longest first, each into the emptiest micro-batch (longest processing time first, Graham 1969). A
    row longer than the budget gets a separate micro-batch.

    Args:
        lengths: tokens of each row.
        budget: tokens of a micro-batch.
        processes: number of processes that share the micro-batches.

    Returns:
        For each process its micro-batches of row numbers, the largest first: lengths [10, 7, 5, 3], a budget of 13 and
        2 processes give [[[0, 3]], [[1, 2]]]. All processes get the same number; some are empty if there are fewer
        rows.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    oversized = [row for row in order if lengths[row] > budget]
    order = order[len(oversized) :]

    # start from the number of micro-batches that the tokens need at least, in rounds of one for each process, and
    # add rounds until the rows fit
    fewest = len(oversized) + -(-sum(int(lengths[row]) for row in order) // budget)
    rounds = max(1, -(-fewest // processes))
    while True:
        empty = rounds * processes - len(oversized)
        bins: list[list[int]] = [[row] for row in oversized] + [[] for _ in range(empty)]
        heap = [(0, number) for number in range(len(oversized), len(bins))]  # (tokens, bin), emptiest first
        for row in order:
            if not heap or heap[0][0] + lengths[row] > budget:
                break
            tokens, number = heap[0]
            bins[number].append(row)
            heapq.heapreplace(heap, (tokens + int(lengths[row]), number))
        else:
            break
        rounds += max(1, rounds // 50)

    # processes take turns, so that those of one round have about the same size
    sizes = [sum(int(lengths[row]) for row in rows) for rows in bins]
    ranked = [bins[number] for number in sorted(range(len(bins)), key=lambda number: -sizes[number])]
    return [ranked[process::processes] for process in range(processes)]


def plan_padded(lengths: Sequence[int], budget: int, processes: int = 1) -> list[list[list[int]]]:
    """Assign rows to micro-batches of similar lengths whose padded tokens are at most `budget`.

    Arguments and result are those of `plan_packed`.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    micro_batches: list[list[int]] = []
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, int(lengths[order[start]])))
        micro_batches.append(order[start : start + rows])
        start += rows
    micro_batches += [[] for _ in range(-len(micro_batches) % processes if micro_batches else processes)]
    return [micro_batches[process::processes] for process in range(processes)]


class EpochSampler(Sampler):
    """Shuffles the rows of each epoch by a seed of that epoch, so that a resumed run gets the same order."""

    def __init__(self, rows: int, seed: Callable[[], int]) -> None:
        self.rows = rows
        self.seed = seed

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed())).tolist())
