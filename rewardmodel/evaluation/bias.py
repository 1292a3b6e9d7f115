"""Predictions with known outcomes in, what the model favours out: order, length, models' names, kinds of battles.

Intervals are 95 %, from whole groups drawn again; all figures of a function stand on the same draws.
"""

import re
import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from rewardmodel.evaluation.bootstrap import STEEPEST, Draws, apart, draw_groups, figure, ratio, slopes
from rewardmodel.evaluation.findings import findings, some_of
from rewardmodel.evaluation.slices import CLOSE, LENGTHS, lengths, slice_figures, slice_terms, slices
from rewardmodel.metrics import log_loss_terms
from rewardmodel.predictions import average_probabilities, has_both_orders, predicted, require_outcomes, true_outcomes

Facts = dict[str, Any]

MODELS = ["model_a", "model_b"]

SLOPE_SAMPLES = 300
"""Bootstrap samples of the slopes on length."""

FAMILIES = {
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
"""Families by the beginning of a model's name, where its first letters are not the family."""


def audit_bias(table: pd.DataFrame) -> Facts:
    """Return every audit of a predictions table, as values that JSON can hold.

    Args:
        table: predictions with known outcomes.

    Returns:
        `battles`, `groups`, and what `position`, `verbosity`, `models` and `slices` return, by their names.

    Raises:
        InputError: no battles, or outcomes that are not known; so do the four.
    """
    audits = {"position": position, "verbosity": verbosity, "models": models, "slices": slices}
    counts = {"battles": len(table), "groups": int(table["group"].nunique())}
    return {**counts, **{name: audit(table) for name, audit in audits.items()}}


def position(table: pd.DataFrame) -> Facts | None:
    """Return what the order of the responses does to battles predicted in both; None if there are none.

    Returns:
        `flip_rate`: share of battles whose likeliest outcome differs between the orders; `mean_abs_difference` of the
        probabilities; `preference`: mean over battles and orders of P(what stands first wins) - P(what stands second
        wins), 0 without position bias; `log_loss` of `ab`, `ba` and their `average`; `gain`: the mean log loss of the
        two orders minus that of their average. Each is {value, low, high}.
    """
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
    figures = _means(_draws(table), columns, np.ones(len(table)))
    return {
        **{name: figures[name] for name in ("flip_rate", "mean_abs_difference", "preference")},
        "log_loss": {name: figures[name] for name in ("ab", "ba", "average")},
        "gain": figures["gain"],
    }


def verbosity(table: pd.DataFrame) -> Facts | None:
    """Return how much people and the model favour longer responses; None where lengths are not in the table.

    A slope is that of a logistic regression without intercept on x = log((1 + response_a_chars) / (1 +
    response_b_chars)): of the winner for people, of p_a / (p_a + p_b) for the model. Both weight a battle by
    winner_model_a + winner_model_b, so that a calibrated model has the slope of people.

    Returns:
        `battles` that were won, by the longer response or the shorter: slopes and `longer_wins` stand on them;
        `humans` and `model`: their slopes, None where there is no finite one; `difference`: model - humans, and
        `verdict`: it in words; `longer_wins`: how often, `humans`, `model` (mean probability) and `model_picks` (how
        often it finds the longer response likelier), or None; `matched`: `battles`, `log_loss`, `accuracy`,
        `accuracy_decided` and `prior` (log loss of their own shares) of those whose lengths differ by less than 10 %,
        or None.
    """
    true = require_outcomes(table)
    if not set(LENGTHS) <= set(table):
        return None
    probabilities, draws, chars = predicted(table), _draws(table), lengths(table)
    won = true[:, :2].sum(axis=1)
    rows = (won > 0) & (chars[:, 0] != chars[:, 1])
    x, times = np.log(chars[rows, 0] / chars[rows, 1]), draws.times(rows, SLOPE_SAMPLES)
    shares = {"humans": _share_of_a(true[rows]), "model": _share_of_a(probabilities[rows])}
    found = {name: slopes(x, share, won[rows], times) for name, share in shares.items()}
    facts: Facts = {"battles": int(rows.sum())}
    facts |= {name: figure(values) if abs(values[0]) < STEEPEST else None for name, values in found.items()}
    told = facts["humans"] and facts["model"]
    facts["difference"] = figure(found["model"] - found["humans"]) if told else None
    facts["verdict"] = _verdict(facts["difference"])
    longer = {name: _scatter(rows, np.where(x > 0, share, 1 - share)) for name, share in shares.items()}
    longer["model_picks"] = (np.sign(longer["model"] - 0.5) + 1) / 2
    facts["longer_wins"] = _means(draws, longer, won * rows) if rows.any() else None
    matched = chars.max(axis=1) / chars.min(axis=1) < CLOSE
    sums = draws.sums(slice_terms(probabilities, true) * matched[:, None])
    facts["matched"] = slice_figures(sums, true[matched]) if matched.any() else None
    return facts


def _share_of_a(outcomes: np.ndarray) -> np.ndarray:
    """Return A / (A + B) of (n_battles, 3), one half where a tie is certain."""
    decided = outcomes[:, 0] + outcomes[:, 1]
    return np.where(decided > 0, outcomes[:, 0] / np.where(decided > 0, decided, 1), 0.5)


def _scatter(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return values at the rows of a mask, 0 elsewhere."""
    full = np.zeros(len(rows))
    full[rows] = values
    return full


def _verdict(difference: Facts | None) -> str:
    if difference is None:
        return "whether the model favours length as people do cannot be told"
    if not apart(difference):
        return "no difference from people can be told"
    return f"the model favours longer responses {'more' if difference['value'] > 0 else 'less'} than people do"


def models(table: pd.DataFrame, least: int = 30) -> Facts | None:
    """Return whose responses are predicted to win more, or less, than people let them; None without models' names.

    Battles of a model, or a family, against itself say nothing about it and are not counted.

    Args:
        table: predictions with known outcomes.
        least: battles that a model, family or pair must have to be listed.

    Returns:
        `families`, `names` and `pairs`, empty where names are unknown: lists of `name` (and `against`, in pairs, after
        it in the alphabet), `battles`, `human` and `predicted` win rate (a tie is half a win) and their `difference`
        {value, low, high}, the farthest from 0 first.
    """
    true = require_outcomes(table)
    if not set(MODELS) <= set(table):
        return None
    names, codes = np.unique(table[MODELS].fillna("").to_numpy(str), return_inverse=True)
    families, of_name = np.unique([family(name) for name in names], return_inverse=True)
    known = names[codes] != ""
    by_name, by_family = np.where(known, codes, -1), np.where(known, of_name[codes], -1)
    pairs, of_pair = np.unique(np.sort(codes, axis=1), axis=0, return_inverse=True)
    first = known.all(axis=1, keepdims=True) & (codes < codes[:, ::-1])
    by_pair = np.where(first, of_pair.reshape(-1, 1), -1)
    rates = [array[:, :2] + array[:, 2:] / 2 for array in (true, predicted(table))]
    draws = _draws(table)
    return {
        "families": _favours(draws, by_family, [{"name": str(name)} for name in families], rates, least),
        "names": _favours(draws, by_name, [{"name": str(name)} for name in names], rates, least),
        "pairs": _favours(
            draws, by_pair, [{"name": str(names[a]), "against": str(names[b])} for a, b in pairs], rates, least
        ),
    }


def family(name: str) -> str:
    """Return the family of a model: by `FAMILIES`, or the first letters of its name, without what is before `/`."""
    short = name.rsplit("/", 1)[-1].lower()
    joint = next((joint for beginning, joint in FAMILIES.items() if short.startswith(beginning)), None)
    return joint or re.split(r"[\d_-]", short, maxsplit=1)[0] or short


def _favours(draws: Draws, codes: np.ndarray, names: list[Facts], rates: list[np.ndarray], least: int) -> list[Facts]:
    """Return the rows of `models` for the names that each side of each battle, (n_battles, 2) int, has (-1: none)."""
    told = (codes >= 0) & (codes != codes[:, ::-1])
    counts = np.bincount(codes[told], minlength=len(names))
    battles, sides = np.nonzero(told & (counts[codes] >= least))
    if not len(battles):
        return []
    listed, columns = np.unique(codes[battles, sides], return_inverse=True)
    human, model = (rate[battles, sides] for rate in rates)
    shape = (len(codes), len(listed))
    terms = [sparse.csr_array((v, (battles, columns)), shape) for v in (np.ones(len(battles)), model - human)]
    sums = draws.sums(sparse.hstack(terms)).reshape(-1, 2, len(listed))
    humans, predictions = (np.bincount(columns, rate) / np.bincount(columns) for rate in (human, model))
    found = []
    for column, code in enumerate(listed):
        means = {"human": float(humans[column]), "predicted": float(predictions[column])}
        difference = figure(ratio(sums[:, 1, column], sums[:, 0, column]))
        found.append({**names[code], "battles": int(counts[code]), **means, "difference": difference})
    return sorted(found, key=lambda row: -abs(row["difference"]["value"]))


def _draws(table: pd.DataFrame) -> Draws:
    return draw_groups(table["group"].to_numpy())


def _means(draws: Draws, columns: dict[str, np.ndarray], weight: np.ndarray) -> Facts:
    """Return the weighted means of (n_battles,) columns, each {value, low, high}."""
    sums = draws.sums(np.column_stack([*(column * weight for column in columns.values()), weight]))
    return {name: figure(ratio(sums[:, place], sums[:, -1])) for place, name in enumerate(columns)}


def format_bias(facts: Facts) -> str:
    """Return what `audit_bias`, or `evaluate`, found as lines for a terminal, and what stands out in it."""
    lines, found = [*_order_lines(facts["position"]), *_length_lines(facts["verbosity"])], findings(facts)
    lines += [*_model_lines(facts["models"]), *_slice_lines(facts["slices"])]
    wrap = textwrap.TextWrapper(118, "  - ", "    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, "what stands out" if found else "nothing stands out", *map(wrap.fill, found)])


def _order_lines(facts: Facts | None) -> list[str]:
    if facts is None:
        return ["order of the responses: one order was predicted (there is no other where each is scored alone)"]
    losses = " / ".join(f"{facts['log_loss'][name]['value']:.4f}" for name in ("ab", "ba", "average"))
    return [
        "order of the responses",
        _row("verdict flips", facts["flip_rate"]),
        _row("mean change of a probability", facts["mean_abs_difference"]),
        _row("P(first wins) - P(second wins)", facts["preference"]),
        f"  {'log_loss, A first / B first / averaged':<42}{losses}",
        _row("averaging gains", facts["gain"]),
    ]


def _length_lines(facts: Facts | None) -> list[str]:
    if facts is None:
        return ["length of the responses: not in the table"]
    wins, matched = facts["longer_wins"], facts["matched"]
    slope = "slope on log length ratio"
    lines = ["length of the responses", _row(f"{slope}, people", facts["humans"]), _row("  the model", facts["model"])]
    lines.append(_row("  the model - people", facts["difference"]))
    if wins:
        shares = ", ".join(f"{who} {100 * wins[name]['value']:.1f} %" for name, who in _WHO.items())
        lines.append(f"  {'the longer response wins':<42}{shares}")
    if matched:
        loss = f"log_loss {matched['log_loss']['value']:.4f}, their own prior {matched['prior']:.4f}"
        lines.append(f"  {'lengths within 10 %':<42}{matched['battles']:,} battles: {loss}")
    return lines


_WHO = {"humans": "people", "model": "the model", "model_picks": "its picks"}


def _row(name: str, found: Facts | None) -> str:
    interval = found and f"{found['value']:>7.4f}   95 % [{found['low']:.4f}, {found['high']:.4f}]"
    return f"  {name:<41}{interval or 'cannot be told'}"


def _model_lines(facts: Facts | None) -> list[str]:
    if facts is None or not any(facts.values()):
        return ["models: no names with enough battles"]
    lines = ["models: predicted - human win rate, in points (*: 0 is outside its 95 % interval)"]
    return lines + [_listed(kind, map(_points, rows)) for kind, rows in facts.items() if rows]


def _points(row: Facts) -> str:
    name = f"{row['name']} against {row['against']}" if "against" in row else row["name"]
    return f"{name} {100 * row['difference']['value']:+.1f}{'*' * apart(row['difference'])}"


def _listed(name: str, shown: Iterable[str]) -> str:
    return textwrap.fill(f"  {name:<15}{some_of(list(shown))}", 118, subsequent_indent=" " * 17)


def _slice_lines(facts: Facts) -> list[str]:
    lines = ["slices: log_loss (battles)"]
    for dimension, rows in facts.items():
        shown = (f"{row['name']}: {row['log_loss']['value']:.4f} ({row['battles']:,})" for row in rows or [])
        lines += [_listed(dimension.replace("_", " "), shown)] if rows else []
    return lines
