"""What the command line writes to standard error: our log lines, and of libraries only what a user can act on."""

import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rewardmodel.distributed import is_main
from rewardmodel.progress import OLD_NAME, quiet_libraries


def set_up_logging(quiet: bool = False, verbose: bool = False) -> None:
    """Set up the package's logger; call it before libraries are imported, which read their settings then.

    Args:
        quiet: only warnings and errors, and no progress bars.
        verbose: also what libraries do, and with each line its time and where it comes from.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if verbose else "%(message)s"))
    ours = logging.getLogger("rewardmodel")
    ours.setLevel(logging.INFO if is_main() and not quiet else logging.WARNING)
    ours.handlers = [handler]
    ours.propagate = False
    quiet_libraries()
    # Noise that a user can do nothing about; the first is about an optional kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", OLD_NAME, FutureWarning)
    if verbose and is_main():
        for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(name, "info")


@contextmanager
def traced(verbose: bool) -> Iterator[None]:
    """Print the traceback of an error that leaves the block, if that is asked for."""
    try:
        yield
    except Exception:
        if verbose:
            traceback.print_exc()
        raise
