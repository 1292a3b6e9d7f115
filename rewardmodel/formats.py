"""A raw file in, validated battles out; one reader a format, in the table at the foot.

Nothing is dropped: a row is read, or the file is refused with the row named. What had to be repaired
(null turns, broken characters) is counted and logged.
"""

import csv
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, concatenate_datasets

from rewardmodel.battles import FEATURES, OUTCOMES, TEXTS, from_columns, validate
from rewardmodel.errors import InputError, nearest

logger = logging.getLogger(__name__)

ROWS_A_CHUNK = 10_000
"""Rows that are Python objects at a time; the rest is Arrow."""

SAMPLE = {"train": "train.csv", "test": "test.csv"}
"""Files of the demonstration set inside the package, by the role that `sample` is asked for."""


def read_battles(source: str | Path | pd.DataFrame | Dataset, role: str = "train") -> Dataset:
    """Return the validated battles of a file, a data frame or a data set.

    Args:
        source: a path; `sample` for the packaged demonstration set; or a table with the competition's columns.
        role: `train` or `test`: which file `sample` means.

    Raises:
        InputError: nothing there, no known format, or a row that is no battle (the row and column are named).
    """
    if isinstance(source, Dataset):
        if source.features == FEATURES:
            return validate(source, "data set")
        if set(FEATURES) <= set(source.column_names):
            return validate(source.select_columns(list(FEATURES)).cast(FEATURES), "data set")
        return _battles(source.column_names, enumerate(source.with_format(None), start=1), "data set")
    if isinstance(source, pd.DataFrame):
        rows = (dict(zip(source.columns, values, strict=True)) for values in source.itertuples(index=False, name=None))
        return _battles(list(source.columns), enumerate(rows, start=1), "data frame")
    if str(source) == "sample":
        with resources.as_file(resources.files("rewardmodel") / "sample" / SAMPLE[role]) as path:
            return read_csv(path)
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of a battles file, or 'sample'")
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path}: no format has the ending '{path.suffix}'; known: {', '.join(READERS)}")
    return READERS[path.suffix.lower()](path)


def read_csv(path: Path) -> Dataset:
    """Return the battles of a CSV file in the competition's format: texts are JSON lists, a string a turn.

    Raises:
        InputError: as `read_battles`.
    """
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next((fields for fields in reader if any(map(str.strip, fields))), [])
            return _battles(header, _csv_rows(reader, header, path), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {_broken_byte(path)} is not UTF-8; save the file as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}; check the quotes of that row") from error


