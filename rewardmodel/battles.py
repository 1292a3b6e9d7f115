"""The canonical table of battles: fixed columns in, a validated, memory-mapped `datasets.Dataset` out.

Every later stage may rely on it: ids are unique, turns line up, and outcomes are probabilities.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter

from rewardmodel.errors import InputError
from rewardmodel.files import cache_folder

OUTCOMES = ("winner_model_a", "winner_model_b", "winner_tie")
"""Outcome columns, and the column order of every (n_battles, 3) array: A wins, B wins, tie."""

TEACHER_COLUMNS = ("teacher_model_a", "teacher_model_b", "teacher_tie")
"""Columns of a teacher's probabilities, in the order of `OUTCOMES`."""

TEXT_COLUMNS = ("prompt", "response_a", "response_b")
"""Columns that hold lists of turns."""

BATTLE_FEATURES = Features(
    {
        "id": Value("string"),
        "prompt": List(Value("string")),
        "response_a": List(Value("string")),
        "response_b": List(Value("string")),
        "model_a": Value("string"),
        "model_b": Value("string"),
        **{name: Value("float64") for name in OUTCOMES},
        "weight": Value("float32"),
        "source": Value("string"),
        "group": Value("int64"),
        "fold": Value("int32"),
        **{name: Value("float64") for name in TEACHER_COLUMNS},
    }
)
"""One battle a row. Outcomes are null in unlabelled battles; `group` and `fold` are -1 until `folds` sets them; the
teacher's probabilities are null where no teacher predicted the battle."""

_SWAPPED = {
    "response_a": "response_b",
    "response_b": "response_a",
    "model_a": "model_b",
    "model_b": "model_a",
    "winner_model_a": "winner_model_b",
    "winner_model_b": "winner_model_a",
    "teacher_model_a": "teacher_model_b",
    "teacher_model_b": "teacher_model_a",
}

_NAMED = ("Latin", "Han", "Japanese", "Hangul", "Cyrillic", "Arabic", "Devanagari", "Hebrew", "Thai", "Greek")
SCRIPTS = (*_NAMED, "other", "none")
"""Scripts that are told apart, as Unicode names them; letters of others are `other`, and no letters are `none`."""

OUTCOME_TOLERANCE = 1e-3
"""How far from 1 the three outcomes of a battle may sum."""


def is_labelled(battles: Dataset) -> bool:
    """Return whether there are battles, and all of them have outcomes."""
    return len(battles) > 0 and not np.isnan(outcomes(battles)).any()


def outcomes(battles: Dataset) -> np.ndarray:
    """Return the outcome probabilities, (n_battles, 3) float64: A, B, tie; NaN where unlabelled."""
    return _array(battles, OUTCOMES)


def teacher_probabilities(battles: Dataset) -> np.ndarray:
    """Return a teacher's probabilities, (n_battles, 3) float64: A, B, tie; NaN where it predicted nothing."""
    return _array(battles, TEACHER_COLUMNS)


def _array(battles: Dataset, names: Sequence[str]) -> np.ndarray:
    columns = battles.with_format(None).select_columns(list(names))
    return np.stack([np.asarray(columns[name][:], dtype=np.float64) for name in names], axis=1)


def select_labelled(battles: Dataset) -> Dataset:
    """Return the battles that have outcomes."""
    known = ~np.isnan(outcomes(battles)).any(axis=1)
    return battles if known.all() else battles.select(np.flatnonzero(known))


def with_column(battles: Dataset, name: str, values: np.ndarray) -> Dataset:
    """Return the battles with other values, (n_battles,), in a column of `BATTLE_FEATURES`; the order stays."""
    replaced = battles.remove_columns(name).add_column(name, values, feature=BATTLE_FEATURES[name])
    return replaced.select_columns(battles.column_names)


def weights(battles: Dataset) -> np.ndarray:
    """Return the weight of each battle in the loss, (n_battles,) float32."""
    return np.asarray(battles.with_format(None)["weight"][:], dtype=np.float32)


def swap(battles: Dataset) -> Dataset:
    """Return the same battles with A and B exchanged: texts, models, outcomes and the teacher's; nothing else moves."""
    order = battles.column_names
    return battles.rename_columns(_SWAPPED).select_columns(order)


def swap_randomly(battles: Dataset, seed: int) -> Dataset:
    """Return the battles, in the same row order, each swapped or not by a coin thrown with `seed`."""
    coin = np.random.default_rng(seed).random(len(battles)) < 0.5
    both = concatenate_datasets([battles, swap(battles)])
    return both.select(np.arange(len(battles)) + coin * len(battles))


