"""Read raw rows from a file, a hub data set or a table, a few at a time; one reader per file ending, in `READERS`.

A raw row is a mapping of column names to values; what it means is for `data.formats`.
"""

import csv
import io
import json
import lzma
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from rewardmodel.config.schema import Source
from rewardmodel.data.sources import check_source
from rewardmodel.errors import InputError

PEEKED_ROWS = 200
"""Rows that are read ahead to choose a format and to collect columns where there is no header."""


class RawRows(NamedTuple):
    """A raw table that is read once, from first row to last.

    Attributes:
        where: the name of the file, for error messages.
        columns: of the header, or of the first `PEEKED_ROWS` rows where there is none.
        rows: number and values of each row: (1, {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}).
        notes: counts of what was skipped, by description: {"blank lines, skipped": 2}.
    """

    where: str
    columns: list[str]
    rows: Iterator[tuple[int, dict[str, Any]]]
    notes: Counter[str]


class ReadRequest(NamedTuple):
    """What a reader needs besides the open file.

    Attributes:
        where: the name of the file, for its ending and for error messages.
        role: `train` or `test`, which file of an archive to read.
        wanted: columns that will be used; others may be left out where that is cheaper.
        opened: closes what the reader opens, once all rows are read.
    """

    where: str
    role: str
    wanted: Collection[str]
    opened: ExitStack


@contextmanager
def open_rows(source: Source | pd.DataFrame | Dataset, role: str, wanted: Collection[str]) -> Iterator[RawRows]:
    """Yield the raw rows of a source; its file is open only inside the context.

    Args:
        source: a path or hub id with options, a DataFrame or a Dataset.
        role: `train` or `test`: which file of `sample` or of an archive, and which split of a hub data set.
        wanted: columns that will be used; others may be missing from the rows, where leaving them out is cheaper.

    Raises:
        InputError: there is no such file or data set, no reader for it, or it is broken; also while rows are read.
    """
    if isinstance(source, pd.DataFrame):
        names = list(map(str, source.columns))
        tuples = source.itertuples(index=False, name=None)
        yield _rows((dict(zip(names, row, strict=True)) for row in tuples), "data frame", names)
    elif isinstance(source, Dataset):
        yield _read_dataset(source, "data set", wanted)
    elif source.path == "sample":
        with resources.as_file(resources.files("rewardmodel.data") / "sample" / f"{role}.csv") as path:
            yield from _open_file(path, role, wanted)
    elif os.path.isfile(source.path):
        yield from _open_file(Path(source.path), role, wanted)
    else:
        check_source(source)
        yield _read_dataset(_load_from_hub(source, role), source.path, wanted)


def _read_dataset(dataset: Dataset, where: str, wanted: Collection[str]) -> RawRows:
    names = dataset.column_names
    return _rows(dataset.with_format(None).select_columns([name for name in names if name in wanted]), where, names)


def _open_file(path: Path, role: str, wanted: Collection[str]) -> Iterator[RawRows]:
    with ExitStack() as opened:
        with _explain_failures(str(path), lambda: 0):
            file = opened.enter_context(path.open("rb"))
        yield _read_file(file, ReadRequest(str(path), role, wanted, opened))


def _load_from_hub(source: Source, role: str) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(source.path, source.subset, split=source.split or role, revision=source.revision)
    except Exception as error:  # from the hub, the network or a builder script: any type
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source.path}: no such file, and the hub gave no data set ({reason}); give the path of a file, or fix "
            "path, subset, split or revision"
        ) from error


def _read_file(file: IO[bytes], request: ReadRequest) -> RawRows:
    suffix = Path(request.where).suffix.lower()
    if suffix not in READERS:
        raise InputError(f"{request.where}: unknown file ending '{suffix}'; known: {', '.join(READERS)}")
    with _explain_failures(request.where, lambda: 0):
        return READERS[suffix](file, request)


def _read_csv(file: IO[bytes], request: ReadRequest) -> RawRows:
    where = request.where
    csv.field_size_limit(sys.maxsize)
    text = request.opened.enter_context(
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    )
    reader = csv.reader(text, strict=True)
    notes: Counter[str] = Counter()  # {"blank lines, skipped": 2}

    def lines() -> Iterator[list[str]]:
        try:
            yield from reader
        except csv.Error as error:
            raise InputError(f"{where}: line {reader.line_num}: {error}; check the quotes of that row") from error

    content = lines()
    header = next((fields for fields in content if any(map(str.strip, fields))), [])
    _check_utf8("".join(header), f"{where}: header")

    def rows() -> Iterator[dict[str, Any]]:
        number = 0
        for fields in content:
            if not fields:
                notes["blank lines, skipped"] += 1
                continue
            number += 1
            if len(fields) != len(header):
                raise InputError(
                    f"{where}: row {number} (line {reader.line_num}): {len(fields)} fields, but the header has "
                    f"{len(header)}; check commas and quotes there"
                )
            row = dict(zip(header, fields, strict=True))
            for name, field in row.items():
                _check_utf8(field, f"{where}: row {number}, column '{name}'")
            yield row

    return _rows(rows(), where, header, notes)


