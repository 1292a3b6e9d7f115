import subprocess
import sys

import numpy as np
import pytest
from conftest import from_columns
from datasets import concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression

from rewardmodel import floors
from rewardmodel.battles import FEATURES, OUTCOMES, swap, with_column
from rewardmodel.config import DataConfig
from rewardmodel.errors import InputError
from rewardmodel.floors import FLOORS, INVERSE_PENALTY, baseline, fit_predict, format_baseline, measure
from rewardmodel.folds import CALIBRATION, HOLDOUT, TRAIN_ONLY
from rewardmodel.metrics import class_prior, log_loss
from rewardmodel.parts import load_battles
from rewardmodel.predictions import PROBABILITIES

ALL = [f"{floor}_{name}" for floor in FLOORS for name in PROBABILITIES]
WORDS = ["the", "a", "of", "we", "it", "is", "water", "sky", "stone", "moves", "over", "green", "cold", "early", "late"]
GRAMS = floors.GRAMS


def battles_of(pairs, outcomes, **columns):
    """Return battles of one turn; a prompt is its row's number."""
    given = {
        "id": [f"id{row}" for row in range(len(pairs))],
        "prompt": [[f"prompt {row}"] for row in range(len(pairs))],
        "response_a": [[first] for first, _ in pairs],
        "response_b": [[second] for _, second in pairs],
    }
    given |= dict(zip(OUTCOMES, np.asarray(outcomes, dtype=float).T.tolist(), strict=True))
    return from_columns(given | {"group": list(range(len(pairs)))} | columns, "made")


def drawn(count, seed=0, soft=False):
    """Return battles of random words and lengths, the longer and the kinder response wins more often."""
    random = np.random.default_rng(seed)
    pairs, lead = [], np.empty(count)
    for row in range(count):
        texts = [" ".join(random.choice(WORDS, size=int(random.integers(3, 60)))) for _ in range(2)]
        kind = random.integers(0, 2, 2)
        pairs.append(tuple(text + " thanks" * int(one) for text, one in zip(texts, kind, strict=True)))
        lead[row] = np.log(len(texts[0]) / len(texts[1])) + 2.0 * (int(kind[0]) - int(kind[1]))
    shares = 0.7 / (1 + np.exp(-2 * lead))
    chances = np.stack([shares, 0.7 - shares, np.full(count, 0.3)], axis=1)
    outcomes = chances if soft else np.eye(3)[[random.choice(3, p=row) for row in chances]]
    return battles_of(pairs, outcomes, fold=(np.arange(count) % 4).tolist())


def array(table, floor):
    return table[[f"{floor}_{name}" for name in PROBABILITIES]].to_numpy()


def changed(battles, **columns):
    data = battles.to_dict() | columns
    return type(battles).from_dict(data, features=FEATURES)


@pytest.fixture(scope="module", autouse=True)
def _few_columns():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floors, "GRAMS", tuple({**settings, "n_features": 2**12} for settings in GRAMS))
        yield


@pytest.fixture(scope="module")
def trained():
    return drawn(200)


def test_the_prior_is_the_weighted_shares_of_both_orders():
    battles = battles_of([("x", "y")] * 4, [[1, 0, 0], [1, 0, 0], [0.25, 0.75, 0], [0, 0, 1]], weight=[1, 1, 2, 4])
    found = array(fit_predict(battles, battles), "prior")
    assert found == pytest.approx(np.tile([0.25, 0.25, 0.5], (4, 1)), abs=1e-7)