AUGMENTATIONS = {
    "none": lambda battles, seed: battles,
    "random": swap_randomly,
    "both": lambda battles, seed: battles,
}
"""Swap augmentations by recipe name: (battles, seed) -> the battles to train on; `both` doubles their sequences."""


def validate(battles: Dataset, where: str) -> Dataset:
    """Return `battles` unchanged if they keep the contract of the table.

    Args:
        battles: rows of `BATTLE_FEATURES`.
        where: the name of the file or data set, for messages.

    Raises:
        InputError: no rows, an id given twice, turns that do not line up, outcomes that are not probabilities summing
            to 1, or battles without outcomes or a teacher's probabilities among others. Rows are counted from 1,
            without the header.
    """
    if not len(battles):
        raise InputError(f"{where}: no battles; give a file with at least one row under the header")
    table = battles.with_format("arrow")[:]
    _check_texts(table, where)
    _check_ids(table.column("id"), where)
    _check_turns(table, where)
    _check_outcomes(table, where)
    _check_sums(_stacked(table, TEACHER_COLUMNS), TEACHER_COLUMNS, where, "predict the battles with the teacher again")
    _check_weights(table.column("weight"), where)
    return battles


def _check_texts(table: pa.Table, where: str) -> None:
    for name in ("id", *TEXT_COLUMNS):
        column = table.column(name)
        row = _first_true(pc.is_null(column))
        if row is None and name != "id":
            holes = pc.is_null(pc.list_flatten(column))
            hole = _first_true(holes)
            row = None if hole is None else pc.list_parent_indices(column)[hole].as_py()
        if row is not None:
            raise InputError(f"{where}: row {row + 1}, column '{name}': null; give a text (an empty one may stand)")
    row = _first_true(pc.equal(pc.list_value_length(table.column("prompt")), 0))
    if row is not None:
        raise InputError(f"{where}: row {row + 1}, column 'prompt': no turns; a battle needs a prompt")


def _check_ids(ids: pa.ChunkedArray, where: str) -> None:
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    first_row: dict[str, int] = {}
    for row, name in enumerate(ids.to_pylist(), start=1):
        if name in first_row:
            raise InputError(
                f"{where}: row {row}, column 'id': {name!r} was already used in row {first_row[name]}; "
                "give every battle an id of its own"
            )
        first_row[name] = row


def _check_turns(table: pa.Table, where: str) -> None:
    turns = {name: pc.list_value_length(table.column(name)) for name in TEXT_COLUMNS}
    for name in ("response_a", "response_b"):
        row = _first_true(pc.not_equal(turns["prompt"], turns[name]))
        if row is not None:
            raise InputError(
                f"{where}: row {row + 1}, column '{name}': {turns[name][row]} turns, but the prompt has "
                f"{turns['prompt'][row]}; give one response turn to each prompt turn (null for an empty one)"
            )


def _check_outcomes(table: pa.Table, where: str) -> None:
    if all(table.column(name).null_count == len(table) for name in OUTCOMES):
        return
    array, teacher = (_stacked(table, names) for names in (OUTCOMES, TEACHER_COLUMNS))
    alone = np.isnan(array).all(axis=1) & np.isfinite(teacher).all(axis=1)  # the teacher's probabilities will do
    for name, values in zip(OUTCOMES, array.T, strict=True):
        bad = ~np.isfinite(values) & ~alone
        if bad.any():
            raise InputError(
                f"{where}: row {bad.argmax() + 1}, column '{name}': no number; label every battle of a file, or none"
            )
    _check_sums(array, OUTCOMES, where, "mark one of them 1 and the others 0, or give shares")


def _check_sums(array: np.ndarray, names: Sequence[str], where: str, mend: str) -> None:
    """Raise unless the rows of an array, (n_battles, 3), are probabilities, or all NaN."""
    good = (array >= 0).all(axis=1) & (np.abs(array.sum(axis=1) - 1) <= OUTCOME_TOLERANCE)
    bad = ~(good | np.isnan(array).all(axis=1))
    if bad.any():
        row = int(bad.argmax())
        values = ", ".join(f"{value:g}" for value in array[row])
        raise InputError(
            f"{where}: row {row + 1}, columns {', '.join(names)}: {values} are not probabilities that sum to 1; {mend}"
        )


