"""Battles in, how many of them repeat or nearly repeat others out, in memory that texts do not fill.

Texts are compared as `folds` compares them: after NFKC, lower-casing and removal of white space.
"""

from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset

from rewardmodel.battles import outcomes
from rewardmodel.data.folds import hash_texts, normalise_texts

EXAMPLES = 5
"""Examples that are given of each finding, and ids that are given of each example."""

GRAM = 5
"""Characters of the overlapping pieces by which prompts are compared; shorter prompts have none."""

CHARACTERS = 4_000
"""Characters of a normalised prompt that count; what follows is not compared."""

BANDS, ROWS = 8, 4
"""Two prompts are candidates if all `ROWS` minima of one of `BANDS` bands agree. Of pairs with similarity s,
1 - (1 - s ** ROWS) ** BANDS are: 98.5 % at .8, all but one in a million at .95."""

SPREAD = 3
"""Candidates are measured unless fewer of all minima agree than a pair at the threshold has, less so many standard
deviations; that leaves out one such pair in 400."""

LEADERS = 4
"""Prompts of a bucket that all later ones of it are compared with; so time grows with prompts, not their square."""

PROMPTS_A_BATCH = PAIRS_A_BATCH = 1_000
"""Prompts that are hashed, and pairs that are compared, at a time."""


def find_duplicates(battles: Dataset) -> dict[str, Any]:
    """Return how many battles repeat another: the same prompt and the same two responses, in either order.

    Texts are told apart by 64-bit hashes. Outcomes are compared by the winning response, so a repeat with A and B
    exchanged, and the winner with them, agrees. Equal chances of A and B count as a tie.

    Returns:
        `battles`: repeats, without the first of each set; `sets`; `examples`: up to `EXAMPLES` lists of ids;
        `label_conflicts`: `sets`, `battles` in them and `examples` of sets whose likeliest outcomes are not all the
        same; `identical_responses`: `battles` whose two responses are the same, and how many of them are `decided`.
    """
    keys, second_first = np.empty(len(battles), np.uint64), np.empty(len(battles), np.int8)
    for row, (prompt, first, second) in enumerate(normalise_texts(battles)):
        keys[row] = hash_texts(prompt, min(first, second), max(first, second))
        second_first[row] = (first > second) - (first < second)
    array, identical = outcomes(battles), second_first == 0
    verdict = winner_signs(array)
    verdict = np.where(identical, abs(verdict), verdict * second_first)  # which of two identical ones won says nothing
    known = ~np.isnan(array).any(axis=1)  # battles without an outcome contradict none
    order = np.argsort(keys, kind="stable")
    starts = np.unique(keys[order], return_index=True)[1]
    sizes = np.diff(starts, append=len(keys))
    least = np.minimum.reduceat(np.where(known, verdict, 2)[order], starts)
    most = np.maximum.reduceat(np.where(known, verdict, -2)[order], starts)
    repeated, conflicting = sizes > 1, least < most

    def examples(sets: np.ndarray) -> list[list[str]]:
        shown = np.flatnonzero(sets)[:EXAMPLES]
        return [battles[order[starts[one] :][: min(sizes[one], EXAMPLES)]]["id"] for one in shown]

    return {
        "battles": int((sizes - 1).sum()),
        "sets": int(repeated.sum()),
        "examples": examples(repeated),
        "label_conflicts": {
            "sets": int(conflicting.sum()),
            "battles": int(sizes[conflicting].sum()),
            "examples": examples(conflicting),
        },
        "identical_responses": {"battles": int(identical.sum()), "decided": int(abs(verdict[identical]).sum())},
    }


def winner_signs(outcomes: np.ndarray) -> np.ndarray:
    """Return the likeliest outcome of each battle, (n_battles,) int8: 1 A, -1 B, 0 tie, even chances or no outcome.

    Args:
        outcomes: (n_battles, 3) float64: A, B, tie; NaN where unlabelled.
    """
    first, second, tie = outcomes.T
    decided = np.maximum(first, second) > tie
    return (decided * np.sign(np.nan_to_num(first - second))).astype(np.int8)


def find_near_duplicates(battles: Dataset, threshold: float = 0.8) -> dict[str, Any]:
    """Return how many prompts of different groups are nearly the same.

    Similarity is the Jaccard index of the sets of `GRAM` characters in a row, over the first `CHARACTERS` of the
    normalised prompt. Candidates come from MinHash (Broder 1997) in bands, and each is then measured exactly, so that
    no pair below the threshold is counted. Some above may be missed: by chance (see `BANDS`, `SPREAD`), and in a
    bucket of many prompts, where each is only compared with the first `LEADERS` of them.

    Args:
        battles: with `group` set; prompts without a group (-1) count as different groups.
        threshold: similarity from which two prompts are nearly the same.

    Returns:
        `threshold`; `prompts`: different prompts that were compared; `pairs`: of prompts that are nearly the same, at
        least; `battles`: that have one of these prompts; `examples`: up to `EXAMPLES`, each `ids` of two battles and
        their `similarity`.
    """
    keys, minima, bands, usable = _hashed(battles)
    distinct, first, count = np.unique(keys[usable], return_index=True, return_counts=True)
    rows = np.flatnonzero(usable)[first]
    pairs = _candidates(bands[rows], minima[rows], threshold)
    groups = np.asarray(battles.with_format(None)["group"][:])[rows[pairs]]
    pairs = pairs[(groups[:, 0] != groups[:, 1]) | (groups[:, 0] < 0)]
    similarity = _similarities(battles, rows[pairs])
    near = similarity >= threshold
    pairs, similarity = pairs[near], similarity[near]
    shown = np.unique(pairs[:, 0], return_index=True)[1][:EXAMPLES]
    return {
        "threshold": threshold,
        "prompts": len(distinct),
        "pairs": len(pairs),
        "battles": int(count[np.unique(pairs)].sum()),
        "examples": [{"ids": battles[rows[pairs[one]]]["id"], "similarity": float(similarity[one])} for one in shown],
    }


