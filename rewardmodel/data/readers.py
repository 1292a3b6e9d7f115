"""Read raw rows from an open file, a few at a time; one reader per file ending, in `READERS`.

Around any ending may be one that says how the file is compressed: `.csv.gz`, `.jsonl.zst`.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rewardmodel.data.raw_rows import Note, RawRows, explain_failures, number_rows
from rewardmodel.errors import InputError


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


def split_endings(name: str) -> tuple[str, str, str]:
    """Return a file's name without its endings, the ending of its content and that of its compression.

    `data/train.csv.gz` -> `("train", ".csv", ".gz")`; what is not known stays in the name: `a.b` -> `("a.b", "", "")`.
    """
    path, packed = Path(name), ""
    if path.suffix.lower() in COMPRESSIONS:
        path, packed = path.with_suffix(""), path.suffix.lower()
    if path.suffix.lower() not in READERS:
        return Path(name).name, "", ""
    return path.stem, path.suffix.lower(), packed


def read_file(file: IO[bytes], request: ReadRequest) -> RawRows:
    """Return the raw rows of an open file.

    Raises:
        InputError: no reader for its ending, or it is broken; also while rows are read.
    """
    _, ending, packed = split_endings(request.where)
    if not ending:
        path = Path(request.where)
        shown = (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()
        raise InputError(
            f"{request.where}: unknown file ending '{shown}'; known: {', '.join(READERS)}, and these compressed: "
            f"{', '.join(COMPRESSIONS)}"
        )
    with explain_failures(request.where, lambda: 0):
        if packed:
            file = request.opened.enter_context(COMPRESSIONS[packed](file))
        return READERS[ending](file, request)


def _read_csv(file: IO[bytes], request: ReadRequest, separator: str = ",") -> RawRows:
    where = request.where
    csv.field_size_limit(sys.maxsize)
    text = request.opened.enter_context(
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    )
    raw_lines, separator = _find_separator(text, separator)
    reader = csv.reader(raw_lines, delimiter=separator, strict=True)
    notes: Counter[Note] = Counter()

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
                notes["blank line", "skipped"] += 1
                continue
            number += 1
            if len(fields) != len(header):
                raise InputError(
                    f"{where}: row {number} (line {reader.line_num}): {len(fields)} fields, but the header has "
                    f"{len(header)}; check {_SEPARATORS[separator]} and quotes there"
                )
            row = dict(zip(header, fields, strict=True))
            for name, field in row.items():
                _check_utf8(field, f"{where}: row {number}, column '{name}'")
            yield row

    return number_rows(rows(), where, header, notes)


def _read_tsv(file: IO[bytes], request: ReadRequest) -> RawRows:
    return _read_csv(file, request, "\t")


_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""What can stand between the fields of a table in text; a spreadsheet writes semicolons where commas are decimal."""


def _find_separator(lines: Iterable[str], default: str) -> tuple[Iterator[str], str]:
    """Return the lines, and what separates the fields of the header: the default, or else what cuts it most often."""
    ahead, lines = _read_ahead(lines)
    header = ahead[-1:]

    def count_fields(separator: str) -> int:
        return len(next(csv.reader(header, delimiter=separator), []))

    return lines, default if count_fields(default) > 1 else max([default, *_SEPARATORS], key=count_fields)


def _read_ahead(lines: Iterable[str]) -> tuple[list[str], Iterator[str]]:
    """Return the first lines up to one that is not blank, and all lines."""
    left, ahead = iter(lines), []
    for line in left:
        ahead.append(line)
        if line.strip():
            break
    return ahead, chain(ahead, left)


def _read_json_lines(file: IO[bytes], request: ReadRequest) -> RawRows:
    where = request.where
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    text = request.opened.enter_context(text)
    notes: Counter[Note] = Counter()
    ahead, lines = _read_ahead(text)
    if ahead and ahead[-1].lstrip().startswith("["):  # a JSON list under this ending
        whole = "".join(lines)
        _check_utf8(whole, where)
        return number_rows(_parse_json(whole, where), where, None)

    def rows() -> Iterator[Any]:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                _check_utf8(line, f"{where}: line {number}")
                yield _parse_json(line, f"{where}: line {number}")
            else:
                notes["blank line", "skipped"] += 1

    return number_rows(rows(), where, None, notes)


