"""Progress of a long loop: a bar in a terminal, a log line every tenth elsewhere (a file, a pipe, a notebook)."""

import logging
import os
import sys
import time
from types import TracebackType

logger = logging.getLogger(__name__)


def in_terminal() -> bool:
    """Return whether standard error is a terminal, where a bar can be redrawn, and --quiet does not ask for none."""
    return sys.stderr.isatty() and logging.getLogger("rewardmodel").level < logging.WARNING


def quiet_libraries() -> None:
    """Switch off the progress bars of datasets, huggingface_hub, transformers and tqdm where there is no terminal.

    They read these variables when they are imported, so this comes first.
    """
    if not in_terminal():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bar while it converts a GGUF file


class Progress:
    """Counts what a loop has done and shows it.

    Args:
        total: number of items, like battles.
        title: what is being done, like "predicting".
        initial: number of items that were done before.
        unit: what an item is called.
        show: whether to show anything; of several processes only one should.
    """

    def __init__(self, total: int, title: str, initial: int = 0, unit: str = "battle", show: bool = True) -> None:
        self.total, self.title, self.unit, self.show = total, title, unit, show
        self.done = self.initial = initial
        self.start = time.monotonic()
        from tqdm import tqdm  # here, because it reads its variables when it is imported

        self.bar = tqdm(total=total, initial=initial, desc=title, unit=unit) if show and in_terminal() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int) -> None:
        """Add `count` items that are done."""
        self.move_to(self.done + count)

    def move_to(self, done: int) -> None:
        """Set the number of items that are done."""
        before, self.done = self.done, done
        if self.bar is not None:
            self.bar.update(done - before)
        elif self.show and 10 * done // self.total > 10 * before // self.total:
            seconds = time.monotonic() - self.start
            rate = (done - self.initial) / max(seconds, 1e-9)
            logger.info(
                "%s: %d %% (%s of %s %ss in %.0f s, %.1f a second)",
                self.title,
                100 * done // self.total,
                f"{done:,}",
                f"{self.total:,}",
                self.unit,
                seconds,
                rate,
            )
