"""A row of a predictions table -> an answer about one battle, as JSON and as lines for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from rewardmodel.config.schema import Recipe
from rewardmodel.objectives import find_objective
from rewardmodel.predictions import PROBABILITIES

WINNERS = ("model_a", "model_b", "tie")
"""Names of the outcomes in answers, in the order of `OUTCOMES`."""

EVEN = 1e-6
"""Probabilities of A and B that are less apart prefer neither: what the same text twice differs by, in float32."""

Answer = dict[str, Any]
"""{"winner": "model_a", "p_model_a": .6, "p_model_b": .3, "p_tie": .1, "ab_p_model_a": .7, …, "flips": False}."""


def describe_prediction(row: Mapping[str, Any]) -> Answer:
    """Return a row of a predictions table as an answer.

    Returns:
        `winner`, the likeliest outcome, and a tie where A and B are equally likely; `p_model_a`, `p_model_b`, `p_tie`;
        `ab_*`, the same in the order as given; `ba_*`, with A and B exchanged and the result exchanged back; `flips`,
        whether the order decides who wins. `ba_*` and `flips` are None where the order cannot matter, or is not asked
        for.
    """
    answer: Answer = {}
    winners = []
    for prefix in ("", "ab_", "ba_"):
        names = [prefix + name for name in PROBABILITIES]
        known = names[0] in row
        answer |= {name: float(row[name]) if known else None for name in names}
        winners.append(_find_winner([row[name] for name in names]) if known else None)
    flips = None if winners[2] is None else winners[1] != winners[2]
    return {"winner": winners[0], **answer, "flips": flips}


def _find_winner(shares: Sequence[float]) -> str:
    return "tie" if abs(shares[0] - shares[1]) < EVEN else WINNERS[int(np.argmax(shares))]


def describe_predictions(table: pd.DataFrame) -> list[Answer]:
    """Return the rows of a predictions table as answers."""
    return [describe_prediction({str(name): value for name, value in row.items()}) for row in table.to_dict("records")]


def format_answer(answer: Answer, recipe: Recipe) -> str:
    """Return the answer of a run with this recipe as lines for a terminal."""
    verdicts = {"model_a": "A is better", "model_b": "B is better", "tie": "it is a tie"}

    def shares(prefix: str) -> str:
        values = [answer[prefix + name] for name in PROBABILITIES]
        return "   ".join(f"{name} {value:5.1%}" for name, value in zip(("A", "B", "tie"), values, strict=True))

    lines = [f"{verdicts[answer['winner']]}        {shares('')}"]
    if answer["flips"] is None:
        separate = find_objective(recipe.objective).encoding == "separate"
        one = f"A was shown first only, because inference.swap_tta is {recipe.inference.swap_tta}."
        return f"{lines[0]}\n{'Each response is scored alone, so that their order cannot matter.' if separate else one}"
    lines += [f"  A shown first    {shares('ab_')}", f"  B shown first    {shares('ba_')}"]
    changes = "The order decides who wins: do not rely on this." if answer["flips"] else "Either order names the same."
    return "\n".join([*lines, changes])
