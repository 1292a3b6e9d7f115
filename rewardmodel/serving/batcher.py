"""Token rows of many requests -> batches by tokens for one model in one thread -> logits, each to its own request.

Nothing waits for a batch to fill: rows that come while the model computes are the next batch.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Condition, Thread
from typing import NamedTuple

import numpy as np

from rewardmodel.inference.judge import TokenRow
from rewardmodel.model.forward import Predictor

logger = logging.getLogger(__name__)

WINDOW = 4
"""Batches of waiting rows, in order of arrival, from which one is chosen: rows of like lengths need less padding."""


class Waiting(NamedTuple):
    """A token row that waits for the model, and where its logits, (n_sequences, n_logits) float32, go."""

    row: TokenRow
    cost: int
    answer: "Future[np.ndarray]"


class TooBusyError(Exception):
    """Too many rows wait; `seconds` is when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many battles wait for the model; try again in {seconds} s")
        self.seconds = seconds


class Batcher:
    """Computes token rows with a model in one thread, batch by batch.

    Args:
        predictor: the model, with its `budget`.
        max_waiting: rows that may wait; more are refused.
        on_batch: called in the thread after each batch with its rows, its sequences and its tokens.
    """

    def __init__(
        self, predictor: Predictor, max_waiting: int, on_batch: Callable[[int, int, int], None] = lambda *_: None
    ) -> None:
        self.predictor = predictor
        self.budget = predictor.budget or 1
        self.max_waiting = max_waiting
        self.on_batch = on_batch
        self.waiting: deque[Waiting] = deque()
        self.changed = Condition()
        self.closing = False
        self.rows_a_second = 0.0
        self.thread = Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    def submit(self, rows: Sequence[TokenRow]) -> "list[Future[np.ndarray]]":
        """Let rows wait for the model, and return where the logits of each will be; cancel those not needed any more.

        Raises:
            TooBusyError: more than `max_waiting` rows would wait.
        """
        entries = [Waiting(row, self.predictor.batching.tokens(row), Future()) for row in rows]
        with self.changed:
            self._forget_cancelled()
            if self.closing or len(self.waiting) + len(entries) > self.max_waiting:
                raise TooBusyError(self._seconds_to_wait())
            self.waiting.extend(entries)
            self.changed.notify()
        return [entry.answer for entry in entries]

    def close(self) -> None:
        """Compute what waits, then end the thread."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def _seconds_to_wait(self) -> int:
        return max(1, min(60, math.ceil(len(self.waiting) / 2 / (self.rows_a_second or math.inf))))

    def _run(self) -> None:
        while batch := self._next_batch():
            start = time.monotonic()
            self._compute([entry for entry in batch if entry.answer.set_running_or_notify_cancel()])
            pace = len(batch) / max(time.monotonic() - start, 1e-6)
            self.rows_a_second = (self.rows_a_second + pace) / 2 if self.rows_a_second else pace

    def _next_batch(self) -> list[Waiting]:
        """Return the batch that has the row that waits longest, once there is one; empty: closed."""
        with self.changed:
            while True:
                self._forget_cancelled()
                if self.waiting or self.closing:
                    break
                self.changed.wait()
            if not self.waiting:
                return []
            ends = np.cumsum([entry.cost for entry in self.waiting])
            window = max(1, int(np.searchsorted(ends, WINDOW * self.budget, side="right")))
            costs = [entry.cost for entry, _ in zip(self.waiting, range(window), strict=False)]
            batches = self.predictor.batching.plan(costs, self.budget, 1)[0]  # [[4, 0], [2, 1, 3]]
            chosen = {*next(batch for batch in batches if 0 in batch)}
            batch = [entry for number, entry in enumerate(self.waiting) if number in chosen]
            self.waiting = deque(entry for number, entry in enumerate(self.waiting) if number not in chosen)
        # heads whose tie parameter is of pairs read the sequences two by two: rows of two come first
        return sorted(batch, key=lambda entry: len(entry.row["branches"]) != 3)

    def _forget_cancelled(self) -> None:
        self.waiting = deque(entry for entry in self.waiting if not entry.answer.cancelled())

    def _compute(self, batch: list[Waiting]) -> None:
        """Answer a batch; where that fails, its halves, so that one row that cannot be computed fails alone."""
        if not batch:
            return
        try:
            logits = self.predictor.compute([entry.row for entry in batch]).cpu().numpy()
        except Exception as error:
            if len(batch) == 1:
                logger.exception("a row of %d tokens could not be computed", batch[0].row["length"])
                batch[0].answer.set_exception(error)
                return
        else:
            sequences = [len(entry.row["branches"]) - 1 for entry in batch]
            for entry, part in zip(batch, np.split(logits, np.cumsum(sequences)[:-1]), strict=True):
                entry.answer.set_result(part)
            self.on_batch(len(batch), sum(sequences), sum(entry.cost for entry in batch))
            return
        self._compute(batch[: len(batch) // 2])
        self._compute(batch[len(batch) // 2 :])
