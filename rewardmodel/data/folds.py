"""Battles in, leak-free groups and folds out: no prompt stands on both sides of a split."""

import hashlib
import unicodedata
from collections.abc import Iterator

import numpy as np
from datasets import Dataset
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rewardmodel.battles import outcomes, with_column
from rewardmodel.errors import InputError

TRAIN_ONLY, CALIBRATION_FOLD, HOLDOUT_FOLD, UNUSED = -2, -3, -4, -5
"""Values of `fold` for battles that are in none: those that only train, two parts that never train, and battles that
only train but share a group with one of these."""

TRAIN_WITH = -10
"""`fold` is TRAIN_WITH - k where a battle that only trains shares a group with fold k: it trains while k does."""

TRIVIAL_RESPONSES = 80
"""A pair of responses with fewer letters together ("Yes." and "No.") does not tie two battles to each other."""


def assign_groups(battles: Dataset) -> Dataset:
    """Return the battles with `group`: connected components over equal prompts and equal pairs of responses.

    Texts are compared after Unicode normalisation (NFKC), lower-casing and removal of white space; a pair of
    responses counts in either order. Group numbers do not depend on the order of rows: 0 has the least key.
    Keys are 64-bit hashes: two texts with the same one would share a group, which leaks nothing.
    """
    count, keys = len(battles), content_keys(battles)
    distinct, nodes = np.unique(keys, return_inverse=True)
    edges = (np.repeat(np.arange(count), 2), count + nodes.ravel())
    graph = coo_array((np.ones(2 * count, bool), edges), shape=(count + len(distinct),) * 2)
    component = connected_components(graph, directed=False)[1][:count]
    return with_column(battles, "group", _ranked(component, keys[:, 0]))


def content_keys(battles: Dataset) -> np.ndarray:
    """Return what ties battles to one another, (n_battles, 2) uint64: battles with a key in common share a group.

    The keys are of the prompt, and of the pair of responses; a trivial pair's is the prompt's again.
    """
    keys = np.empty((len(battles), 2), np.uint64)
    for row, (prompt, first, second) in enumerate(normalise_texts(battles)):
        keys[row] = hash_texts(b"prompt", prompt)
        if len(first) + len(second) >= TRIVIAL_RESPONSES:
            keys[row, 1] = hash_texts(b"pair", min(first, second), max(first, second))
    return keys


def assign_folds(
    battles: Dataset, folds: int, seed: int = 0, calibration: float = 0.0, holdout: float = 0.0
) -> Dataset:
    """Return the battles with `fold`: whole groups, outcomes and sources alike, whatever the row order.

    `fold` is 0 to folds - 1, or `CALIBRATION_FOLD` or `HOLDOUT_FOLD` for the shares that are asked for. Battles that
    came as `TRAIN_ONLY` are never judged: they stay so, or become `TRAIN_WITH` - k or `UNUSED` with the group that
    they share.

    Raises:
        InputError: fewer than two folds, shares that leave nothing to train on or are less than a group, or fewer
            groups than parts.
    """
    parts, shares = plan_parts(folds, calibration, holdout)
    plain = battles.with_format(None)
    groups = np.asarray(plain["group"][:])
    before = np.asarray(plain["fold"][:])
    only_trains = (before == TRAIN_ONLY) | (before == UNUSED) | (before <= TRAIN_WITH)
    judged = np.flatnonzero(~only_trains)
    distinct, group = np.unique(groups[judged], return_inverse=True)
    if len(distinct) < len(parts):
        raise InputError(
            f"data.folds: {len(parts)} parts need as many different prompts, but there are {len(distinct)}; use fewer"
        )
    part_of_group = parts[_deal(group, _strata(battles, judged), shares, np.random.default_rng(seed))]
    for part, share in zip(parts, shares, strict=True):
        if part not in part_of_group:
            name = {CALIBRATION_FOLD: "data.calibration", HOLDOUT_FOLD: "data.holdout"}.get(int(part), "data.folds")
            raise InputError(f"{name}: {share:g} of {len(judged)} battles is less than a prompt; ask for more")
    place = np.searchsorted(distinct, groups).clip(max=len(distinct) - 1)
    there = part_of_group[place]
    shared = np.where(there >= 0, TRAIN_WITH - there, UNUSED)
    fold = np.where(only_trains, np.where(distinct[place] == groups, shared, TRAIN_ONLY), there)
    return with_column(battles, "fold", fold.astype(np.int32))


def train_mask(fold: np.ndarray, held_out: int) -> np.ndarray:
    """Return which battles, by their `fold`, train while one fold is held out, (n_battles,) bool."""
    others = (fold >= 0) & (fold != held_out)
    return others | (fold == TRAIN_ONLY) | ((fold <= TRAIN_WITH) & (fold != TRAIN_WITH - held_out))


