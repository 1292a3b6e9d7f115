"""The table of battles: one battle per row with fixed columns, as a validated, memory-mapped `datasets.Dataset`.

What later stages rely on: ids are unique, every prompt turn has one turn of each response, and outcomes are
probabilities that sum to 1.
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

from rewardmodel.errors import InputError, plural
from rewardmodel.files import cache_folder

OUTCOMES = ("winner_model_a", "winner_model_b", "winner_tie")
"""Outcome columns, and the column order of every (n_battles, 3) array: A wins, B wins, tie."""

TEACHER_COLUMNS = ("teacher_model_a", "teacher_model_b", "teacher_tie")
"""Columns with the probabilities predicted by a teacher model, in the order of `OUTCOMES`."""

TEXT_COLUMNS = ("prompt", "response_a", "response_b")
"""Text columns; each value is a list of turns: `["What is 2 + 2?", "And 3 + 3?"]`."""

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
"""Columns and dtypes. Outcomes are null for unlabelled battles, the teacher's probabilities where no teacher predicted
the battle. `group` (battles that must stay in one fold) and `fold` are -1 until `data.folds` assigns them."""

_COUNTERPARTS = {
    "response_a": "response_b",
    "model_a": "model_b",
    "winner_model_a": "winner_model_b",
    "teacher_model_a": "teacher_model_b",
}

_UNICODE_SCRIPTS = (
    *("Latin", "Han", "Japanese", "Hangul", "Cyrillic"),
    *("Arabic", "Devanagari", "Hebrew", "Thai", "Greek"),
)
SCRIPTS = (*_UNICODE_SCRIPTS, "other", "none")
"""Scripts that are distinguished, by Unicode name; `other` for letters of any other script, `none` without letters."""


def is_labelled(battles: Dataset) -> bool:
    """Return whether there is at least one battle and every battle has an outcome."""
    return len(battles) > 0 and not np.isnan(outcomes(battles)).any()


def outcomes(battles: Dataset) -> np.ndarray:
    """Return the outcome probabilities, (n_battles, 3) float64: A, B, tie; NaN for unlabelled battles."""
    return _stack_columns(battles, OUTCOMES)


def teacher_probabilities(battles: Dataset) -> np.ndarray:
    """Return the teacher's probabilities, (n_battles, 3) float64: A, B, tie; NaN for battles without a prediction."""
    return _stack_columns(battles, TEACHER_COLUMNS)


def _stack_columns(battles: Dataset, names: Sequence[str]) -> np.ndarray:
    columns = battles.with_format(None).select_columns(list(names))
    return np.stack([np.asarray(columns[name][:], dtype=np.float64) for name in names], axis=1)


def select_labelled(battles: Dataset) -> Dataset:
    """Return the battles that have outcomes."""
    known = ~np.isnan(outcomes(battles)).any(axis=1)
    return battles if known.all() else battles.select(np.flatnonzero(known))


def with_column(battles: Dataset, name: str, values: np.ndarray) -> Dataset:
    """Return the battles with the values of one column of `BATTLE_FEATURES` replaced; columns keep their order.

    Args:
        battles: n_battles rows.
        name: the column.
        values: (n_battles,), castable to the dtype of the column.
    """
    replaced = battles.remove_columns(name).add_column(name, values, feature=BATTLE_FEATURES[name])
    return replaced.select_columns(battles.column_names)


def weights(battles: Dataset) -> np.ndarray:
    """Return the weight of each battle in the loss, (n_battles,) float32."""
    return np.asarray(battles.with_format(None)["weight"][:], dtype=np.float32)


def swap(battles: Dataset) -> Dataset:
    """Return the battles with A and B exchanged: responses, models, outcomes and the teacher's probabilities."""
    exchanged = _COUNTERPARTS | {second: first for first, second in _COUNTERPARTS.items()}
    return battles.rename_columns(exchanged).select_columns(battles.column_names)


def swap_randomly(battles: Dataset, seed: int) -> Dataset:
    """Return the battles in the same row order, each swapped with probability 1/2; `seed` fixes which."""
    coin = np.random.default_rng(seed).random(len(battles)) < 0.5
    both = concatenate_datasets([battles, swap(battles)])
    return both.select(np.arange(len(battles)) + coin * len(battles))


