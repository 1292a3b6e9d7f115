import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel.battles import OUTCOMES
from rewardmodel.evaluation.evaluate import evaluate
from rewardmodel.evaluation.findings import ALIKE, LARGE, MANY_FLIPS, MOST, NO_SPREAD, UNIFORM, findings, some_of
from rewardmodel.predictions import PROBABILITIES, average_probabilities


def figure(value, low=None, high=None):
    """Return a figure; one number alone is a point."""
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high}


def measured(groups=100, **metrics):
    return {"battles": groups, "groups": groups, "metrics": metrics}


def ordered(groups=100, **position):
    return {"battles": groups, "groups": groups, "position": position}


def confident(says, hits, after=None):
    """Return facts of two bins whose mean confidence is `says`."""
    bins = [{"battles": 30, "confidence": says - 0.1}, {"battles": 10, "confidence": says + 0.3}]
    later = None if after is None else [{"battles": 5, "confidence": after}]
    return measured(accuracy=hits) | {"reliability": {"before": bins, "after": later}}


def confused(rows, groups, stated):
    return {"confusion": rows, "groups": groups, "battles": sum(map(sum, rows)), "stated": stated}


def longer(slope, low, high):
    return {"groups": 100, "verbosity": {"difference": figure(slope, low, high)}}


def favoured(gaps, kind="families", names=None):
    """Return facts of models whose win rate is off by known gaps, a point each side."""
    rows = [{"name": f"m{row}", "difference": figure(gap, gap - 0.01, gap + 0.01)} for row, gap in enumerate(gaps)]
    return {"models": {"families": [], "names": names or [], "pairs": []} | {kind: rows}}


def sliced(*losses, dimension="source", width=0.01):
    """Return facts of slices of 50 battles whose outcome shares have a log loss of 1.05."""
    rows = [
        {"name": f"s{row}", "battles": 50, "prior_all": 1.05, "log_loss": figure(loss, loss - width, loss + width)}
        for row, loss in enumerate(losses)
    ]
    return {"slices": {"turns": None, dimension: rows}}


TWICE_AS_LONG = 2 * math.atanh(LARGE) / math.log(2)
"""Slope at which a response twice as long is favoured by `LARGE`."""

