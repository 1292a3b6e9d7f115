"""Token rows -> logits, shard by shard: each shard is written to a file, so that a killed prediction continues.

A shard is a set of rows that are computed together, in several micro-batches per process; its file is written
completely or not at all. Which rows are in which shard depends only on the rows, the tokens of a batch and the number
of processes, so that an interrupted prediction gives the same bits as an uninterrupted one. The files are in a folder
named by a digest of model, rows and settings, so that shards of another prediction are never read. Only the main
process reads and writes files and reads the clock.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset

from rewardmodel.distributed import from_main, is_main, process_state
from rewardmodel.files import read_arrays, write_arrays, write_text
from rewardmodel.model.forward import Predictor, check_finite, split_by_tokens
from rewardmodel.model.packing import is_packed
from rewardmodel.progress import Progress
from rewardmodel.prompt.tokenization import select_sequence

logger = logging.getLogger(__name__)

BATCHES = 16
"""Micro-batches of a process in a shard: enough for rows of mixed lengths to fill them, few enough to compute again.
The first shards have 1, 2, 4 and 8."""

WHOLE, FIRST, SECOND = "whole", "first", "second"
"""Kinds of shards: all sequences of their rows, the first only, or the second only."""

TITLES = {WHOLE: "predicting", FIRST: "predicting as given", SECOND: "predicting exchanged"}
"""Titles of the progress bar, by kind of shard."""

BUDGET_FILE = "budget.json"
"""File with the tokens of a batch, by the name of the device that they were measured on."""

DIGITS = 16
"""Hexadecimal digits of the digests in the name of a folder."""

Piece = tuple[np.ndarray, np.ndarray]
"""Row numbers, (n,) int64, ascending, and their logits, (n, n_sequences, n_logits) float32."""


class Deadline:
    """Time budget for the optional swapped pass. Only rank 0 reads the clock, so all ranks stop at the same shard.

    Args:
        seconds: from now.
        clock: seconds since some fixed time.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end = clock() + seconds
        self.seconds = self.tokens = 0.0  # sums over past shards, each weighted half as much as the next

    def left(self) -> float:
        """Return the seconds that are left; negative after the deadline."""
        return self.end - self.clock()

    def allows(self, tokens: int) -> bool:
        """Return whether a number of tokens can be computed in time, at the pace of the last shards."""
        return from_main(lambda: self.seconds * tokens < self.left() * max(self.tokens, 1))

    def share(self, models: int) -> "Deadline":
        """Return the deadline of the next of `models` models that share the time that is left equally."""
        return Deadline(self.left() / models, self.clock)

    def over(self) -> "Deadline":
        """Return a deadline that has passed."""
        return Deadline(-math.inf, self.clock)

    def measure(self, tokens: int, work: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the result of `work`, which computes a number of tokens, and update the pace."""
        start = self.clock()
        result = work()
        self.seconds, self.tokens = self.seconds / 2 + self.clock() - start, self.tokens / 2 + tokens
        return result


def sharded_logits(
    predictor: Predictor, rows: Dataset, folder: Path | None = None, deadline: Deadline | None = None
) -> np.ndarray:
    """Return the logits of each sequence of rows, (n_rows, n_sequences, n_logits) float32, in their order.

    Args:
        predictor: the model.
        rows: of `prompt.tokenization.TOKEN_ROW_FEATURES`, all with the same number of sequences.
        folder: of this prediction's shards (`shard_folder`); None: no files.
        deadline: if given, rows have two sequences. The first of all rows is computed however long it takes, then the
            second of as many rows as there is time for, the shortest first: each gains about the same, and costs its
            tokens. The others get NaN.

    Raises:
        FloatingPointError: logits that are NaN or infinite; that shard is not written.
    """
    # the same budget in every process, and after a restart, so that the same rows are in the same shard
    budget = _common_budget(folder, predictor, rows)
    predictor = replace(predictor, budget=budget)
    smallest = budget * process_state().num_processes
    tokens = smallest * BATCHES if folder or deadline else None
    packed = is_packed(predictor.model)

    def compute(rows: Dataset, advance: Callable[[int], Any]) -> np.ndarray:
        logits = predictor.logits(rows, on_batch=advance)
        check_finite(logits, rows["id"], f"NaN or infinite predictions of {{}} ({predictor.dtype})")
        return logits

    def compute_shards(rows: Dataset, kind: str) -> np.ndarray:
        costs, until = np.array(predictor.batching.costs(rows)), deadline if kind == SECOND else None
        order = _order_rows(costs, packed, ascending=until is not None)
        shards = split_by_tokens(costs, order, tokens, smallest if tokens else None)
        return _compute_missing(compute, rows, costs, shards, kind, folder, deadline, until)

    # both sequences together, which is quickest; or the second as time allows
    if deadline is None:
        return compute_shards(rows, WHOLE)
    first = compute_shards(select_sequence(rows, 0), FIRST)
    second = compute_shards(select_sequence(rows, 1), SECOND) if deadline.allows(0) else first[:0]
    return np.concatenate([first, second if len(second) else np.full_like(first, np.nan)], axis=1)


def shard_folder(work: Path, model: Path, rows: Dataset, settings: dict[str, Any]) -> Path:
    """Return the folder in `work` of one prediction's shards, named by digests of all that its logits depend on.

    Args:
        work: folder of the shards of one output.
        model: folder of the saved model.
        rows: to predict.
        settings: all other settings that logits depend on; JSON.
    """
    return work / from_main(lambda: f"{_model_digest(model)}-{_rows_digest(rows, settings)}")


def remove_shards(work: Path) -> None:
    """Remove the shards of an output, and their folder if nothing else is in it."""
    for path in work.glob(f"{'[0-9a-f]' * DIGITS}-{'[0-9a-f]' * DIGITS}"):
        shutil.rmtree(path)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def _order_rows(costs: np.ndarray, packed: bool, ascending: bool) -> np.ndarray:
    """Return row numbers, (n_rows,), in the order in which shards take them.

    Args:
        costs: (n_rows,) tokens of each row.
        packed: whether batches are packed.
        ascending: the cheapest row first.
    """
    if ascending:
        return np.argsort(costs, kind="stable")
    if packed:  # mixed lengths fill batches best
        return np.random.default_rng(0).permutation(len(costs))
    return np.argsort(-costs, kind="stable")  # similar lengths need the least padding


def _compute_missing(
    compute: Callable[..., np.ndarray],
    rows: Dataset,
    costs: np.ndarray,
    shards: Sequence[np.ndarray],
    kind: str,
    folder: Path | None,
    measured: Deadline | None,
    until: Deadline | None,
) -> np.ndarray:
    """Return the logits of rows; those that the files of `folder` lack are computed, shard by shard, and written.

    Args:
        compute: (rows, advance) -> logits; calls `advance` with the number of rows of each batch.
        rows: to predict.
        costs: (n_rows,) tokens of each row.
        shards: row numbers of each shard.
        kind: of the shards.
        folder: of their files; None: no files.
        measured: measures the time that shards take.
        until: no shard starts that would not end before; None: all are computed.

    Returns:
        (n_rows, n_sequences, n_logits) float32, NaN for rows that there was no time for; empty if there was time for
        none.
    """
    pieces: list[Piece] = from_main(lambda: _read(folder, kind))
    done = np.zeros(len(rows), bool)
    for numbers, _ in pieces:
        done[numbers] = True
    if 0 < done.sum() < len(rows):
        logger.info("continues: %d of %d battles are already computed (%s)", done.sum(), len(rows), TITLES[kind])
    with Progress(len(rows), TITLES[kind], initial=int(done.sum()), show=is_main()) as progress:
        for shard in shards:
            todo = shard[~done[shard]]
            if not len(todo):
                continue
            tokens = int(costs[todo].sum())
            if until is not None and not until.allows(tokens):
                break
            shard_rows = rows if len(todo) == len(rows) else rows.select(todo)
            work = partial(compute, rows=shard_rows, advance=progress.update)
            logits = work() if measured is None else measured.measure(tokens, work)
            if folder is not None and is_main():
                _write(folder, kind, (todo, logits))
            pieces.append((todo, logits))
            done[todo] = True
            progress.move_to(int(done.sum()))  # including rows of other processes
    return _join_pieces(pieces, len(rows))


def _join_pieces(pieces: list[Piece], rows: int) -> np.ndarray:
    """Return the logits of a number of rows; NaN for rows in no piece; empty if there are no pieces."""
    if not pieces:
        return np.empty(0, np.float32)
    result = np.full((rows, *pieces[0][1].shape[1:]), np.nan, np.float32)
    for numbers, logits in pieces:
        result[numbers] = logits
    return result


def _read(folder: Path | None, kind: str) -> list[Piece]:
    if folder is None:
        return []
    return [(rows, logits) for rows, logits in read_arrays(folder, f"{kind}-*.npz", ("rows", "logits"))]


def _write(folder: Path, kind: str, piece: Piece) -> None:
    # named by its first row: no other shard that is written has it, even if the number of processes changes
    write_arrays(folder / f"{kind}-{piece[0][0]:08d}.npz", rows=piece[0], logits=piece[1])


def _common_budget(folder: Path | None, predictor: Predictor, rows: Dataset) -> int:
    """Return the tokens of a batch that fit in every process; from the folder if it has those of such a device."""
    if predictor.budget is not None:
        return predictor.budget
    device = predictor.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def read_budget() -> int | None:
        try:
            return json.loads((folder / BUDGET_FILE).read_text(encoding="utf-8"))[name] if folder else None
        except (OSError, ValueError, KeyError):
            return None

    known = from_main(read_budget)
    if known is not None:
        return known
    measured = min(gather_object([predictor.find_budget(rows)]))
    if folder is not None and is_main():
        write_text(folder / BUDGET_FILE, json.dumps({name: measured}))
    return measured


def _model_digest(folder: Path) -> str:
    digest = hashlib.blake2b()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'blake2b').hexdigest()}".encode())
    return digest.hexdigest()[:DIGITS]


def _rows_digest(rows: Dataset, settings: dict[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode())
    for table in (
        rows.with_format("arrow").select_columns(["input_ids", "segment_ids", "branches"]).iter(batch_size=1000)
    ):
        for column in table.columns:
            array = column.combine_chunks()
            digest.update(array.value_lengths().to_numpy().tobytes())
            digest.update(array.flatten().to_numpy().tobytes())
    return digest.hexdigest()[:DIGITS]
