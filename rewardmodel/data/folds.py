"""Assign battles to groups and folds without leakage: no prompt is in two parts of a split."""

import hashlib
import unicodedata
from collections.abc import Iterator

import numpy as np
from datasets import Dataset

from rewardmodel.battles import outcomes, with_column
from rewardmodel.errors import InputError, plural

TRAIN_ONLY, CALIBRATION_FOLD, HOLDOUT_FOLD, UNUSED = -2, -3, -4, -5
"""Values of `fold` outside 0, 1, ...: battles that only train; two parts that never train; and battles that would only
train, but share a group with one of these two parts."""

TRAIN_WITH = -10
"""`fold` is TRAIN_WITH - k for a battle that only trains and shares a group with fold k: it trains whenever k does."""

TRIVIAL_RESPONSES = 80
"""Pairs of responses with fewer characters together ("Yes." and "No.") do not put two battles into one group."""


def assign_groups(battles: Dataset) -> Dataset:
    """Return the battles with `group`: connected components over equal prompts and equal pairs of responses.

    Texts are compared after Unicode normalisation (NFKC), lower-casing and removal of white space; a pair of responses
    counts in either order. Groups are numbered by their least key, so numbers do not depend on the order of rows. Keys
    are 64-bit hashes; a collision would merge two groups, which leaks nothing.
    """
    from scipy.sparse import coo_array  # late, so that a broken file is reported sooner
    from scipy.sparse.csgraph import connected_components

    count, keys = len(battles), content_keys(battles)
    distinct, nodes = np.unique(keys, return_inverse=True)
    edges = (np.repeat(np.arange(count), 2), count + nodes.ravel())
    graph = coo_array((np.ones(2 * count, bool), edges), shape=(count + len(distinct),) * 2)
    component = connected_components(graph, directed=False)[1][:count]
    return with_column(battles, "group", _number_by_key(component, keys[:, 0]))


def content_keys(battles: Dataset) -> np.ndarray:
    """Return the keys by which battles are grouped, (n_battles, 2) uint64: a common key means the same group.

    The first is a hash of the prompt, the second of the pair of responses in either order. For a pair shorter
    than `TRIVIAL_RESPONSES`, which may be equal by chance, it is the prompt's again.
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
    """Return the battles with `fold`: whole groups, stratified by outcome and source.

    `fold` becomes 0 to `folds` - 1, or `CALIBRATION_FOLD` or `HOLDOUT_FOLD` for these shares of the battles. Battles
    that come as `TRAIN_ONLY` are never evaluated: they stay so, or become `TRAIN_WITH` - k or `UNUSED` if they share a
    group with one of the parts. The result does not depend on the order of rows.

    Args:
        battles: with `group` assigned.
        folds: number of folds, at least 2.
        seed: of the random generator.
        calibration: share of the battles to keep for calibration.
        holdout: share of the battles that is never trained on.

    Raises:
        InputError: fewer than two folds, shares that leave nothing to train on or are less than one group, or fewer
            groups than parts.
    """
    parts, shares = plan_parts(folds, calibration, holdout)
    plain = battles.with_format(None)
    groups = np.asarray(plain["group"][:])
    before = np.asarray(plain["fold"][:])
    only_trains = (before == TRAIN_ONLY) | (before == UNUSED) | (before <= TRAIN_WITH)

    # Deal the groups of battles that may be evaluated.
    evaluated = np.flatnonzero(~only_trains)
    distinct, group = np.unique(groups[evaluated], return_inverse=True)
    if len(distinct) < len(parts):
        raise InputError(
            f"data.folds: {len(parts)} parts need as many different prompts, but there are {len(distinct)}; set fewer"
        )
    part_of_group = parts[_deal_groups(group, _strata(battles, evaluated), shares, np.random.default_rng(seed))]
    for part, share in zip(parts, shares, strict=True):
        if part not in part_of_group:
            name = {CALIBRATION_FOLD: "data.calibration", HOLDOUT_FOLD: "data.holdout"}.get(int(part), "data.folds")
            raise InputError(
                f"{name}: {share:g} of {plural(len(evaluated), 'battle')} is less than one prompt; set a larger share"
            )

    # Battles that only train follow the part of their group, if it was dealt.
    nearest = np.searchsorted(distinct, groups).clip(max=len(distinct) - 1)
    was_dealt, own_part = distinct[nearest] == groups, part_of_group[nearest]
    follows = np.where(own_part >= 0, TRAIN_WITH - own_part, UNUSED)
    fold = np.where(only_trains, np.where(was_dealt, follows, TRAIN_ONLY), own_part)
    return with_column(battles, "fold", fold.astype(np.int32))


def train_mask(fold: np.ndarray, held_out: int) -> np.ndarray:
    """Return which battles train while one fold is held out, (n_battles,) bool; `fold` is their (n_battles,) column."""
    others = (fold >= 0) & (fold != held_out)
    return others | (fold == TRAIN_ONLY) | ((fold <= TRAIN_WITH) & (fold != TRAIN_WITH - held_out))


def limit_battles(battles: Dataset, count: int, seed: int = 0) -> Dataset:
    """Return a random subset of whole groups with at least `count` battles in total; rows keep their order."""
    return battles.select(draw_rows(np.asarray(battles.with_format(None)["group"][:]), count, seed))


def draw_rows(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the rows, ascending int64, of random whole groups with at least `count` rows in total.

    Of one seed, the rows of a smaller count are among those of a larger one.

    Args:
        groups: (n_rows,) integer labels.
        count: how many rows.
        seed: of the drawing.
    """
    sizes = np.bincount(groups)
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    enough = np.searchsorted(sizes[drawn].cumsum(), count) + 1
    return np.flatnonzero(np.isin(groups, drawn[:enough]))


