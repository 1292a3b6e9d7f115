"""Which of the processes of a launch this is; one process alone is the main one."""

import os


def is_main() -> bool:
    """Return whether this process is the one that writes files and talks."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Return when every process has come here."""
    from accelerate import PartialState  # here, because the command line must start without torch

    PartialState().wait_for_everyone()
