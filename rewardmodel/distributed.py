"""Which of the processes of a launch this is; one process alone is the main one."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from accelerate import PartialState

Found = TypeVar("Found")


def is_main() -> bool:
    """Return whether this process is the one that writes files and talks."""
    return os.environ.get("RANK", "0") == "0"


def joined() -> "PartialState":
    """Return accelerate's state of this process, which is one of its launch from here on."""
    import torch  # here, because the command line must start without it
    from accelerate import PartialState

    # Unless it is told, processes on CPUs know nothing of each other.
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()
    return PartialState(cpu=cpu)


def wait_for_all() -> None:
    """Return when every process has come here."""
    joined().wait_for_everyone()


def from_main(find: Callable[[], Found]) -> Found:
    """Return in every process what `find` returns in the main one, which alone calls it."""
    joined()
    from accelerate.utils import broadcast_object_list

    found: list = [find() if is_main() else None]
    broadcast_object_list(found)
    return found[0]


def in_every_process(names: set[str]) -> set[str]:
    """Return those of some names that every process gives."""
    if joined().num_processes == 1:
        return names
    from accelerate.utils import gather_object

    return set.intersection(*gather_object([names]))