RULES = {
    "log loss": (
        measured(log_loss=figure(1.2, UNIFORM + 0.001, 1.3)),
        measured(log_loss=figure(1.2, UNIFORM - 0.001, 1.3)),
        "The log loss, 1.2000, is above 1.0986: saying one third each would be better.",
    ),
    "log loss, the same in every group": (
        measured(ALIKE, log_loss=figure(1.2)),
        measured(ALIKE - 1, log_loss=figure(1.2)),
        "The log loss, 1.2000, is above 1.0986: saying one third each would be better.",
    ),
    "spread": (
        {"battles": 2, "spread": NO_SPREAD * 0.99},
        {"battles": 2, "spread": NO_SPREAD},
        "All battles get nearly the same prediction: the model reads nothing from them.",
    ),
    "spread of one battle": (
        {"battles": 2, "spread": 0.0},
        {"battles": 1, "spread": 0.0},
        "All battles get nearly the same prediction: the model reads nothing from them.",
    ),
    "winners": (
        measured(accuracy_decided=figure(0.58, 0.499, 0.66)),
        measured(accuracy_decided=figure(0.58, 0.501, 0.66)),
        "That the model tells winner from loser is not shown: it finds 58 % of the winners [50, 66], a coin 50 %.",
    ),
    "winners, all of them": (
        measured(ALIKE - 1, accuracy_decided=figure(1.0)),
        measured(ALIKE, accuracy_decided=figure(1.0)),
        "That the model tells winner from loser is not shown: it finds 100 % of the winners [100, 100], a coin 50 %.",
    ),
    "losers": (
        measured(accuracy_decided=figure(0.4, 0.35, 0.45)),
        measured(accuracy_decided=figure(0.6, 0.55, 0.65)),
        "That the model tells winner from loser is not shown: it finds 40 % of the winners [35, 45], a coin 50 %.",
    ),
    "too sure by a size that matters": (
        confident(0.551, figure(0.5, 0.49, 0.51)),
        confident(0.549, figure(0.5, 0.49, 0.51)),
        "The model is too sure: it gives the likeliest outcome 55 % on average, which happens in 50 %.",
    ),
    "too unsure beyond chance": (
        confident(0.4, figure(0.5, 0.401, 0.6)),
        confident(0.4, figure(0.5, 0.399, 0.6)),
        "The model is too unsure: it gives the likeliest outcome 40 % on average, which happens in 50 %.",
    ),
    "too sure after calibration": (
        confident(0.5, figure(0.5, 0.49, 0.51), after=0.6),
        confident(0.6, figure(0.5, 0.49, 0.51), after=0.5),
        "The model is too sure: it gives the likeliest outcome 60 % on average, which happens in 50 %.",
    ),
    "too little for a tie beyond chance": (  # 20 of 100 are 13.3 to 28.9 % (Wilson)
        confused([[30, 10, 0], [10, 30, 0], [15, 5, 0]], 100, [0.45, 0.43, 0.12]),
        confused([[30, 10, 0], [10, 30, 0], [15, 5, 0]], 100, [0.43, 0.43, 0.14]),
        "The model gives a tie 12 % on average, which happens in 20 %, and never finds it likeliest.",
    ),
    "too much for a win of B, by what matters": (
        confused([[300, 100, 0], [100, 300, 0], [100, 99, 1]], 1000, [0.37, 0.451, 0.179]),
        confused([[300, 100, 0], [100, 300, 0], [100, 99, 1]], 1000, [0.37, 0.449, 0.181]),
        "The model gives a win of B 45 % on average, which happens in 40 %.",
    ),
    "flips": (
        ordered(flip_rate=figure(0.42, MANY_FLIPS + 0.001, 0.5)),
        ordered(flip_rate=figure(0.42, MANY_FLIPS - 0.001, 0.5)),
        "The verdict flips with the order of the responses in 42 % of battles.",
    ),
    "flips, all of them": (
        ordered(ALIKE, flip_rate=figure(1.0)),
        ordered(ALIKE - 1, flip_rate=figure(1.0)),
        "The verdict flips with the order of the responses in 100 % of battles.",
    ),
    "first place, of a size that matters": (
        ordered(preference=figure(LARGE, 0.04, 0.06)),
        ordered(preference=figure(LARGE - 0.001, 0.04, 0.06)),
        "The model favours what stands first, by 5 points of probability.",
    ),
    "second place, beyond chance": (
        ordered(preference=figure(-0.1, -0.2, -0.001)),
        ordered(preference=figure(-0.1, -0.2, 0.001)),
        "The model favours what stands second, by 10 points of probability.",
    ),
    "longer, of a size that matters": (
        longer(TWICE_AS_LONG + 0.001, 0.01, 0.3),
        longer(TWICE_AS_LONG - 0.001, 0.01, 0.3),
        "The model favours longer responses more than people do: one twice as long by 5 points.",
    ),
    "longer less, beyond chance": (
        longer(-1.0, -2.0, -0.001),
        longer(-1.0, -2.0, 0.001),
        "The model favours longer responses less than people do: one twice as long by 33 points.",
    ),
    "families, more than chance has it": (  # .05 * 20 + 2 sqrt(.05 * .95 * 20) = 2.95
        favoured([0.1, -0.2, 0.06, *[0] * 17]),
        favoured([0.1, -0.2, *[0] * 18]),
        "Predicted to win more or less often than people let them, 3 of 20 families: "
        "m0 10 points more, m1 20 points less, m2 6 points more.",
    ),
    "a family, of a size that matters": (
        favoured([LARGE]),
        favoured([LARGE - 0.001]),
        "Predicted to win more or less often than people let them, 1 of 1 families: m0 5 points more.",
    ),
    "models of families that are not off": (
        favoured([0.1, -0.1], kind="names"),
        favoured([0.005, -0.005], kind="names"),
        "Predicted to win more or less often than people let them, 2 of 2 models: "
        "m0 10 points more, m1 10 points less.",
    ),
    "a slice": (
        sliced(1.07, 0.9),
        sliced(1.0599, 0.9),
        "By source, the model is worse than the outcome shares of all battles on: s0 (log loss 1.0700 against 1.0500).",
    ),
    "slices of a model that is no worse on all battles": (
        sliced(1.07, 1.0299, dimension="length_gap"),
        sliced(1.07, 1.0301, dimension="length_gap"),
        "By length gap, the model is worse than the outcome shares of all battles on: "
        "s0 (log loss 1.0700 against 1.0500).",
    ),
}