def _stacked(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    return np.stack([table.column(name).to_numpy() for name in names], axis=1).astype(np.float64)


def _check_weights(weights: pa.ChunkedArray, where: str) -> None:
    usable = pc.and_(pc.is_finite(weights), pc.greater(weights, 0)).combine_chunks().fill_null(False)
    row = _first_true(pc.invert(usable))
    if row is not None:
        raise InputError(f"{where}: row {row + 1}, column 'weight': {weights[row]}; give a number above 0")


def _first_true(mask: pa.ChunkedArray | pa.Array) -> int | None:
    row = pc.index(mask, value=True).as_py()
    return None if row < 0 else row


COLUMN_DEFAULTS: dict[str, Any] = {
    "model_a": "",
    "model_b": "",
    **dict.fromkeys([*OUTCOMES, *TEACHER_COLUMNS]),
    "weight": 1.0,
    "source": "",
    "group": -1,
    "fold": -1,
}
"""Values of the columns that a row need not have."""


def build_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return an Arrow table of battles, `COLUMN_DEFAULTS` filled in; rows have at least an id and the three texts."""
    return pa.Table.from_pylist([{**COLUMN_DEFAULTS, **row} for row in rows], schema=BATTLE_FEATURES.arrow_schema)


def store(tables: Iterable[pa.Table], where: str) -> Dataset:
    """Return validated, memory-mapped battles of Arrow tables, which are written to the cache one by one.

    The file is named by its content, and so is the data set's fingerprint: the same battles are stored once, and
    what is computed from them is found again by later processes.

    Raises:
        InputError: as `validate`, or a cache folder that cannot be written.
    """
    folder = cache_folder() / "battles"
    partial = folder / f".{uuid4().hex}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ArrowWriter(path=str(partial), features=BATTLE_FEATURES) as writer:
            for table in tables:
                writer.write_table(table)
            writer.finalize()
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
        validate(Dataset.from_file(str(partial)), where)
        path = folder / f"{digest}.arrow"
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error}); set REWARDMODEL_CACHE to a folder with room"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()
    battles = Dataset.from_file(str(path))
    battles._fingerprint = digest
    return battles


def write_parquet(battles: Dataset, path: Path) -> None:
    """Write battles as a Parquet file, some thousand rows at a time."""
    with pq.ParquetWriter(path, BATTLE_FEATURES.arrow_schema) as writer:
        for table in battles.with_format("arrow").iter(batch_size=5000):
            writer.write_table(table)


def data_fingerprint(battles: Dataset) -> str:
    """Return a digest of battles in their order, the same in whatever file they stand and however they are split.

    A teacher's probabilities are in it where there are any.
    """
    digest = hashlib.sha256()
    left_out = [
        "group",
        "fold",
        "source",
        *(() if np.isfinite(teacher_probabilities(battles)).any() else TEACHER_COLUMNS),
    ]
    columns = [name for name in BATTLE_FEATURES if name not in left_out]
    for batch in battles.with_format(None).select_columns(columns).iter(batch_size=1000):
        digest.update(json.dumps(batch, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def count_characters(column: pa.ListArray) -> np.ndarray:
    """Return the characters of all turns of each battle, (n,) int64."""
    lengths = pc.utf8_length(column.flatten()).to_numpy()
    return np.bincount(pc.list_parent_indices(column), lengths, minlength=len(column)).astype(np.int64)


def detect_scripts(column: pa.ListArray) -> np.ndarray:
    """Return where in `SCRIPTS` the script of most letters of each battle stands, (n,); kana make Han Japanese."""
    texts = pc.binary_join(column, "\n")
    han, kana, none = (SCRIPTS.index(name) for name in ("Han", "Japanese", "none"))
    latin = pc.match_substring_regex(texts, "[A-Za-z]").to_numpy(zero_copy_only=False)
    script = np.where(latin, SCRIPTS.index("Latin"), none)
    mixed = pc.invert(pc.string_is_ascii(texts))
    named = [r"\p{Hiragana}\p{Katakana}" if name == "Japanese" else rf"\p{{{name}}}" for name in _NAMED]
    classes = [*(f"[{one}]" for one in named), rf"[^{''.join(named)}\P{{L}}]"]
    counts = np.stack([pc.count_substring_regex(texts.filter(mixed), one).to_numpy() for one in classes], axis=1)
    counts[:, kana] += np.where(counts[:, kana] > 0, counts[:, han], 0)
    counts[counts[:, kana] > 0, han] = 0
    script[mixed.to_numpy(zero_copy_only=False)] = np.where(counts.any(axis=1), counts.argmax(axis=1), none)
    return script
