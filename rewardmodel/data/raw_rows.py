"""A raw table in, numbered rows out, with what libraries raise for broken files turned into one line.

What a row means is for `data.formats`; which file the rows come from is for `data.sources`.
"""

import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple

import pyarrow as pa

from rewardmodel.errors import InputError

Note = tuple[str, str]
"""What was repaired or skipped: a noun that is counted, and words that follow it: `("null turn", "read as empty")`."""

PEEKED_ROWS = 200
"""Rows that are read ahead to choose a format and to collect columns where there is no header."""


class RawRows(NamedTuple):
    """A raw table that is read once, from first row to last.

    Attributes:
        where: the name of the file, for error messages.
        columns: of the header, or of the first `PEEKED_ROWS` rows where there is none.
        rows: number and values of each row: (1, {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}).
        notes: counts of what was skipped, by noun and words: {("blank line", "skipped"): 2}.
    """

    where: str
    columns: list[str]
    rows: Iterator[tuple[int, dict[str, Any]]]
    notes: Counter[Note]


def number_rows(
    rows: Iterable[Any], where: str, columns: list[str] | None, notes: Counter[Note] | None = None
) -> RawRows:
    """Return numbered rows; columns are the header's, or without one those of the first `PEEKED_ROWS` rows.

    Raises:
        InputError: a row that is not an object, or one that the library cannot read; also while rows are read.
    """
    numbered = _number(rows, where)
    if columns is None:
        first = list(islice(numbered, PEEKED_ROWS))
        columns = list(dict.fromkeys(name for _, row in first for name in row))
        numbered = chain(first, numbered)
    return RawRows(where, columns, numbered, Counter() if notes is None else notes)


def _number(rows: Iterable[Any], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with explain_failures(where, lambda: number):
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
def explain_failures(where: str, row: Callable[[], int]) -> Iterator[None]:
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
