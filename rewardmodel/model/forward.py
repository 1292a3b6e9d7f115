"""A classifier and rows of tokens -> logits, in batches of a number of tokens, on one device or spread over several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, reduce
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rewardmodel.distributed import process_state
from rewardmodel.errors import plural
from rewardmodel.model.batching import Batch, pad, padded_tokens, plan_packed, plan_padded, to_device
from rewardmodel.model.budget import Memory, find_budget
from rewardmodel.model.packing import is_packed, packing_of
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

    def longest_row(self, rows: Dataset) -> dict[str, Any]:
        """Return the row that costs the most tokens."""
        return rows.select_columns(list(MODEL_COLUMNS))[int(np.argmax(self.costs(rows)))]


def choose_batching(model: Any, pad_token_id: int) -> Batching:
    """Return how rows become batches of a model: packed if its attention can, else padded."""
    if is_packed(model):
        return Batching(packing_of(model), lambda row: row["length"], plan_packed)
    return Batching(partial(pad, pad_token_id=pad_token_id), padded_tokens, plan_padded)


@dataclass(frozen=True)
class Predictor:
    """A classifier with all that turns rows of tokens into logits.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: of the model.
        dtype: precision of the forward pass.
        budget: tokens of a batch; None: as many as fit into free memory.
        feature_cache: folder of `model.features` for this backbone and these settings; None: features are not kept.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    budget: int | None = None
    feature_cache: Path | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @cached_property
    def batching(self) -> Batching:
        """How rows become batches of the model."""
        return choose_batching(self.model, self.tokenizer.pad_token_id)

    @torch.no_grad()
    def find_budget(self, rows: Dataset) -> int:
        """Return the tokens of a batch of these rows: `budget`, or as many as fit into free memory."""
        if self.budget is not None:
            return self.budget
        longest = self.batching.longest_row(rows)

        def compute(count: int) -> None:
            self.compute([longest] * count)

        memory = Memory(self.device) if self.device.type == "cuda" else None
        return find_budget(memory, compute, self.batching.tokens(longest))

    @torch.no_grad()
    def compute(self, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Return the logits of the sequences of rows, as one batch, (n_sequences, n_logits) float32, on the device."""
        with autocast(self.device, self.dtype):
            return self.model(**to_device(self.batching.collate(rows), self.device)).logits.float()

    @torch.no_grad()
    def logits(
        self, rows: Dataset, *, local_only: bool = False, on_batch: Callable[[int], Any] = lambda rows: None
    ) -> np.ndarray:
        """Return the logits of each sequence of rows, (n_rows, n_sequences, n_logits) float32, in their order.

        The rows are dealt to all processes, and every process returns the logits of all of them.

        Args:
            rows: of `prompt.tokenization.TOKEN_ROW_FEATURES`, all with the same number of sequences.
            local_only: compute all rows in this process, for instance because other processes have other rows.
            on_batch: called with the number of rows of each batch of this process once it is computed.
        """
        state = process_state()
        process, processes = (0, 1) if local_only else (state.process_index, state.num_processes)

        # deal the rows to processes and micro-batches; the plans agree only if all processes have one budget
        rows = rows.select_columns(list(MODEL_COLUMNS))
        costs, budget = self.batching.costs(rows), self.find_budget(rows)
        if processes > 1:
            budget = min(gather_object([budget]))
        mine = self.batching.plan(costs, budget, processes)[process]  # [[4, 0], [2, 7, 1]]: row numbers

        found = []
        for micro_batch in mine:
            # FSDP needs every process in every forward pass; one that has no rows left computes the shortest again
            chosen = [rows[number] for number in micro_batch or [int(np.argmin(costs))]]
            logits = self.compute(chosen)
            found.append(logits.view(len(chosen), -1, logits.shape[-1])[: len(micro_batch)])
            on_batch(len(micro_batch))

        # back into the order of the rows; each process fills in its own, and their sum has all
        together = torch.cat(found)
        result = together.new_zeros(len(rows), *together.shape[1:])
        result[[number for micro_batch in mine for number in micro_batch]] = together
        return (reduce(result, "sum") if processes > 1 else result).cpu().numpy()


def check_finite(values: np.ndarray, ids: Sequence[str], message: str) -> None:
    """Raise FloatingPointError, naming battles, unless all that was computed of rows, (n, k, l), is finite.

    Args:
        values: one entry a row.
        ids: of the same battles; a data set's column, of which only what is named is read.
        message: what is wrong, with {} for the battles: "16 battles".
    """
    bad = ~np.isfinite(values).all(axis=(1, 2))
    if bad.any():
        first = ", ".join(ids[int(row)] for row in np.flatnonzero(bad)[:5])
        raise FloatingPointError(f"{message.format(plural(int(bad.sum()), 'battle'))}; the first ids: {first}")


def split_by_tokens(
    costs: np.ndarray, order: np.ndarray, tokens: int | None, first: int | None = None
) -> list[np.ndarray]:
    """Return row numbers in an order as parts of about `tokens` tokens, each part ascending; None: one part.

    Args:
        costs: (n_rows,) tokens of each row.
        order: (n_rows,) row numbers.
        tokens: of a part.
        first: of the first part; each has twice as many as the one before, up to `tokens`, so that something is kept
            soon, however slow the machine is. Default: `tokens`.
    """
    ends = np.cumsum(costs[order])
    full, size, bounds = tokens or int(ends[-1]), first or tokens or int(ends[-1]), [0]
    while bounds[-1] < ends[-1]:
        bounds.append(bounds[-1] + min(size, full))
        size *= 2
    number = np.searchsorted(bounds, ends - costs[order], side="right")
    return [np.sort(part) for part in np.split(order, np.flatnonzero(np.diff(number)) + 1)]
