"""Read battles from files, hub data sets and tables of several formats; one parser per format, in `FORMATS`.

No row is dropped: each becomes a battle, or several where it has several answers, or the file is refused with an error
that names the row. What had to be repaired (null turns, broken characters) is counted and logged, and so are columns
that are not read.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, concatenate_datasets

from rewardmodel.battles import BATTLE_FEATURES, OUTCOMES, TEXT_COLUMNS, store, validate, with_column
from rewardmodel.config.schema import Source
from rewardmodel.data.answers import CHOICE_COLUMNS, PAIRS, parse_answers, parse_choices
from rewardmodel.data.battle_parser import COMMON_COLUMNS, BattleParser, Format
from rewardmodel.data.folds import assign_groups, limit_battles
from rewardmodel.data.outcomes import OUTCOME_COLUMNS, check_outcomes
from rewardmodel.data.pairs import CONTEXT_COLUMNS, parse_competition, parse_conversations
from rewardmodel.data.raw_rows import RawRows
from rewardmodel.data.readers import split_endings
from rewardmodel.data.sources import open_rows
from rewardmodel.data.tables import rows_as_table
from rewardmodel.data.teacher import with_teacher
from rewardmodel.errors import InputError, nearest, plural

logger = logging.getLogger(__name__)

BattleSource: TypeAlias = str | Path | Source | pd.DataFrame | Dataset
"""Where battles can be read from: a path, a hub id, a path or hub id with options, or a table."""


class SourceReport(NamedTuple):
    """How one source was read.

    Attributes:
        where: its path, hub id or kind.
        tossed: whether a coin decided which response is A, because its format does not say.
        unread: the file's columns that are not read.
    """

    where: str
    tossed: bool
    unread: list[str]


def read_battles(
    source: BattleSource | Sequence[BattleSource],
    role: str = "train",
    seed: int = 0,
    reports: list[SourceReport] | None = None,
) -> Dataset:
    """Return the validated battles of one source, or of several one after the other, memory-mapped from the cache.

    Args:
        source: a path, the id of a hub data set, `sample` for the packaged demonstration set, a `Source` with options,
            a table, a dict (of a battle, or of columns) or a list of dicts; or a list of these, whose battles' ids get
            the source's name as prefix.
        role: `train` or `test`: which file of `sample`, of an archive or of a folder, and which split of a data set.
        seed: for limits, and to choose which response is A in preference data.
        reports: gets a report of each source that is read.

    Raises:
        InputError: a source cannot be read, has no known format, or has a row that is not a battle; the message names
            file, row and column.
    """
    source, reports = rows_as_table(source), [] if reports is None else reports
    if not isinstance(source, Sequence) or isinstance(source, str):
        return _read_source(source, role, seed, reports)
    if not source:
        raise InputError("data.train: an empty list; give at least one source of battles")
    names = _distinct_names(source)
    parts = [_read_source(one, role, seed, reports, f"{name}/") for one, name in zip(source, names, strict=True)]
    return validate(concatenate_datasets(parts), " + ".join(names))


def _distinct_names(sources: Sequence[BattleSource]) -> list[str]:
    """Return a name for each source: its file name without ending, else its path, numbered where these are equal."""
    paths = [str(_as_source(one).path) if not isinstance(one, pd.DataFrame | Dataset) else "table" for one in sources]
    stems = [split_endings(path)[0] for path in paths]
    names = stems if len(set(stems)) == len(stems) else paths
    return [f"{name}#{number}" if names.count(name) > 1 else name for number, name in enumerate(names, start=1)]


def _as_source(given: Any) -> Source:
    if isinstance(given, Source):
        return given
    if isinstance(given, str | Path):
        return Source(str(given))
    if isinstance(given, DatasetDict):
        raise InputError(f"battles: a DatasetDict of {', '.join(given)}; give one split, like battles['train']")
    raise InputError(
        f"battles: of type {type(given).__name__}; give a path, a Source, a pandas DataFrame, a datasets.Dataset, or a "
        "list of these; or rows as a list of dicts"
    )


def _read_source(given: BattleSource, role: str, seed: int, reports: list[SourceReport], prefix: str = "") -> Dataset:
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
    if source.score_scale is not None and not source.score_scale > 0:
        raise InputError(f"{source.path}: score_scale: {source.score_scale}; give a number above 0, or leave it out")
    if source.pairs not in PAIRS:
        raise InputError(
            f"{source.path}: pairs: {source.pairs}{nearest(source.pairs, PAIRS)}; known: {', '.join(PAIRS)}"
        )

    wanted = {*KNOWN_COLUMNS, *(name for name in source.columns.values() if name)}
    with open_rows(given if isinstance(given, pd.DataFrame | Dataset) else source, role, wanted) as opened:
        raw = _rename_columns(opened, source.columns)
        name = _find_format(raw, source.format, role if source.path else None)
        format = FORMATS[name]
        check_outcomes(source, raw.where, set(raw.columns))
        if source.score_scale is not None and not _has_scores(format, set(raw.columns)):
            raise InputError(f"{raw.where}: score_scale: the format {name} has no scores here; leave it out")
        parser = BattleParser(raw, format, source, seed, prefix)
        report = SourceReport(raw.where, format.tossed, _unread_columns(opened.columns, format, source.columns))
        battles = store(parser.tables(), raw.where)
    reports.append(report)
    if report.unread:
        logger.info("%s: columns that are not read: %s", raw.where, ", ".join(report.unread))

    if source.teacher is not None:
        battles = with_teacher(battles, Path(source.teacher), prefix)
    for (noun, words), count in sorted(raw.notes.items()):
        logger.warning("%s: %s %s", raw.where, plural(count, noun), words)
    return battles if source.limit is None else limit_battles(assign_groups(battles), source.limit, seed)


def _has_scores(format: Format, columns: set[str]) -> bool:
    """Return whether rows of a format with these columns may say how much better one response is."""
    return format.reads is _GRADES or (format.reads is _CHOICES and {"score_chosen", "score_rejected"} <= columns)


def _rename_columns(raw: RawRows, mapping: Mapping[str, str | None]) -> RawRows:
    """Return rows with the file's columns renamed to ours.

    Args:
        raw: rows as in the file.
        mapping: our column name -> the file's, or None to ignore a column of ours that the file has. A mapped column
            is read from the file's column of that name only. What is named `history` and mapped to the prompt is not
            the history too.
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
    gone = {*mapping, *({*mapping.values()} & {*CONTEXT_COLUMNS})}

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, values in raw.rows:
            kept = {name: value for name, value in values.items() if name not in gone}
            yield number, kept | {ours: values.get(theirs) for ours, theirs in taken.items()}

    return raw._replace(columns=[*(name for name in raw.columns if name not in gone), *taken], rows=rows())


