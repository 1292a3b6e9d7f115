"""Predictions with known outcomes in, biases of the model out: position, verbosity, models that wrote the responses.

Intervals are 95 %, by a bootstrap of whole prompt groups; all results of a function share the same draws.
"""

import re
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from rewardmodel.errors import plural
from rewardmodel.evaluation.bootstrap import MAX_SLOPE, Draws, divide, draw_groups, fit_slopes, interval_of
from rewardmodel.evaluation.findings import join_names, list_findings
from rewardmodel.evaluation.results import (
    Evaluation,
    Interval,
    ModelBias,
    PositionBias,
    Slice,
    VerbosityBias,
    WinRate,
)
from rewardmodel.evaluation.slices import (
    LENGTH_COLUMNS,
    SIMILAR_LENGTH_RATIO,
    measure_slices,
    response_lengths,
    slice_terms,
    summarise_slice,
)
from rewardmodel.metrics import class_prior, log_loss_terms
from rewardmodel.predictions import (
    average_probabilities,
    has_both_orders,
    predicted,
    require_outcomes,
    true_outcomes,
)

MODEL_NAME_COLUMNS = ["model_a", "model_b"]
"""Columns with the names of the models that wrote the responses."""

MODEL_FAMILY_PREFIXES = {
    "chatgpt": "gpt",
    "gpt4all": "gpt4all",
    "text-davinci": "gpt",
    "o1": "gpt",
    "o3": "gpt",
    "o4": "gpt",
    "bard": "gemini",
    "chatglm": "glm",
    "codellama": "llama",
    "meta-llama": "llama",
    "codestral": "mistral",
    "magistral": "mistral",
    "ministral": "mistral",
    "mixtral": "mistral",
    "qwq": "qwen",
}
"""Families of the models that wrote the responses, by the prefix of a name whose first letters are not the family."""


def audit_bias(table: pd.DataFrame) -> Evaluation:
    """Return an evaluation with the parts about bias: `position`, `verbosity`, `models` and `slices`.

    Args:
        table: predictions with known outcomes.

    Raises:
        InputError: no battles, or outcomes that are not known; so do the four functions by themselves.
    """
    return Evaluation(
        battles=len(table),
        groups=int(table["group"].nunique()),
        position=measure_position_bias(table),
        verbosity=measure_verbosity_bias(table),
        models=measure_model_bias(table),
        slices=measure_slices(table),
    )


def measure_position_bias(table: pd.DataFrame) -> PositionBias | None:
    """Return what the order of the responses does to battles predicted in both; None if there are none."""
    require_outcomes(table)
    table = table[has_both_orders(table)]
    if table.empty:
        return None
    true = true_outcomes(table)
    ab, ba = predicted(table, "ab"), predicted(table, "ba")
    losses = [log_loss_terms(probabilities, true) for probabilities in (ab, ba, average_probabilities([ab, ba]))]
    columns = {
        "flip_rate": ab.argmax(axis=1) != ba.argmax(axis=1),
        "mean_abs_difference": np.abs(ab - ba).mean(axis=1),
        "preference": (ab[:, 0] - ab[:, 1] + ba[:, 1] - ba[:, 0]) / 2,
        "gain": (losses[0] + losses[1]) / 2 - losses[2],
        **dict(zip(("ab", "ba", "average"), losses, strict=True)),
    }
    means = _weighted_means(_draw(table), columns, np.ones(len(table)))
    log_loss = {order: means.pop(order) for order in ("ab", "ba", "average")}
    return PositionBias(log_loss=log_loss, **means)


def measure_verbosity_bias(table: pd.DataFrame) -> VerbosityBias | None:
    """Return how much people and the model favour longer responses; None where lengths are not in the table.

    A slope is that of a logistic regression without intercept on x = log((1 + response_a_chars) / (1 +
    response_b_chars)): of the winner for people, of p_a / (p_a + p_b) for the model. Both weight a battle by
    winner_model_a + winner_model_b, so that a calibrated model has the slope of people.
    """
    true = require_outcomes(table)
    if not set(LENGTH_COLUMNS) <= set(table):
        return None
    probabilities, draws, chars = predicted(table), _draw(table), response_lengths(table)

    # slopes, of the battles that the longer response or the shorter one won; 300 samples, because they take the time
    won = true[:, :2].sum(axis=1)
    rows = (won > 0) & (chars[:, 0] != chars[:, 1])
    x, times = np.log(chars[rows, 0] / chars[rows, 1]), draws.times(rows, 300)
    shares = {"humans": _share_of_a(true[rows]), "model": _share_of_a(probabilities[rows])}
    slopes = {name: fit_slopes(x, share, won[rows], times) for name, share in shares.items()}
    groups = draws.groups_of(rows)
    humans, model = (interval_of(one, groups) if abs(one[0]) < MAX_SLOPE else None for one in slopes.values())
    difference = interval_of(slopes["model"] - slopes["humans"], groups) if humans and model else None

    # how often the longer response wins
    longer = {name: _scatter(rows, np.where(x > 0, share, 1 - share)) for name, share in shares.items()}
    longer["model_picks"] = (np.sign(longer["model"] - 0.5) + 1) / 2

    # battles of nearly equal lengths
    matched = chars.max(axis=1) / chars.min(axis=1) < SIMILAR_LENGTH_RATIO
    sums = draws.sums(slice_terms(probabilities, true) * matched[:, None])
    prior, groups_matched = class_prior(true), draws.groups_of(matched)

    return VerbosityBias(
        battles=int(rows.sum()),
        humans=humans,
        model=model,
        difference=difference,
        verdict=_compare_slopes(difference),
        longer_wins=_weighted_means(draws, longer, won * rows) if rows.any() else None,
        matched=summarise_slice("within 10 %", sums, true[matched], prior, groups_matched) if matched.any() else None,
    )


