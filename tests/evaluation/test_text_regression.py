import subprocess
import sys

import numpy as np
import pytest
from builders import battles_of, drawn, from_columns
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression

from rewardmodel.battles import outcomes, write_parquet
from rewardmodel.errors import InputError
from rewardmodel.evaluation import text_regression as regression
from rewardmodel.evaluation.text_regression import (
    INVERSE_PENALTY,
    count_texts,
    fit_lengths,
    fit_tfidf,
    load_regression,
    predict_each,
    save_regression,
)
from rewardmodel.metrics import log_loss

GRAMS = regression.GRAMS


@pytest.fixture(scope="module", autouse=True)
def _few_columns():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regression, "GRAMS", tuple({**settings, "n_features": 2**12} for settings in GRAMS))
        yield


@pytest.fixture(scope="module")
def battles():
    return drawn(200)


@pytest.fixture(scope="module")
def fitted(battles):
    return fit_tfidf(count_texts(battles), outcomes(battles))


def test_a_planted_rule_of_lengths_is_found_to_near_its_entropy():
    random = np.random.default_rng(1)
    lengths = random.integers(5, 500, (4000, 2))
    lead = 2 * np.tanh(np.log1p(lengths[:, 0]) - np.log1p(lengths[:, 1]))
    decided = 1 / (1 + np.exp(1 - 2 * abs(lead / 2)))
    chances = np.stack([decided / (1 + np.exp(-lead)), decided / (1 + np.exp(lead)), 1 - decided], axis=1)
    outcomes = np.eye(3)[(random.random((4000, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(max=2)]
    battles = battles_of([("a" * first, "b" * second) for first, second in lengths], outcomes)
    counts = regression.TextCounts(count_texts(battles).sizes, [])
    found = fit_lengths(counts.rows(np.arange(3000)), outcomes[:3000])(counts.rows(np.arange(3000, 4000)))
    assert log_loss(found, chances[3000:]) == pytest.approx(log_loss(chances[3000:], chances[3000:]), abs=0.005)
    assert abs(found - chances[3000:]).mean() < 0.02


def test_the_regression_is_that_of_scikit_learn_on_both_orders():
    random = np.random.default_rng(0)
    text, further = random.normal(size=(300, 6)).astype(np.float32), random.normal(size=(300, 3))
    mass = random.dirichlet(np.ones(3), 300)
    first, second, tie = mass[:200].T
    found_wins, found_ties = (
        1 / (1 + np.exp(-(part[200:] @ coefficients.text + further[200:] @ coefficients.further)))
        for part, coefficients in (
            (text, regression._fit_coefficients(csr_array(text[:200]), further[:200], first, second)),
            (abs(text), regression._fit_coefficients(csr_array(abs(text[:200])), further[:200], tie, first + second)),
        )
    )

    def known(features, yes, no, mirror):
        rows = features[:200]
        both = np.concatenate([rows, mirror * rows, rows, mirror * rows])
        labels = np.repeat([1, 1 if mirror == 1 else 0, 0, 0 if mirror == 1 else 1], 200)
        weight = np.concatenate([yes, yes, no, no]) / 2
        model = LogisticRegression(C=INVERSE_PENALTY, fit_intercept=False, tol=1e-8, max_iter=1000)
        return model.fit(both, labels, weight).predict_proba(features[200:])[:, 1]

    assert found_wins == pytest.approx(known(np.hstack([text, further]), first, second, -1), abs=2e-3)
    assert found_ties == pytest.approx(known(np.hstack([abs(text), further]), tie, first + second, 1), abs=2e-3)


def test_the_document_frequency_is_that_of_scikit_learn(battles):
    first, second = count_texts(battles).rows(np.arange(100)).grams[0]
    rows = np.concatenate([first.toarray(), second.toarray()])
    known = TfidfTransformer().fit(rows).idf_
    assert regression._inverse_document_frequency(first, second, np.full((100, 3), 1 / 3)) == pytest.approx(
        known, abs=1e-5
    )


def test_characters_and_turns_are_counted():
    battles = from_columns(
        {"id": ["x"], "prompt": [["ab", "c"]], "response_a": [["", ""]], "response_b": [["défg", "h"]]}, "made"
    )
    assert np.exp(count_texts(battles).sizes) == pytest.approx(np.array([[5, 2, 7, 2]]))


def test_the_end_of_a_very_long_response_is_not_counted():
    first, second = (battles_of([("all of it " * 400 + end, "z")], [[1, 0, 0]]) for end in ("end", "not"))
    grams = [count_texts(battles).grams[0][0] for battles in (first, second)]
    assert (grams[0] != grams[1]).nnz == 0


def test_texts_are_counted_some_at_a_time_to_the_same(battles, fitted, monkeypatch):
    whole, counts = predict_each([fitted], battles), count_texts(battles)
    monkeypatch.setattr(regression, "TEXTS_BATCH", 7)
    parts, in_parts = predict_each([fitted], battles), count_texts(battles)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(in_parts.sizes, counts.sizes)
    for (first, second), (one, other) in zip(in_parts.grams, counts.grams, strict=True):
        assert (first != one).nnz == (second != other).nnz == 0
    assert predict_each([fitted, fitted], battles.select([])).shape == (2, 0, 3)


@pytest.mark.slow
def test_a_baseline_that_is_read_back_in_a_fresh_process_predicts_the_same_bits(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regression, "GRAMS", GRAMS)
        battles, judged = drawn(60), drawn(40, seed=1)
        fitted = fit_tfidf(count_texts(battles), outcomes(battles))
        save_regression(fitted, tmp_path / "baseline.npz")
        expected = predict_each([fitted], judged)[0]
    write_parquet(judged, tmp_path / "battles.parquet")
    code = """if True:
        import sys
        from pathlib import Path
        import numpy as np
        from datasets import Dataset
        from rewardmodel.evaluation.text_regression import load_regression, predict_each
        folder = Path(sys.argv[1])
        battles = Dataset.from_parquet(str(folder / "battles.parquet"))
        np.save(folder / "found.npy", predict_each([load_regression(folder / "baseline.npz")], battles)[0])
        sys.exit("torch" in sys.modules)"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), expected)
    assert expected.std(axis=0).min() > 0.01
    assert (tmp_path / "baseline.npz").stat().st_size < 4e6


def test_a_file_holds_no_pickle_and_the_same_baseline_is_the_same_file(fitted, tmp_path):
    for name in ("one.npz", "two.npz"):
        save_regression(fitted, tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz", allow_pickle=False) as arrays:
        kinds = {name: arrays[name].dtype.kind for name in arrays.files}
    assert kinds.pop("counted") == "U"
    assert set(kinds.values()) == {"f"}


def test_what_is_no_baseline_is_refused(fitted, tmp_path, monkeypatch):
    path = tmp_path / "baseline.npz"
    how = r"baseline\.npz: cannot read a baseline \({}.*\); train again with --resume, .* --inference\.blend false"
    with pytest.raises(InputError, match=how.format("no such file")):
        load_regression(path)
    path.write_text("not a zip")
    with pytest.raises(InputError, match=how.format("")):
        load_regression(path)
    np.savez(path, counted=np.array(regression._count_settings()))
    with pytest.raises(InputError, match=how.format(".*lead_text")):
        load_regression(path)
    save_regression(fitted, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=how.format("")):
        load_regression(path)
    save_regression(fitted, path)
    monkeypatch.setattr(regression, "MAX_CHARACTERS", 10)
    with pytest.raises(InputError, match=how.format("counts other features")):
        load_regression(path)
