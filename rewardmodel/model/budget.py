"""Free memory in, how many tokens fit into a batch out."""

import logging
from collections.abc import Callable

import torch

from rewardmodel.errors import InputError

logger = logging.getLogger(__name__)

CPU_TOKENS = 4096
"""Tokens of a batch on a CPU: more make it no faster."""

MOST_TOKENS = 65_536
"""Tokens of a batch on a GPU at most: more make it no faster."""

SHARE = 0.85
"""Share of free memory to fill; allocators leave gaps."""


class Memory:
    """Memory of a CUDA device, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        """Return what can still be allocated, unused cache of the allocator included."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak(self, work: Callable[[], None]) -> int:
        """Return how much `work` takes at most, beyond what was taken before it."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def find_budget(memory: Memory | None, work: Callable[[int], None], longest: int) -> int:
    """Return how many tokens a batch may have.

    On CUDA two batches are computed, of one and of two of the longest rows; memory grows evenly between them, and
    so on.

    Args:
        memory: of the device; none: a CPU.
        work: computes a batch of so many rows of the longest length.
        longest: tokens of the longest row.

    Raises:
        InputError: not even one row fits.
    """
    if memory is None:
        return CPU_TOKENS
    free = memory.free()
    try:
        one = memory.peak(lambda: work(1))
    except torch.OutOfMemoryError as error:
        raise no_room(longest) from error
    try:
        two = memory.peak(lambda: work(2))
    except torch.OutOfMemoryError:
        return longest
    tokens = fitting(free, one, two, longest)
    logger.info(
        "%s tokens a batch fit: %.1f GiB free, %.2f MiB a token",
        f"{tokens:,}", free / 2**30, _each(one, two) / longest / 2**20,
    )  # fmt: skip
    return tokens


def fitting(free: int, one: int, two: int, longest: int) -> int:
    """Return how many tokens fit into a share of free bytes, if one and two rows of the longest length take so many."""
    rows = 1 + (SHARE * free - one) / _each(one, two)
    return max(longest, min(MOST_TOKENS, int(rows * longest)))


def _each(one: int, two: int) -> int:
    return max(two - one, one // 2, 1)


def no_room(tokens: int) -> InputError:
    """Return the error to raise when one row alone is more than the memory takes."""
    return InputError(
        f"a battle of {tokens:,} tokens does not fit into the device's memory; set trainer.gradient_checkpointing "
        "true, a smaller prompt.max_length, or model.load_in_4bit true"
    )
