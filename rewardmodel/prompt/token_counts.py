"""Count the tokens of battles, and measure what truncation keeps of them at several values of `prompt.max_length`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from rewardmodel.battles import TEXT_COLUMNS
from rewardmodel.prompt.encoder import PromptEncoder, sum_sizes
from rewardmodel.prompt.truncation import MIN_ROUND_TOKENS, Sizes, measure_retention

MAX_LENGTHS = (512, 1024, 1536, 2048, 3072, 4096, 8192)
"""Budgets in tokens at which truncation is measured, in addition to the encoder's own."""

COUNTED_BATTLES = 20_000
"""Battles whose tokens are counted, drawn with the seed; all of them where there are fewer."""


def count_tokens(battles: Dataset, encoder: PromptEncoder, seed: int = 0) -> dict[str, Any]:
    """Return the tokens of each battle and what truncation keeps at each budget, compared with cutting the right end.

    The right cut takes the same template without truncation and keeps its first `max_length` tokens. With separate
    encoding there are two sequences per battle, and the prompt keeps what it keeps in the shorter of the two.

    Args:
        battles: what to count; at most `COUNTED_BATTLES` of them are.
        encoder: its tokenizer, template and truncation policy are measured.
        seed: draws the sample.

    Returns:
        `battles`: how many were counted; `max_length` and `truncation` of the encoder; `lengths`: tokens per battle of
        the `prompt`, of `both_responses` and of the `longer_response`, (n_battles,) int64, and of each `sequence`,
        template included, (n_sequences,) int64; `retention`: one entry per budget, with `max_length`, and `kept` and
        `right_cut`, each as `measure_retention` returns it.
    """
    count = min(COUNTED_BATTLES, len(battles))
    rows = np.sort(np.random.default_rng(seed).choice(len(battles), count, replace=False))
    least = encoder.fixed_tokens(1).length + len(encoder.mark) + MIN_ROUND_TOKENS
    budgets = [length for length in sorted({*MAX_LENGTHS, encoder.max_length}) if length >= least]
    prompt, a, b = TEXT_COLUMNS
    texts_of_sequences = [(prompt, a, b)] if len(encoder.responses) > 1 else [(prompt, a), (prompt, b)]

    full, sequences, kept = [], [], []
    for batch in battles.select(rows).with_format(None).select_columns(list(TEXT_COLUMNS)).iter(batch_size=500):
        tokenized = (encoder.tokenize_rounds(*(batch[name] for name in names)) for names in texts_of_sequences)
        for conversations in zip(*tokenized, strict=True):
            # sizes: for each sequence of the battle, the tokens of each round: [[(8, 120, 95), (5, 40, 61)]]
            sizes = [[tuple(map(len, texts)) for texts in rounds] for rounds in conversations]
            totals = [sum_sizes(rounds) for rounds in sizes]
            full.append((totals[0][0], *(size for one in totals for size in one[1:])))
            sequences += [sum(map(sum, rounds)) + encoder.fixed_tokens(len(rounds)).length for rounds in sizes]
            counts = [_count_kept(encoder, rounds, budgets) for rounds in sizes]
            prompt_kept = np.min([one[..., 0] for one in counts], axis=0)
            kept.append(np.dstack([prompt_kept, *(one[..., 1:] for one in counts)]))

    # full: (n_battles, 3) of prompt, A, B; kept: (n_battles, 2, n_budgets, 3), first by truncation, then by right cut
    full_sizes, kept_sizes = np.array(full), np.array(kept)
    return {
        "battles": count,
        "max_length": encoder.max_length,
        "truncation": encoder.truncation,
        "lengths": {
            "prompt": full_sizes[:, 0],
            "both_responses": full_sizes[:, 1:].sum(axis=1),
            "longer_response": full_sizes[:, 1:].max(axis=1),
            "sequence": np.array(sequences),
        },
        "retention": [
            {
                "max_length": length,
                "kept": measure_retention(full_sizes, kept_sizes[:, 0, number]),
                "right_cut": measure_retention(full_sizes, kept_sizes[:, 1, number]),
            }
            for number, length in enumerate(budgets)
        ],
    }


def _count_kept(encoder: PromptEncoder, rounds: Sequence[Sizes], budgets: list[int]) -> np.ndarray:
    """Return the tokens of each text that stay, (2, n_budgets, n_texts) int64: by truncation, and by a right cut."""
    truncated = [encoder.count_kept(rounds, encoder.fit_rounds(rounds, length)) for length in budgets]
    fixed, position = encoder.fixed_tokens(len(rounds)), 0
    right_cut = np.zeros((len(budgets), len(rounds[0])), np.int64)
    for before, (number, text) in zip(fixed.before, fixed.turns, strict=True):
        position += len(before)
        right_cut[:, text] += np.clip(np.array(budgets) - position, 0, rounds[number][text])
        position += rounds[number][text]
    return np.stack([truncated, right_cut])
