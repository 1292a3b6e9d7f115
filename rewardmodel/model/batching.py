"""Rows of tokens in, tensors for the model out: packed without padding, and planned by tokens, not by rows."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

Batch = dict[str, Any]
"""Arguments of a model's forward pass (`model.heads`)."""


def pack(rows: Sequence[dict[str, Any]]) -> Batch:
    """Return rows of `prompt.tokenization.ROWS` one after another, with the tokens of each battle counted from 0.

    Returns:
        input_ids and position_ids (1, T) int64; layout, the branches of each battle; and `readings`.
    """
    positions, starts = [], []
    begin = 0
    for row in rows:
        positions.append(np.arange(row["branches"][0]))
        for (_, shared), (first, branch) in _runs(row["branches"]):
            positions.append(np.arange(shared, shared + branch))
            starts.append([(begin, shared), (begin + first, branch)])
        begin += row["length"]
    return {
        "input_ids": torch.from_numpy(np.concatenate([np.asarray(row["input_ids"], np.int64) for row in rows]))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        "layout": [list(row["branches"]) for row in rows],
        **readings(np.concatenate([row["segment_ids"] for row in rows]), starts),
    }


def pad(rows: Sequence[dict[str, Any]], pad_token_id: int) -> Batch:
    """Return the sequences of rows, filled up on the right to the longest.

    Returns:
        input_ids and attention_mask (n_sequences, longest) int64; and `readings`.
    """
    ids, segments = [], []
    for row in rows:
        for runs in _runs(row["branches"]):
            index = _places(runs)
            ids.append(torch.from_numpy(np.asarray(row["input_ids"], np.int64)[index]))
            segments.append(torch.from_numpy(np.asarray(row["segment_ids"])[index]))
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    flat = pad_sequence(segments, batch_first=True).flatten().numpy()
    starts = [[(number * input_ids.shape[1], len(one))] for number, one in enumerate(ids)]
    return {
        "input_ids": input_ids,
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        **readings(flat, starts),
    }


def readings(segment_ids: np.ndarray, sequences: Sequence[Sequence[tuple[int, int]]]) -> Batch:
    """Return where the head reads each sequence, as places in all tokens of the batch one after another.

    Args:
        segment_ids: of all places.
        sequences: the runs (first place, tokens) of each sequence.

    Returns:
        last (n_sequences,) int64, the place of its last token; responses (m,) int64, the places of all tokens of
        responses, and response_of (m,) int64, 2 * sequence for the first response and 2 * sequence + 1 for the second.
    """
    responses, response_of = [], []
    for number, runs in enumerate(sequences):
        places = _places(runs)
        segments = segment_ids[places]
        responses.append(places[segments > 0])
        response_of.append(2 * number + segments[segments > 0].astype(np.int64) - 1)
    last = np.array([first + tokens - 1 for *_, (first, tokens) in sequences])
    return {
        "last": torch.from_numpy(last),
        "responses": torch.from_numpy(np.concatenate(responses)),
        "response_of": torch.from_numpy(np.concatenate(response_of)),
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on the device, sent there without waiting."""
    if device.type == "cpu":
        return batch
    return {
        name: value.pin_memory().to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def padded_tokens(row: dict[str, Any]) -> int:
    """Return the tokens that a row's sequences take, filled up to the longest of them."""
    shared, *branches = row["branches"]
    return (shared + max(branches)) * len(branches)


def _runs(branches: Sequence[int]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield where in a row each of its sequences is: first place and tokens of what is shared, and of the rest."""
    shared, *lengths = branches
    end = shared
    for length in lengths:
        yield (0, shared), (end, length)
        end += length


def _places(runs: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([np.arange(first, first + tokens) for first, tokens in runs])


def plan_packed(lengths: Sequence[int], budget: int, processes: int = 1) -> list[list[list[int]]]:
    """Deal rows to micro-batches of at most `budget` tokens, as few and as equal as may be.

    The longest row goes first, each to the emptiest micro-batch (longest processing time first, Graham 1969). A row
    over the budget has a micro-batch of its own.

    Args:
        lengths: tokens of each row.
        budget: tokens of a micro-batch.
        processes: among which the micro-batches are dealt.

    Returns:
        For each process its micro-batches, as many as for every other, the largest first; row numbers in each. One is
        empty where there are more than rows.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    over = [row for row in order if lengths[row] > budget]
    order = order[len(over) :]
    least = len(over) + -(-sum(int(lengths[row]) for row in order) // budget)
    rounds = max(1, -(-least // processes))
    while True:
        bins: list[list[int]] = [[row] for row in over] + [[] for _ in range(rounds * processes - len(over))]
        heap = [(0, number) for number in range(len(over), len(bins))] or [(budget, -1)]
        for row in order:
            tokens, number = heap[0]
            if number < 0 or tokens + lengths[row] > budget:
                break
            bins[number].append(row)
            heapq.heapreplace(heap, (tokens + int(lengths[row]), number))
        else:
            break
        rounds += max(1, rounds // 50)
    sizes = {number: sum(int(lengths[row]) for row in rows) for number, rows in enumerate(bins)}
    ranked = [bins[number] for number in sorted(sizes, key=lambda number: -sizes[number])]
    return [ranked[process::processes] for process in range(processes)]


def plan_padded(lengths: Sequence[int], budget: int, processes: int = 1) -> list[list[list[int]]]:
    """Deal rows to micro-batches of about equal lengths, whose padded tokens are at most `budget`; as `plan_packed`."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    cut: list[list[int]] = []
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, int(lengths[order[start]])))
        cut.append(order[start : start + rows])
        start += rows
    cut += [[] for _ in range(-len(cut) % processes if cut else processes)]
    return [cut[process::processes] for process in range(processes)]


class EpochSampler(Sampler):
    """Draws the order of rows anew each epoch, from a seed of that epoch, so that a resumed run draws it again."""

    def __init__(self, rows: int, seed: Callable[[], int]) -> None:
        self.rows = rows
        self.seed = seed

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed())).tolist())