AUGMENTATIONS = {
    "none": lambda battles, seed: battles,
    "random": swap_randomly,
    "both": lambda battles, seed: battles,
}
"""`data.swap_augmentation` by name: (battles, seed) -> the battles to train on. `both` changes nothing here: it makes
tokenization emit two sequences per battle."""


def validate(battles: Dataset, where: str) -> Dataset:
    """Return `battles` unchanged, or raise an error that names the first invalid row.

    Args:
        battles: rows of `BATTLE_FEATURES`.
        where: the name of the file or data set, for error messages.

    Raises:
        InputError: no rows, null texts, a duplicate id, a response with more or fewer turns than its prompt, outcomes
            or teacher's probabilities that do not sum to 1, a weight of 0 or less, or some battles without an outcome
            (and without a teacher) while others have one. Rows are counted from 1, without the header.
    """
    if not len(battles):
        raise InputError(f"{where}: no battles; give a file with at least one row under the header")
    table = battles.with_format("arrow")[:]
    _check_texts(table, where)
    _check_ids(table.column("id"), where)
    _check_turns(table, where)
    _check_outcomes(table, where)
    _check_sums(_stack(table, TEACHER_COLUMNS), TEACHER_COLUMNS, where, "predict the battles with the teacher again")
    _check_weights(table.column("weight"), where)
    return battles


def _check_texts(table: pa.Table, where: str) -> None:
    for name in ("id", *TEXT_COLUMNS):
        column = table.column(name)
        row = _first_true(pc.is_null(column))
        if row is None and name != "id":
            turn = _first_true(pc.is_null(pc.list_flatten(column)))  # counted over all rows
            row = None if turn is None else pc.list_parent_indices(column)[turn].as_py()
        if row is not None:
            raise InputError(f"{where}: row {row + 1}, column '{name}': null; give a text, which may be empty")
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
                "give every battle a unique id"
            )
        first_row[name] = row


def _check_turns(table: pa.Table, where: str) -> None:
    turns = {name: pc.list_value_length(table.column(name)) for name in TEXT_COLUMNS}
    for name in ("response_a", "response_b"):
        row = _first_true(pc.not_equal(turns["prompt"], turns[name]))
        if row is not None:
            raise InputError(
                f"{where}: row {row + 1}, column '{name}': {plural(turns[name][row].as_py(), 'turn')}, but the prompt "
                f"has {turns['prompt'][row]}; give one response turn for each prompt turn (null for an empty one)"
            )


def _check_outcomes(table: pa.Table, where: str) -> None:
    if all(table.column(name).null_count == len(table) for name in OUTCOMES):
        return
    array, teacher = (_stack(table, names) for names in (OUTCOMES, TEACHER_COLUMNS))
    teacher_only = np.isnan(array).all(axis=1) & np.isfinite(teacher).all(axis=1)  # distillation needs no outcome
    for name, values in zip(OUTCOMES, array.T, strict=True):
        bad = ~np.isfinite(values) & ~teacher_only
        if bad.any():
            raise InputError(
                f"{where}: row {bad.argmax() + 1}, column '{name}': missing, NaN or infinite; label every battle of a "
                "file, or none"
            )
    _check_sums(array, OUTCOMES, where, "mark one of them 1 and the others 0, or give shares")


def _check_sums(array: np.ndarray, names: Sequence[str], where: str, hint: str) -> None:
    """Raise unless each row of an array, (n_battles, 3), is all NaN or probabilities that sum to 1 within 1e-3."""
    good = (array >= 0).all(axis=1) & (np.abs(array.sum(axis=1) - 1) <= 1e-3)
    bad = ~(good | np.isnan(array).all(axis=1))
    if bad.any():
        row = int(bad.argmax())
        values = ", ".join(f"{value:g}" for value in array[row])
        raise InputError(
            f"{where}: row {row + 1}, columns {', '.join(names)}: {values} are not probabilities that sum to 1; {hint}"
        )


