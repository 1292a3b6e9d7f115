import dataclasses
import json
from dataclasses import asdict, astuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from rewardmodel.battles import OUTCOMES
from rewardmodel.errors import InputError
from rewardmodel.evaluation.bias import (
    audit_bias,
    format_bias,
    measure_model_bias,
    measure_position_bias,
    measure_verbosity_bias,
    model_family,
)
from rewardmodel.evaluation.bootstrap import draw_groups, percentile_interval
from rewardmodel.evaluation.findings import list_findings
from rewardmodel.evaluation.results import Evaluation, Interval, ModelBias
from rewardmodel.evaluation.slices import measure_slices
from rewardmodel.metrics import (
    accuracy,
    accuracy_decided,
    class_prior,
    log_loss,
)
from rewardmodel.predictions import PROBABILITIES, average_probabilities, predicted, true_outcomes

A, B, TIE = np.eye(3)
EVEN = [0.4, 0.4, 0.2]
SWAPPED = {"model_a": "model_b", "response_a_chars": "response_b_chars", "winner_model_a": "winner_model_b"}
SWAPPED |= {"p_model_a": "p_model_b", "ab_p_model_a": "ba_p_model_b", "ab_p_model_b": "ba_p_model_a"}
SWAPPED |= {"ab_p_tie": "ba_p_tie"}
SWAPPED |= {there: here for here, there in SWAPPED.items()}


def table_of(true, ab, ba=None, **columns):
    true, ab = np.array(true, float), np.array(ab, float)
    orders = {"ab_": ab} if ba is None else {"ab_": ab, "ba_": np.array(ba, float)}
    made = {"id": [str(row) for row in range(len(true))], "group": np.arange(len(true)), **columns}
    made |= dict(zip(OUTCOMES, true.T, strict=True))
    for prefix, array in {"": average_probabilities(list(orders.values())), **orders}.items():
        made |= {prefix + name: column for name, column in zip(PROBABILITIES, array.T, strict=True)}
    return pd.DataFrame(made)


