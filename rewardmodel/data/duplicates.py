"""Find battles that repeat others, and prompts that nearly repeat others, without holding all texts in memory.

Texts are compared as `folds` compares them: after NFKC normalisation, lower-casing and removal of white space.
"""

from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset

from rewardmodel.battles import outcomes
from rewardmodel.data.folds import hash_texts, normalise_texts

_EXAMPLES = 5
"""Examples given of each finding, and ids given of each example."""

_GRAM = 5
"""Prompts are compared by their character 5-grams; shorter prompts have none and are not compared."""

_CHARACTERS = 4_000
"""Characters of a normalised prompt that are compared; the rest is ignored."""

BANDS, ROWS_PER_BAND = 8, 4
"""Locality-sensitive hashing: two prompts are compared if all minima of one band agree. A pair with Jaccard similarity
s is compared with probability 1 - (1 - s^ROWS_PER_BAND)^BANDS: .985 at s = .8, 1 - 1e-6 at .95."""

LEADERS = 4
"""Prompts of a bucket that all later ones of the bucket are compared with, so that time is linear in prompts."""

PAIRS_PER_BATCH = 1_000
"""Pairs of prompts that are in memory at a time."""


def find_duplicates(battles: Dataset) -> dict[str, Any]:
    """Return how many battles repeat another: the same prompt and the same two responses, in either order.

    Texts are compared by 64-bit hashes. A repeat with A and B exchanged agrees if its winner is exchanged too. Equal
    probabilities of A and B count as a tie.

    Returns:
        `battles`: repeats, not counting the first battle of each set; `sets`; `examples`: up to 5 lists of up to 5
        ids; `label_conflicts`: sets whose battles do not all have the same likeliest outcome, as `sets`, `battles` in
        them and `examples`; `identical_responses`: `battles` whose two responses are equal, and how many of these
        have a winner (`decided`).
    """
    # A key for each battle that does not depend on the order of its responses, and the sign of that order.
    keys, second_first = np.empty(len(battles), np.uint64), np.empty(len(battles), np.int8)
    for row, (prompt, first, second) in enumerate(normalise_texts(battles)):
        keys[row] = hash_texts(prompt, min(first, second), max(first, second))
        second_first[row] = (first > second) - (first < second)

    # The winner with respect to that key; of two identical responses it does not matter which one won.
    array, identical = outcomes(battles), second_first == 0
    winner = winner_signs(array)
    winner = np.where(identical, abs(winner), winner * second_first)
    known = ~np.isnan(array).any(axis=1)  # battles without an outcome contradict no other

    # Sets of equal keys, as slices of a sorted order.
    order = np.argsort(keys, kind="stable")
    starts = np.unique(keys[order], return_index=True)[1]
    sizes = np.diff(starts, append=len(keys))
    least = np.minimum.reduceat(np.where(known, winner, 2)[order], starts)
    most = np.maximum.reduceat(np.where(known, winner, -2)[order], starts)
    repeated, conflicting = sizes > 1, least < most

    def examples(sets: np.ndarray) -> list[list[str]]:
        shown = np.flatnonzero(sets)[:_EXAMPLES]
        return [battles[order[starts[one] :][: min(sizes[one], _EXAMPLES)]]["id"] for one in shown]

    return {
        "battles": int((sizes - 1).sum()),
        "sets": int(repeated.sum()),
        "examples": examples(repeated),
        "label_conflicts": {
            "sets": int(conflicting.sum()),
            "battles": int(sizes[conflicting].sum()),
            "examples": examples(conflicting),
        },
        "identical_responses": {"battles": int(identical.sum()), "decided": int(abs(winner[identical]).sum())},
    }


def winner_signs(outcomes: np.ndarray) -> np.ndarray:
    """Return 1 where A is likeliest to win, -1 where B is, 0 for ties, equal chances and unlabelled, (n_battles,) int8.

    Args:
        outcomes: (n_battles, 3) float64: A, B, tie; NaN where unlabelled.
    """
    first, second, tie = outcomes.T
    decided = np.maximum(first, second) > tie
    return (decided * np.sign(np.nan_to_num(first - second))).astype(np.int8)