def _broken_byte(path: Path) -> int:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _csv_rows(reader: Any, header: list[str], path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, fields in enumerate((fields for fields in reader if fields), start=1):
        if len(fields) != len(header):
            raise InputError(
                f"{path}: row {number} (line {reader.line_num}): {len(fields)} fields, but the header has "
                f"{len(header)}; check commas and quotes there"
            )
        yield number, dict(zip(header, fields, strict=True))


def _battles(header: list[str], rows: Iterator[tuple[int, dict[str, Any]]], where: str) -> Dataset:
    """Return validated battles of numbered rows with the competition's columns."""
    numbers = _check_header(header, where)
    source = Path(where).stem
    repaired: Counter[str] = Counter()
    chunks, columns = [], _no_rows(numbers)
    for number, row in rows:
        for name, value in _parse_row(row, number, numbers, where, repaired).items():
            columns[name].append(value)
        if len(columns["id"]) == ROWS_A_CHUNK:
            chunks.append(from_columns(columns, source))
            columns = _no_rows(numbers)
    chunks.append(from_columns(columns, source))
    for what, count in repaired.items():
        logger.warning("%s: %d %s", where, count, what)
    return validate(concatenate_datasets(chunks), where)


def _no_rows(numbers: list[str]) -> dict[str, list]:
    return {name: [] for name in ("id", *TEXTS, "model_a", "model_b", *numbers)}


def _check_header(header: list[str], where: str) -> list[str]:
    """Return the columns of numbers: the outcomes of labelled battles, and their weights where given."""
    if not header:
        raise InputError(f"{where}: the file is empty; give one with a header and at least one battle")
    twice = [name for name, count in Counter(header).items() if count > 1 and name in FEATURES]
    if twice:
        raise InputError(f"{where}: column '{twice[0]}' is there twice; keep one of them")
    given = [name for name in OUTCOMES if name in header]
    for name in ("id", *TEXTS, *(OUTCOMES if given else ())):
        if name not in header:
            spare = [other for other in header if other not in FEATURES]
            raise InputError(
                f"{where}: column '{name}' is missing{nearest(name, spare).replace('did you mean', 'is it')}"
                f"{'' if nearest(name, spare) else ';'} columns needed: id, {', '.join(TEXTS)}, "
                f"and to train on: {', '.join(OUTCOMES)}"
            )
    return [*(OUTCOMES if given else ()), *(["weight"] if "weight" in header else ())]


def _parse_row(
    row: dict[str, Any], number: int, numbers: list[str], where: str, repaired: Counter[str]
) -> dict[str, Any]:
    def refuse(column: str, reason: str) -> InputError:
        return InputError(f"{where}: row {number}, column '{column}': {reason}")

    parsed: dict[str, Any] = {name: _text(row.get(name)) for name in ("model_a", "model_b")}
    parsed["id"] = _text(row["id"])
    if not parsed["id"]:
        raise refuse("id", "empty; give every battle an id")
    for name in TEXTS:
        parsed[name] = _parse_turns(row[name], name, refuse, repaired)
    rounds = max(1, *(len(parsed[name]) for name in TEXTS))
    for name in TEXTS:
        if not parsed[name]:
            parsed[name] = [""] * rounds
            repaired["missing texts read as empty turns"] += 1
    for name in numbers:
        value = row[name].strip() if isinstance(row[name], str) else row[name]
        mend = "give a number above 0" if name == "weight" else "give 1, 0 or a probability"
        try:
            parsed[name] = None if _is_missing(value) or value == "" else float(value)
        except (TypeError, ValueError):
            raise refuse(name, f"{_shown(value)} is no number; {mend}") from None
    return parsed


def _parse_turns(
    value: Any, column: str, refuse: Callable[[str, str], InputError], repaired: Counter[str]
) -> list[str]:
    """Return the turns of one text: a JSON list (or a list) of strings, null standing for an empty turn."""
    if _is_missing(value):
        return []
    turns = value
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            turns = json.loads(value, strict=False)
        except (ValueError, RecursionError):
            raise refuse(column, f'{_shown(value)} is not a JSON list; write a list of turns, like ["..."]') from None
    turns = [] if turns is None else turns
    if not hasattr(turns, "__iter__") or isinstance(turns, str | dict):
        raise refuse(column, f'{_shown(value)} is not a list; write a list of turns, like ["..."]')
    texts = []
    for turn in turns:
        empty = turn is None or turn is pd.NA
        if empty:
            repaired["null turns read as empty"] += 1
        elif not isinstance(turn, str):
            raise refuse(column, f"the turn {_shown(turn)} is not text; put it in quotes, or write null")
        texts.append(_valid_text("" if empty else turn, repaired))
    return texts


def _valid_text(text: str, repaired: Counter[str]) -> str:
    """Return `text` with lone surrogates, which JSON allows and UTF-8 does not, replaced or joined."""
    try:
        text.encode()
    except UnicodeEncodeError:
        repaired["turns with broken characters, replaced by �"] += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _text(value: Any) -> str:
    return "" if _is_missing(value) else str(value).strip()


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and np.isnan(value))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


READERS: dict[str, Callable[[Path], Dataset]] = {".csv": read_csv}
"""Readers by file ending: path -> validated battles."""
