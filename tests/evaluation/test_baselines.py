import subprocess
import sys

import numpy as np
import pytest
from builders import battles_of, changed, drawn
from datasets import concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel.battles import OUTCOMES, swap, with_column
from rewardmodel.config.schema import DataConfig
from rewardmodel.data.folds import CALIBRATION_FOLD, HOLDOUT_FOLD, TRAIN_ONLY
from rewardmodel.data.splits import load_battles
from rewardmodel.errors import InputError
from rewardmodel.evaluation import text_regression as regression
from rewardmodel.evaluation.baselines import (
    BASELINES,
    baseline,
    fit_baselines,
    format_baseline,
    measure_baselines,
    predict_baselines,
)
from rewardmodel.metrics import class_prior, log_loss
from rewardmodel.predictions import PROBABILITIES

GRAMS = regression.GRAMS


@pytest.fixture(scope="module", autouse=True)
def _few_columns():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regression, "GRAMS", tuple({**settings, "n_features": 2**12} for settings in GRAMS))
        yield


def fit_predict(training, judged):
    return predict_baselines(fit_baselines(training), judged)


ALL = [f"{name}_{outcome}" for name in BASELINES for outcome in PROBABILITIES]


def array(table, name):
    return table[[f"{name}_{outcome}" for outcome in PROBABILITIES]].to_numpy()


@pytest.fixture(scope="module")
def trained():
    return drawn(200)


def test_the_prior_is_the_weighted_shares_of_both_orders():
    battles = battles_of([("x", "y")] * 4, [[1, 0, 0], [1, 0, 0], [0.25, 0.75, 0], [0, 0, 1]], weight=[1, 1, 2, 4])
    found = array(fit_predict(battles, battles), "prior")
    assert found == pytest.approx(np.tile([0.25, 0.25, 0.5], (4, 1)), abs=1e-7)


def test_words_that_win_are_found_by_tfidf_alone(trained):
    judged = drawn(200, seed=1)
    table = fit_predict(trained, judged)
    true = np.stack([judged[name] for name in OUTCOMES], axis=1)
    loss = {name: log_loss(array(table, name), true) for name in BASELINES}
    assert loss["tfidf"] < loss["length"] - 0.02
    assert loss["length"] < loss["prior"] - 0.02


texts = st.text(alphabet=st.sampled_from("ab é雪\u0000\n\U0001f600"), max_size=40)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_a_swap_is_exact(trained, pairs):
    judged = battles_of(pairs, np.full((len(pairs), 3), np.nan))
    counts, exchanged = regression.count_texts(judged), regression.count_texts(swap(judged))
    for fitted in fit_baselines(trained).values():
        given, swapped = fitted(counts), fitted(exchanged)
        assert swapped[:, [1, 0, 2]] == pytest.approx(given, abs=1e-9)
        assert given.sum(axis=1) == pytest.approx(1, abs=1e-12)
        assert (given > 0).all()


def test_training_battles_may_stand_in_either_order(trained):
    judged = drawn(30, seed=2)
    mixed = concatenate_datasets([trained.select(range(90)), swap(trained.select(range(90, 200)))])
    given, exchanged = (fit_predict(part, judged)[ALL].to_numpy() for part in (trained, mixed))
    assert exchanged == pytest.approx(given, abs=1e-5)


def test_a_weight_of_two_is_the_battle_twice(trained):
    judged = drawn(50, seed=3)
    heavy = changed(trained, weight=[2.0] * 40 + [1.0] * 160)
    again = trained.select(range(40))
    again = changed(again, id=[f"again{row}" for row in range(40)])
    once = fit_predict(trained, judged)[ALL].to_numpy()
    weighted = fit_predict(heavy, judged)[ALL].to_numpy()
    twice = fit_predict(concatenate_datasets([trained, again]), judged)[ALL].to_numpy()
    assert weighted == pytest.approx(twice, abs=2e-3)
    assert abs(once - twice).max() > 0.01


def test_a_soft_outcome_is_the_battle_with_each_outcome_by_its_weight():
    soft, judged = drawn(150, soft=True), drawn(40, seed=4)
    chances = np.stack([soft[name] for name in OUTCOMES], axis=1)
    parts = []
    for column in range(3):
        hard = {name: [float(place == column)] * 150 for place, name in enumerate(OUTCOMES)}
        ids = [f"{column}-{row}" for row in range(150)]
        parts.append(changed(soft, id=ids, weight=chances[:, column].tolist(), **hard))
    hard = concatenate_datasets(parts)
    found, known = (fit_predict(part, judged)[ALL].to_numpy() for part in (soft, hard))
    assert found == pytest.approx(known, abs=2e-3)


def test_unlabelled_training_battles_are_refused(trained):
    unlabelled = battles_of([("x", "y")], np.full((1, 3), np.nan))
    unlabelled = changed(unlabelled, **{name: [None] for name in OUTCOMES})
    with pytest.raises(InputError, match="outcome"):
        fit_predict(unlabelled, trained)
    with pytest.raises(InputError, match="outcome"):
        fit_predict(trained.select([]), trained)
    with pytest.raises(InputError, match="outcome"):
        baseline(unlabelled)
    table = fit_predict(trained, unlabelled)
    assert table.columns.tolist() == ["id", *ALL]
    assert table["id"].tolist() == ["id0"]


@pytest.mark.parametrize("folds", [[-1] * 200, [0] * 200, [TRAIN_ONLY] * 200, [CALIBRATION_FOLD] * 200])
def test_battles_without_two_folds_are_refused(trained, folds):
    with pytest.raises(InputError, match="assign_folds"):
        baseline(changed(trained, fold=folds))


