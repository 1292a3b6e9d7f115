import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel.battles import OUTCOMES
from rewardmodel.evaluation.bootstrap import FEWEST_GROUPS
from rewardmodel.evaluation.evaluate import evaluate
from rewardmodel.evaluation.findings import (
    LARGE_GAP,
    MANY_FLIPS,
    MAX_NAMES,
    MIN_SPREAD,
    UNIFORM_LOG_LOSS,
    join_names,
    list_findings,
)
from rewardmodel.evaluation.results import (
    Evaluation,
    Interval,
    ModelBias,
    PositionBias,
    Reliability,
    ReliabilityBin,
    Slice,
    VerbosityBias,
    WinRate,
    read_evaluation,
)
from rewardmodel.files import write_json
from rewardmodel.predictions import PROBABILITIES, average_probabilities


def interval(value, low=None, high=None):
    """Return an estimate and its interval; one number alone has none."""
    return Interval(value, low, high)


def measured(groups=100, **metrics):
    return Evaluation(groups, groups, metrics=metrics)


def ordered(groups=100, **position):
    nothing = {name: interval(0) for name in ("flip_rate", "mean_abs_difference", "preference", "gain")}
    return Evaluation(groups, groups, position=PositionBias(**nothing | position, log_loss={}))


def confident(mean, hits, after=None):
    """Return an evaluation of two bins whose mean confidence is `mean`."""
    bins = [ReliabilityBin(0, 1, *one, 0, 0, 0) for one in ((30, mean - 0.1), (10, mean + 0.3))]
    later = None if after is None else [ReliabilityBin(0, 1, 5, after, 0, 0, 0)]
    return replace(measured(accuracy=hits), reliability=Reliability(bins, later))


def confused(rows, groups, means):
    return Evaluation(sum(map(sum, rows)), groups, confusion=rows, mean_probabilities=means)


def longer(slope, low, high):
    difference = interval(slope, low, high)
    return Evaluation(100, 100, verbosity=VerbosityBias(100, None, None, difference, "", None, None))


def favoured(gaps, kind="families", names=()):
    """Return an evaluation of models whose win rate is off by known gaps, a point each side."""
    rows = [WinRate(f"m{row}", 50, 0, 0, interval(gap, gap - 0.01, gap + 0.01)) for row, gap in enumerate(gaps)]
    return Evaluation(100, 100, models=ModelBias(**{"families": [], "names": list(names), "pairs": []} | {kind: rows}))


def sliced(*losses, dimension="source", width=0.01):
    """Return an evaluation of slices of 50 battles whose outcome shares have a log loss of 1.05."""
    other = {"battles": 50, "accuracy": interval(0), "accuracy_decided": None, "prior": 1.05, "prior_all": 1.05}
    rows = [
        Slice(name=f"s{row}", log_loss=interval(loss, loss - width, loss + width), **other)
        for row, loss in enumerate(losses)
    ]
    return Evaluation(100, 100, slices={"turns": None, dimension: rows})


TWICE_AS_LONG = 2 * math.atanh(LARGE_GAP) / math.log(2)
"""Slope at which a response twice as long is favoured by `LARGE_GAP`."""