def _stack(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    return np.stack([table.column(name).to_numpy() for name in names], axis=1).astype(np.float64)


def _check_weights(weights: pa.ChunkedArray, where: str) -> None:
    usable = pc.and_(pc.is_finite(weights), pc.greater(weights, 0)).combine_chunks().fill_null(False)
    row = _first_true(pc.invert(usable))
    if row is not None:
        raise InputError(f"{where}: row {row + 1}, column 'weight': {weights[row]}; give a number above 0")


def _first_true(mask: pa.ChunkedArray | pa.Array) -> int | None:
    """Return the index of the first true value, or None."""
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
"""Values of the columns that a row may leave out."""


def build_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rows as an Arrow table of battles; every row has an id and the three texts, the rest has defaults."""
    columns = {name: [row.get(name, COLUMN_DEFAULTS.get(name)) for row in rows] for name in BATTLE_FEATURES}
    return pa.Table.from_pydict(columns, schema=BATTLE_FEATURES.arrow_schema)


def store(tables: Iterable[pa.Table], where: str) -> Dataset:
    """Write tables of battles to one Arrow file in the cache, one by one, and return it validated and memory-mapped.

    The file is named by a hash of its content, which is the data set's fingerprint too: equal battles are stored once,
    and caches that depend on them (tokens) are shared between processes.

    Args:
        tables: what `build_table` returns.
        where: the name of the file or data set, for error messages.

    Raises:
        InputError: as `validate`, or the cache folder cannot be written.
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
            f"{folder}: cannot be written ({error}); set REWARDMODEL_CACHE to a writable folder with free space"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()
    battles = Dataset.from_file(str(path))
    battles._fingerprint = digest
    return battles


def write_parquet(battles: Dataset, path: Path) -> None:
    """Write battles to a Parquet file in row groups of 5,000, so that memory stays bounded."""
    with pq.ParquetWriter(path, BATTLE_FEATURES.arrow_schema) as writer:
        for table in battles.with_format("arrow").iter(batch_size=5000):
            writer.write_table(table)


def data_fingerprint(battles: Dataset) -> str:
    """Return a hash of the battles in their order, 16 hexadecimal digits, to detect that a run's data changed.

    It covers ids, texts, models, outcomes and weights, and the teacher's probabilities if there are any; it does not
    depend on the file that the battles came from, nor on how they are grouped and split.
    """
    digest = hashlib.sha256()
    has_teacher = np.isfinite(teacher_probabilities(battles)).any()
    left_out = {"group", "fold", "source", *(() if has_teacher else TEACHER_COLUMNS)}
    columns = [name for name in BATTLE_FEATURES if name not in left_out]
    for batch in battles.with_format(None).select_columns(columns).iter(batch_size=1000):
        digest.update(json.dumps(batch, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def count_characters(column: pa.ListArray) -> np.ndarray:
    """Return the number of characters of each battle over all turns of a text column, (n_battles,) int64."""
    lengths = pc.utf8_length(column.flatten()).to_numpy()
    return np.bincount(pc.list_parent_indices(column), lengths, minlength=len(column)).astype(np.int64)


def detect_scripts(column: pa.ListArray) -> np.ndarray:
    """Return the script of most letters of each battle, (n_battles,) int64 indices into `SCRIPTS`.

    Texts with kana are Japanese, whatever the number of their Han characters.
    """
    texts = pc.binary_join(column, "\n")
    han, kana, none = (SCRIPTS.index(name) for name in ("Han", "Japanese", "none"))

    # ASCII texts need no counting: Latin if they have a letter.
    has_latin = pc.match_substring_regex(texts, "[A-Za-z]").to_numpy(zero_copy_only=False)
    script = np.where(has_latin, SCRIPTS.index("Latin"), none)

    # Letters of each script in the other texts, (n_mixed, len(SCRIPTS) - 1); the last column counts `other`.
    mixed = pc.invert(pc.string_is_ascii(texts))
    named = [r"\p{Hiragana}\p{Katakana}" if name == "Japanese" else rf"\p{{{name}}}" for name in _UNICODE_SCRIPTS]
    classes = [*(f"[{one}]" for one in named), rf"[^{''.join(named)}\P{{L}}]"]
    counts = np.stack([pc.count_substring_regex(texts.filter(mixed), one).to_numpy() for one in classes], axis=1)
    counts[:, kana] += np.where(counts[:, kana] > 0, counts[:, han], 0)
    counts[counts[:, kana] > 0, han] = 0
    script[mixed.to_numpy(zero_copy_only=False)] = np.where(counts.any(axis=1), counts.argmax(axis=1), none)
    return script
