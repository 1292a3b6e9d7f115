"""A file, a hub data set or a table in, numbered raw rows out, a few at a time; one reader a file ending.

What a row means is for `formats`; here it is only a mapping of column names to values.
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
from rewardmodel.errors import InputError

SAMPLE_FILES = {"train": "train.csv", "test": "test.csv"}
"""Files of the demonstration set inside the package, by the role that `sample` is asked for."""

PEEKED_ROWS = 200
"""Rows that are looked at before a format is chosen."""

PARQUET_ROWS = 500
"""Rows of a Parquet file that are Python objects at a time."""


class RawRows(NamedTuple):
    """A raw table: its name for messages, its columns, its numbered rows (from 1), and counts of what was passed over.

    `rows` can be read once; `columns` are those of the header, or of the first `PEEKED_ROWS` rows where there is none.
    """

    where: str
    columns: list[str]
    rows: Iterator[tuple[int, dict[str, Any]]]
    notes: Counter[str]


class ReadRequest(NamedTuple):
    """What a reader is asked for: the file's name, its role, the columns that are wanted, what to close in the end."""

    where: str
    role: str
    wanted: Collection[str]
    opened: ExitStack


@contextmanager
def open_rows(source: Source | pd.DataFrame | Dataset, role: str, wanted: Collection[str]) -> Iterator[RawRows]:
    """Yield the raw rows of a source; a file is open only inside the context.

    Args:
        source: where they are.
        role: `train` or `test`: which file of `sample` or of an archive, and which split on the hub.
        wanted: columns that will be read; others need not be in the rows, where leaving them out is cheaper.

    Raises:
        InputError: nothing there, no reader for it, or a file that breaks off; raised while rows are read, too.
    """
    if isinstance(source, pd.DataFrame):
        names = list(map(str, source.columns))
        tuples = source.itertuples(index=False, name=None)
        yield _rows((dict(zip(names, row, strict=True)) for row in tuples), "data frame", names)
    elif isinstance(source, Dataset):
        yield _of_dataset(source, "data set", wanted)
    elif source.path == "sample":
        with resources.as_file(resources.files("rewardmodel.data") / "sample" / SAMPLE_FILES[role]) as path:
            yield from _of_file(path, role, wanted)
    elif os.path.isfile(source.path):
        yield from _of_file(Path(source.path), role, wanted)
    elif HUB_ID.fullmatch(source.path) and Path(source.path).suffix.lower() not in READERS:
        yield _of_dataset(_from_hub(source, role), source.path, wanted)
    else:
        raise InputError(f"{source.path}: no such file; give the path of a battles file, a hub id, or 'sample'")


def _of_dataset(dataset: Dataset, where: str, wanted: Collection[str]) -> RawRows:
    names = dataset.column_names
    return _rows(dataset.with_format(None).select_columns([name for name in names if name in wanted]), where, names)


def _of_file(path: Path, role: str, wanted: Collection[str]) -> Iterator[RawRows]:
    with ExitStack() as opened:
        with _failures(str(path), lambda: 0):
            file = opened.enter_context(path.open("rb"))
        yield _read(file, ReadRequest(str(path), role, wanted, opened))


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def _from_hub(source: Source, role: str) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(source.path, source.subset, split=source.split or role, revision=source.revision)
    except Exception as error:  # whatever the hub, the network or the builder script says
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source.path}: no such file, and the hub gives no data set of that name ({reason}); give the path of a "
            "file, or mend path, subset, split or revision"
        ) from error


def _read(file: IO[bytes], asked: ReadRequest) -> RawRows:
    suffix = Path(asked.where).suffix.lower()
    if suffix not in READERS:
        raise InputError(f"{asked.where}: no format has the ending '{suffix}'; known: {', '.join(READERS)}")
    with _failures(asked.where, lambda: 0):
        return READERS[suffix](file, asked)


def _read_csv(file: IO[bytes], asked: ReadRequest) -> RawRows:
    where = asked.where
    csv.field_size_limit(sys.maxsize)
    text = asked.opened.enter_context(
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    )
    reader = csv.reader(text, strict=True)
    notes: Counter[str] = Counter()

    def lines() -> Iterator[list[str]]:
        try:
            yield from reader
        except csv.Error as error:
            raise InputError(f"{where}: line {reader.line_num}: {error}; check the quotes of that row") from error

    def rows() -> Iterator[dict[str, Any]]:
        number = 0
        for fields in content:
            if not fields:
                notes["blank lines, passed over"] += 1
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

    content = lines()
    header = next((fields for fields in content if any(map(str.strip, fields))), [])
    _check_utf8("".join(header), f"{where}: header")
    return _rows(rows(), where, header, notes)


