"""Read battles from files, hub data sets and tables of several formats; one parser per format, in `FORMATS`.

No row is dropped: each becomes a battle, or the file is refused with an error that names the row. What had to be
repaired (null turns, broken characters) is counted and logged.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from rewardmodel.battles import BATTLE_FEATURES, OUTCOMES, TEXT_COLUMNS, build_table, store, validate, with_column
from rewardmodel.config.schema import Source
from rewardmodel.data.folds import TRAIN_ONLY, assign_groups, limit_battles
from rewardmodel.data.raw_row import RawRow, is_json_list, shorten
from rewardmodel.data.readers import PEEKED_ROWS, READERS, RawRows, open_rows
from rewardmodel.data.tables import rows_as_table
from rewardmodel.data.teacher import with_teacher
from rewardmodel.errors import InputError, nearest

logger = logging.getLogger(__name__)

ROWS_PER_TABLE = 5_000
"""Battles that are parsed before they are written to the cache; bounds memory."""

BattleSource: TypeAlias = str | Path | Source | pd.DataFrame | Dataset
"""Where battles can be read from: a path, a hub id, a path or hub id with options, or a table."""


def read_battles(source: BattleSource | Sequence[BattleSource], role: str = "train", seed: int = 0) -> Dataset:
    """Return the validated battles of one source, or of several one after the other, memory-mapped from the cache.

    Args:
        source: a path, the id of a hub data set, `sample` for the packaged demonstration set, a `Source` with options,
            a table, a dict or a list of dicts; or a list of these, whose battles' ids get the source's name as prefix.
        role: `train` or `test`: which file of `sample` or of an archive, and which split of a hub data set.
        seed: for limits, and to choose which response is A in preference data.

    Raises:
        InputError: a source cannot be read, has no known format, or has a row that is not a battle; the message names
            file, row and column.
    """
    source = rows_as_table(source)
    if not isinstance(source, Sequence) or isinstance(source, str):
        return _read_source(source, role, seed)
    if not source:
        raise InputError("data.train: an empty list; give at least one source of battles")
    names = _distinct_names(source)
    parts = [_read_source(one, role, seed, f"{name}/") for one, name in zip(source, names, strict=True)]
    return validate(concatenate_datasets(parts), " + ".join(names))


def _distinct_names(sources: Sequence[BattleSource]) -> list[str]:
    """Return a name for each source: its file name without ending, else its path, numbered where these are equal."""
    paths = [str(_as_source(one).path) if not isinstance(one, pd.DataFrame | Dataset) else "table" for one in sources]
    stems = [_stem(path) for path in paths]
    names = stems if len(set(stems)) == len(stems) else paths
    return [f"{name}#{number}" if names.count(name) > 1 else name for number, name in enumerate(names, start=1)]


def _stem(path: str) -> str:
    return Path(path).stem if Path(path).suffix.lower() in READERS else Path(path).name


def _as_source(given: str | Path | Source) -> Source:
    return given if isinstance(given, Source) else Source(str(given))


def _read_source(given: BattleSource, role: str, seed: int, prefix: str = "") -> Dataset:
    if isinstance(given, Dataset) and given.features == BATTLE_FEATURES:
        names = np.array([prefix + name for name in given["id"]], dtype=object) if prefix else None
        return validate(given if names is None else with_column(given, "id", names), "data set")

    # Check the options before a large file is read.
    source = Source("") if isinstance(given, pd.DataFrame | Dataset) else _as_source(given)
    if not source.weight > 0:
        raise InputError(f"{source.path}: weight: {source.weight}; give a number above 0, or leave the source out")
    if source.limit is not None and source.limit < 1:
        raise InputError(f"{source.path}: limit: {source.limit}; give a positive number of battles, or leave it out")
    if source.teacher is not None and role != "train":
        raise InputError(f"{source.path}: teacher: used in training only; leave it out")

    wanted = {*KNOWN_COLUMNS, *(name for name in source.columns.values() if name)}
    with open_rows(given if isinstance(given, pd.DataFrame | Dataset) else source, role, wanted) as opened:
        raw = _rename_columns(opened, source.columns)
        reader = _Reader(raw, _find_format(raw, source.format), source, seed, prefix)
        battles = store(reader.tables(), raw.where)
    if unread := [name for name in opened.columns if name not in wanted]:
        logger.info("%s: columns that are not read: %s", raw.where, ", ".join(unread))

    if source.teacher is not None:
        battles = with_teacher(battles, Path(source.teacher), prefix)
    for what, count in sorted(raw.notes.items()):
        logger.warning("%s: %d %s", raw.where, count, what)
    return battles if source.limit is None else limit_battles(assign_groups(battles), source.limit, seed)


def _rename_columns(raw: RawRows, mapping: Mapping[str, str | None]) -> RawRows:
    """Return rows with the file's columns renamed to ours.

    Args:
        raw: rows as in the file.
        mapping: our column name -> the file's, or None to ignore a column of ours that the file has. A mapped column
            is read from the file's column of that name only.
    """
    for ours, theirs in mapping.items():
        if ours not in KNOWN_COLUMNS:
            raise InputError(
                f"{raw.where}: columns.{ours}: unknown column{nearest(ours, KNOWN_COLUMNS)}; known: "
                f"{', '.join(KNOWN_COLUMNS)}"
            )
        if theirs is not None and theirs not in raw.columns:
            raise InputError(
                f"{raw.where}: columns.{ours}: the file has no column '{theirs}'{nearest(theirs, raw.columns)}; "
                f"it has: {', '.join(raw.columns)}"
            )
    read = {*KNOWN_COLUMNS, *mapping.values()}
    twice = [name for name, count in Counter(raw.columns).items() if count > 1 and name in read]
    if twice:
        raise InputError(f"{raw.where}: column '{twice[0]}' occurs twice; keep one of them")
    if not mapping:
        return raw
    taken = {ours: theirs for ours, theirs in mapping.items() if theirs is not None}

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, values in raw.rows:
            kept = {name: value for name, value in values.items() if name not in mapping}
            yield number, kept | {ours: values.get(theirs) for ours, theirs in taken.items()}

    return raw._replace(columns=[*(name for name in raw.columns if name not in mapping), *taken], rows=rows())


def _find_format(raw: RawRows, name: str | None) -> "Format":
    """Return the format of that name, or else the one with most of its columns in the file; raise if one is missing."""
    if name is not None and name not in FORMATS:
        raise InputError(
            f"{raw.where}: format: no format '{name}'{nearest(name, FORMATS)}; known: {', '.join(FORMATS)}"
        )
    if not raw.columns:
        raise InputError(f"{raw.where}: the file is empty; give one with a header and at least one battle")
    here = set(raw.columns)
    name = name or max(FORMATS, key=lambda one: len(here & set(FORMATS[one].needs)) / len(FORMATS[one].needs))
    outcomes = [column for column in OUTCOMES if column in here]
    for column in (*FORMATS[name].needs, *(OUTCOMES if outcomes else ())):
        if column not in here:
            spare = nearest(column, here - KNOWN_COLUMNS).replace("did you mean", "is it")
            needs = "; ".join(f"{one}: {', '.join(FORMATS[one].needs)}" for one in FORMATS)
            raise InputError(
                f"{raw.where}: column '{column}' is missing{spare or ';'} the columns of each format are: {needs} (and "
                f"the outcome: {', '.join(OUTCOMES)}, or winner, or p_b); map other names with data.train.columns"
            )
    return FORMATS[name]


class _Reader:
    """Parses the raw rows of one source into Arrow tables of battles; `prefix` is put before each id."""

    def __init__(self, raw: RawRows, format: "Format", source: Source, seed: int, prefix: str) -> None:
        self.raw, self.format, self.source, self.seed, self.prefix = raw, format, source, seed, prefix
        self.columns = set(raw.columns)
        self.identifier = next((name for name in ("id", "question_id") if name in self.columns), None)
        self.name = _stem(raw.where)
        self.labelled: bool | None = None

    def tables(self) -> Iterator[pa.Table]:
        """Yield tables of `ROWS_PER_TABLE` battles, so that few rows are Python objects at a time."""
        first = list(islice(self.raw.rows, PEEKED_ROWS))

        # Texts are JSON lists of turns if most of the first ones are.
        texts = [values.get(name) for _, values in first for name in TEXT_COLUMNS]
        strings = [text for text in texts if isinstance(text, str) and text.strip()]
        self.json_texts = 2 * sum(map(is_json_list, strings)) > len(strings)
        if self.format is FORMATS["competition"] and strings and not self.json_texts:
            logger.info("%s: texts are plain strings (not JSON lists), read as one turn each", self.raw.where)
        if self.identifier is None:
            logger.info("%s: no column 'id': battles are numbered from 1", self.raw.where)

        battles = []
        for number, values in chain(first, self.raw.rows):
            if not values.keys() <= self.columns:
                self.check_late_columns(number, values)
            battles.append(
                self.battle(RawRow(self.raw.where, number, values, self.raw.notes, self.json_texts, self.seed))
            )
            if len(battles) == ROWS_PER_TABLE:
                yield build_table(battles)
                battles = []
        yield build_table(battles)

    def check_late_columns(self, number: int, values: dict[str, Any]) -> None:
        late = sorted((values.keys() - self.columns) & KNOWN_COLUMNS)
        if late:
            raise InputError(
                f"{self.raw.where}: row {number}, column '{late[0]}': none of the first {PEEKED_ROWS} rows has it; "
                "give every row the same columns, null where there is no value"
            )

    def battle(self, row: RawRow) -> dict[str, Any]:
        identifier = str(row.number) if self.identifier is None else row.read_text(self.identifier)
        if not identifier:
            raise row.error(self.identifier or "id", "empty; give every battle an id")
        weight = row.read_number("weight", "give a number above 0") if "weight" in self.columns else 1.0
        parsed = self.format.parse(row)
        labelled = parsed[OUTCOMES[0]] is not None
        if OUTCOMES[0] not in self.columns and self.labelled not in (None, labelled):
            column = "winner" if "winner" in self.columns else "p_b"
            raise row.error(column, "only some battles of the file are labelled; label all of them, or none")
        self.labelled = labelled
        return {
            **parsed,
            "id": self.prefix + identifier,
            "source": row.read_text("source") or row.read_text("subset") or self.name,
            "weight": None if weight is None else weight * self.source.weight,
            "fold": -1 if self.source.validation else TRAIN_ONLY,
        }


_WINNERS = {"model_a": 0, "a": 0, "model_b": 1, "b": 1, "tie": 2}
_WINNERS |= dict.fromkeys(("tie (bothbad)", "bothbad", "both_bad", "both bad"), 2)
"""Values of a `winner` column -> index of the outcome in `OUTCOMES`."""


def _parse_competition(row: RawRow) -> dict[str, Any]:
    """Parse columns prompt, response_a and response_b: lists of turns, their JSON, or plain texts."""
    texts = {name: row.read_turns(name) for name in TEXT_COLUMNS}
    rounds = max(1, *map(len, texts.values()))
    for name in TEXT_COLUMNS:
        if not texts[name]:
            texts[name] = [""] * rounds
            row.notes["missing texts read as empty turns"] += 1
    return {**texts, "model_a": row.read_text("model_a"), "model_b": row.read_text("model_b"), **_parse_outcome(row)}


def _parse_conversations(row: RawRow) -> dict[str, Any]:
    """Parse two whole conversations with the same user turns, in columns conversation_a and conversation_b."""
    prompt, response_a = split_turns(row.read_dialogue("conversation_a", "user"))
    other, response_b = split_turns(row.read_dialogue("conversation_b", "user"))
    if not prompt:
        raise row.error("conversation_a", "empty; give its messages")
    if prompt != other:
        raise row.error("conversation_b", "its user turns differ from those of conversation_a; give both the same")
    texts = {"prompt": prompt, "response_a": response_a, "response_b": response_b}
    return {**texts, "model_a": row.read_text("model_a"), "model_b": row.read_text("model_b"), **_parse_outcome(row)}


def _parse_preference(row: RawRow) -> dict[str, Any]:
    """Parse columns chosen and rejected; a hash of the texts and the seed decides which of them becomes A."""
    shared = [] if row.values.get("prompt") is None else row.read_dialogue("prompt", "user")
    chosen, rejected = (_conversation(row, name, shared) for name in ("chosen", "rejected"))
    (prompt, better), (other, worse) = split_turns(chosen), split_turns(rejected)
    if prompt != other:
        raise row.error("rejected", "its user turns differ from those of chosen; give both the same prompt")
    key = json.dumps([row.seed, prompt, better, worse]).encode()
    first = hashlib.blake2b(key, digest_size=1).digest()[0] % 2  # 0 or 1, whatever the order of rows
    a, b = ("chosen", "rejected") if first == 0 else ("rejected", "chosen")
    responses = {"chosen": better, "rejected": worse}
    return {
        **{"prompt": prompt, "response_a": responses[a], "response_b": responses[b]},
        **{"model_a": row.read_text(f"{a}_model"), "model_b": row.read_text(f"{b}_model")},
        **dict(zip(OUTCOMES, (1.0 - first, float(first), 0.0), strict=True)),
    }


def _conversation(row: RawRow, column: str, prompt: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return a conversation with its prompt, which may be in the prompt column, at the start of `column`, or both."""
    messages = row.read_dialogue(column, "assistant")
    if not messages:
        raise row.error(column, "empty; give the response")
    own_prompt = messages[0][0] != "assistant"
    if not prompt and not own_prompt:
        raise row.error(column, "no prompt; give a column 'prompt', or messages that begin with the user's")
    users = [[text.strip() for role, text in part if role == "user"] for part in (prompt, messages)]
    if own_prompt and users[1][: len(users[0])] == users[0]:  # the column repeats the prompt
        return [one for one in prompt if one[0] == "system" and one not in messages] + messages
    return prompt + messages


