"""Battles in, what scikit-learn makes of them without a language model out: the floors that a model has to beat.

P(tie) is a logistic regression on features that a swap leaves alone, P(A | no tie) one without intercept on features
whose sign a swap changes. The three-class log loss is the sum of the two, and each is the same in both orders: that is
training and predicting on both orders, and p(swap(x)) == swap(p(x)) exactly. Needs no torch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset, concatenate_datasets
from scipy.optimize import minimize
from scipy.sparse import csr_array, hstack, vstack
from scipy.special import expit
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import normalize

from rewardmodel.battles import OUTCOMES, TEXTS, labelled, outcomes, weights
from rewardmodel.errors import InputError
from rewardmodel.folds import trains
from rewardmodel.metrics import summary
from rewardmodel.predictions import PROBABILITIES, true_outcomes

INVERSE_PENALTY = 0.3
"""scikit-learn's C, for both regressions. Log loss of `tfidf` with C .1, .3, 1 and 3 on 1,870 arena battles in five
grouped folds: 1.040, 1.036, 1.038, 1.057; with 3,189 battles of other sources to train on: 1.043, 1.041, 1.051, 1.089.
`length` hardly depends on it (1.050)."""

CHARACTERS = 3000
"""What is read of a response, from its beginning, for TF-IDF; lengths count all of it."""

GRAMS = (
    {"analyzer": "word", "ngram_range": (1, 2), "n_features": 2**18},
    {"analyzer": "char_wb", "ngram_range": (3, 3), "n_features": 2**16},
)
"""What TF-IDF counts, as `HashingVectorizer` says it."""


class Reading(NamedTuple):
    """What the floors know of n_battles battles; it is read once for all folds."""

    sizes: np.ndarray
    """(n_battles, 4) float64: the logarithms of 1 + characters of prompt, A and B, and of the turns."""
    grams: list[tuple[csr_array, csr_array]]
    """For each of `GRAMS`, A's and B's 1 + log(count), (n_battles, n_features) float32."""


class Task(NamedTuple):
    """Which battles of a reading train, what they teach, and which are judged."""

    training: np.ndarray
    """(n_training,) rows."""
    mass: np.ndarray
    """(n_training, 3) float64: outcome probabilities times weight."""
    judged: np.ndarray
    """(n_judged,) rows."""


def fit_predict(training: Dataset, judged: Dataset) -> pd.DataFrame:
    """Return what each floor, trained on some battles, predicts for others.

    Args:
        training: labelled battles; soft outcomes and `weight` count. Those without an outcome are left out.
        judged: the battles to predict, labelled or not.

    Returns:
        One row a judged battle, in their order: `id`, and for each of `FLOORS` its name before `_p_model_a`,
        `_p_model_b` and `_p_tie`, float64, of sum 1.

    Raises:
        InputError: no training battles, or training battles without outcomes.
    """
    training = labelled(training)
    if not len(training):
        raise InputError("the floors need training battles with outcomes; label them, or give others")
    count = len(training)
    both = concatenate_datasets([part.select_columns(list(TEXTS)) for part in (training, judged)])
    task = Task(np.arange(count), _mass(training), np.arange(count, len(both)))
    table = pd.DataFrame({"id": np.asarray(judged.with_format(None)["id"][:], dtype=object)})
    return table.assign(**_predicted(_read(both), task))


def baseline(battles: Dataset) -> pd.DataFrame:
    """Return what each floor predicts for battles of a fold when it is trained on the other folds.

    Args:
        battles: labelled battles with `group` and `fold` set. Those that only train are not judged; the calibration
            and holdout parts neither train nor are judged, nor do those without an outcome.

    Returns:
        One row a judged battle, in their order: `id`, `group`, the outcomes, and the columns of `fit_predict`.

    Raises:
        InputError: battles without outcomes, or a fold that no other battles can be trained for.
    """
    battles = labelled(battles)
    if not len(battles):
        raise InputError("the floors are judged on labelled battles, but these have no outcomes; label them")
    fold = np.asarray(battles.with_format(None)["fold"][:])
    rows = np.flatnonzero((fold >= 0) | trains(fold, -1))
    battles, fold = battles.select(rows), fold[rows]
    judged = np.flatnonzero(fold >= 0)
    if not len(judged) or (fold == fold[judged[0]]).all():
        raise InputError("the floors need battles in at least two folds; set them with assign_folds")
    reading, mass = _read(battles), _mass(battles)
    parts = []
    for number in np.unique(fold[judged]):
        own, others = np.flatnonzero(fold == number), np.flatnonzero(trains(fold, number))
        parts.append(pd.DataFrame(_predicted(reading, Task(others, mass[others], own)), index=own))
    plain = battles.with_format(None)
    known = {name: np.asarray(plain[name][:]) for name in ("id", "group")}
    known |= dict(zip(OUTCOMES, outcomes(battles).T, strict=True))
    return pd.DataFrame(known).join(pd.concat(parts), how="right").sort_index().reset_index(drop=True)


def measure(table: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """Return floor -> log_loss and accuracy -> value, low, high (95 %, whole groups drawn again) of `baseline`."""
    true, groups = true_outcomes(table), table["group"].to_numpy()
    facts = {}
    for floor in FLOORS:
        found = summary(table[[f"{floor}_{name}" for name in PROBABILITIES]].to_numpy(np.float64), true, groups)
        facts[floor] = {name: found[name] for name in ("log_loss", "accuracy")}
    return facts


def format_baseline(facts: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return what `measure` found as lines for a terminal."""
    lines = [f"{'floor':<10}{'log loss':>8}   {'95 %':<18}{'accuracy':>8}   95 %"]
    for floor, found in facts.items():
        loss, hits = (
            f"{metric['value']:>8.4f}   [{metric['low']:.4f}, {metric['high']:.4f}]"
            for metric in (found["log_loss"], found["accuracy"])
        )
        lines.append(f"{floor:<10}{loss}  {hits}")
    return "\n".join(lines)