def _unread_columns(columns: Sequence[str], format: Format, mapping: Mapping[str, str | None]) -> list[str]:
    """Return the file's columns that are neither read nor ignored by name; `input` belongs to an instruction."""
    reads = {*COMMON_COLUMNS, *format.needs, *format.reads}
    reads -= set() if mapping.get("prompt") == "instruction" else {"input"}
    used = {*mapping.values(), *(name for name in reads if name not in mapping)}
    return [name for name in columns if name not in used and mapping.get(name, "") is not None]


def _find_format(raw: RawRows, name: str | None, role: str | None) -> str:
    """Return the format of that name, or else the one whose columns the file has; raise if one is missing.

    Args:
        raw: the rows.
        name: of a format; None: by the columns.
        role: of the file in a recipe; None: the rows are of a table in Python.
    """
    if name is not None and name not in FORMATS:
        raise InputError(
            f"{raw.where}: format: no format '{name}'{nearest(name, FORMATS)}; known: {', '.join(FORMATS)}"
        )
    if not raw.columns:
        raise InputError(f"{raw.where}: the file is empty; give one with a header and at least one battle")
    here = set(raw.columns)
    complete = [one for one in FORMATS if here.issuperset(FORMATS[one].needs)]
    shares = {one: len(here & ({*format.needs} - {"prompt"})) / len(format.needs) for one, format in FORMATS.items()}
    single = next((column for column in ("response", "completion", "answer", "output") if column in here), None)
    if name is None and not complete and single and not any(shares.values()):
        raise InputError(
            f"{raw.where}: one response a row, in column '{single}', and no second one to compare it with; put two "
            "responses of a prompt into one row, or all into a list: answers, with a rank or score each"
        )
    name = name or (complete[0] if complete else max(FORMATS, key=lambda one: shares[one]))
    outcomes = [column for column in OUTCOMES if column in here]
    for column in (*FORMATS[name].needs, *(OUTCOMES if outcomes else ())):
        if column not in here:
            spare = nearest(column, here - KNOWN_COLUMNS).replace("did you mean", "is it")
            needs = "; ".join(f"{one}: {', '.join(FORMATS[one].needs)}" for one in FORMATS)
            raise InputError(
                f"{raw.where}: column '{column}' is missing{spare}; the columns of each format are: {needs} (and "
                f"the outcome: {', '.join(OUTCOMES)}, or winner, or p_b); {_explain_renaming(role)}"
            )
    return name


def _explain_renaming(role: str | None) -> str:
    """Return how a column of another name is read: as the recipe, or the Python program, that gave it can say it."""
    python = "in Python with Source(path, columns={…})"
    return f"rename it, or map it with data.{role}.columns in a recipe, {python}" if role else "rename it in the table"


_VOTES = ("model_a", "model_b", *OUTCOME_COLUMNS)
_CHOICES = ("prompt", "chosen_model", "rejected_model", "score_chosen", "score_rejected", *CHOICE_COLUMNS)
_GRADES = ("ranks", "scores")


def _answers(prompt: str, answers: str) -> Format:
    return Format((prompt, answers), partial(parse_answers, prompt=prompt, column=answers), _GRADES, tossed=True)


FORMATS = {
    "competition": Format(TEXT_COLUMNS, parse_competition, _VOTES),
    "conversations": Format(("conversation_a", "conversation_b"), parse_conversations, (*_VOTES, "turn")),
    "preference": Format(("chosen", "rejected"), parse_choices, _CHOICES, tossed=True),
    "answers": _answers("prompt", "answers"),
    "responses": _answers("prompt", "responses"),
    "completions": _answers("prompt", "completions"),
    "ultrafeedback": _answers("instruction", "completions"),
    "nemo": _answers("context", "completions"),
}
"""Formats by name: the competition's columns; the arena's dumps; preference data as of TRL and RewardBench; several
ranked or scored answers to a prompt, as of Nectar, UltraFeedback and NeMo."""

KNOWN_COLUMNS = dict.fromkeys(
    (*COMMON_COLUMNS, *(name for one in FORMATS.values() for name in (*one.needs, *one.reads)))
).keys()
"""Every column that is read, in the order of error messages."""