def _share_of_a(outcomes: np.ndarray) -> np.ndarray:
    """Return A / (A + B) of (n_battles, 3), one half where a tie is certain."""
    decided = outcomes[:, 0] + outcomes[:, 1]
    return np.where(decided > 0, outcomes[:, 0] / np.where(decided > 0, decided, 1), 0.5)


def _scatter(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return values at the rows of a mask, 0 elsewhere."""
    full = np.zeros(len(rows))
    full[rows] = values
    return full


def _compare_slopes(difference: Interval | None) -> str:
    if difference is None:
        return "whether the model favours length as people do cannot be estimated"
    if difference.low is None:
        return "too few prompts to tell whether the model favours length as people do"
    if not difference.excludes():
        return "no difference from people beyond noise"
    return f"the model favours longer responses {'more' if difference.value > 0 else 'less'} than people do"


def measure_model_bias(table: pd.DataFrame, least: int = 30) -> ModelBias | None:
    """Return whose responses are predicted to win more, or less, than people let them; None without models' names.

    Battles of a model, or a family, against itself say nothing about it and are not counted.

    Args:
        table: predictions with known outcomes.
        least: battles that a model, family or pair must have to be listed. In a pair, `against` comes after `name` in
            the alphabet.
    """
    true = require_outcomes(table)
    if not set(MODEL_NAME_COLUMNS) <= set(table):
        return None
    names, codes = np.unique(table[MODEL_NAME_COLUMNS].fillna("").to_numpy(str), return_inverse=True)
    families, family_of = np.unique([model_family(name) for name in names], return_inverse=True)

    # whom each battle's A and B count for, (n_battles, 2): an index, -1 for nobody
    known = names[codes] != ""
    by_name, by_family = np.where(known, codes, -1), np.where(known, family_of[codes], -1)
    # of a pair, the win rate is that of the side whose name comes first in the alphabet
    pairs, pair_of = np.unique(np.sort(codes, axis=1), axis=0, return_inverse=True)
    first = known.all(axis=1, keepdims=True) & (codes < codes[:, ::-1])
    by_pair = np.where(first, pair_of.reshape(-1, 1), -1)
    rates = [array[:, :2] + array[:, 2:] / 2 for array in (true, predicted(table))]
    draws = _draw(table)
    return ModelBias(
        families=_win_rates(draws, by_family, [(str(name), None) for name in families], rates, least),
        names=_win_rates(draws, by_name, [(str(name), None) for name in names], rates, least),
        pairs=_win_rates(draws, by_pair, [(str(names[a]), str(names[b])) for a, b in pairs], rates, least),
    )


def model_family(name: str) -> str:
    """Return the family of a model: by `MODEL_FAMILY_PREFIXES`, or the first letters of its name after the last `/`."""
    short = name.rsplit("/", 1)[-1].lower()
    known = next((family for prefix, family in MODEL_FAMILY_PREFIXES.items() if short.startswith(prefix)), None)
    return known or re.split(r"[\d_-]", short, maxsplit=1)[0] or short


def _win_rates(
    draws: Draws, codes: np.ndarray, names: Sequence[tuple[str, str | None]], rates: list[np.ndarray], least: int
) -> list[WinRate]:
    """Return the win rates of those who wrote the responses, the largest differences first.

    Args:
        draws: of the battles' groups.
        codes: (n_battles, 2) int, the place in `names` of who wrote A and B; -1: not counted.
        names: and whom each is against.
        rates: wins of A and B, a tie half a win, (n_battles, 2) float64: by people, as predicted.
        least: battles to be listed.
    """
    counted = (codes >= 0) & (codes != codes[:, ::-1])
    counts = np.bincount(codes[counted], minlength=len(names))
    battles, sides = np.nonzero(counted & (counts[codes] >= least))
    if not len(battles):
        return []
    listed, columns = np.unique(codes[battles, sides], return_inverse=True)
    human, model = (rate[battles, sides] for rate in rates)
    # a column each for the number of battles and for the differences of those who are listed
    shape = (len(codes), len(listed))
    terms = [sparse.csr_array((v, (battles, columns)), shape) for v in (np.ones(len(battles)), model - human)]
    sums = draws.sums(sparse.hstack(terms)).reshape(-1, 2, len(listed))
    by_people, as_predicted = (np.bincount(columns, rate) / np.bincount(columns) for rate in (human, model))
    found = [
        WinRate(
            name=names[code][0],
            battles=int(counts[code]),
            human=float(by_people[column]),
            predicted=float(as_predicted[column]),
            difference=interval_of(
                divide(sums[:, 1, column], sums[:, 0, column]), draws.groups_of(battles[columns == column])
            ),
            against=names[code][1],
        )
        for column, code in enumerate(listed)
    ]
    return sorted(found, key=lambda row: -abs(row.difference.value))


def _draw(table: pd.DataFrame) -> Draws:
    return draw_groups(table["group"].to_numpy())


def _weighted_means(draws: Draws, columns: dict[str, np.ndarray], weight: np.ndarray) -> dict[str, Interval]:
    """Return the weighted means of (n_battles,) columns."""
    sums = draws.sums(np.column_stack([*(column * weight for column in columns.values()), weight]))
    groups = draws.groups_of(weight > 0)
    return {name: interval_of(divide(sums[:, place], sums[:, -1]), groups) for place, name in enumerate(columns)}


def format_bias(evaluation: Evaluation) -> str:
    """Return what `audit_bias`, or `evaluate`, found as lines for a terminal, and what stands out in it."""
    lines = [*_position_lines(evaluation.position), *_verbosity_lines(evaluation.verbosity)]
    lines += [*_model_lines(evaluation.models), *_slice_lines(evaluation.slices or {})]
    found = list_findings(evaluation)
    wrap = textwrap.TextWrapper(118, "  - ", "    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, "what stands out" if found else "nothing stands out", *map(wrap.fill, found)])


def _position_lines(bias: PositionBias | None) -> list[str]:
    if bias is None:
        return ["order of the responses: only one order was predicted (there is no other where each is scored alone)"]
    losses = " / ".join(f"{bias.log_loss[name].value:.4f}" for name in ("ab", "ba", "average"))
    return [
        "order of the responses",
        _row("verdict flips", bias.flip_rate),
        _row("mean change of a probability", bias.mean_abs_difference),
        _row("P(first wins) - P(second wins)", bias.preference),
        f"  {'log_loss, A first / B first / averaged':<42}{losses}",
        _row("averaging gains", bias.gain),
    ]


def _verbosity_lines(bias: VerbosityBias | None) -> list[str]:
    if bias is None:
        return ["length of the responses: not in the table"]
    lines = [
        "length of the responses",
        _row("slope on log length ratio, people", bias.humans),
        _row("  the model", bias.model),
        _row("  the model - people", bias.difference),
    ]
    if wins := bias.longer_wins:
        who = {"humans": "people", "model": "the model", "model_picks": "its picks"}
        shares = ", ".join(f"{label} {100 * wins[name].value:.1f} %" for name, label in who.items())
        lines.append(f"  {'the longer response wins':<42}{shares}")
    if matched := bias.matched:
        loss = f"log_loss {matched.log_loss.value:.4f}, their own prior {matched.prior:.4f}"
        lines.append(f"  {'lengths within 10 %':<42}{plural(matched.battles, 'battle')}: {loss}")
    return lines


def _row(name: str, found: Interval | None) -> str:
    return f"  {name:<41}{found or 'cannot be estimated'}"


def _model_lines(bias: ModelBias | None) -> list[str]:
    named = {"families": bias.families, "names": bias.names, "pairs": bias.pairs} if bias else {}
    if not any(named.values()):
        return ["models: no names with enough battles"]
    lines = ["models: predicted - human win rate, in points (*: 0 is outside its 95 % interval)"]
    return lines + [_list(kind, map(_points, rows)) for kind, rows in named.items() if rows]


def _points(row: WinRate) -> str:
    name = f"{row.name} against {row.against}" if row.against else row.name
    return f"{name} {100 * row.difference.value:+.1f}{'*' * row.difference.excludes()}"


def _list(name: str, shown: Iterable[str]) -> str:
    return textwrap.fill(f"  {name:<15}{join_names(list(shown))}", 118, subsequent_indent=" " * 17)


def _slice_lines(slices: dict[str, list[Slice] | None]) -> list[str]:
    lines = ["slices: log_loss (battles)"]
    for dimension, rows in slices.items():
        if rows and len(rows) > 1:
            shown = (f"{row.name}: {row.log_loss.value:.4f} ({row.battles:,})" for row in rows)
            lines.append(_list(dimension.replace("_", " "), shown))
    return lines if len(lines) > 1 else ["slices: too few battles"]