def _hashed(battles: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the hashes of each battle's prompt, and whether it is long enough to have some.

    Returns:
        Its key, (n,) uint64; the last byte of each minimum, (n, BANDS * ROWS) uint8; the keys of its bands, (n, BANDS)
        uint64; (n,) bool.
    """
    keys, usable = np.empty(len(battles), np.uint64), np.empty(len(battles), bool)
    minima = np.zeros((len(battles), BANDS * ROWS), np.uint8)
    bands = np.zeros((len(battles), BANDS), np.uint64)
    texts, start = normalise_texts(battles), 0
    while batch := [prompt for prompt, _, _ in islice(texts, PROMPTS_A_BATCH)]:
        here = slice(start, start + len(batch))
        keys[here] = [hash_texts(prompt) for prompt in batch]
        decoded = [_compared(prompt) for prompt in batch]
        usable[here] = [len(text) >= GRAM for text in decoded]
        least = _minima([text for text in decoded if len(text) >= GRAM])
        minima[here][usable[here]], bands[here][usable[here]] = least.astype(np.uint8), _band_keys(least)
        start += len(batch)
    return keys, minima, bands, usable


def _compared(prompt: bytes) -> str:
    return prompt.decode()[:CHARACTERS]


@cache
def _odd_numbers(count: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    return np.random.default_rng(count).integers(np.iinfo(dtype).max, size=count, dtype=dtype) | dtype(1)


def _grams(text: str) -> np.ndarray:
    """Return a hash of every `GRAM` characters in a row, (characters - GRAM + 1,) uint64: a polynomial modulo 2^64."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    count = len(points) - GRAM + 1
    hashed = np.zeros(count, np.uint64)
    for place, factor in enumerate(_odd_numbers(GRAM, np.uint64)):
        hashed += points[place : place + count] * factor
    return hashed


def _minima(texts: list[str]) -> np.ndarray:
    """Return the least hash of each text's pieces under each permutation, (n_texts, BANDS * ROWS) uint32."""
    if not texts:
        return np.zeros((0, BANDS * ROWS), np.uint32)
    sizes = np.array([len(text) for text in texts])
    ends = sizes.cumsum()
    within = np.ones(ends[-1], bool)  # pieces of the joined texts that do not reach into the next text
    for back in range(1, GRAM):
        within[ends - back] = False
    grams = (_grams("".join(texts))[within[: 1 - GRAM]] >> np.uint64(32)).astype(np.uint32)
    starts = ends - sizes - (GRAM - 1) * np.arange(len(texts))
    factors = _odd_numbers(BANDS * ROWS, np.uint32)
    return np.stack([np.minimum.reduceat(grams * factor + factor // 3, starts) for factor in factors], axis=1)


def _band_keys(minima: np.ndarray) -> np.ndarray:
    """Return one key for the minima of each band, (n_texts, BANDS) uint64."""
    return (minima.reshape(-1, BANDS, ROWS) * _odd_numbers(ROWS, np.uint64)).sum(axis=2, dtype=np.uint64)


def _candidates(bands: np.ndarray, minima: np.ndarray, threshold: float) -> np.ndarray:
    """Return pairs of rows to compare, (n_pairs, 2) int64: of rows with a band in common, the first with later ones."""
    count, size = minima.shape
    enough = size * threshold - SPREAD * (size * threshold * (1 - threshold)) ** 0.5
    found = [np.zeros(0, np.int64)]
    for keys in bands.T:
        order = np.argsort(keys, kind="stable")
        starts, sizes = np.unique(keys[order], return_index=True, return_counts=True)[1:]
        start = np.repeat(starts, sizes)
        for leader in range(LEADERS):
            place = np.flatnonzero(np.arange(count) > start + leader)
            first, later = order[start[place] + leader], order[place]
            likely = (minima[first] == minima[later]).sum(axis=1) >= enough
            found.append(first[likely] * count + later[likely])
    return np.stack(np.divmod(np.unique(np.concatenate(found)), max(count, 1)), axis=1)


def _similarities(battles: Dataset, pairs: np.ndarray) -> np.ndarray:
    """Return the Jaccard index of the prompts of each pair of rows, (n_pairs,) float64."""
    return np.array([value for start in range(0, len(pairs), PAIRS_A_BATCH)
                     for value in _jaccard(battles, pairs[start : start + PAIRS_A_BATCH])])  # fmt: skip


def _jaccard(battles: Dataset, pairs: np.ndarray) -> Iterator[float]:
    rows, places = np.unique(pairs, return_inverse=True)
    sets = [np.unique(_grams(_compared(prompt))) for prompt, _, _ in normalise_texts(battles.select(rows))]
    for first, second in places.reshape(-1, 2):
        shared = len(np.intersect1d(sets[first], sets[second], assume_unique=True))
        yield shared / (len(sets[first]) + len(sets[second]) - shared)
