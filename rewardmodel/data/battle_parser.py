"""Raw rows of one source and their format in, Arrow tables of battles out: with ids, weights and one kind of texts.

What a row of a format means is for its parser, in `data.pairs` and `data.answers`; which format it is, for
`data.formats`.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import pyarrow as pa

from rewardmodel.battles import OUTCOMES, TEXT_COLUMNS, build_table
from rewardmodel.config.schema import Source
from rewardmodel.data.folds import TRAIN_ONLY
from rewardmodel.data.pairs import CONTEXT_COLUMNS
from rewardmodel.data.raw_row import RawRow
from rewardmodel.data.raw_rows import PEEKED_ROWS, RawRows
from rewardmodel.data.readers import split_endings
from rewardmodel.data.text_lists import looks_like_list, looks_like_turns
from rewardmodel.errors import InputError

logger = logging.getLogger(__name__)

ROWS_PER_TABLE = 5_000
"""Battles that are parsed before they are written to the cache; bounds memory."""

COMMON_COLUMNS = ("id", "question_id", "weight", "source", "subset", *CONTEXT_COLUMNS)
"""Columns that are read in every format."""


@dataclass(frozen=True)
class Format:
    """One format of battles files.

    Attributes:
        needs: the columns that identify it.
        parse: raw row -> texts, models and outcome of its battles, by column of `BATTLE_FEATURES`; `place`, if given,
            tells the battles of one row apart.
        reads: columns that it also reads, where they exist.
        tossed: whether a coin decides which response is A.
    """

    needs: tuple[str, ...]
    parse: Callable[[RawRow], list[dict[str, Any]]]
    reads: tuple[str, ...]
    tossed: bool = False


class BattleParser:
    """Parses the raw rows of one source into Arrow tables of battles; `prefix` is put before each id."""

    def __init__(self, raw: RawRows, format: Format, source: Source, seed: int, prefix: str) -> None:
        self.raw, self.format, self.source, self.seed, self.prefix = raw, format, source, seed, prefix
        self.columns = set(raw.columns)
        self.identifier = next((name for name in ("id", "question_id") if name in self.columns), None)
        self.first_rows: dict[str, int] = {}  # of each id
        self.name = split_endings(raw.where)[0]
        self.labelled: bool | None = None

    def tables(self) -> Iterator[pa.Table]:
        """Yield tables of about `ROWS_PER_TABLE` battles, so that few rows are Python objects at a time."""
        first = list(islice(self.raw.rows, PEEKED_ROWS))
        self.json_texts = _are_lists(values for _, values in first)
        if self.format.needs == TEXT_COLUMNS and self.json_texts is False:
            logger.info("%s: texts are plain strings (not JSON lists), read as one turn each", self.raw.where)
        if self.identifier is None:
            logger.info("%s: no column 'id': battles are numbered from 1", self.raw.where)
        context = [name for name in CONTEXT_COLUMNS[:2] if name in self.columns]
        if context:
            logger.info("%s: columns that become part of the prompt: %s", self.raw.where, ", ".join(context))

        battles: list[dict[str, Any]] = []
        for number, values in chain(first, self.raw.rows):
            if not values.keys() <= self.columns:
                self._check_late_columns(number, values)
            lists = self._has_lists(values)
            battles += self._battles(
                RawRow(self.raw.where, number, values, self.raw.notes, lists, self.seed, self.source)
            )
            if len(battles) >= ROWS_PER_TABLE:
                yield build_table(battles)
                battles = []
        yield build_table(battles)

    def _has_lists(self, values: dict[str, Any]) -> bool:
        """Return whether the texts of a row are lists of turns: all of them are, or those of the first rows were.

        A file may be put together from two kinds. A single response that is a list, next to a plain prompt, is text.
        """
        if self.format.needs != TEXT_COLUMNS:
            return False
        prompt, *responses = (values.get(name) for name in TEXT_COLUMNS)
        strings = [text for text in (prompt, *responses) if isinstance(text, str) and text.strip()]
        if self.json_texts:
            lists = not strings or any(text.lstrip().startswith("[") for text in strings) or not isinstance(prompt, str)
        else:
            lists = prompt in strings and len(strings) > 1 and all(map(looks_like_turns, strings))
        if lists != bool(self.json_texts) and strings:
            kinds = ("plain texts", "lists of turns")
            self.raw.notes["row", f"of {kinds[lists]} among rows of {kinds[not lists]}"] += 1
        return lists

    def _check_late_columns(self, number: int, values: dict[str, Any]) -> None:
        late = sorted((values.keys() - self.columns) & {*COMMON_COLUMNS, *self.format.needs, *self.format.reads})
        if late:
            raise InputError(
                f"{self.raw.where}: row {number}, column '{late[0]}': none of the first {PEEKED_ROWS} rows has it; "
                "give every row the same columns, null where there is no value"
            )

    def _battles(self, row: RawRow) -> list[dict[str, Any]]:
        weight = row.read_number("weight", "give a number above 0") if "weight" in self.columns else 1.0
        if weight is None or not 0 < weight < math.inf:
            raise row.error("weight", f"{weight}; give a number above 0")
        parsed, identifier = self.format.parse(row), self._read_id(row)
        labelled = parsed[0][OUTCOMES[0]] is not None
        if OUTCOMES[0] not in self.columns and self.labelled not in (None, labelled):
            column = "winner" if "winner" in self.columns else "p_b"
            raise row.error(column, "only some battles of the file are labelled; label all of them, or none")
        self.labelled = labelled
        shared = {
            "source": row.read_text("source") or row.read_text("subset") or self.name,
            "weight": weight * self.source.weight / len(parsed),
            "fold": -1 if self.source.validation else TRAIN_ONLY,
        }
        places = [battle.pop("place", "") for battle in parsed]
        ids = [self.prefix + (f"{identifier}/{place}" if place else identifier) for place in places]
        return [{**battle, **shared, "id": name} for battle, name in zip(parsed, ids, strict=True)]

    def _read_id(self, row: RawRow) -> str:
        if self.identifier is None:
            return str(row.number)
        identifier = row.read_text(self.identifier)
        if not identifier:
            raise row.error(self.identifier, "empty; give every battle an id")
        first = self.first_rows.setdefault(identifier, row.number)
        if first != row.number:
            numbered = f"let the rows be numbered with columns: {{{self.identifier}: null}}"
            hint = numbered if self.source.path else "leave out the column, so that the rows are numbered"
            raise row.error(
                self.identifier,
                f"{identifier!r} was already used in row {first}; give every battle a unique id, or {hint}",
            )
        return identifier


def _are_lists(rows: Iterable[dict[str, Any]]) -> bool | None:
    """Return whether most texts of some rows are lists of turns; None: none of them is a string."""
    texts = [values.get(name) for values in rows for name in TEXT_COLUMNS]
    strings = [text for text in texts if isinstance(text, str) and text.strip()]
    return 2 * sum(map(looks_like_list, strings)) > len(strings) if strings else None