def split_turns(messages: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Return the prompt turns and the response turns of a conversation, as many of each.

    Consecutive messages of one side are joined by a blank line, and a system message is part of the prompt turn where
    it occurs. What is missing is empty: `[("assistant", "Hi"), ("user", "Who?")]` -> `(["", "Who?"], ["Hi", ""])`.
    """
    prompts: list[str] = []
    responses: list[str] = []
    after_prompt = False  # whether the message before is of the prompt's side
    for role, text in messages:
        is_prompt = role != "assistant"
        if is_prompt and after_prompt:
            prompts[-1] += f"\n\n{text}"
        elif is_prompt or not prompts:
            prompts.append(text if is_prompt else "")
            responses.append("" if is_prompt else text)
        else:
            responses[-1] = text if after_prompt else f"{responses[-1]}\n\n{text}"
        after_prompt = is_prompt
    return prompts, responses


def _parse_outcome(row: RawRow) -> dict[str, float | None]:
    """Return the outcome from p_b (a judge's P(B better)), else from winner_*, else from winner; None: not labelled."""
    values: Sequence[float | None]
    p = row.read_number("p_b")
    if p is not None:
        if not 0 <= p <= 1:
            raise row.error("p_b", f"{p:g} is not a probability; give P(B better), from 0 to 1")
        values = [1 - p, p, 0.0]
    else:
        values = [row.read_number(name) for name in OUTCOMES]
        label = row.read_text("winner") if values == [None] * 3 else ""
        if label and label.lower() not in _WINNERS:
            raise row.error("winner", f"{shorten(label)} is not an outcome; known: {', '.join(_WINNERS)}")
        values = [float(number == _WINNERS[label.lower()]) for number in range(3)] if label else values
    return dict(zip(OUTCOMES, values, strict=True))


@dataclass(frozen=True)
class Format:
    """One format of battles files.

    Attributes:
        needs: the columns that identify it.
        parse: raw row -> texts, models and outcome of a battle, by column of `BATTLE_FEATURES`.
    """

    needs: tuple[str, ...]
    parse: Callable[[RawRow], dict[str, Any]]


FORMATS = {
    "competition": Format(TEXT_COLUMNS, _parse_competition),
    "conversations": Format(("conversation_a", "conversation_b"), _parse_conversations),
    "preference": Format(("chosen", "rejected"), _parse_preference),
}
"""Formats by name: the competition's columns; the arena's dumps; preference data as of TRL and RewardBench."""

_OPTIONAL = ("id", "question_id", "model_a", "model_b", "weight", "source", "subset", "chosen_model", "rejected_model")
_NEEDED = [name for one in FORMATS.values() for name in one.needs]
KNOWN_COLUMNS = dict.fromkeys((*_OPTIONAL, *_NEEDED, *OUTCOMES, "winner", "p_b")).keys()
"""Every column that is read, in the order of error messages."""