def plan_parts(folds: int, calibration: float, holdout: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the parts that battles are dealt to, and the share of the battles of each.

    Returns:
        (n_parts,) values of `fold`, the folds first; (n_parts,) shares that sum to 1.

    Raises:
        InputError: fewer than two folds, or shares that leave nothing to train on.
    """
    if folds < 2:
        raise InputError(f"data.folds: {folds}; one fold is held out while the others train, so set at least 2")
    for name, share in (("calibration", calibration), ("holdout", holdout)):
        if not 0 <= share < 1 or calibration + holdout >= 1:
            raise InputError(f"data.{name}: {share}; give a share from 0 to 1 that leaves battles to train on")
    parts = [(fold, (1 - calibration - holdout) / folds) for fold in range(folds)]
    parts += [(part, share) for part, share in ((CALIBRATION_FOLD, calibration), (HOLDOUT_FOLD, holdout)) if share]
    return np.array([part for part, _ in parts]), np.array([share for _, share in parts])


def _strata(battles: Dataset, rows: np.ndarray) -> np.ndarray:
    """Return the stratum of each row, its (source, likeliest outcome) numbered from 0, (n_rows,) int64."""
    source = np.unique(np.asarray(battles.with_format(None)["source"][:])[rows], return_inverse=True)[1]
    return np.unique(source * 3 + outcomes(battles)[rows].argmax(axis=1), return_inverse=True)[1]


def _deal_groups(group: np.ndarray, stratum: np.ndarray, shares: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the part of each group, (n_groups,) int64, so that every part gets its share of every stratum.

    Groups of several battles are dealt first, the largest first, each to the part that lacks most of what the group
    has; groups of one battle then fill the remaining quotas exactly. (scikit-learn's StratifiedGroupKFold has no parts
    of unequal size and takes 76 s for a million battles.)

    Args:
        group: (n_battles,) int64, numbered from 0 without gaps.
        stratum: (n_battles,) int64, numbered from 0 without gaps.
        shares: (n_parts,) float64, sum 1.
        random: breaks ties.
    """
    from scipy.sparse import coo_array

    count, strata = group.max() + 1, stratum.max() + 1
    content = coo_array((np.ones(len(group)), (group, stratum)), shape=(count, strata)).tocsr()  # battles by stratum
    lacking = shares[:, None] * np.bincount(stratum, minlength=strata)  # (n_parts, n_strata) battles still to deal
    part = np.full(count, -1)
    sizes = np.bincount(group)
    order = random.permutation(count)
    order = order[np.argsort(-sizes[order], kind="stable")]

    def deal_greedily(groups: np.ndarray) -> None:
        for number in groups:
            here = slice(content.indptr[number], content.indptr[number + 1])
            columns, counts = content.indices[here], content.data[here]
            need = lacking[:, columns] @ counts + lacking.sum(axis=1) * counts.sum()
            part[number] = random.choice(np.flatnonzero(need >= need.max() - 1e-9))
            lacking[part[number], columns] -= counts

    # Groups of several battles.
    deal_greedily(order[sizes[order] > 1])

    # Groups of one battle: fill the quota of each part and stratum, then deal what rounding left over.
    single = order[sizes[order] == 1]
    stratum_of_single = content.indices[content.indptr[single]]
    for number in range(strata):
        candidates = single[stratum_of_single == number]
        wanted = lacking[:, number].clip(min=0)
        quota = np.floor(wanted * min(1, len(candidates) / max(wanted.sum(), 1))).astype(np.int64)
        part[candidates[: quota.sum()]] = np.repeat(np.arange(len(shares)), quota)
        lacking[:, number] -= quota
    deal_greedily(single[part[single] < 0])
    return part


def normalise_texts(battles: Dataset) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield (prompt, response A, response B) of each battle, normalised for comparison: UTF-8 turns joined by NUL."""
    columns = battles.with_format(None).select_columns(["prompt", "response_a", "response_b"])
    for batch in columns.iter(batch_size=1000):
        for texts in zip(*batch.values(), strict=True):
            prompt, first, second = (b"\0".join(map(_normalise, turns)) for turns in texts)
            yield prompt, first, second


def _normalise(text: str) -> bytes:
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return plain.lower().encode().translate(None, b" \t\n\r\v\f")


def hash_texts(*parts: bytes) -> int:
    """Return a 64-bit BLAKE2b hash of texts."""
    digest = hashlib.blake2b(b"\0\0".join(parts), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _number_by_key(component: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return components renumbered from 0 in the order of their least key, (n_battles,) int64."""
    least = np.full(component.max() + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, component, keys)
    return np.unique(least, return_inverse=True)[1][component]
