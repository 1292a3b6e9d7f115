"""Sizes of texts and a token budget in, how much of each text stays out; and the cuts themselves.

Arithmetic only. Exchanging two responses exchanges what stays of them and changes nothing else.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Sizes = tuple[int, ...]
"""Tokens of one round: of the prompt turn, then of each response."""

CUT_MARK = " […] "
"""Stands where text was cut."""

MIN_ROUND_TOKENS = 48
"""An older round of a conversation is kept only if at least so many tokens are left for its texts."""


class Truncation(NamedTuple):
    """How a policy shares a budget among the texts of a round, and which part of a text it keeps."""

    share: Callable[[Sizes, int], Sizes]
    cut: Callable[[list[int], int, list[int]], list[int]]


def keep_rounds(
    rounds: Sequence[Sizes], room: Callable[[int], int], mark: int, share: Callable[[Sizes, int], Sizes]
) -> list[Sizes]:
    """Return how many tokens of each text stay, marks included, for the latest rounds that fit.

    Args:
        rounds: tokens of each round's texts, in the order of the conversation.
        room: how many tokens there are for texts when so many rounds are laid out.
        mark: tokens of the mark that stands for left-out rounds.
        share: shares what is left among the texts of a round that does not fit.
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
    """Return how many tokens of (prompt, *responses) stay: a quarter is the prompt's, the longest response gives way.

    The prompt takes what the responses leave, too.
    """
    prompt, *responses = texts
    left = budget - min(prompt, budget // 4)
    level = left
    for rank, size in enumerate(sorted(responses)):
        level = left // (len(responses) - rank)
        if size > level:
            break
        left -= size
        level = left + size  # all fit so far, so nothing above the largest is cut
    kept = [min(size, level) for size in responses]
    return (min(prompt, budget - sum(kept)), *kept)


def share_in_proportion(texts: Sizes, budget: int) -> Sizes:
    """Return how many tokens of each text stay: the same share of all."""
    total = sum(texts)
    return texts if total <= budget else tuple(size * budget // total for size in texts)


def cut_middle(ids: list[int], size: int, mark: list[int]) -> list[int]:
    """Return at most `size` of the tokens: all, or head and tail around the mark (the head alone if it is tiny)."""
    if len(ids) <= size:
        return ids
    rest = size - len(mark)
    return ids[:size] if rest < 2 else ids[: rest - rest // 2] + mark + ids[-(rest // 2) :]


def cut_tail(ids: list[int], size: int, mark: list[int]) -> list[int]:
    """Return at most `size` of the tokens: all, or the head and the mark (the head alone if it is tiny)."""
    if len(ids) <= size:
        return ids
    rest = size - len(mark)
    return ids[:size] if rest < 2 else ids[:rest] + mark


def cut_head(ids: list[int], size: int, mark: list[int]) -> list[int]:
    """Return at most `size` of the tokens: all, or the mark and the tail (the tail alone if it is tiny)."""
    if len(ids) <= size:
        return ids
    rest = size - len(mark)
    return ids[len(ids) - size :] if rest < 2 else mark + ids[-rest:]


def count_kept_tokens(full: int, size: int, mark: int) -> int:
    """Return how many tokens of a text of `full` tokens its cut to `size` keeps, without the mark."""
    return full if full <= size else size - mark if size - mark >= 2 else size


def measure_retention(full: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Return what a truncation leaves: shares of battles cut, and of prompt and response tokens kept.

    Args:
        full: (n_battles, 1 + n_responses) tokens of the prompt and of each response.
        kept: the same after truncation.

    Returns:
        `battles_cut`, `prompt_kept`, `responses_kept`, and `less_kept_response`: the mean number of tokens that
        stay of the response that keeps fewer.
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
"""Policies by the recipe's `prompt.truncation`; all keep recent rounds first."""