def test_every_battle_of_a_fold_is_judged_in_order_and_no_other(trained):
    folds = np.array(trained["fold"][:])
    folds[:20], folds[20:40], folds[40:60] = TRAIN_ONLY, CALIBRATION_FOLD, HOLDOUT_FOLD
    battles = changed(trained, fold=folds.tolist())
    table = baseline(battles)
    assert table.columns.tolist() == ["id", "group", *OUTCOMES, *ALL]
    assert table["id"].tolist() == trained["id"][60:]
    for name in ("group", *OUTCOMES):
        assert table[name].tolist() == trained[name][60:]
    training = battles.select(np.flatnonzero((folds == TRAIN_ONLY) | (folds > 0)))
    judged = battles.select(np.flatnonzero(folds == 0))
    known = fit_predict(training, judged).set_index("id")
    found = table.set_index("id").loc[known.index]
    assert found[ALL].to_numpy() == pytest.approx(known.to_numpy(), abs=1e-5)


@pytest.mark.parametrize("part", [0, 3, CALIBRATION_FOLD])
def test_no_baseline_sees_the_outcomes_of_what_it_judges(trained, part):
    folds = np.array(trained["fold"][:])
    folds[:40] = CALIBRATION_FOLD
    there = folds == part
    other = np.stack([trained[name] for name in OUTCOMES], axis=1)
    other[there] = [0, 0, 1]
    relabelled = dict(zip(OUTCOMES, other.T.tolist(), strict=True)) | {"weight": np.where(there, 7.0, 1.0).tolist()}
    given = baseline(changed(trained, fold=folds.tolist()))
    after = baseline(changed(trained, fold=folds.tolist(), **relabelled))
    own = np.isin(given["id"], np.array(trained["id"][:])[there]) if part >= 0 else np.ones(len(given), bool)
    assert (given[ALL].to_numpy() == after[ALL].to_numpy())[own].all()
    assert part < 0 or not (given[ALL].to_numpy() == after[ALL].to_numpy())[~own].any(axis=1).all()


def test_the_same_battles_give_the_same_table(trained):
    assert baseline(trained).equals(baseline(trained))


def test_odd_texts_and_outcomes_are_predicted():
    pairs = [("", ""), ("雪が降る 😀", ""), ("word " * 40_000, "x"), ("\u0000", " "), ("same", "same")]
    battles = battles_of(pairs, [[1, 0, 0]] * 5, fold=[0, 1, 0, 1, 0])
    table = baseline(battles)
    values = table[ALL].to_numpy()
    assert np.isfinite(values).all()
    assert len(table) == 5
    assert array(table, "tfidf")[0][0] == pytest.approx(array(table, "tfidf")[0][1], abs=1e-9)
    assert array(table, "prior")[0] == pytest.approx([0.5, 0.5, 0])


def test_measure_gives_intervals_by_group_and_a_table(trained):
    table = baseline(trained)
    facts = measure_baselines(table)
    assert list(facts) == list(BASELINES)
    true = table[list(OUTCOMES)].to_numpy()
    for name, found in facts.items():
        assert list(found) == ["log_loss", "accuracy"]
        assert found["log_loss"].value == log_loss(array(table, name), true)
        for metric in found.values():
            assert metric.low < metric.value < metric.high
    wide = measure_baselines(table.assign(group=table["group"] // 20))
    spread = [one["length"]["log_loss"].high - one["length"]["log_loss"].low for one in (facts, wide)]
    assert spread[0] != spread[1]
    assert facts["prior"]["log_loss"].value == pytest.approx(
        log_loss(np.broadcast_to(class_prior(true), true.shape), true), abs=0.03
    )
    lines = format_baseline(facts).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(BASELINES)
    assert f"{facts['tfidf']['log_loss'].value:.4f}" in lines[3]


def test_baselines_are_fitted_once_and_predict_any_battles(trained):
    baselines = fit_baselines(trained)
    for seed in (1, 2):
        judged = drawn(20, seed=seed)
        assert predict_baselines(baselines, judged).equals(fit_predict(trained, judged))
    assert predict_baselines(baselines, judged.select([])).columns.tolist() == ["id", *ALL]


@pytest.mark.slow
def test_the_baselines_need_no_torch():
    code = "import sys, rewardmodel.evaluation.baselines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow  # five folds of 1,870 long battles
def test_the_baselines_of_real_battles(real_data, monkeypatch):
    monkeypatch.setattr(regression, "GRAMS", GRAMS)
    battles = load_battles(DataConfig(train=str(real_data / "kaggle" / "train.csv"), folds=5))
    facts = measure_baselines(baseline(battles))
    loss = {name: found["log_loss"].value for name, found in facts.items()}
    assert loss["prior"] == pytest.approx(1.097, abs=0.003)
    assert loss["length"] <= 1.06
    assert loss["tfidf"] <= loss["length"] - 0.005


def test_battles_without_an_outcome_teach_and_judge_nothing():
    battles = load_battles(DataConfig(train="sample", limit=60, folds=3))
    known = np.arange(len(battles)) % 4 > 0
    for name in OUTCOMES:
        values = np.where(known, np.array(battles[name][:]), np.nan)
        battles = with_column(battles, name, values)
    only = battles.select(np.flatnonzero(known))
    assert baseline(battles).equals(baseline(only))
    assert fit_predict(battles, only).equals(fit_predict(only, only))
    with pytest.raises(InputError, match="no training battle has an outcome"):
        fit_predict(battles.select(np.flatnonzero(~known)), only)