def random_table(count=200, seed=0, soft=False, groups=None):
    random = np.random.default_rng(seed)
    true = random.dirichlet([1, 1, 1], count) if soft else np.eye(3)[random.integers(3, size=count)]
    return table_of(
        true,
        *random.dirichlet([2, 2, 2], (2, count)),
        group=random.integers(groups or max(1, count // 2), size=count),
        source=random.choice(["arena", "judge", ""], count),
        model_a=random.choice(["gpt-4", "gpt-3.5-turbo", "claude-2", ""], count),
        model_b=random.choice(["gpt-4", "vicuna-13b", "claude-1", "claude-2"], count),
        turns=random.integers(1, 6, count),
        script=random.choice(["Latin", "Han"], count, p=[0.9, 0.1]),
        prompt_chars=random.integers(0, 50, count),
        response_a_chars=random.integers(0, 300, count),
        response_b_chars=random.integers(0, 300, count),
    )


def swapped(table):
    return table.rename(columns=SWAPPED)


def same(found, expected):
    """Return whether two values that JSON can hold are the same up to rounding."""
    if isinstance(expected, dict):
        return set(found) == set(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == (pytest.approx(expected, rel=1e-6, abs=1e-8) if isinstance(expected, float) else expected)


def by_name(rows):
    return {row.name: row for row in rows}


def point(value):
    return Interval(value, None, None)


def near(interval, **tolerance):
    """Return what an interval equals that is the same up to rounding."""
    return pytest.approx(astuple(interval), **tolerance)


def bootstrapped(metric, table, order=""):
    arrays = predicted(table, order), true_outcomes(table)
    means = draw_groups(table["group"].to_numpy()).means(metric.columns(*arrays))
    return Interval(metric(*arrays), *percentile_interval(metric.of_mean(means[1:]), table["group"].nunique()))


def regression(x, won, weight):
    """Return scikit-learn's slope of the same regression, each battle as two weighted rows."""
    rows = np.concatenate([x, x])[:, None], np.repeat([1, 0], len(x))
    model = LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10)
    return model.fit(*rows, np.concatenate([weight * won, weight * (1 - won)])).coef_.item()


# position


def test_a_model_that_favours_what_stands_first_by_a_tenth():
    table = table_of([A, B, TIE, A], [[0.45, 0.35, 0.2]] * 4, [[0.35, 0.45, 0.2]] * 4)
    facts = measure_position_bias(table)
    for name, value in {"flip_rate": 1, "mean_abs_difference": 0.2 / 3, "preference": 0.1}.items():
        assert astuple(getattr(facts, name)) == near(point(value))
    assert facts.log_loss["ab"].value == pytest.approx(-np.log([0.45, 0.35, 0.2, 0.45]).mean())
    assert facts.log_loss["ba"].value == pytest.approx(-np.log([0.35, 0.45, 0.2, 0.35]).mean())
    assert facts.log_loss["average"].value == pytest.approx(-np.log([0.4, 0.4, 0.2, 0.4]).mean())
    assert facts.gain.value == pytest.approx(3 / 4 * (np.log(0.4) - np.log([0.45, 0.35]).mean()))


def test_a_model_that_always_says_a_has_no_preference_for_a_position():
    facts = measure_position_bias(table_of([A, B], [[0.6, 0.2, 0.2]] * 2, [[0.6, 0.2, 0.2]] * 2))
    assert facts.flip_rate.value == facts.preference.value == facts.gain.value == 0


def test_battles_without_the_second_order_are_left_out_of_what_order_does():
    ab, ba = [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], [[0.5, 0.4, 0.1], [0.3, 0.6, 0.1], [np.nan] * 3]
    true = np.eye(3)[[0, 1, 2]]
    assert measure_position_bias(table_of(true, ab, ba)) == measure_position_bias(table_of(true[:2], ab[:2], ba[:2]))
    assert measure_position_bias(table_of(true, ab, np.full((3, 3), np.nan))) is None


def test_flips_are_changes_of_the_likeliest_outcome():
    ab = [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]
    ba = [[0.5, 0.4, 0.1], [0.3, 0.6, 0.1], [0.3, 0.4, 0.3], [0.1, 0.2, 0.7]]
    assert measure_position_bias(table_of(np.eye(3)[[0, 1, 2, 0]], ab, ba)).flip_rate.value == 0.25


def test_log_losses_of_orders_have_the_intervals_of_the_metrics():
    table = random_table(soft=True)
    for order, found in measure_position_bias(table).log_loss.items():
        assert astuple(found) == near(bootstrapped(log_loss, table, "" if order == "average" else order))


def test_the_gain_is_paired_and_never_negative():
    facts = measure_position_bias(random_table())
    mean = (facts.log_loss["ab"].value + facts.log_loss["ba"].value) / 2
    assert facts.gain.value == pytest.approx(mean - facts.log_loss["average"].value)
    width = facts.log_loss["average"].high - facts.log_loss["average"].low
    assert 0 < facts.gain.low < facts.gain.high < facts.gain.low + width


def test_intervals_are_clustered_by_group():
    table = random_table(100)
    copies = pd.concat([table.assign(group=np.arange(100))] * 4, ignore_index=True)
    once = measure_position_bias(table.assign(group=np.arange(100)))
    assert same(asdict(measure_position_bias(copies)), asdict(once))
    narrow = measure_position_bias(copies.assign(group=np.arange(400))).flip_rate
    assert once.flip_rate.high - once.flip_rate.low > 1.5 * (narrow.high - narrow.low)


# verbosity


def lengths_table(true_slope=None, model_slope=0.5, count=3000, tie=0.25, seed=0):
    """Return battles whose winner follows the length by one slope (None: a fair coin), the model by another."""
    random = np.random.default_rng(seed)
    chars = np.exp(random.normal(6, 0.8, (count, 2))).astype(int)
    x = np.log((1 + chars[:, 0]) / (1 + chars[:, 1]))
    won, share = random.random(count) < expit((true_slope or 0) * x), expit(model_slope * x)
    true = np.where(random.random((count, 1)) < tie, TIE, np.where(won[:, None], A, B))
    ab = np.stack([share * (1 - tie), (1 - share) * (1 - tie), np.full(count, tie)], axis=1)
    return table_of(true, ab, response_a_chars=chars[:, 0], response_b_chars=chars[:, 1])


def test_planted_slopes_are_found_exactly_in_probabilities():
    table = lengths_table(model_slope=0.7)
    share = expit(0.3 * np.log((1 + table["response_a_chars"]) / (1 + table["response_b_chars"])))
    table = table.assign(winner_model_a=share * 0.8, winner_model_b=(1 - share) * 0.8, winner_tie=0.2)
    facts = measure_verbosity_bias(table)
    for name, slope in {"humans": 0.3, "model": 0.7, "difference": 0.4}.items():
        assert astuple(getattr(facts, name)) == near(point(slope), abs=1e-6)


def test_planted_slopes_are_found_in_votes():
    facts = measure_verbosity_bias(lengths_table(true_slope=0.4, model_slope=0.9))
    assert facts.humans.low < 0.4 < facts.humans.high
    assert facts.model.value == pytest.approx(0.9)
    assert facts.difference.low > 0.2
    assert facts.verdict == "the model favours longer responses more than people do"


def test_a_model_that_favours_length_less_than_people():
    facts = measure_verbosity_bias(lengths_table(true_slope=0.9, model_slope=0.1))
    assert facts.difference.high < 0
    assert facts.verdict == "the model favours longer responses less than people do"


@pytest.mark.parametrize("seed", range(3))
def test_equal_slopes_differ_by_nothing_beyond_noise(seed):
    facts = measure_verbosity_bias(lengths_table(true_slope=0.5, model_slope=0.5, seed=seed))
    assert facts.difference.low < 0 < facts.difference.high
    assert facts.verdict == "no difference from people beyond noise"


def test_intervals_of_a_slope_cover_as_often_as_they_say():
    facts = [measure_verbosity_bias(lengths_table(0.5, 0.5, count=200, seed=seed)).humans for seed in range(25)]
    assert 0.85 <= np.mean([one.low <= 0.5 <= one.high for one in facts]) <= 1
    spread = np.std([one.value for one in facts])
    assert np.mean([one.high - one.low for one in facts]) == pytest.approx(2 * 1.96 * spread, rel=0.4)


def test_the_slope_of_people_is_that_of_a_logistic_regression_on_decided_battles():
    table = lengths_table(true_slope=0.6)
    decided = table[table["winner_tie"] == 0]
    x = np.log((1 + decided["response_a_chars"]) / (1 + decided["response_b_chars"])).to_numpy()
    expected = regression(x, decided["winner_model_a"].to_numpy(), np.ones(len(x)))
    assert measure_verbosity_bias(table).humans.value == pytest.approx(expected, abs=1e-5)
    assert measure_verbosity_bias(table).battles == (x != 0).sum()


def test_soft_outcomes_weigh_as_much_as_somebody_won():
    table = random_table(soft=True)
    x = np.log((1 + table["response_a_chars"]) / (1 + table["response_b_chars"])).to_numpy()
    true, probabilities = (array[x != 0] for array in (true_outcomes(table), predicted(table)))
    x, weight, facts = x[x != 0], true[:, :2].sum(axis=1), measure_verbosity_bias(table)
    for name, array in {"humans": true, "model": probabilities}.items():
        share = array[:, 0] / array[:, :2].sum(axis=1)
        assert getattr(facts, name).value == pytest.approx(regression(x, share, weight), abs=1e-5)
        longer = np.average(np.where(x > 0, share, 1 - share), weights=weight)
        assert facts.longer_wins[name].value == pytest.approx(longer)


def test_how_often_the_longer_response_wins():
    chars = {"response_a_chars": [20, 20, 10, 20, 10], "response_b_chars": [10, 10, 20, 10, 10]}
    ab = [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.1, 0.7, 0.2], [0.1, 0.1, 0.8], [0.5, 0.4, 0.1]]
    facts = measure_verbosity_bias(table_of([A, A, A, TIE, B], ab, **chars))
    assert facts.battles == 3
    wins = {name: found.value for name, found in facts.longer_wins.items()}
    assert wins == pytest.approx({"humans": 2 / 3, "model": (0.75 + 0.25 + 0.875) / 3, "model_picks": 2 / 3})


def test_an_even_probability_is_half_a_pick():
    facts = measure_verbosity_bias(table_of([A], [EVEN], response_a_chars=[20], response_b_chars=[10]))
    assert facts.longer_wins["model_picks"].value == facts.longer_wins["model"].value == 0.5


def test_matched_battles_are_those_of_nearly_the_same_length():
    chars = {"response_a_chars": [99, 99, 108, 109, 0], "response_b_chars": [99, 108, 99, 99, 0]}
    table = table_of([A, B, TIE, A, A], np.random.default_rng(0).dirichlet([1, 1, 1], 5), **chars)
    inside, matched = table.iloc[[0, 1, 2, 4]], measure_verbosity_bias(table).matched
    true, probabilities = true_outcomes(inside), predicted(inside)
    assert matched.battles == 4
    assert matched.log_loss.value == pytest.approx(log_loss(probabilities, true))
    assert matched.accuracy.value == pytest.approx(accuracy(probabilities, true))
    assert matched.accuracy_decided.value == pytest.approx(accuracy_decided(probabilities, true))
    assert matched.prior == pytest.approx(log_loss(np.tile(class_prior(true), (4, 1)), true))


@pytest.mark.parametrize("winners", [[A, B], [B, A]])
def test_where_length_decides_every_battle_there_is_no_slope(winners):
    facts = measure_verbosity_bias(table_of(winners, [EVEN] * 2, response_a_chars=[20, 10], response_b_chars=[10, 20]))
    assert facts.humans is facts.difference is None
    assert astuple(facts.model) == near(point(0))
    assert facts.verdict == "whether the model favours length as people do cannot be estimated"


def test_where_nobody_wins_by_length_there_is_nothing_to_estimate():
    longer = {"response_a_chars": [20, 10], "response_b_chars": [10, 20]}
    ties = measure_verbosity_bias(table_of([TIE, TIE], [EVEN] * 2, **longer))
    alike = measure_verbosity_bias(table_of([A, B], [EVEN] * 2, response_a_chars=[20, 10], response_b_chars=[20, 10]))
    for facts in (ties, alike):
        assert facts.battles == 0
        assert facts.humans is facts.model is facts.difference is facts.longer_wins is None
    assert ties.matched is None
    assert alike.matched.battles == 2


def test_a_certain_tie_leaves_the_winner_open():
    facts = measure_verbosity_bias(table_of([A, B], [TIE, TIE], response_a_chars=[20, 10], response_b_chars=[10, 10]))
    assert facts.model.value == 0


# models


FAMILY_NAMES = {
    "gpt-4-0613": "gpt",
    "chatgpt-4o-latest": "gpt",
    "text-davinci-003": "gpt",
    "o1-mini": "gpt",
    "gpt4all-13b-snoozy": "gpt4all",
    "claude-instant-1": "claude",
    "Llama-2-13b-chat": "llama",
    "llama2-70b-steerlm-chat": "llama",
    "meta-llama/Meta-Llama-3-8B": "llama",
    "codellama-34b-instruct": "llama",
    "mixtral-8x7b-instruct-v0.1": "mistral",
    "mistralai/Mistral-7B-Instruct": "mistral",
    "google/gemma-2-9b-it": "gemma",
    "gemini-pro": "gemini",
    "palm-2": "palm",
    "vicuna_13b": "vicuna",
    "qwen1.5-72b-chat": "qwen",
    "chatglm3-6b": "glm",
    "yi-34b-chat": "yi",
    "01": "01",
    "": "",
}


@pytest.mark.parametrize(("name", "expected"), FAMILY_NAMES.items())
def test_family_of_a_name(name, expected):
    assert model_family(name) == expected


def favouring_table():
    """Return 160 battles that gpt-4 and claude-2 win alike, a quarter tied, while the model gives gpt-4 20 points."""
    as_a = table_of([A, B, B, TIE, A, A, B, TIE] * 10, [[0.55, 0.15, 0.3]] * 80, model_a="gpt-4", model_b="claude-2")
    as_b = table_of([A, B, B, TIE, A, A, B, TIE] * 10, [[0.15, 0.55, 0.3]] * 80, model_a="claude-2", model_b="gpt-4")
    return pd.concat([as_a, as_b], ignore_index=True).assign(group=np.arange(160))


def test_a_family_that_the_model_favours():
    facts = measure_model_bias(favouring_table())
    for kind, names in {"families": ["gpt", "claude"], "names": ["gpt-4", "claude-2"]}.items():
        rows = by_name(getattr(facts, kind))
        assert set(rows) == set(names)
        for name, sign in zip(names, [1, -1], strict=True):
            assert rows[name].battles == 160
            assert rows[name].human == pytest.approx(0.5)
            assert rows[name].predicted == pytest.approx(0.5 + sign * 0.2)
            assert rows[name].difference.value == pytest.approx(sign * 0.2)
        assert 0 < rows[names[0]].difference.low < 0.2 < rows[names[0]].difference.high
    (pair,) = facts.pairs
    assert (pair.name, pair.against) == ("claude-2", "gpt-4")
    assert pair.difference.value == pytest.approx(-0.2)


def test_an_interval_of_models_is_the_bootstrap_of_their_battles():
    table = favouring_table().assign(group=np.repeat(np.arange(40), 4))
    side = np.where(table["model_a"] == "gpt-4", 1, -1)
    terms = (table["p_model_a"] - table["p_model_b"] - table["winner_model_a"] + table["winner_model_b"]) / 2 * side
    drawn = draw_groups(table["group"].to_numpy()).means(terms.to_numpy()[:, None])[1:]
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = by_name(measure_model_bias(table).names)["gpt-4"].difference
    assert astuple(found) == near(Interval(terms.mean(), low, high))


def test_rates_of_names_against_direct_computation():
    table = random_table(400)
    for row in measure_model_bias(table, least=1).names:
        apart = table[table["model_a"] != table["model_b"]]
        as_a, as_b = apart[apart["model_a"] == row.name], apart[apart["model_b"] == row.name]
        assert row.battles == len(as_a) + len(as_b)
        for key, prefix, tie in (("human", "winner", "winner_tie"), ("predicted", "p", "p_tie")):
            wins = as_a[f"{prefix}_model_a"].sum() + as_b[f"{prefix}_model_b"].sum()
            assert getattr(row, key) == pytest.approx((wins + (as_a[tie].sum() + as_b[tie].sum()) / 2) / row.battles)
        assert row.difference.value == pytest.approx(row.predicted - row.human)


def test_models_are_sorted_by_how_far_off_they_are_and_those_with_few_battles_left_out():
    table = random_table(400)
    everything, some = measure_model_bias(table, least=1), measure_model_bias(table, least=95)
    for kind, rows in vars(everything).items():
        far = [abs(row.difference.value) for row in rows]
        assert far == sorted(far, reverse=True)
        assert getattr(some, kind) == [row for row in rows if row.battles >= 95]
        assert "" not in by_name(rows)
    assert 0 < len(some.names) < len(everything.names)


def test_a_model_against_itself_is_not_counted():
    alone = favouring_table().assign(model_a="gpt-4", model_b="gpt-4")
    assert measure_model_bias(alone) == ModelBias([], [], [])
    table = pd.concat([favouring_table(), alone], ignore_index=True)
    facts, expected = measure_model_bias(table.assign(group=np.arange(320))), measure_model_bias(favouring_table())
    for kind, rows in vars(expected).items():
        for found, row in zip(getattr(facts, kind), rows, strict=True):
            assert (found.name, found.against, found.battles) == (row.name, row.against, row.battles)
            rates = [(one.human, one.predicted, one.difference.value) for one in (found, row)]
            assert rates[0] == pytest.approx(rates[1])


def test_models_of_a_family_against_each_other_count_as_models_only():
    facts = measure_model_bias(favouring_table().replace("claude-2", "gpt-3.5"))
    assert facts.families == []
    assert len(facts.names) == 2


def test_one_unknown_name_leaves_the_other():
    facts = measure_model_bias(favouring_table().replace({"claude-2": "", "gpt-4": "gpt-4"}))
    assert [row.name for row in facts.names] == ["gpt-4"]
    assert facts.pairs == []


@pytest.mark.parametrize("unknown", ["", None])
def test_unknown_names_give_empty_lists(unknown):
    table = favouring_table().assign(model_a=unknown, model_b=unknown)
    assert measure_model_bias(table) == ModelBias([], [], [])


# slices


MASKS = {
    "outcome": lambda table: {
        name: table[column] == 1 for name, column in zip(("A", "B", "tie"), OUTCOMES, strict=True)
    },
    "source": lambda table: {name or "unknown": table["source"] == name for name in ("arena", "judge", "")},
    "script": lambda table: {name: table["script"] == name for name in ("Latin", "Han")},
    "turns": lambda table: {"1": table["turns"] == 1, "2": table["turns"] == 2, "3+": table["turns"] > 2},
}


@pytest.mark.parametrize("dimension", MASKS)
def test_slices_against_direct_computation(dimension):
    table = random_table(600)
    rows, masks = by_name(measure_slices(table)[dimension]), MASKS[dimension](table)
    assert set(rows) == set(masks)
    prior_all = class_prior(true_outcomes(table))
    for name, mask in masks.items():
        part, row = table[mask], rows[name]
        true, probabilities = true_outcomes(part), predicted(part)
        assert row.battles == len(part)
        assert row.log_loss.value == pytest.approx(log_loss(probabilities, true))
        assert row.accuracy.value == pytest.approx(accuracy(probabilities, true))
        if name == "tie":
            assert row.accuracy_decided is None
        else:
            assert row.accuracy_decided.value == pytest.approx(accuracy_decided(probabilities, true))
        assert row.prior == pytest.approx(log_loss(np.broadcast_to(class_prior(true), true.shape), true))
        assert row.prior_all == pytest.approx(log_loss(np.broadcast_to(prior_all, true.shape), true))
        expected = bootstrapped(log_loss, part)
        assert row.log_loss.high - row.log_loss.low == pytest.approx(expected.high - expected.low, rel=0.3)


def test_a_slice_of_the_whole_table_has_the_intervals_of_the_metrics():
    table = random_table().assign(script="Latin")
    (row,) = measure_slices(table)["script"]
    for name, metric in {"log_loss": log_loss, "accuracy": accuracy, "accuracy_decided": accuracy_decided}.items():
        assert astuple(getattr(row, name)) == near(bootstrapped(metric, table))


def test_lengths_are_cut_into_quarters_named_by_their_range():
    table = random_table(400).assign(response_a_chars=np.arange(1, 401), response_b_chars=0)
    rows = measure_slices(table)["length"]
    assert [(row.name, row.battles) for row in rows] == [
        ("0-100", 100),
        ("101-200", 100),
        ("201-300", 100),
        ("301-400", 100),
    ]
    assert [row.name for row in measure_slices(table.assign(response_a_chars=7))["length"]] == ["0-7"]
    assert [row.name for row in measure_slices(table.assign(prompt_chars=[5] * 300 + [9] * 100))["prompt_length"]] == [
        "0-5",
        "6-9",
    ]


def test_length_gaps_are_ratios():
    pairs = [(99, 99), (99, 108), (99, 109), (99, 199), (99, 200), (0, 2)]
    table = random_table(60).assign(
        response_a_chars=[pair[0] for pair in pairs] * 10, response_b_chars=[pair[1] for pair in pairs] * 10
    )
    found = {row.name: row.battles for row in measure_slices(table, least=1)["length_gap"]}
    assert found == {"within 10 %": 20, "up to 2x": 20, "above 2x": 20}


def test_small_slices_are_one():
    table = random_table(100).assign(source=["a"] * 60 + ["b"] * 25 + ["c"] * 15)
    rows = measure_slices(table)["source"]
    assert [(row.name, row.battles) for row in rows] == [("a", 60), ("others (2)", 40)]
    assert rows[1].log_loss.value == pytest.approx(log_loss(predicted(table[60:]), true_outcomes(table[60:])))
    assert [row.name for row in measure_slices(table, least=15)["source"]] == ["a", "b", "c"]


def test_slices_hold_every_battle_once():
    for rows in measure_slices(random_table(333)).values():
        assert sum(row.battles for row in rows) == 333


def test_sources_that_are_all_unknown_are_no_slices():
    assert measure_slices(random_table().assign(source=""))["source"] is None


def test_an_outcome_between_a_and_b_is_a_tie():
    table = random_table(40).assign(winner_model_a=0.5, winner_model_b=0.5, winner_tie=0.0)
    assert [row.name for row in measure_slices(table)["outcome"]] == ["tie"]


# the whole audit


def sort_rows(facts):
    for rows in (*facts["slices"].values(), *facts["models"].values()):
        rows.sort(key=lambda row: (row["name"], row.get("against") or ""))
    return facts


def exchanged(facts):
    """Return the facts with what must change when A and B are exchanged changed."""
    losses = facts["position"]["log_loss"]
    losses["ab"], losses["ba"] = losses["ba"], losses["ab"]
    for row in facts["slices"]["outcome"]:
        row["name"] = {"A": "B", "B": "A"}.get(row["name"], row["name"])
    return sort_rows(facts)


@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(80, 120), soft=st.booleans())
def test_exchanging_a_and_b_changes_only_what_must(seed, count, soft):
    table = random_table(count, seed, soft)
    there = sort_rows(asdict(audit_bias(swapped(table))))
    assert same(exchanged(asdict(audit_bias(table))), there)