def _mass(battles: Dataset) -> np.ndarray:
    return outcomes(battles) * weights(battles).astype(np.float64)[:, None]


def _predicted(reading: Reading, task: Task) -> dict[str, np.ndarray]:
    """Return the columns of all floors by name, each (n_judged,) float64."""
    return {
        f"{floor}_{name}": column
        for floor, predict in FLOORS.items()
        for name, column in zip(PROBABILITIES, predict(reading, task).T, strict=True)
    }


def _read(battles: Dataset) -> Reading:
    """Return lengths and n-gram counts of battles, some thousand at a time."""
    vectorizers = [
        HashingVectorizer(**settings, alternate_sign=False, norm=None, dtype=np.float32) for settings in GRAMS
    ]
    sizes: list[tuple[int, ...]] = []
    counts: list[tuple[list[csr_array], list[csr_array]]] = [([], []) for _ in GRAMS]
    for batch in battles.with_format(None).select_columns(list(TEXTS)).iter(batch_size=2000):
        columns = [["\n".join(turns) for turns in batch[name]] for name in TEXTS]
        sizes.extend(zip(*([len(text) for text in texts] for texts in columns), map(len, batch["prompt"]), strict=True))
        for side, texts in enumerate(columns[1:]):
            heads = [text[:CHARACTERS] for text in texts]
            for vectorizer, sides in zip(vectorizers, counts, strict=True):
                sides[side].append(_damped(vectorizer.transform(heads)))
    logs = np.log(np.asarray(sizes, dtype=np.float64) + np.array([1, 1, 1, 0]))
    return Reading(logs, [(vstack(first, format="csr"), vstack(second, format="csr")) for first, second in counts])


def _damped(counts: Any) -> csr_array:
    """Return 1 + log(count) of the counts that are not zero (scikit-learn's `sublinear_tf`)."""
    matrix = csr_array(counts, dtype=np.float32)
    matrix.data = 1 + np.log(matrix.data)
    return matrix


