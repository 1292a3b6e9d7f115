"""Progress of a long loop: a bar in a terminal, a log line every tenth elsewhere (a file, a pipe, a notebook)."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

logger = logging.getLogger(__name__)


BARS = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
"""Environment variables that switch bars of datasets, huggingface_hub and transformers off, or always on (0)."""

OLD_NAME = "`is_gradient_checkpointing` is deprecated"
"""How a warning begins about a name that peft asks transformers by, and that a user can do nothing about."""


def in_terminal() -> bool:
    """Return whether standard error is a terminal, where a bar can be redrawn, and --quiet does not ask for none."""
    return sys.stderr.isatty() and logging.getLogger("rewardmodel").level < logging.WARNING


def quiet_libraries() -> None:
    """Switch off the progress bars of datasets, huggingface_hub, transformers and tqdm where there is no terminal.

    They read these variables when they are imported, so this comes first.
    """
    if not in_terminal():
        for name in BARS:
            os.environ.setdefault(name, "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bar while it converts a GGUF file


@contextmanager
def quiet() -> Iterator[None]:
    """Show of libraries, in the block or in a function that this decorates, what the command line shows of them.

    A Python program that calls us has set its own logging, and may have imported them before; that is left as it is.
    """
    import datasets
    from transformers.utils import logging as transformers_logging

    undo = []
    if not in_terminal() and "0" not in map(os.environ.get, BARS):
        if transformers_logging.is_progress_bar_enabled():
            transformers_logging.disable_progress_bar()
            undo.append(transformers_logging.enable_progress_bar)
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            undo.append(datasets.enable_progress_bars)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", OLD_NAME, FutureWarning)
            yield
    finally:
        for show_again in undo:
            show_again()


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