def find_near_duplicates(battles: Dataset, threshold: float = 0.8) -> dict[str, Any]:
    """Return how many pairs of prompts in different groups are nearly equal.

    Similarity is the Jaccard index of the sets of character 5-grams of the normalised prompts. Candidate pairs come
    from the bands of MinHash signatures (Broder 1997; Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, ch. 3)
    and are then measured exactly, so no pair below the threshold is counted. Some above it may be missed: by chance
    (see `BANDS`), and in buckets of many prompts (see `LEADERS`).

    Args:
        battles: with `group` assigned; prompts without a group (-1) count as different groups.
        threshold: Jaccard index from which two prompts are nearly equal.

    Returns:
        `threshold`; `prompts`: distinct prompts that were compared; `pairs`: found, a lower bound; `battles`: with one
        of these prompts; `examples`: up to 5, each with the `ids` of two battles and their `similarity`.
    """
    # Hash every prompt, and keep one battle of each distinct prompt.
    keys, bands, usable = _hash_prompts(battles)
    distinct, first, count = np.unique(keys[usable], return_index=True, return_counts=True)
    rows = np.flatnonzero(usable)[first]

    # Candidates of different groups, measured exactly.
    pairs = _candidates(bands[rows])
    groups = np.asarray(battles.with_format(None)["group"][:])[rows[pairs]]
    pairs = pairs[(groups[:, 0] != groups[:, 1]) | (groups[:, 0] < 0)]
    similarity = _similarities(battles, rows[pairs])
    near = similarity >= threshold
    pairs, similarity = pairs[near], similarity[near]

    shown = np.unique(pairs[:, 0], return_index=True)[1][:_EXAMPLES]
    return {
        "threshold": threshold,
        "prompts": len(distinct),
        "pairs": len(pairs),
        "battles": int(count[np.unique(pairs)].sum()),
        "examples": [{"ids": battles[rows[pairs[one]]]["id"], "similarity": float(similarity[one])} for one in shown],
    }


def _hash_prompts(battles: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the hashes of each battle's prompt.

    Returns:
        A key of the prompt, (n,) uint64; keys of its bands, (n, BANDS) uint64; whether it has any grams, (n,) bool.
    """
    keys, usable = np.empty(len(battles), np.uint64), np.empty(len(battles), bool)
    bands = np.zeros((len(battles), BANDS), np.uint64)
    for row, (prompt, _, _) in enumerate(normalise_texts(battles)):
        text = _compared_text(prompt)
        keys[row], usable[row] = hash_texts(prompt), len(text) >= _GRAM
        if usable[row]:
            bands[row] = _band_keys(_signature(text))
    return keys, bands, usable


def _compared_text(prompt: bytes) -> str:
    return prompt.decode()[:_CHARACTERS]


@cache
def _odd_numbers(count: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Return fixed random odd numbers, (count,); multiplying by one permutes the integers modulo 2^32 or 2^64."""
    return np.random.default_rng(count).integers(np.iinfo(dtype).max, size=count, dtype=dtype) | dtype(1)


def _grams(text: str) -> np.ndarray:
    """Return a hash of each 5-gram of a text, (characters - 4,) uint64: a polynomial of its characters modulo 2^64."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    count = len(points) - _GRAM + 1
    hashed = np.zeros(count, np.uint64)
    for offset, factor in enumerate(_odd_numbers(_GRAM, np.uint64)):
        hashed += points[offset : offset + count] * factor
    return hashed


def _signature(text: str) -> np.ndarray:
    """Return the MinHash signature of a text, the least gram per permutation: (BANDS * ROWS_PER_BAND,) uint32."""
    grams = (_grams(text) >> np.uint64(32)).astype(np.uint32)
    factors = _odd_numbers(BANDS * ROWS_PER_BAND, np.uint32)
    return (grams[:, None] * factors + factors // 3).min(axis=0)


def _band_keys(signature: np.ndarray) -> np.ndarray:
    """Return one key for the minima of each band, (BANDS,) uint64."""
    bands = signature.reshape(BANDS, ROWS_PER_BAND)
    return (bands * _odd_numbers(ROWS_PER_BAND, np.uint64)).sum(axis=1, dtype=np.uint64)


def _candidates(bands: np.ndarray) -> np.ndarray:
    """Return pairs of rows to compare, (n_pairs, 2) int64: leaders of a bucket with later rows of the bucket.

    Args:
        bands: (n_rows, BANDS) keys; rows with the same key in a column are in the same bucket.
    """
    count = len(bands)
    found = [np.zeros(0, np.int64)]
    for keys in bands.T:
        order = np.argsort(keys, kind="stable")
        starts, sizes = np.unique(keys[order], return_index=True, return_counts=True)[1:]
        start = np.repeat(starts, sizes)  # index in `order` of the first row of each row's bucket
        for leader in range(LEADERS):
            later = np.flatnonzero(np.arange(count) > start + leader)
            found.append(order[start[later] + leader] * count + order[later])
    return np.stack(np.divmod(np.unique(np.concatenate(found)), max(count, 1)), axis=1)


def _similarities(battles: Dataset, pairs: np.ndarray) -> np.ndarray:
    """Return the Jaccard index of the prompts of each pair of rows, (n_pairs,) float64."""
    found: list[float] = []
    for start in range(0, len(pairs), PAIRS_PER_BATCH):
        rows, places = np.unique(pairs[start : start + PAIRS_PER_BATCH], return_inverse=True)
        grams = [np.unique(_grams(_compared_text(prompt))) for prompt, _, _ in normalise_texts(battles.select(rows))]
        for first, second in places.reshape(-1, 2):
            shared = len(np.intersect1d(grams[first], grams[second], assume_unique=True))
            found.append(shared / (len(grams[first]) + len(grams[second]) - shared))
    return np.array(found)
