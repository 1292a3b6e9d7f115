"""Truncation: share a token budget among the texts of a battle, and cut the texts to their shares.

Sizes are numbers of tokens. Exchanging the two responses exchanges their shares and changes nothing else.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Sizes = tuple[int, ...]
"""Tokens of the texts of one round: the prompt turn, then each response; (12, 340, 298) in joint encoding."""

CUT_MARK = " […] "
"""Replaces the text that was cut."""

MIN_ROUND_TOKENS = 48
"""An older round of a conversation is kept only if at least this many tokens are left for its texts."""


class Truncation(NamedTuple):
    """A truncation policy.

    Attributes:
        share: (sizes of a round, budget) -> tokens of each text to keep.
        cut: (ids, size, mark) -> at most `size` ids, with the mark where some were cut.
    """

    share: Callable[[Sizes, int], Sizes]
    cut: Callable[[list[int], int, list[int]], list[int]]


def keep_rounds(
    rounds: Sequence[Sizes], room: Callable[[int], int], mark: int, share: Callable[[Sizes, int], Sizes]
) -> list[Sizes]:
    """Return how many tokens of each text to keep, marks included, for as many of the latest rounds as fit.

    Args:
        rounds: sizes of each round, in the order of the conversation: [(12, 340, 298), (9, 120, 333)].
        room: number of rounds -> tokens available for their texts, next to the fixed text of the template.
        mark: tokens of the mark that replaces dropped rounds.
        share: shares what is left among the texts of a round that does not fit.

    Returns:
        Sizes of the kept rounds, the latest last; [(9, 120, 333)] where the first round was dropped.
    """
    if sum(map(sum, rounds)) <= room(len(rounds)):
        return list(rounds)
    kept: list[Sizes] = []
    used = mark if len(rounds) > 1 else 0
    for texts in reversed(rounds):
        left = room(len(kept) + 1) - used
        if kept and left < min(MIN_ROUND_TOKENS, sum(texts)):
            break
        kept.append(share(texts, left))
        used += sum(kept[-1])
    return kept[::-1]


def share_evenly(texts: Sizes, budget: int) -> Sizes:
    """Return how many tokens of (prompt, *responses) to keep: cut the longest response first.

    A quarter of the budget is reserved for the prompt, which also gets what the responses leave.
    """
    prompt, *responses = texts
    left = budget - min(prompt, budget // 4)
    level = left
    for rank, size in enumerate(sorted(responses)):
        level = left // (len(responses) - rank)
        if size > level:
            break
        left -= size
        level = left + size  # all responses so far fit; if the loop ends here, none is cut
    kept = [min(size, level) for size in responses]
    return (min(prompt, budget - sum(kept)), *kept)


def share_in_proportion(texts: Sizes, budget: int) -> Sizes:
    """Return how many tokens of each text to keep: the same fraction of each."""
    total = sum(texts)
    return texts if total <= budget else tuple(size * budget // total for size in texts)


def cut_middle(ids: list[int], size: int, mark: list[int]) -> list[int]:
    """Return at most `size` ids: all, or first and last ones around the mark (only first ones if the mark fills it)."""
    if len(ids) <= size:
        return ids
    rest = size - len(mark)
    return ids[:size] if rest < 2 else ids[: rest - rest // 2] + mark + ids[-(rest // 2) :]


def cut_tail(ids: list[int], size: int, mark: list[int]) -> list[int]:
    """Return at most `size` ids: all, or the first ones and the mark (only first ones if the mark fills it)."""
    if len(ids) <= size:
        return ids
    rest = size - len(mark)
    return ids[:size] if rest < 2 else ids[:rest] + mark


def cut_head(ids: list[int], size: int, mark: list[int]) -> list[int]:
    """Return at most `size` ids: all, or the mark and the last ones (only last ones if the mark fills it)."""
    if len(ids) <= size:
        return ids
    rest = size - len(mark)
    return ids[len(ids) - size :] if rest < 2 else mark + ids[-rest:]


def count_kept_tokens(full: int, size: int, mark: int) -> int:
    """Return how many tokens of a text of `full` tokens remain after a cut to `size`, not counting the mark."""
    return full if full <= size else size - mark if size - mark >= 2 else size


def measure_retention(full: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Return how much of the texts a truncation keeps.

    Args:
        full: (n_battles, 1 + n_responses) int64, tokens of the prompt and of each response.
        kept: the same after truncation.

    Returns:
        `battles_cut`, `prompt_kept`, `responses_kept`: shares of battles and of tokens; `less_kept_response`: mean
        number of tokens kept of the response that keeps fewer.
    """
    return {
        "battles_cut": float((kept < full).any(axis=1).mean()),
        "prompt_kept": float(kept[:, 0].sum() / max(full[:, 0].sum(), 1)),
        "responses_kept": float(kept[:, 1:].sum() / max(full[:, 1:].sum(), 1)),
        "less_kept_response": float(kept[:, 1:].min(axis=1).mean()),
    }


TRUNCATIONS = {
    "balanced": Truncation(share_evenly, cut_middle),
    "head": Truncation(share_in_proportion, cut_tail),
    "tail": Truncation(share_in_proportion, cut_head),
    "head_tail": Truncation(share_in_proportion, cut_middle),
}
"""Policies by the recipe's `prompt.truncation`; all keep the latest rounds first."""
