"""Free memory of a device -> how many tokens a batch may have."""

import logging
from collections.abc import Callable

import torch

from rewardmodel.errors import InputError

logger = logging.getLogger(__name__)

CPU_TOKENS = 4096
"""Tokens of a batch on a CPU; larger batches are not faster."""

MAX_TOKENS = 65_536
"""Most tokens of a batch on a GPU; larger batches are not faster."""

SHARE = 0.85
"""Share of free memory to fill; the rest is for the allocator's fragmentation."""


class Memory:
    """Measures the memory of a CUDA device, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        """Return the bytes that can still be allocated, including the allocator's unused cache."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak(self, work: Callable[[], None]) -> int:
        """Return the peak of the memory that `work` allocates, in bytes."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def find_budget(memory: Memory | None, work: Callable[[int], None], longest: int) -> int:
    """Return how many tokens a batch may have.

    On CUDA the peaks of two batches are measured, of one and of two rows of the longest length, and extrapolated
    linearly. On a CPU nothing is computed.

    Args:
        memory: of the device; None: a CPU.
        work: computes a batch of a number of rows of the longest length.
        longest: tokens of the longest row.

    Raises:
        InputError: one row of the longest length does not fit.
    """
    if memory is None:
        return CPU_TOKENS
    free = memory.free()
    try:
        one = memory.peak(lambda: work(1))
    except torch.OutOfMemoryError as error:
        raise out_of_memory_error(longest) from error
    try:
        two = memory.peak(lambda: work(2))
    except torch.OutOfMemoryError:
        return longest
    tokens = extrapolate_tokens(free, one, two, longest)
    mib = _bytes_per_row(one, two) / longest / 2**20
    logger.info("%s tokens a batch fit: %.1f GiB free, %.2f MiB a token", f"{tokens:,}", free / 2**30, mib)
    return tokens


def extrapolate_tokens(free: int, one: int, two: int, longest: int) -> int:
    """Extrapolate linearly from the peaks of one and two longest rows to the tokens that fill `SHARE` of free memory.

    Args:
        free: bytes of free memory.
        one: peak of one row of the longest length, in bytes.
        two: peak of two such rows.
        longest: tokens of such a row.

    Returns:
        At least `longest`, at most `MAX_TOKENS` unless the longest row has more.
    """
    rows = 1 + (SHARE * free - one) / _bytes_per_row(one, two)
    return max(longest, min(MAX_TOKENS, int(rows * longest)))


def _bytes_per_row(one: int, two: int) -> int:
    """Return the bytes of one more row, at least half of the first's: the measured difference may be too small."""
    return max(two - one, one // 2, 1)


def out_of_memory_error(tokens: int) -> InputError:
    """Return the error to raise when a single row does not fit into memory."""
    return InputError(
        f"a battle of {tokens:,} tokens does not fit into the device's memory; set trainer.gradient_checkpointing "
        "true, a smaller prompt.max_length, or model.load_in_4bit true"
    )