def limit_battles(battles: Dataset, count: int, seed: int = 0) -> Dataset:
    """Return whole groups, drawn with `seed`, until there are at least `count` battles; rows keep their order."""
    groups = np.asarray(battles.with_format(None)["group"][:])
    sizes = np.bincount(groups)
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    enough = np.searchsorted(sizes[drawn].cumsum(), count) + 1
    return battles.select(np.flatnonzero(np.isin(groups, drawn[:enough])))


def plan_parts(folds: int, calibration: float, holdout: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of `fold` that are dealt, the folds first, and the share of the battles that each should have.

    Raises:
        InputError: fewer than two folds, or shares that leave nothing to train on.
    """
    if folds < 2:
        raise InputError(f"data.folds: {folds}; one fold is held out and the others train, so set at least 2")
    for name, share in (("calibration", calibration), ("holdout", holdout)):
        if not 0 <= share < 1 or calibration + holdout >= 1:
            raise InputError(f"data.{name}: {share}; give a share from 0 to 1 that leaves battles to train on")
    kept = [(part, share) for part, share in ((CALIBRATION_FOLD, calibration), (HOLDOUT_FOLD, holdout)) if share]
    dealt = [(fold, (1 - calibration - holdout) / folds) for fold in range(folds)] + kept
    return np.array([part for part, _ in dealt]), np.array([share for _, share in dealt])


def _strata(battles: Dataset, rows: np.ndarray) -> np.ndarray:
    """Return for each row the number of its (source, likeliest outcome), (n_rows,) int64."""
    source = np.unique(np.asarray(battles.with_format(None)["source"][:])[rows], return_inverse=True)[1]
    return np.unique(source * 3 + outcomes(battles)[rows].argmax(axis=1), return_inverse=True)[1]


def _deal(group: np.ndarray, stratum: np.ndarray, shares: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the part of each group so that every part has its share of every stratum.

    Groups of several battles go first, the largest first, each to the part that lacks most of what it brings; then
    the battles that are alone, which fill what is lacking exactly. scikit-learn's StratifiedGroupKFold knows no parts
    of unequal size and takes 76 s for a million battles.

    Args:
        group: (n_battles,) int64, from 0 without gaps.
        stratum: (n_battles,) int64, from 0 without gaps.
        shares: (n_parts,) float64, sum 1.
        random: breaks ties.
    """
    count, strata = group.max() + 1, stratum.max() + 1
    content = coo_array((np.ones(len(group)), (group, stratum)), shape=(count, strata)).tocsr()
    lacking = shares[:, None] * np.bincount(stratum, minlength=strata)
    part = np.full(count, -1)
    sizes = np.bincount(group)
    order = random.permutation(count)
    order = order[np.argsort(-sizes[order], kind="stable")]

    def greedily(groups: np.ndarray) -> None:
        for number in groups:
            here = slice(content.indptr[number], content.indptr[number + 1])
            columns, brought = content.indices[here], content.data[here]
            need = lacking[:, columns] @ brought + lacking.sum(axis=1) * brought.sum()
            part[number] = random.choice(np.flatnonzero(need >= need.max() - 1e-9))
            lacking[part[number], columns] -= brought

    greedily(order[sizes[order] > 1])
    alone = order[sizes[order] == 1]
    stratum_alone = content.indices[content.indptr[alone]]
    for number in range(strata):
        here = alone[stratum_alone == number]
        wanted = lacking[:, number].clip(min=0)
        quota = np.floor(wanted * min(1, len(here) / max(wanted.sum(), 1))).astype(np.int64)
        part[here[: quota.sum()]] = np.repeat(np.arange(len(shares)), quota)
        lacking[:, number] -= quota
    greedily(alone[part[alone] < 0])
    return part


def normalise_texts(battles: Dataset) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield prompt and both responses of each battle as they are compared: normalised turns in UTF-8, joined by NUL."""
    columns = battles.with_format(None).select_columns(["prompt", "response_a", "response_b"])
    for batch in columns.iter(batch_size=1000):
        for texts in zip(*batch.values(), strict=True):
            prompt, first, second = (b"\0".join(map(_normalise, turns)) for turns in texts)
            yield prompt, first, second


def _normalise(text: str) -> bytes:
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return plain.lower().encode().translate(None, b" \t\n\r\v\f")


def hash_texts(*parts: bytes) -> int:
    """Return a 64-bit hash of texts."""
    digest = hashlib.blake2b(b"\0\0".join(parts), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _ranked(component: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return group numbers from 0, in the order of the least key of each component."""
    least = np.full(component.max() + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, component, keys)
    return np.unique(least, return_inverse=True)[1][component]
