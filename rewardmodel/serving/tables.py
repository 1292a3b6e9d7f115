"""Logits of battles of many requests -> one table of predictions for all that wait -> the answers of each request.

A table of one battle takes about as long to build as one of many, and holds up the model on a machine with few cores.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np

from rewardmodel.inference.judge import Battle
from rewardmodel.serving.answers import Answer, describe_predictions


class Computed(NamedTuple):
    """The battles of a request, their logits (n, n_sequences, n_logits) float32, and where its answers go."""

    battles: Sequence[Battle]
    logits: np.ndarray
    answers: "Future[list[Answer]]"


class Tables:
    """Builds tables of predictions in a thread, each of all battles that are there when it starts.

    Args:
        predictions: (battles, logits) -> a table of as many rows (`inference.judge.Judge.predictions`).
        thread: of one worker.
    """

    def __init__(self, predictions: Callable[[Sequence[Battle], np.ndarray], Any], thread: Executor) -> None:
        self.predictions = predictions
        self.thread = thread
        self.waiting: deque[Computed] = deque()

    def submit(self, battles: Sequence[Battle], logits: np.ndarray) -> "Future[list[Answer]]":
        """Return where the answer to each battle of a request will be, or what `predictions` raises for it alone."""
        entry = Computed(battles, logits, Future())
        self.waiting.append(entry)
        self.thread.submit(self._build)
        return entry.answers

    def _build(self) -> None:
        entries = [self.waiting.popleft() for _ in range(len(self.waiting))]
        self._answer([entry for entry in entries if entry.answers.set_running_or_notify_cancel()])

    def _answer(self, entries: Sequence[Computed]) -> None:
        """Answer requests; where that fails, each alone, so that only the one that causes it fails."""
        if not entries:
            return
        try:
            battles = [battle for entry in entries for battle in entry.battles]
            found = describe_predictions(self.predictions(battles, np.concatenate([entry.logits for entry in entries])))
        except Exception as error:
            if len(entries) == 1:
                entries[0].answers.set_exception(error)
                return
            for entry in entries:
                self._answer([entry])
            return
        start = 0
        for entry in entries:
            entry.answers.set_result(found[start : start + len(entry.battles)])
            start += len(entry.battles)