@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_battles_changes_nothing(seed):
    table = random_table(80, seed)
    facts = asdict(audit_bias(table))
    assert same(asdict(audit_bias(table.sample(frac=1, random_state=seed % 1000))), facts)
    assert same(asdict(audit_bias(table.assign(group=table["group"] * 3 - 7))), facts)


SMALL = {
    "one row": lambda: random_table(1),
    "one tie": lambda: table_of([TIE], [EVEN], [EVEN], response_a_chars=[0], response_b_chars=[0]),
    "all ties": lambda: random_table(40).assign(winner_model_a=0.0, winner_model_b=0.0, winner_tie=1.0),
    "all won by A": lambda: random_table(40).assign(winner_model_a=1.0, winner_model_b=0.0, winner_tie=0.0),
    "one group": lambda: random_table(40, groups=1),
    "two groups": lambda: random_table(40, groups=2),
    "sure and wrong": lambda: random_table(40).assign(p_model_a=1.0, p_model_b=0.0, p_tie=0.0),
    "empty texts": lambda: random_table(40).assign(prompt_chars=0, response_a_chars=0, response_b_chars=0),
}


@pytest.mark.parametrize("made", SMALL.values(), ids=SMALL)
def test_small_tables_can_be_written_as_json_and_words(made):
    facts = audit_bias(made())
    assert json.loads(json.dumps(asdict(facts), allow_nan=False)) == asdict(facts)
    assert format_bias(facts).startswith("order of the responses")


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 12), soft=st.booleans())
def test_any_small_table_can_be_written(seed, count, soft):
    facts = audit_bias(random_table(count, seed, soft))
    assert json.loads(json.dumps(asdict(facts), allow_nan=False)) == asdict(facts)
    format_bias(facts)