@pytest.mark.parametrize(("beyond", "short", "sentence"), RULES.values(), ids=RULES)
def test_a_rule_speaks_just_beyond_its_threshold_and_not_just_short_of_it(beyond, short, sentence):
    assert findings(beyond) == [sentence]
    assert findings(short) == []


def test_models_are_not_named_beside_their_families():
    both = favoured([0.1, 0.2], names=favoured([0.3], kind="names")["models"]["names"])
    (sentence,) = findings(both)
    assert "2 of 2 families: m0" in sentence


def test_a_slice_by_what_happened_says_nothing():
    assert findings(sliced(1.5, 0.1, dimension="outcome")) == []


def test_an_outcome_that_never_happens_need_not_be_found():
    assert findings(confused([[50, 10, 0], [10, 50, 0], [0, 0, 0]], 120, [0.5, 0.48, 0.02])) == []


def test_steps_without_a_loss_are_counted():
    assert findings({}, [(1, 0.5), (2, math.nan), (3, math.inf)]) == [
        "The training loss was no number at 2 logged steps."
    ]
    assert findings({}, [(1, 0.5)]) == []


def test_a_preference_costs_what_the_constant_says():
    shifted = 0.35 + np.array([1, -1]) * LARGE / 2
    assert round(float(-0.35 * np.log(shifted / 0.35).sum()), 3) == 0.002


@pytest.mark.parametrize("part", ["metrics", "reliability", "confusion", "position", "verbosity", "models", "slices"])
def test_what_was_not_measured_is_passed_over(part):
    assert findings({part: None}) == findings({part: {}}) == []


@given(st.floats(-1, 1), st.floats(1e-6, 1))
def test_a_preference_is_told_where_it_is_large_and_beyond_chance(value, half):
    told = findings(ordered(preference=figure(value, value - half, value + half)))
    beyond = not value - half <= 0 <= value + half
    assert bool(told) == (abs(value) >= LARGE and beyond)
    assert ("first" in "".join(told)) == (bool(told) and value > 0)


@given(st.lists(st.text("abc", min_size=1), max_size=9))
def test_some_names_and_the_number_of_the_others_are_all(names):
    shown = some_of(names)
    assert all(name in shown for name in names[:MOST])
    assert shown.endswith(f" and {len(names) - MOST} more") == (len(names) > MOST)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 80), groups=st.integers(1, 80), flat=st.booleans())
def test_any_evaluation_gives_each_sentence_once_and_its_file_the_same(seed, count, groups, flat):
    random = np.random.default_rng(seed)
    true = np.eye(3)[random.integers(3, size=count)]
    orders = random.dirichlet([0.5] * 3, (2, 1 if flat else count)) + np.zeros((2, count, 3))
    columns = {"id": np.arange(count).astype(str), "group": random.integers(groups, size=count)}
    for prefix, array in {"": average_probabilities(list(orders)), "ab_": orders[0], "ba_": orders[1]}.items():
        columns |= {prefix + name: column for name, column in zip(PROBABILITIES, array.T, strict=True)}
    table = pd.DataFrame(columns | dict(zip(OUTCOMES, true.T, strict=True)))
    chars = {name: random.integers(9, size=count) for name in ("response_a_chars", "response_b_chars")}
    facts = evaluate(table.assign(model_a="gpt-4", model_b=random.choice(["claude-2", "palm-2"], count), **chars))
    said = findings(facts)
    assert len(set(said)) == len(said)
    assert findings(json.loads(json.dumps(facts))) == said
    assert any("nearly the same prediction" in one for one in said) == (flat and count > 1)
