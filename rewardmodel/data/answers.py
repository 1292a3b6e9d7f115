"""A raw row with several answers to one prompt in, battles between them out: ranked, scored, or chosen and rejected.

Which answers meet is the source's key `pairs`. Equal ranks or scores are a tie. Two answers that are both chosen, or
both rejected, do not meet: nothing says that they are alike. The battles of a row share the weight of one.
"""

import math
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from rewardmodel.data.pairs import Message, join_prompt, parse_preference, read_prompt, score_lead, split_turns, toss
from rewardmodel.data.raw_row import RawRow, is_missing, shorten
from rewardmodel.data.text_lists import is_message, is_sequence

CHOICE_COLUMNS = ("num_correct", "num_incorrect", "total_completions", "models")
"""What lists of chosen and rejected answers may come with: how many they are, and the models in the same order."""


class Answer(NamedTuple):
    """One answer of a row.

    Attributes:
        column: that it stands in.
        place: in its row, from 1.
        messages: what was said.
        grade: the higher, the better.
        model: that wrote it, or an empty text.
    """

    column: str
    place: int
    messages: list[Message]
    grade: float
    model: str


def parse_choices(row: RawRow) -> list[dict[str, Any]]:
    """Parse columns chosen and rejected: one response each, or lists of several, `["4"]` and `["5", "3", "22"]`."""
    names = ("chosen", "rejected")
    counted = not all(is_missing(row.values.get(name)) for name in CHOICE_COLUMNS[:3])
    if not counted and not any(_holds_answers(row.values.get(name)) for name in names):
        return parse_preference(row)
    if row.source.score_scale is not None:
        raise row.error("chosen", "score_scale: lists of chosen and rejected answers have no scores; leave it out")
    hint = "give the answers as a list"
    lists = [_as_answers(row, name, hint if counted else "") for name in names]
    for name, answers in zip(names, lists, strict=True):
        if not answers:
            raise row.error(
                name, f"no answers; a battle needs one chosen and one rejected: {hint}, or leave the row out"
            )
    sizes = (len(lists[0]), len(lists[1]), len(lists[0]) + len(lists[1]))
    for name, size in zip(CHOICE_COLUMNS, sizes, strict=False):
        given = row.read_number(name, "give the number of answers")
        if given is not None and given != size:
            raise row.error(name, f"{given:g}, but the row has {size}; correct the lists, or leave the row out")
    listed: Any = row.values.get("models")
    models = [*map(str, listed)] if is_sequence(listed) and len(listed) == sizes[2] else [""] * sizes[2]
    columns = [name for name, size in zip(names, sizes, strict=False) for _ in range(size)]
    answers = [
        Answer(column, place, row.read_messages(column, text, "assistant"), float(column == "chosen"), model)
        for place, (column, text, model) in enumerate(zip(columns, lists[0] + lists[1], models, strict=True), start=1)
    ]
    return _meet(row, "chosen", read_prompt(row, "prompt"), answers, ties=False, scored=False)


def _holds_answers(value: Any) -> bool:
    """Return whether a value is a list of several answers, rather than one text in a list, or one conversation."""
    if not is_sequence(value) or not len(value):
        return False
    return is_sequence(value[0]) or (isinstance(value[0], str) and len(value) > 1)


def _as_answers(row: RawRow, column: str, hint: str) -> list[Any]:
    value = row.values.get(column)
    return row.read_list(column, hint) if hint or not isinstance(value, str) else [value]


def parse_answers(row: RawRow, prompt: str, column: str) -> list[dict[str, Any]]:
    """Parse a column of ranked or scored answers: `[{"answer": "4", "rank": 1}, {"answer": "5", "rank": 2}]`.

    Args:
        row: one prompt and its answers.
        prompt: column of the prompt.
        column: of the answers; where they are texts alone, their ranks or scores are in a column `ranks` or `scores`.
    """
    entries = row.read_list(column, 'give a list of answers, like [{"answer": "...", "rank": 1}]')
    beside = next((name for name in ("ranks", "scores") if not is_missing(row.values.get(name))), None)
    if beside is not None:
        grades = row.read_list(beside, "give one number for each answer")
        if len(grades) != len(entries):
            raise row.error(beside, f"{len(grades)} for {len(entries)} answers; give one number for each")
        key = beside.removesuffix("s")
        entries = [
            {**(one if isinstance(one, dict) else {"answer": one}), key: grade}
            for one, grade in zip(entries, grades, strict=True)
        ]
    graded_by = next((key for key in _GRADES if entries and isinstance(entries[0], dict) and key in entries[0]), None)
    answers = [_read_answer(row, column, place, entry, graded_by) for place, entry in enumerate(entries, start=1)]
    scored = graded_by not in ("rank", "label")
    if row.source.score_scale is not None and not scored:
        raise row.error(column, f"score_scale: the answers have a {graded_by} each and no score; leave it out")
    return _meet(row, column, read_prompt(row, prompt), answers, ties=graded_by != "label", scored=scored)