def _read_json_lines(file: IO[bytes], request: ReadRequest) -> RawRows:
    where = request.where
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    lines = request.opened.enter_context(text)
    notes: Counter[str] = Counter()

    def rows() -> Iterator[Any]:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                _check_utf8(line, f"{where}: line {number}")
                yield _parse_json(line, f"{where}: line {number}")
            else:
                notes["blank lines, skipped"] += 1

    return _rows(rows(), where, None, notes)


def _check_utf8(text: str, where: str) -> None:
    # surrogateescape reads a byte that is not UTF-8 as U+DC00 + byte
    broken = None if text.isascii() else re.search("[\udc80-\udcff]", text)
    if broken:
        raise InputError(f"{where}: byte {ord(broken[0]) - 0xDC00:#x} is not UTF-8; save the file as UTF-8")


def _read_json(file: IO[bytes], request: ReadRequest) -> RawRows:
    text = file.read().decode("utf-8-sig")
    if text.lstrip().startswith("{"):
        raise InputError(
            f"{request.where}: not a JSON list of objects, one per battle; if it is JSON Lines, name it .jsonl"
        )
    content = _parse_json(text, request.where)
    if not isinstance(content, list):
        raise InputError(f"{request.where}: not a JSON list; give a list of objects, one per battle")
    return _rows(content, request.where, None)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({' '.join(str(error).split())}); correct the file there") from error


def _read_parquet(file: IO[bytes], request: ReadRequest) -> RawRows:
    table = pq.ParquetFile(file)
    names = table.schema_arrow.names
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{request.where}: column '{twice[0]}' occurs twice; keep one of them")
    # 500 rows are Python objects at a time
    batches = table.iter_batches(500, columns=[name for name in names if name in request.wanted])
    return _rows((row for batch in batches for row in batch.to_pylist()), request.where, names)


def _read_zip(file: IO[bytes], request: ReadRequest) -> RawRows:
    archive = request.opened.enter_context(zipfile.ZipFile(file))
    endings = set(READERS) - {".zip"}
    names = [Path(name) for name in archive.namelist()]
    members = [name for name in names if name.suffix.lower() in endings and not name.name.startswith("._")]
    wanted = members if len(members) == 1 else [name for name in members if name.stem == request.role]
    if len(wanted) != 1:
        found = ", ".join(map(str, members[:8])) or "none has a known ending"
        raise InputError(
            f"{request.where}: not clear which file in it to read: {found}; keep one, call one of them {request.role}, "
            "or unpack the archive and give the file"
        )
    member = request.opened.enter_context(archive.open(wanted[0].as_posix()))
    return _read_file(member, request._replace(where=f"{request.where}/{wanted[0]}"))


READERS: dict[str, Callable[[IO[bytes], ReadRequest], RawRows]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".zip": _read_zip,
}
"""Readers by file ending: (open file, request) -> raw rows."""


def _rows(rows: Iterable[Any], where: str, columns: list[str] | None, notes: Counter[str] | None = None) -> RawRows:
    """Return numbered rows; columns are the header's, or without one those of the first `PEEKED_ROWS` rows."""
    numbered = _number_rows(rows, where)
    if columns is None:
        first = list(islice(numbered, PEEKED_ROWS))
        columns = list(dict.fromkeys(name for _, row in first for name in row))
        numbered = chain(first, numbered)
    return RawRows(where, columns, numbered, Counter() if notes is None else notes)


def _number_rows(rows: Iterable[Any], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with _explain_failures(where, lambda: number):
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise InputError(f"{where}: row {number}: not an object; give one JSON object per battle")
            yield number, row


_UNREADABLE = (
    *(pa.ArrowException, OSError, ValueError, OverflowError, EOFError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
"""What libraries raise for files that are broken, or use a feature that they do not support."""


@contextmanager
def _explain_failures(where: str, row: Callable[[], int]) -> Iterator[None]:
    """Turn what libraries raise for broken files into one line that names the file and the last row that was read."""
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: after row {row()}: not UTF-8; save the file as UTF-8") from error
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where}: after row {row()}: cannot be read further ({reason}); is the file complete?"
        ) from error
