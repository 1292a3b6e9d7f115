"""Ctrl-C, SIGTERM or a full disk -> one line that says how to go on, and an end within seconds."""

import atexit
import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any, NoReturn

from rewardmodel.distributed import is_main

GRACE = 1.5
"""Seconds for the work to end by itself, removing what is half-written; then the process ends."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what clusters send before they kill."""

_RESUME = "the last checkpoint and features that were read are kept; the same command with --resume goes on"

GO_ON = {
    "run": _RESUME,
    "train": _RESUME,
    "learning-curve": "finished points are kept; the same command goes on from them",
    "predict": "finished shards are kept next to the output; the same command goes on from them",
    "benchmark": "responses that were scored are kept; the same command goes on from them",
    "serve": "started requests are finished first",
}
"""What is kept of each command, and how it goes on."""

NOTHING_KEPT = "nothing is half-written; give the same command again"
"""The same of the other commands."""


def how_to_go_on(command: str) -> str:
    """Return what is kept of a command that was broken off, and how it goes on."""
    return GO_ON.get(command, NOTHING_KEPT)


def describe_failure(error: OSError, command: str) -> str:
    """Return an error of the operating system as a line: what could not be done where, and what to do."""
    reason = " ".join(str(error).split())
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'no file is named'}: {error.strerror}; free some space; {how_to_go_on(command)}"
    return f"{reason}; fix the path or its permissions"


@contextmanager
def stoppable(command: str) -> Iterator[None]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt, with the signal's number, and say how the command goes on.

    The line is printed at once, by a thread, even while the main thread is in a library and sees no signal. If it is
    still there after `GRACE`, the process ends with the exit code that it would have had: 128 and the number.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        while number := reader.recv(1):
            if number[0] in SIGNALS:
                name = signal.Signals(number[0]).name
                if is_main():
                    print(f"interrupted ({name}); {how_to_go_on(command)}", file=sys.stderr, flush=True)
                if not over.wait(GRACE):
                    os._exit(128 + number[0])
                return

    _reset_in_children()
    before: dict[int, Any] = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    earlier = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in before.items():
            signal.signal(number, handler)
        over.set()
        writer.close()
        watcher.join()
        reader.close()


def end_process(code: int) -> NoReturn:
    """End the process after what is registered with atexit, without the second that freeing every module takes."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for one in SIGNALS:  # once is enough: the clean-up is not to be interrupted
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


@cache
def _reset_in_children() -> None:
    """Let processes that are forked from this one end as usual: a signal to one of them is not for this process."""

    def reset() -> None:
        if signal.getsignal(signal.SIGTERM) is _interrupt:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    os.register_at_fork(after_in_child=reset)
