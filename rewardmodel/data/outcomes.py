"""The outcome of a raw row: what the words and codes of a `winner` column mean, votes, and a judge's probability.

A word that names a side is read (`A>B`, `Response 1`, the name of one of the models); a code that could mean either is
refused with what to write, because a wrong guess trains a model on the opposite of the votes.
"""

import re
from typing import Any

from rewardmodel.battles import OUTCOMES
from rewardmodel.config.schema import Source
from rewardmodel.data.raw_row import RawRow, shorten
from rewardmodel.errors import InputError, nearest

OUTCOME_COLUMNS = (*OUTCOMES, "winner", "p_b")
"""Columns that `parse_outcome` reads."""

WINNERS = {"model_a": 0, "model_b": 1, "tie": 2}
"""What the values of a source's `outcomes` may be -> index in `OUTCOMES`."""

_NAMED = ("model", "response", "assistant", "answer", "completion", "output", "candidate", "option")
_SIGNS = {">": 0, ">>": 0, "<": 1, "<<": 1, "=": 2, "==": 2}
_WORDS = {"a": 0, "b": 1, "left": 0, "right": 1, "first": 0, "second": 1, "tie": 2, "draw": 2, "equal": 2, "same": 2}
_WORDS |= {f"{name} {side}": number % 2 for name in _NAMED for number, side in enumerate("ab12")}
_WORDS |= {f"a{sign}b": outcome for sign, outcome in _SIGNS.items()}
_WORDS |= {f"b{sign}a": (1, 0, 2)[outcome] for sign, outcome in _SIGNS.items()}
_WORDS |= dict.fromkeys(("bothbad", "both bad", "bothgood", "both good", "neither"), 2)
_WORDS |= dict.fromkeys(("tie bothbad", "tie both bad", "tie bothgood", "tie both good", "tie inconsistent"), 2)
"""Words of a `winner` column, without their case, brackets and underscores -> index of the outcome in `OUTCOMES`."""

_SCALES = dict.fromkeys(("overall_preference", "preference_strength"), 3)
"""Columns whose numbers have a documented meaning -> the largest of them: from -n, the first response is much better,
over 0, both are alike, to n, the second is much better (the data cards of HelpSteer2-Preference and HelpSteer3)."""


def parse_outcome(row: RawRow) -> dict[str, float | None]:
    """Return the outcome from p_b (a judge's P(B better)), else from winner_*, else from winner; None: not labelled.

    Raises:
        InputError: a value that is no probability, or no outcome by name.
    """
    p = row.read_number("p_b")
    if p is not None:
        if not 0 <= p <= 1:
            raise row.error("p_b", f"{p:g} is not a probability; give P(B better), from 0 to 1")
        return dict(zip(OUTCOMES, (1 - p, p, 0.0), strict=True))
    values = [row.read_number(name) for name in OUTCOMES]
    label = row.read_text("winner") if values == [None] * 3 else ""
    return certain(_read_winner(row, label)) if label else dict(zip(OUTCOMES, values, strict=True))


def certain(outcome: int) -> dict[str, float | None]:
    """Return the probabilities of an outcome that is known, by its index in `OUTCOMES`."""
    return {name: float(number == outcome) for number, name in enumerate(OUTCOMES)}


def _read_winner(row: RawRow, label: str) -> int:
    """Return the index of the outcome that a label names, by the source's `outcomes`, by name, or on a known scale."""
    if row.source.outcomes:
        given = {_code(value): WINNERS[outcome] for value, outcome in row.source.outcomes.items()}
        if _code(label) in given:
            return given[_code(label)]
        raise row.error(
            "winner", f"{shorten(label)} is not among the source's outcomes: {', '.join(given)}; add it there"
        )

    if label in WINNERS:
        return WINNERS[label]

    # the name of a side's column or model, a word, or a number on a scale
    sides = [{row.read_text(f"model_{side}"), row.source.columns.get(f"response_{side}")} for side in "ab"]
    named = [number for number, names in enumerate(sides) if label in names]
    if len(named) == 1:
        return named[0]
    word = re.sub(r"[\s_()\[\]-]+", " ", label.lower()).strip()
    word = re.sub(r"\s*([<>=]+)\s*", r"\1", word)
    word = re.sub(r"( is)?( much| slightly)? (better|wins?|won|preferred)$", "", word)
    if word in _WORDS:
        return _WORDS[word]
    largest = _SCALES.get(row.source.columns.get("winner") or "")
    if largest is not None and re.fullmatch(r"[-+]?\d+", label) and abs(int(label)) <= largest:
        return 2 if int(label) == 0 else int(int(label) > 0)
    known = "model_a, model_b, tie, A>B, left, Response 1 and the like, or the name of the row's model_a or model_b"
    raise row.error(
        "winner",
        f"{shorten(label)} is not an outcome by name; say what each value means in the source's key outcomes, "
        f'{{"{label[:20]}": …}}, with model_a, model_b or tie; known by name: {known}',
    )


def _code(value: Any) -> str:
    """Return a value as it is compared with the keys of `outcomes`: `1`, `1.0` and `"1"` are one code."""
    text = str(value).strip().lower()
    return text[:-2] if re.fullmatch(r"[-+]?\d+\.0", text) else text


def check_outcomes(source: Source, where: str, columns: set[str]) -> None:
    """Raise unless a source's `outcomes` can be used: their values are outcomes, and the file has a `winner` column.

    Raises:
        InputError: a value that is not in `WINNERS`, or no column to apply them to.
    """
    for value, outcome in source.outcomes.items():
        if outcome not in WINNERS:
            raise InputError(
                f"{where}: outcomes.{value}: {shorten(outcome)} is not an outcome{nearest(str(outcome), WINNERS)}; "
                f"write {', '.join(WINNERS)}"
            )
    if source.outcomes and "winner" not in columns:
        raise InputError(
            f"{where}: outcomes: the file has no column 'winner', whose values they explain; name the file's with "
            "columns: {winner: …}, or leave outcomes out"
        )