RULES = {
    "log loss": (
        measured(log_loss=interval(1.2, UNIFORM_LOG_LOSS + 0.001, 1.3)),
        measured(log_loss=interval(1.2, UNIFORM_LOG_LOSS - 0.001, 1.3)),
        "The log loss, 1.2000, is worse than 1.0986, that of one third each.",
    ),
    "log loss, the same in every group": (
        measured(FEWEST_GROUPS, log_loss=interval(1.2)),
        measured(FEWEST_GROUPS - 1, log_loss=interval(1.2)),
        "The log loss, 1.2000, is worse than 1.0986, that of one third each.",
    ),
    "spread": (
        Evaluation(2, 2, spread=MIN_SPREAD * 0.99),
        Evaluation(2, 2, spread=MIN_SPREAD),
        "All battles get nearly the same prediction: the model ignores its input.",
    ),
    "spread of one battle": (
        Evaluation(2, 2, spread=0.0),
        Evaluation(1, 1, spread=0.0),
        "All battles get nearly the same prediction: the model ignores its input.",
    ),
    "winners": (
        measured(accuracy_decided=interval(0.58, 0.499, 0.66)),
        measured(accuracy_decided=interval(0.58, 0.501, 0.66)),
        "Picking the winner is not shown to be better than chance: 58 % [50, 66] of decided battles are right.",
    ),
    "winners, all of them": (
        measured(FEWEST_GROUPS - 1, accuracy_decided=interval(1.0)),
        measured(FEWEST_GROUPS, accuracy_decided=interval(1.0)),
        "Picking the winner is not shown to be better than chance: 100 % of decided battles are right.",
    ),
    "losers": (
        measured(accuracy_decided=interval(0.4, 0.35, 0.45)),
        measured(accuracy_decided=interval(0.6, 0.55, 0.65)),
        "Picking the winner is not shown to be better than chance: 40 % [35, 45] of decided battles are right.",
    ),
    "too sure by a size that matters": (
        confident(0.551, interval(0.5, 0.49, 0.51)),
        confident(0.549, interval(0.5, 0.49, 0.51)),
        "The model is overconfident: the likeliest outcome gets 55 % on average, and happens in 50 % of battles.",
    ),
    "too unsure beyond chance": (
        confident(0.4, interval(0.5, 0.401, 0.6)),
        confident(0.4, interval(0.5, 0.399, 0.6)),
        "The model is underconfident: the likeliest outcome gets 40 % on average, and happens in 50 % of battles.",
    ),
    "too sure after calibration": (
        confident(0.5, interval(0.5, 0.49, 0.51), after=0.6),
        confident(0.6, interval(0.5, 0.49, 0.51), after=0.5),
        "The model is overconfident: the likeliest outcome gets 60 % on average, and happens in 50 % of battles.",
    ),
    "too little for a tie beyond chance": (  # 20 of 100 are 13.3 to 28.9 % (Wilson)
        confused([[30, 10, 0], [10, 30, 0], [15, 5, 0]], 100, [0.45, 0.43, 0.12]),
        confused([[30, 10, 0], [10, 30, 0], [15, 5, 0]], 100, [0.43, 0.43, 0.14]),
        "P(tie) is 12 % on average, but it happens in 20 %; it is never the likeliest outcome.",
    ),
    "too much for a win of B, by what matters": (
        confused([[300, 100, 0], [100, 300, 0], [100, 99, 1]], 1000, [0.37, 0.451, 0.179]),
        confused([[300, 100, 0], [100, 300, 0], [100, 99, 1]], 1000, [0.37, 0.449, 0.181]),
        "P(B wins) is 45 % on average, but it happens in 40 %.",
    ),
    "flips": (
        ordered(flip_rate=interval(0.42, MANY_FLIPS + 0.001, 0.5)),
        ordered(flip_rate=interval(0.42, MANY_FLIPS - 0.001, 0.5)),
        "The verdict flips with the order of the responses in 42 % of battles.",
    ),
    "flips, all of them": (
        ordered(FEWEST_GROUPS, flip_rate=interval(1.0)),
        ordered(FEWEST_GROUPS - 1, flip_rate=interval(1.0)),
        "The verdict flips with the order of the responses in 100 % of battles.",
    ),
    "first place, of a size that matters": (
        ordered(preference=interval(LARGE_GAP, 0.04, 0.06)),
        ordered(preference=interval(LARGE_GAP - 0.001, 0.04, 0.06)),
        "The model favours the response that stands first, by 5 points of probability.",
    ),
    "second place, beyond chance": (
        ordered(preference=interval(-0.1, -0.2, -0.001)),
        ordered(preference=interval(-0.1, -0.2, 0.001)),
        "The model favours the response that stands second, by 10 points of probability.",
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
        "The predicted win rate of 3 of 20 families is off: "
        "m0 10 points too high, m1 20 points too low, m2 6 points too high.",
    ),
    "a family, of a size that matters": (
        favoured([LARGE_GAP]),
        favoured([LARGE_GAP - 0.001]),
        "The predicted win rate of 1 of 1 families is off: m0 5 points too high.",
    ),
    "models of families that are not off": (
        favoured([0.1, -0.1], kind="names"),
        favoured([0.005, -0.005], kind="names"),
        "The predicted win rate of 2 of 2 models is off: m0 10 points too high, m1 10 points too low.",
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
    assert list_findings(beyond) == [sentence]
    assert list_findings(short) == []


def test_models_are_not_named_beside_their_families():
    both = favoured([0.1, 0.2], names=favoured([0.3], kind="names").models.names)
    (sentence,) = list_findings(both)
    assert "2 of 2 families is off: m0" in sentence


def test_a_slice_by_what_happened_says_nothing():
    assert list_findings(sliced(1.5, 0.1, dimension="outcome")) == []


def test_an_outcome_that_never_happens_need_not_be_found():
    assert list_findings(confused([[50, 10, 0], [10, 50, 0], [0, 0, 0]], 120, [0.5, 0.48, 0.02])) == []


def test_steps_without_a_loss_are_counted():
    assert list_findings(Evaluation(0, 0), [(1, 0.5), (2, math.nan), (3, math.inf)]) == [
        "The training loss was NaN or infinite at 2 logged steps."
    ]
    assert list_findings(Evaluation(0, 0), [(1, 0.5)]) == []


def test_a_preference_costs_what_the_constant_says():
    shifted = 0.35 + np.array([1, -1]) * LARGE_GAP / 2
    assert round(float(-0.35 * np.log(shifted / 0.35).sum()), 3) == 0.002


def test_what_was_not_measured_is_skipped():
    assert list_findings(Evaluation(100, 100)) == []
    assert list_findings(Evaluation(100, 100, metrics={}, confusion=[], mean_probabilities=[], slices={})) == []


@given(st.floats(-1, 1), st.floats(1e-6, 1))
def test_a_preference_is_listed_where_it_is_large_and_beyond_chance(value, half):
    listed = list_findings(ordered(preference=interval(value, value - half, value + half)))
    beyond = not value - half <= 0 <= value + half
    assert bool(listed) == (abs(value) >= LARGE_GAP and beyond)
    assert ("first" in "".join(listed)) == (bool(listed) and value > 0)


@given(st.lists(st.text("abc", min_size=1), max_size=9))
def test_some_names_and_the_number_of_the_others_are_all(names):
    shown = join_names(names)
    assert all(name in shown for name in names[:MAX_NAMES])
    assert shown.endswith(f" and {len(names) - MAX_NAMES} more") == (len(names) > MAX_NAMES)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 80), groups=st.integers(1, 80), flat=st.booleans())