def test_one_group_shows_nothing_beyond_chance():
    assert "nothing stands out" in format_bias(audit_bias(lengths_table(1.5, -1, count=200).assign(group=0)))


def test_an_audit_is_the_same_twice():
    assert audit_bias(random_table()) == audit_bias(random_table())


def test_older_tables_are_audited_as_far_as_they_go():
    table = random_table()[["id", "group", *OUTCOMES, *PROBABILITIES]]
    facts = audit_bias(table)
    assert facts.battles == 200
    assert facts.position is facts.verbosity is facts.models is None
    assert {name for name, rows in facts.slices.items() if rows} == {"outcome"}
    assert list(facts.slices) == ["outcome", "source", "script", "turns", "length", "length_gap", "prompt_length"]
    assert len(format_bias(facts).splitlines()) == 6


@pytest.mark.parametrize(
    "audit", [audit_bias, measure_position_bias, measure_verbosity_bias, measure_model_bias, measure_slices]
)
def test_outcomes_must_be_known(audit):
    with pytest.raises(InputError, match="not known"):
        audit(random_table(5).assign(winner_tie=np.nan))
    with pytest.raises(InputError, match="not known"):
        audit(random_table(5)[:0])


# lines for a terminal


def test_lines_are_short_and_few_where_nothing_is_off():
    random, count = np.random.default_rng(0), 900
    table = random_table(count).assign(group=np.arange(count))
    share = random.dirichlet([4, 4, 4], count)
    true = np.eye(3)[(random.random((count, 1)) > share.cumsum(axis=1)).sum(axis=1)]
    for names, array in ((OUTCOMES, true), (PROBABILITIES, share)):
        table[list(names)] = array
    for order in ("ab_", "ba_"):
        table[[order + name for name in PROBABILITIES]] = share
    lines = format_bias(audit_bias(table)).splitlines()
    assert lines[-1] == "nothing stands out"
    assert len(lines) <= 28
    assert max(map(len, lines)) <= 118