def _length_features(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return features of the lengths: (n, 5) that change sign with the order, (n, 5) that do not, a constant first.

    The constants that are taken off are typical of the arena; the constant feature is large so that its coefficient,
    the intercept, is hardly penalised.
    """
    prompt, first, second, turns = sizes.T
    difference, middle, longer = first - second, (first + second) / 2 - 7, np.maximum(first, second) - 7
    signed = [np.tanh(difference), difference, difference * middle, difference * (prompt - 5), difference * turns]
    constant = np.full_like(prompt, 10)
    return np.stack(signed, axis=1), np.stack([constant, abs(signed[0]), longer, prompt - 5, turns], axis=1)


def _prior(reading: Reading, task: Task) -> np.ndarray:
    """Return the outcome shares of the training battles in both orders: A and B have the same."""
    shares = task.mass.sum(axis=0) / task.mass.sum()
    decided = (shares[0] + shares[1]) / 2
    return np.tile([decided, decided, shares[2]], (len(task.judged), 1))


def _length(reading: Reading, task: Task) -> np.ndarray:
    return _regressed(csr_array((len(reading.sizes), 0)), *_length_features(reading.sizes), task)


def _tfidf(reading: Reading, task: Task) -> np.ndarray:
    """Return predictions from the difference of the responses' TF-IDF vectors, beside the lengths.

    What changes sign with the order is the difference; what does not is its absolute value and the cosines of the
    vectors, with their squares: like answers tie.
    """
    signed, even = _length_features(reading.sizes)
    differences, cosines = [], []
    for first, second in reading.grams:
        scale = _inverse_document_frequency(first, second, task)
        vectors = [_unit(matrix, scale) for matrix in (first, second)]
        differences.append(vectors[0] - vectors[1])
        cosine = np.asarray((vectors[0] * vectors[1]).sum(axis=1), dtype=np.float64)
        cosines += [cosine, cosine**2]
    del vectors
    return _regressed(hstack(differences, format="csr"), signed, np.column_stack([even, *cosines]), task)


def _inverse_document_frequency(first: csr_array, second: csr_array, task: Task) -> np.ndarray:
    """Return log((1 + n) / (1 + df)) + 1 of each column, float32, over the training responses, by their weight.

    The formula is that of scikit-learn's `TfidfTransformer`.
    """
    weight = task.mass.sum(axis=1)
    frequency = np.zeros(first.shape[1])
    for matrix in (first, second):
        own = matrix[task.training]
        frequency += np.bincount(own.indices, np.repeat(weight, np.diff(own.indptr)), minlength=matrix.shape[1])
    return (np.log((1 + 2 * weight.sum()) / (1 + frequency)) + 1).astype(np.float32)


def _unit(matrix: csr_array, scale: np.ndarray) -> csr_array:
    """Return the rows with each column times its scale, then of length 1; empty rows stay empty."""
    scaled = csr_array((matrix.data * scale[matrix.indices], matrix.indices, matrix.indptr), shape=matrix.shape)
    return normalize(scaled, copy=False)


def _regressed(difference: csr_array, signed: np.ndarray, even: np.ndarray, task: Task) -> np.ndarray:
    """Return P(A), P(B), P(tie), (n_judged, 3).

    Args:
        difference: (n_battles, n_features) A's text less B's; its absolute value speaks for a tie.
        signed: (n_battles, k) float64 further features that change sign with the order.
        even: (n_battles, l) float64 further features that do not.
        task: which battles train and which are judged.
    """
    first, second, tie = task.mass.T
    lead = _scores(difference, signed, task, first, second)
    undecided = expit(_scores(abs(difference), even, task, tie, first + second))
    return np.stack([(1 - undecided) * expit(lead), (1 - undecided) * expit(-lead), undecided], axis=1)


def _scores(text: csr_array, further: np.ndarray, task: Task, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    """Return the log-odds of yes, (n_judged,), by an L2-penalised logistic regression without intercept.

    Its coefficients c minimise sum(yes log(1 + exp(-z)) + no log(1 + exp(z))) + |c|^2 / (2 `INVERSE_PENALTY`) where
    z = features @ c: scikit-learn's `LogisticRegression` on every battle with either label and these weights. The
    search is in units in which the curvature at c = 0 is about 1, which takes a quarter of the steps: text columns are
    scaled, the few other ones whitened.

    Args:
        text: (n_battles, n_features) float32.
        further: (n_battles, k) float64.
        task: which battles train and which are judged.
        yes: (n_training,) float64 weight of the label 1.
        no: (n_training,) float64 weight of the label 0.
    """
    known = yes + no > 0
    rows, yes, no = task.training[known], yes[known], no[known]
    own, dense, count = text[rows], further[rows], text.shape[1]
    weight = (yes + no) / 4
    curvature = np.bincount(own.indices, own.data**2 * np.repeat(weight, np.diff(own.indptr)), minlength=text.shape[1])
    unit = 1 / np.sqrt(curvature + 1 / INVERSE_PENALTY)
    inner = (dense * weight[:, None]).T @ dense + np.eye(dense.shape[1]) / INVERSE_PENALTY
    mixed = np.linalg.inv(np.linalg.cholesky(inner)).T

    def coefficients(steps: np.ndarray) -> np.ndarray:
        return np.concatenate([steps[:count] * unit, mixed @ steps[count:]])

    def loss(steps: np.ndarray) -> tuple[float, np.ndarray]:
        found = coefficients(steps)
        score = own @ found[:count].astype(np.float32) + dense @ found[count:]
        value = (yes * np.logaddexp(0, -score) + no * np.logaddexp(0, score)).sum()
        slope = no * expit(score) - yes * expit(-score)
        gradient = np.concatenate([own.T @ slope.astype(np.float32), dense.T @ slope]) + found / INVERSE_PENALTY
        gradient = np.concatenate([gradient[:count] * unit, mixed.T @ gradient[count:]])
        return value + found @ found / (2 * INVERSE_PENALTY), gradient

    start = np.zeros(count + dense.shape[1])
    found = coefficients(minimize(loss, start, jac=True, method="L-BFGS-B", options=SEARCH).x)
    return text[task.judged] @ found[:count].astype(np.float32) + further[task.judged] @ found[count:]


SEARCH = {"maxiter": 200, "ftol": 1e-6, "gtol": 1e-3}
"""When the search for coefficients ends."""

FLOORS: dict[str, Callable[[Reading, Task], np.ndarray]] = {"prior": _prior, "length": _length, "tfidf": _tfidf}
"""Floors by name: (reading, task) -> (n_judged, 3) float64: A, B, tie."""
