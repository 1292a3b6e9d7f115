"""A benchmark's file or hub data set in, its questions out, checked row by row: one prompt, responses, which are right.

Each published benchmark has a parser of its rows here; `benchmarks.table` says which is whose. Needs no torch.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rewardmodel.config.schema import Source
from rewardmodel.data.raw_row import RawRow, shorten
from rewardmodel.data.raw_rows import RawRows
from rewardmodel.data.sources import open_rows
from rewardmodel.errors import InputError, nearest

TIES = "Ties"
"""The subset of RewardBench 2 whose questions have several right answers."""

RM_BENCH_STYLES = ("concise", "detailed", "markdown")
"""Styles of RM-Bench's three chosen and three rejected responses, in their order."""


class Question(NamedTuple):
    """One row of a benchmark.

    Attributes:
        row: its number in the file, from 1.
        id: as in the file; its number where there is none.
        subset: what it counts towards.
        prompt: a text.
        responses: n texts, two or more.
        correct: (n,) bool, which of them are right; of a pair exactly one is.
        group: questions of one group are resampled together: they have the same prompt, or belong together.
    """

    row: int
    id: str
    subset: str
    prompt: str
    responses: list[str]
    correct: np.ndarray
    group: str


class QuestionParts(NamedTuple):
    """What a parser takes from a row: the fields of `Question` that benchmarks write differently."""

    prompt: str
    responses: list[str]
    correct: list[bool]
    subset: str


def read_questions(
    sources: Sequence[Source],
    columns: Sequence[str],
    parse: Callable[[RawRow], QuestionParts],
    optional: Sequence[str] = (),
) -> list[Question]:
    """Return the questions of a benchmark, in the order of its rows.

    Args:
        sources: a file, or one hub data set for each of its splits.
        columns: that the benchmark has.
        parse: raw row -> parts of the question.
        optional: columns that are read where they exist.

    Raises:
        InputError: a source cannot be read, lacks a column, or has a row that is not a question; file, row and column
            are named.
    """
    questions = [one for source in sources for one in _read_source(source, columns, parse, optional)]
    if not questions:
        raise InputError(f"{sources[0].path}: the file is empty; give one with at least one row")
    _check_ties(questions, sources[0].path)
    return questions


def _read_source(
    source: Source, columns: Sequence[str], parse: Callable[[RawRow], QuestionParts], optional: Sequence[str]
) -> Iterable[Question]:
    with open_rows(source, "test", {*columns, *optional, "subset"}) as raw:
        _check_columns(raw, columns)
        # the splits of a hub data set are its subsets where it has no column for these
        split = {"subset": source.split} if source.split and "subset" not in raw.columns else {}
        for number, values in raw.rows:
            row = RawRow(raw.where, number, values | split, raw.notes, json_texts=False, seed=0)
            parts = parse(row)
            name = next((row.read_text(column) for column in optional if row.read_text(column)), str(number))
            group = f"{TIES} {_tied_number(row, name)}" if parts.subset == TIES else parts.prompt.strip()
            yield Question(
                number, name, parts.subset, parts.prompt, parts.responses, np.array(parts.correct, bool), group
            )


def _check_columns(raw: RawRows, columns: Sequence[str]) -> None:
    for column in columns if raw.columns else ():
        if column not in raw.columns:
            raise InputError(
                f"{raw.where}: column '{column}' is missing{nearest(column, raw.columns)}; this benchmark has: "
                f"{', '.join(columns)}"
            )


def parse_best_of_n(row: RawRow, subsets: Sequence[str]) -> QuestionParts:
    """Parse RewardBench 2: lists chosen and rejected, their numbers in num_correct and total_completions."""
    chosen, rejected = (_read_texts(row, column) for column in ("chosen", "rejected"))
    counts = {"num_correct": len(chosen), "total_completions": len(chosen) + len(rejected)}
    for column, found in counts.items():
        said = row.read_number(column, "give the number of responses")
        if said is not None and said != found:
            lists = "chosen has" if column == "num_correct" else "chosen and rejected have"
            raise row.error(column, f"{said:g}, but {lists} {found} responses; correct the number or the lists")
    subset = _read_subset(row, "subset", subsets)
    if subset == TIES and row.read_text("id").startswith("tied:") and len(chosen) < 2:
        raise row.error("chosen", "one response; a question with tied answers has two or more right ones")
    correct = [True] * len(chosen) + [False] * len(rejected)
    return QuestionParts(_read_prompt(row, "prompt"), chosen + rejected, correct, subset)


def parse_pair(row: RawRow, subsets: Sequence[str]) -> QuestionParts:
    """Parse RewardBench: texts chosen and rejected."""
    responses = [_read_response(row, column) for column in ("chosen", "rejected")]
    return QuestionParts(_read_prompt(row, "prompt"), responses, [True, False], _read_subset(row, "subset", subsets))


