"""Which of the processes of a launch this is; one process alone is the main one."""

import os
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def is_main() -> bool:
    """Return whether this process is the one that writes files and talks."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Return when every process has come here."""
    from accelerate import PartialState  # here, because the command line must start without torch

    PartialState().wait_for_everyone()


def from_main(find: Callable[[], Found]) -> Found:
    """Return in every process what `find` returns in the main one, which alone calls it."""
    from accelerate.utils import broadcast_object_list

    found: list = [find() if is_main() else None]
    broadcast_object_list(found)
    return found[0]