def test_what_stands_out_is_listed_as_the_findings_say_it():
    facts = audit_bias(lengths_table(true_slope=0.2, model_slope=-1.5, count=800))
    orders = table_of([A, B] * 10, [[0.45, 0.35, 0.2]] * 20, [[0.35, 0.45, 0.2]] * 20)
    facts = dataclasses.replace(facts, position=measure_position_bias(orders))
    assert len(list_findings(facts)) > 2
    lines = format_bias(facts).split("what stands out\n")[1].replace("\n    ", " ").splitlines()
    assert lines == [f"  - {sentence}" for sentence in list_findings(facts)]


def test_dimensions_of_one_slice_have_no_line():
    one = measure_slices(random_table(40, groups=20))
    text, single = (
        format_bias(Evaluation(40, 20, slices=one)),
        [rows[0].name for rows in one.values() if rows and len(rows) == 1],
    )
    assert single
    assert not any(f"{name}: " in text for name in single)
    alone = {name: rows and rows[:1] for name, rows in one.items()}
    assert "slices: too few battles" in format_bias(Evaluation(40, 20, slices=alone))


def test_of_few_prompts_no_preference_for_length_is_claimed():
    facts = measure_verbosity_bias(random_table(40, groups=3))
    assert facts.difference.low is None
    assert facts.verdict == "too few prompts to tell whether the model favours length as people do"