def _lead(one: Answer, two: Answer, scored: bool) -> float | None:
    """Return how much better the first answer is; None if it is, and their grades do not say how much."""
    lead = score_lead(one.grade, two.grade)
    return lead if scored or lead == 0 else None


def _read_answer(row: RawRow, column: str, place: int, entry: Any, graded_by: str | None) -> Answer:
    values = entry if isinstance(entry, dict) else {}
    key = next((key for key in _TEXT_KEYS if not is_missing(values.get(key))), None)
    if key is None:
        raise row.error(column, f"answer {place}: {shorten(entry)} has no text; give it as 'answer'")
    if graded_by is None or is_missing(values.get(graded_by)):
        raise row.error(column, f"answer {place} has no {graded_by or 'rank or score'}; give each answer one")
    try:
        grade = _GRADES[graded_by](values[graded_by])
        if math.isnan(grade):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        what = "neither chosen nor rejected" if graded_by == "label" else "not a number"
        raise row.error(column, f"answer {place}: {graded_by} {shorten(values[graded_by])} is {what}") from None
    messages = row.read_messages(column, values if is_message(values) else values[key], "assistant")
    model = next((values[key] for key in ("model", "generator", "model_name") if values.get(key)), "")
    return Answer(column, place, messages, grade, str(model))


_TEXT_KEYS = ("answer", "response", "completion", "text", "content", "output")
"""Names of an answer's text in data sets."""

_GRADES: dict[str, Callable[[Any], float]] = {
    "rank": lambda value: -float(value),
    "overall_score": float,
    "score": float,
    "rating": float,
    "label": lambda value: {"chosen": 1.0, "rejected": 0.0}[value],
}
"""Names of an answer's grade in data sets, the first found counts: value -> the higher, the better; rank 1 is best."""


def _meet(
    row: RawRow, column: str, prompt: list[Message], answers: list[Answer], ties: bool, scored: bool
) -> list[dict[str, Any]]:
    """Return the battles between the answers of a row, by the source's key `pairs`; `place` says which two met.

    Raises:
        InputError: fewer than two answers, an empty one, none that is better than another, or other prompts in them.
    """
    ranked = sorted(answers, key=lambda answer: -answer.grade)
    pairs = [(one, two) for one, two in PAIRS[row.source.pairs](ranked) if ties or one.grade != two.grade]
    if not pairs:
        raise row.error(column, f"{len(answers)} answers, and no two to compare; give two, or leave the row out")
    turns: dict[int, list[str]] = {}
    asked: list[str] = []
    for answer in answers:
        if not answer.messages:
            raise row.error(answer.column, f"answer {answer.place} is empty; leave it out")
        here, turns[answer.place] = split_turns(join_prompt(row, answer.column, prompt, answer.messages))
        if asked and here != asked:
            raise row.error(answer.column, f"answer {answer.place}: its user turns differ from those of answer 1")
        asked = here
    return [
        {
            **toss(row, asked, (turns[one.place], turns[two.place]), (one.model, two.model), _lead(one, two, scored)),
            "place": f"{min(one.place, two.place)}-{max(one.place, two.place)}",
        }
        for one, two in pairs
    ]


PAIRS: dict[str, Callable[[list[Answer]], Any]] = {
    "all": lambda ranked: combinations(ranked, 2),
    "adjacent": pairwise,
    "best": lambda ranked: ((ranked[0], other) for other in ranked[1:]),
}
"""Which answers meet, by the source's key `pairs`: answers, the best first -> pairs of them."""
