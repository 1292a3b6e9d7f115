"""Battles in, leak-free groups and folds out: no prompt stands on both sides of a split."""

import hashlib
import re
import unicodedata
import warnings

import numpy as np
from datasets import Dataset, Value
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from rewardmodel.battles import outcomes
from rewardmodel.errors import InputError

TRAIN_ONLY, CALIBRATION, HOLDOUT = -2, -3, -4
"""Values of `fold` for battles that are in none: those that only train, and two parts that never train."""

TRIVIAL_RESPONSES = 80
"""A pair of responses with fewer characters together ("Yes." and "No.") does not tie two battles to each other."""

_SPACES = re.compile(r"\s+")


def assign_groups(battles: Dataset) -> Dataset:
    """Return the battles with `group`: connected components over equal prompts and equal pairs of responses.

    Texts are compared after Unicode normalisation (NFKC), lower-casing and folding of white space; a pair of
    responses counts in either order. Group numbers do not depend on the order of rows: 0 has the least key.
    """
    plain = battles.with_format(None)
    keys = [
        [_key(turns) for turns in plain["prompt"]],
        [_pair_key(*pair) for pair in zip(plain["response_a"], plain["response_b"], strict=True)],
    ]
    count = len(battles)
    nodes: dict[str, int] = {}
    edges = []
    for column in keys:
        for row, key in enumerate(column):
            if key:
                edges.append((row, count + nodes.setdefault(key, len(nodes))))
    rows, columns = np.array(edges).T
    graph = coo_array((np.ones(len(edges), bool), (rows, columns)), shape=(count + len(nodes),) * 2)
    component = connected_components(graph, directed=False)[1][:count]
    return _with_column(battles, "group", _ranked(component, keys[0]), "int64")


def assign_folds(battles: Dataset, folds: int, seed: int = 0) -> Dataset:
    """Return the battles with `fold`, 0 to folds - 1: whole groups, outcome shares alike, whatever the row order.

    Raises:
        InputError: fewer than two folds, or fewer groups than folds.
    """
    if folds < 2:
        raise InputError(f"data.folds: {folds}; one fold is held out and the others train, so set at least 2")
    groups = np.asarray(battles.with_format(None)["group"][:])
    distinct = len(np.unique(groups))
    if distinct < folds:
        raise InputError(
            f"data.folds: {folds} folds need {folds} different prompts, but there are {distinct}; use fewer"
        )
    order = np.lexsort((np.asarray(battles.with_format(None)["id"][:]), groups))
    likeliest = outcomes(battles).argmax(axis=1)
    fold = np.full(len(battles), -1)
    rare = np.bincount(likeliest, minlength=3) < folds
    strata = np.where(rare[likeliest], 3, likeliest)  # outcomes too rare for every fold share a stratum
    if np.bincount(strata).max() < folds:
        strata = np.zeros_like(strata)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        for number, (_, held_out) in enumerate(splitter.split(order, strata[order], groups[order])):
            fold[order[held_out]] = number
    return _with_column(battles, "fold", fold, "int32")


def limit(battles: Dataset, count: int, seed: int = 0) -> Dataset:
    """Return whole groups, drawn with `seed`, until there are at least `count` battles; rows keep their order."""
    groups = np.asarray(battles.with_format(None)["group"][:])
    sizes = np.bincount(groups)
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    enough = np.searchsorted(sizes[drawn].cumsum(), count) + 1
    return battles.select(np.flatnonzero(np.isin(groups, drawn[:enough])))


def _ranked(component: np.ndarray, keys: list[str]) -> np.ndarray:
    least: dict[int, str] = {}
    for label, key in zip(component.tolist(), keys, strict=True):
        least[label] = min(key, least.get(label, key))
    rank = {label: number for number, label in enumerate(sorted(least, key=least.__getitem__))}
    return np.array([rank[label] for label in component.tolist()])


def _key(turns: list[str]) -> str:
    return hashlib.blake2b(_normalise(turns).encode(), digest_size=16).hexdigest()


def _pair_key(response_a: list[str], response_b: list[str]) -> str:
    first, second = sorted((_normalise(response_a), _normalise(response_b)))
    if len(first) + len(second) < TRIVIAL_RESPONSES:
        return ""
    return "pair " + hashlib.blake2b(f"{first}\0{second}".encode(), digest_size=16).hexdigest()


def _normalise(turns: list[str]) -> str:
    return "\0".join(_SPACES.sub(" ", unicodedata.normalize("NFKC", turn)).strip().lower() for turn in turns)


def _with_column(battles: Dataset, name: str, values: np.ndarray, dtype: str) -> Dataset:
    order = battles.column_names
    replaced = battles.remove_columns(name).add_column(name, values, feature=Value(dtype))
    return replaced.select_columns(order)