def _check_utf8(text: str, where: str) -> None:
    # surrogateescape reads a byte that is not UTF-8 as U+DC00 + byte
    broken = None if text.isascii() else re.search("[\udc80-\udcff]", text)
    if broken:
        raise InputError(f"{where}: byte {ord(broken[0]) - 0xDC00:#x} is not UTF-8; save the file as UTF-8")


def _read_json(file: IO[bytes], request: ReadRequest) -> RawRows:
    """Read a list of objects, an object with that list under one of its keys, or JSON Lines under this ending."""
    where, content = request.where, file.read()
    text = content.decode("utf-8-sig").lstrip()
    if not text.startswith("{"):
        rows = _parse_json(text, where)
        if not isinstance(rows, list):
            raise InputError(f"{where}: not a JSON list; give a list of objects, one per battle")
        return number_rows(rows, where, None)

    # The first line is a whole object, and others follow.
    first, _, rest = text.partition("\n")
    if rest.lstrip().startswith("{") and first.rstrip().endswith("}"):
        return _read_json_lines(io.BytesIO(content), request)
    return number_rows(_rows_of_object(_parse_json(text, where), request), where, None)


def _rows_of_object(whole: dict[str, Any], request: ReadRequest) -> list[Any]:
    """Return the rows of a JSON file that is one object: `{"version": "1", "data": [{"prompt": ...}, ...]}`."""
    lists = {key: rows for key, rows in whole.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)}
    tables = {key: rows for key, rows in lists.items() if key not in request.wanted}
    if len(tables) == 1 or request.role in tables:
        return tables.get(request.role) or next(iter(tables.values()))
    if not tables and any(isinstance(value, str | list) for key, value in whole.items() if key in request.wanted):
        return [whole]  # a file of one battle
    if whole and all(isinstance(value, dict) for value in whole.values()):
        hint = "if pandas wrote it, write it with to_json(orient='records')"
    elif tables:
        hint = f"several of its keys hold lists of objects: {', '.join(lists)}; keep the one with the battles"
    else:
        hint = f"none of its keys holds such a list: {', '.join(map(str, list(whole)[:8]))}"
    raise InputError(f"{request.where}: one JSON object, not a list of objects, one per battle; {hint}")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({' '.join(str(error).split())}); correct the file there") from error


def _read_parquet(file: IO[bytes], request: ReadRequest) -> RawRows:
    # Parquet begins at the end of the file, which compressed files only reach by reading all of it
    packed = split_endings(request.where)[2]
    table = pq.ParquetFile(io.BytesIO(file.read()) if packed else file)
    names = table.schema_arrow.names
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{request.where}: column '{twice[0]}' occurs twice; keep one of them")
    # 500 rows are Python objects at a time
    batches = table.iter_batches(500, columns=[name for name in names if name in request.wanted])
    return number_rows((row for batch in batches for row in batch.to_pylist()), request.where, names)


def _read_zip(file: IO[bytes], request: ReadRequest) -> RawRows:
    archive = request.opened.enter_context(zipfile.ZipFile(file))
    names = [name for name in archive.namelist() if not Path(name).name.startswith("._")]
    members = [name for name in names if split_endings(name)[1] not in ("", ".zip")]
    wanted = members if len(members) == 1 else [name for name in members if split_endings(name)[0] == request.role]
    if len(wanted) != 1:
        found = ", ".join(members[:8]) or "none has a known ending"
        raise InputError(
            f"{request.where}: not clear which file in it to read: {found}; keep one, call one of them {request.role}, "
            "or unpack the archive and give the file"
        )
    member = request.opened.enter_context(archive.open(wanted[0]))
    return read_file(member, request._replace(where=f"{request.where}/{wanted[0]}"))


READERS: dict[str, Callable[[IO[bytes], ReadRequest], RawRows]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".zip": _read_zip,
}
"""Readers by file ending: (open file, request) -> raw rows."""


COMPRESSIONS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: io.BufferedReader(pa.CompressedInputStream(file, "zstd")),
}
"""What opens a compressed file, by the ending behind the reader's."""
