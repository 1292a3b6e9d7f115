"""A model and tokenised rows in, logits out: by token budget, on one device or dealt to many."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, reduce
from datasets import Dataset

from rewardmodel.distributed import joined
from rewardmodel.model.batching import Batch, pack, pad, padded_tokens, plan_packed, plan_padded, to_device
from rewardmodel.model.budget import Memory, find_budget
from rewardmodel.model.packing import is_packed
from rewardmodel.model.precision import autocast
from rewardmodel.prompt.tokenization import MODEL_COLUMNS


@dataclass(frozen=True)
class Batching:
    """How rows become batches of one model.

    Attributes:
        collate: rows -> `Batch`.
        tokens: row -> tokens that it costs in a batch.
        plan: (tokens of rows, budget, processes) -> micro-batches, as `model.batching.plan_packed`.
    """

    collate: Callable[[Sequence[dict[str, Any]]], Batch]
    tokens: Callable[[dict[str, Any]], int]
    plan: Callable[[Sequence[int], int, int], list[list[list[int]]]]

    def costs(self, rows: Dataset) -> list[int]:
        """Return the tokens that each row costs in a batch."""
        return [self.tokens(row) for row in rows.select_columns(["branches", "length"])]


def batching(model: Any, pad_token_id: int) -> Batching:
    """Return how rows become batches of a model: packed if its attention can, else padded."""
    if is_packed(model):
        return Batching(pack, lambda row: row["length"], plan_packed)
    return Batching(partial(pad, pad_token_id=pad_token_id), padded_tokens, plan_padded)


@torch.no_grad()
def row_logits(
    model: Any,
    rows: Dataset,
    pad_token_id: int,
    dtype: torch.dtype,
    budget: int,
    *,
    alone: bool = False,
    advance: Callable[[int], Any] = lambda rows: None,
) -> np.ndarray:
    """Return the logits of each sequence of rows, (n_rows, n_sequences, n_logits) float32, in their order.

    Every process returns all of them and computes its share, or has rows of its own and is `alone` with them.

    Args:
        model: in evaluation mode, on its device.
        rows: of `prompt.tokenization.ROWS`, all with the same number of sequences.
        pad_token_id: what fills the ends of shorter sequences, where a model cannot do without.
        dtype: precision to compute in.
        budget: tokens of a batch.
        alone: whether other processes have other rows, or none.
        advance: is told the rows of each batch of this process when they are done.
    """
    state, how = joined(), batching(model, pad_token_id)
    process, processes = (0, 1) if alone else (state.process_index, state.num_processes)
    rows = rows.select_columns(list(MODEL_COLUMNS))
    costs = how.costs(rows)
    if processes > 1:
        budget = min(gather_object([budget]))  # with one of its own each would plan other shares
    mine = how.plan(costs, budget, processes)[process]
    device = next(model.parameters()).device
    found = []
    for micro in mine:
        # A sharded model needs every process in every forward pass; one without rows left repeats a row.
        chosen = [rows[number] for number in micro or [int(np.argmin(costs))]]
        with autocast(device, dtype):
            logits = model(**to_device(how.collate(chosen), device)).logits.float()
        found.append(logits.view(len(chosen), -1, logits.shape[-1])[: len(micro)])
        advance(len(micro))
    together = torch.cat(found)
    result = together.new_zeros(len(rows), *together.shape[1:])
    result[[number for micro in mine for number in micro]] = together
    return (reduce(result, "sum") if processes > 1 else result).cpu().numpy()


@torch.no_grad()
def forward_budget(model: Any, rows: Dataset, pad_token_id: int, dtype: torch.dtype) -> int:
    """Return how many tokens of rows fit into a batch that is only computed forward."""
    device = next(model.parameters()).device
    how = batching(model, pad_token_id)
    longest = longest_row(rows, how)

    def work(count: int) -> None:
        with autocast(device, dtype):
            model(**to_device(how.collate([longest] * count), device))

    return find_budget(Memory(device) if device.type == "cuda" else None, work, how.tokens(longest))


def longest_row(rows: Dataset, how: Batching) -> dict[str, Any]:
    """Return the row that costs a batch the most tokens."""
    return rows.select_columns(list(MODEL_COLUMNS))[int(np.argmax(how.costs(rows)))]


def cut(costs: np.ndarray, order: np.ndarray, least: int | None) -> list[np.ndarray]:
    """Return row numbers in this order in shards of about `least` tokens, each ascending; none: all in one.

    Args:
        costs: tokens of each row, (n_rows,).
        order: (n_rows,) row numbers.
        least: tokens of a shard.
    """
    ends = np.cumsum(costs[order])
    number = (ends - costs[order]) // (least or ends[-1])
    return [np.sort(shard) for shard in np.split(order, np.flatnonzero(np.diff(number)) + 1)]


def check_numbers(values: np.ndarray, rows: Dataset, said: str) -> None:
    """Raise FloatingPointError, which names battles, if what was computed of rows, (n, k, l), is not all finite.

    `said` tells what, with {} where their number goes.
    """
    bad = ~np.isfinite(values).all(axis=(1, 2))
    if bad.any():
        ids = ", ".join(rows.select(np.flatnonzero(bad)[:5])["id"][:])
        raise FloatingPointError(f"{said.format(bad.sum())}; the first ids: {ids}")