def test_a_planted_rule_of_lengths_is_found_to_near_its_entropy():
    random = np.random.default_rng(1)
    lengths = random.integers(5, 500, (4000, 2))
    lead = 2 * np.tanh(np.log1p(lengths[:, 0]) - np.log1p(lengths[:, 1]))
    decided = 1 / (1 + np.exp(1 - 2 * abs(lead / 2)))
    chances = np.stack([decided / (1 + np.exp(-lead)), decided / (1 + np.exp(lead)), 1 - decided], axis=1)
    outcomes = np.eye(3)[(random.random((4000, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(max=2)]
    battles = battles_of([("a" * first, "b" * second) for first, second in lengths], outcomes)
    reading = floors.Reading(floors._read(battles).sizes, [])
    task = floors.Task(np.arange(3000), outcomes[:3000], np.arange(3000, 4000))
    found = FLOORS["length"](reading, task)
    assert log_loss(found, chances[3000:]) == pytest.approx(log_loss(chances[3000:], chances[3000:]), abs=0.005)
    assert abs(found - chances[3000:]).mean() < 0.02


def test_words_that_win_are_found_by_tfidf_alone(trained):
    judged = drawn(200, seed=1)
    table = fit_predict(trained, judged)
    true = np.stack([judged[name] for name in OUTCOMES], axis=1)
    loss = {floor: log_loss(array(table, floor), true) for floor in FLOORS}
    assert loss["tfidf"] < loss["length"] - 0.02
    assert loss["length"] < loss["prior"] - 0.02


def test_the_regression_is_that_of_scikit_learn_on_both_orders():
    random = np.random.default_rng(0)
    text, further = random.normal(size=(300, 6)).astype(np.float32), random.normal(size=(300, 3))
    mass = random.dirichlet(np.ones(3), 300)
    task = floors.Task(np.arange(200), mass[:200], np.arange(200, 300))
    found = floors._regressed(csr_array(text), further, further, task)

    def known(features, yes, no, mirror):
        rows = features[:200]
        both = np.concatenate([rows, mirror * rows, rows, mirror * rows])
        labels = np.repeat([1, 1 if mirror == 1 else 0, 0, 0 if mirror == 1 else 1], 200)
        weight = np.concatenate([yes, yes, no, no]) / 2
        model = LogisticRegression(C=INVERSE_PENALTY, fit_intercept=False, tol=1e-8, max_iter=1000)
        return model.fit(both, labels, weight).predict_proba(features[200:])[:, 1]

    first, second, tie = mass[:200].T
    wins = known(np.hstack([text, further]), first, second, -1)
    ties = known(np.hstack([abs(text), further]), tie, first + second, 1)
    assert found == pytest.approx(np.stack([(1 - ties) * wins, (1 - ties) * (1 - wins), ties], axis=1), abs=2e-3)


def test_the_document_frequency_is_that_of_scikit_learn(trained):
    first, second = floors._read(trained).grams[0]
    task = floors.Task(np.arange(100), np.full((100, 3), 1 / 3), np.arange(100, 200))
    rows = np.concatenate([first[:100].toarray(), second[:100].toarray()])
    known = TfidfTransformer().fit(rows).idf_
    assert floors._inverse_document_frequency(first, second, task) == pytest.approx(known, abs=1e-5)


def test_a_reading_counts_characters_and_turns():
    battles = from_columns(
        {"id": ["x"], "prompt": [["ab", "c"]], "response_a": [["", ""]], "response_b": [["défg", "h"]]}, "made"
    )
    assert np.exp(floors._read(battles).sizes) == pytest.approx(np.array([[5, 2, 7, 2]]))


texts = st.text(alphabet=st.sampled_from("ab é雪\u0000\n\U0001f600"), max_size=40)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_a_swap_is_exact(trained, pairs):
    judged = battles_of(pairs, np.full((len(pairs), 3), np.nan))
    reading = floors._read(concatenate_datasets([trained, judged, swap(judged)]))
    task = floors.Task(np.arange(200), floors._mass(trained), np.arange(200, 200 + 2 * len(pairs)))
    for predict in FLOORS.values():
        given, swapped = np.split(predict(reading, task), 2)
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
    with pytest.raises(InputError, match="outcomes"):
        fit_predict(unlabelled, trained)
    with pytest.raises(InputError, match="outcomes"):
        fit_predict(trained.select([]), trained)
    with pytest.raises(InputError, match="outcomes"):
        baseline(unlabelled)
    table = fit_predict(trained, unlabelled)
    assert table.columns.tolist() == ["id", *ALL]
    assert table["id"].tolist() == ["id0"]


@pytest.mark.parametrize("folds", [[-1] * 200, [0] * 200, [TRAIN_ONLY] * 200, [CALIBRATION] * 200])
def test_battles_without_two_folds_are_refused(trained, folds):
    with pytest.raises(InputError, match="assign_folds"):
        baseline(changed(trained, fold=folds))


def test_every_battle_of_a_fold_is_judged_in_order_and_no_other(trained):
    folds = np.array(trained["fold"][:])
    folds[:20], folds[20:40], folds[40:60] = TRAIN_ONLY, CALIBRATION, HOLDOUT
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


@pytest.mark.parametrize("part", [0, 3, CALIBRATION])
def test_no_floor_sees_the_outcomes_of_what_it_judges(trained, part):
    folds = np.array(trained["fold"][:])
    folds[:40] = CALIBRATION
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


def test_the_end_of_a_very_long_response_is_not_counted():
    first, second = (battles_of([("all of it " * 400 + end, "z")], [[1, 0, 0]]) for end in ("end", "not"))
    grams = [floors._read(battles).grams[0][0] for battles in (first, second)]
    assert (grams[0] != grams[1]).nnz == 0


def test_measure_gives_intervals_by_group_and_a_table(trained):
    table = baseline(trained)
    facts = measure(table)
    assert list(facts) == list(FLOORS)
    true = table[list(OUTCOMES)].to_numpy()
    for floor, found in facts.items():
        assert list(found) == ["log_loss", "accuracy"]
        assert found["log_loss"]["value"] == log_loss(array(table, floor), true)
        for metric in found.values():
            assert metric["low"] < metric["value"] < metric["high"]
    wide = measure(table.assign(group=table["group"] // 20))
    spread = [one["length"]["log_loss"]["high"] - one["length"]["log_loss"]["low"] for one in (facts, wide)]
    assert spread[0] != spread[1]
    assert facts["prior"]["log_loss"]["value"] == pytest.approx(
        log_loss(np.broadcast_to(class_prior(true), true.shape), true), abs=0.03
    )
    lines = format_baseline(facts).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(FLOORS)
    assert f"{facts['tfidf']['log_loss']['value']:.4f}" in lines[3]


def test_the_floors_need_no_torch():
    code = "import sys, rewardmodel.floors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Five folds of 1,870 long battles: 5 to 15 s.
def test_the_floors_of_real_battles(real_data, monkeypatch):
    monkeypatch.setattr(floors, "GRAMS", GRAMS)
    facts = measure(baseline(load_battles(DataConfig(train=str(real_data / "kaggle" / "train.csv"), folds=5))))
    loss = {floor: found["log_loss"]["value"] for floor, found in facts.items()}
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
    with pytest.raises(InputError, match="the floors need training battles with outcomes"):
        fit_predict(battles.select(np.flatnonzero(~known)), only)