def test_any_evaluation_gives_each_sentence_once_and_its_file_the_same(tmp_path_factory, seed, count, groups, flat):
    random = np.random.default_rng(seed)
    true = np.eye(3)[random.integers(3, size=count)]
    orders = random.dirichlet([0.5] * 3, (2, 1 if flat else count)) + np.zeros((2, count, 3))
    columns = {"id": np.arange(count).astype(str), "group": random.integers(groups, size=count)}
    for prefix, array in {"": average_probabilities(list(orders)), "ab_": orders[0], "ba_": orders[1]}.items():
        columns |= {prefix + name: column for name, column in zip(PROBABILITIES, array.T, strict=True)}
    table = pd.DataFrame(columns | dict(zip(OUTCOMES, true.T, strict=True)))
    chars = {name: random.integers(9, size=count) for name in ("response_a_chars", "response_b_chars")}
    facts = evaluate(table.assign(model_a="gpt-4", model_b=random.choice(["claude-2", "palm-2"], count), **chars))
    said = list_findings(facts)
    assert len(set(said)) == len(said)
    path = tmp_path_factory.mktemp("run") / "metrics.json"
    write_json(path, asdict(facts))
    assert list_findings(read_evaluation(path)) == said
    assert any("nearly the same prediction" in one for one in said) == (flat and count > 1)