def parse_styles(row: RawRow, domains: Sequence[str]) -> QuestionParts:
    """Parse RM-Bench: three chosen and three rejected responses, by style; `safety-refuse` and others by their kind."""
    chosen, rejected = (_read_texts(row, column) for column in ("chosen", "rejected"))
    for column, texts in (("chosen", chosen), ("rejected", rejected)):
        if len(texts) != len(RM_BENCH_STYLES):
            raise row.error(column, f"{len(texts)} responses; give three: {', '.join(RM_BENCH_STYLES)}")
    domain = row.read_text("domain").partition("-")[0]
    if domain not in domains:
        _read_subset(row, "domain", domains)
    return QuestionParts(_read_prompt(row, "prompt"), chosen + rejected, [True] * 3 + [False] * 3, domain)


def parse_judgement(row: RawRow, sources: dict[str, str]) -> QuestionParts:
    """Parse JudgeBench: response_A, response_B and a label, `A>B` or `B>A`; `mmlu-pro-law` counts as `mmlu-pro`."""
    label = row.read_text("label")
    if label not in ("A>B", "B>A"):
        raise row.error("label", f"{shorten(label)} is neither 'A>B' nor 'B>A'; correct it, or leave the row out")
    name = row.read_text("source")
    found = [category for start, category in sources.items() if name == start or name.startswith(f"{start}-")]
    if not found:
        raise row.error("source", f"{shorten(name)} is unknown; known: {', '.join(sources)}")
    responses = [_read_response(row, column) for column in ("response_A", "response_B")]
    return QuestionParts(_read_prompt(row, "question"), responses, [label == "A>B", label == "B>A"], found[0])


def parse_instruction(row: RawRow, subsets: Sequence[str]) -> QuestionParts:
    """Parse LLMBar: output_1, output_2 and a label, 1 or 2; without a subset it counts towards the whole only."""
    label = row.read_number("label", "give 1 or 2")
    if label not in (1, 2):
        raise row.error("label", f"{shorten(row.values.get('label'))} is neither 1 nor 2; correct it")
    responses = [_read_response(row, column) for column in ("output_1", "output_2")]
    subset = _read_subset(row, "subset", subsets) if row.read_text("subset") else ""
    return QuestionParts(_read_prompt(row, "input"), responses, [label == 1, label == 2], subset)


def _read_response(row: RawRow, column: str) -> str:
    """Return a text, which may be empty."""
    value = row.values.get(column)
    if not isinstance(value, str):
        raise row.error(column, f"{shorten(value)} is not a text; give the response, which may be empty")
    return row.repair(value)


def _read_prompt(row: RawRow, column: str) -> str:
    text = row.values.get(column)
    if not isinstance(text, str) or not text.strip():
        raise row.error(column, f"{shorten(text)}: no prompt; give it as one text")
    return row.repair(text)


def _read_texts(row: RawRow, column: str) -> list[str]:
    texts: list[Any] = row.read_list(column, 'give a list of responses, like ["..."]')
    if not texts:
        raise row.error(column, "no response; give a list with at least one")
    for place, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise row.error(column, f"response {place} is {shorten(text)}, not a text; give texts, which may be empty")
    return [row.repair(text) for text in texts]


def _read_subset(row: RawRow, column: str, known: Sequence[str]) -> str:
    name = row.read_text(column)
    if name not in known:
        raise row.error(column, f"{shorten(name)} is unknown{nearest(name, known)}; known: {', '.join(known)}")
    return name


def _tied_number(row: RawRow, name: str) -> str:
    """Return the number that a question of Ties shares with its reference: 7 of `tied:7` and `ref:7`."""
    kind, _, number = name.partition(":")
    if kind not in ("ref", "tied") or not number.isdecimal():
        raise row.error("id", f"{shorten(name)}; questions of {TIES} are called 'ref:7' and 'tied:7'")
    return number


def _check_ties(questions: Sequence[Question], where: str) -> None:
    first: dict[str, int] = {}
    for one in questions:
        if one.subset == TIES and first.setdefault(one.id, one.row) != one.row:
            raise InputError(
                f"{where}: row {one.row}, column 'id': {one.id!r} was already used in row {first[one.id]}; keep one"
            )
    if first and not any(f"ref:{name.removeprefix('tied:')}" in first for name in first if name.startswith("tied:")):
        raise InputError(f"{where}: subset {TIES}: no 'tied:7' has its 'ref:7'; give the benchmark's whole file")


def question_sources(data: str | Path | None, hub: Source, splits: Sequence[str]) -> list[Source]:
    """Return what to read a benchmark from: a file, or each split of a data set on the hub.

    Args:
        data: a path or hub id; default: the benchmark's own on the hub.
        hub: the benchmark's own.
        splits: of it, or of the hub id given.
    """
    if data is not None and Path(data).is_file():
        return [Source(str(data))]
    path, subset, revision = (hub.path, hub.subset, hub.revision) if data is None else (str(data), None, "main")
    return [Source(path, subset=subset, split=split, revision=revision) for split in splits]