def _read_json_lines(file: IO[bytes], asked: ReadRequest) -> RawRows:
    where = asked.where
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    lines = asked.opened.enter_context(text)
    notes: Counter[str] = Counter()

    def rows() -> Iterator[Any]:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                _check_utf8(line, f"{where}: line {number}")
                yield _parsed(line, f"{where}: line {number}")
            else:
                notes["blank lines, passed over"] += 1

    return _rows(rows(), where, None, notes)


def _check_utf8(text: str, where: str) -> None:
    broken = None if text.isascii() else NOT_UTF8.search(text)
    if broken:
        raise InputError(f"{where}: byte {ord(broken[0]) - 0xDC00:#x} is not UTF-8; save the file as UTF-8")


NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of bytes that are no UTF-8."""


def _read_json(file: IO[bytes], asked: ReadRequest) -> RawRows:
    text = file.read().decode("utf-8-sig")
    if text.lstrip().startswith("{"):
        raise InputError(f"{asked.where}: not a JSON list of objects, one a battle; is it JSON Lines? Name it .jsonl")
    content = _parsed(text, asked.where)
    if not isinstance(content, list):
        raise InputError(f"{asked.where}: not a JSON list; give a list of objects, one a battle")
    return _rows(content, asked.where, None)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({' '.join(str(error).split())}); mend it there") from error


def _read_parquet(file: IO[bytes], asked: ReadRequest) -> RawRows:
    table = pq.ParquetFile(file)
    names = table.schema_arrow.names
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{asked.where}: column '{twice[0]}' occurs twice; keep one of them")
    batches = table.iter_batches(PARQUET_ROWS, columns=[name for name in names if name in asked.wanted])
    return _rows((row for batch in batches for row in batch.to_pylist()), asked.where, names)


def _read_zip(file: IO[bytes], asked: ReadRequest) -> RawRows:
    archive = asked.opened.enter_context(zipfile.ZipFile(file))
    endings = set(READERS) - {".zip"}
    names = [Path(name) for name in archive.namelist()]
    members = [name for name in names if name.suffix.lower() in endings and not name.name.startswith("._")]
    wanted = members if len(members) == 1 else [name for name in members if name.stem == asked.role]
    if len(wanted) != 1:
        raise InputError(
            f"{asked.where}: which file in it? {', '.join(map(str, members[:8])) or 'none has a known ending'}; either "
            f"there is one, or one is called {asked.role}: unpack it and give the file"
        )
    member = asked.opened.enter_context(archive.open(wanted[0].as_posix()))
    return _read(member, asked._replace(where=f"{asked.where}/{wanted[0]}"))


READERS: dict[str, Callable[[IO[bytes], ReadRequest], RawRows]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".zip": _read_zip,
}
"""Readers by file ending: (open file, what is asked for) -> raw rows."""


def _rows(rows: Iterable[Any], where: str, columns: list[str] | None, notes: Counter[str] | None = None) -> RawRows:
    """Return numbered rows; without a header, the columns are gathered from the first rows."""
    numbered = _numbered(rows, where)
    if columns is None:
        first = list(islice(numbered, PEEKED_ROWS))
        columns = list(dict.fromkeys(name for _, row in first for name in row))
        numbered = chain(first, numbered)
    return RawRows(where, columns, numbered, Counter() if notes is None else notes)


def _numbered(rows: Iterable[Any], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with _failures(where, lambda: number):
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise InputError(f"{where}: row {number}: not an object; give one JSON object a battle")
            yield number, row


UNREADABLE = (
    pa.ArrowException, OSError, ValueError, OverflowError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
)  # fmt: skip
"""What libraries raise on files that are broken or of a kind that they do not know."""


@contextmanager
def _failures(where: str, row: Callable[[], int]) -> Iterator[None]:
    """Turn what libraries raise on broken files into one line that says where."""
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: after row {row()}: not UTF-8; save the file as UTF-8") from error
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: after row {row()}: cannot be read on ({reason}); is the file whole?") from error
