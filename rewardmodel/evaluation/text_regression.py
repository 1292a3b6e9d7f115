"""Battles in, probabilities from logistic regressions on their lengths and words out: fitted, saved, read back.

P(tie) is a logistic regression on features that a swap leaves alone, P(A | no tie) one without intercept on features
whose sign a swap changes. The three-class log loss is the sum of the two, and each is the same in both orders: that is
training and predicting on both orders, and p(swap(x)) == swap(p(x)) exactly. Needs no torch.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from scipy.sparse import csr_array, hstack, vstack
from scipy.special import expit
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from rewardmodel.battles import TEXT_COLUMNS
from rewardmodel.errors import InputError
from rewardmodel.files import atomic_path

INVERSE_PENALTY = 0.3
"""scikit-learn's C, for both regressions. Log loss of `tfidf` with C .1, .3, 1 and 3 on 1,870 arena battles in five
grouped folds: 1.040, 1.036, 1.038, 1.057; with 3,189 battles of other sources to train on: 1.043, 1.041, 1.051, 1.089.
`length` hardly depends on it (1.050)."""

MAX_CHARACTERS = 3000
"""Of a response, from its start, that TF-IDF counts; lengths count all of it."""

GRAMS = (
    {"analyzer": "word", "ngram_range": (1, 2), "n_features": 2**18},
    {"analyzer": "char_wb", "ngram_range": (3, 3), "n_features": 2**16},
)
"""What TF-IDF counts, as arguments of `HashingVectorizer`."""

TEXTS_BATCH = 2000
"""Battles whose texts are counted at a time."""


class TextCounts(NamedTuple):
    """What is counted in the texts of n_battles battles."""

    sizes: np.ndarray
    """(n_battles, 4) float64: the logarithms of 1 + characters of prompt, A and B, and of the number of turns."""
    grams: list[tuple[csr_array, csr_array]]
    """For each of `GRAMS`, A's and B's 1 + log(count), (n_battles, n_features) float32."""

    def rows(self, rows: np.ndarray) -> "TextCounts":
        """Return the counts of some of the battles."""
        return TextCounts(self.sizes[rows], [(first[rows], second[rows]) for first, second in self.grams])


class Coefficients(NamedTuple):
    """Coefficients of one logistic regression."""

    text: np.ndarray
    """(n_features,) float32, of all `GRAMS` one after another; of lengths alone (0,)."""
    further: np.ndarray
    """(k,) float64, of lengths and similarity."""


@dataclass(frozen=True)
class Regression:
    """Two fitted regressions.

    Attributes:
        scales: the inverse document frequencies of each of `GRAMS`, (n_features,) float32; empty: lengths alone.
        lead: log-odds of A against B.
        tie: log-odds of a tie.
    """

    scales: tuple[np.ndarray, ...]
    lead: Coefficients
    tie: Coefficients

    def __call__(self, counts: TextCounts) -> np.ndarray:
        """Return P(A), P(B), P(tie), (n_battles, 3) float64."""
        features = _features(counts, self.scales)
        lead = features.difference @ self.lead.text + features.signed @ self.lead.further
        tie = expit(abs(features.difference) @ self.tie.text + features.even @ self.tie.further)
        return np.stack([(1 - tie) * expit(lead), (1 - tie) * expit(-lead), tie], axis=1)


def fit_lengths(counts: TextCounts, mass: np.ndarray) -> Regression:
    """Return the regressions on lengths alone; arguments as for `fit_tfidf`."""
    return _fit_both(counts, mass, ())


def fit_tfidf(counts: TextCounts, mass: np.ndarray) -> Regression:
    """Return the regressions on the difference of the responses' TF-IDF vectors and on the lengths.

    What changes sign with the order is the difference; what does not is its absolute value and the cosines of the
    vectors, with their squares: similar answers tie.

    Args:
        counts: of n training battles.
        mass: (n, 3) float64 outcome probabilities times weight.
    """
    return _fit_both(counts, mass, tuple(_inverse_document_frequency(*pair, mass) for pair in counts.grams))


def _fit_both(counts: TextCounts, mass: np.ndarray, scales: tuple[np.ndarray, ...]) -> Regression:
    features = _features(counts, scales)
    first, second, tie = mass.T
    text = features.difference
    lead = _fit_coefficients(text, features.signed, first, second)
    np.abs(text.data, out=text.data)  # in place: it is the largest array
    return Regression(scales, lead, _fit_coefficients(text, features.even, tie, first + second))


def predict_each(fitted: Sequence[Callable[[TextCounts], np.ndarray]], battles: Dataset) -> np.ndarray:
    """Return what several predict of battles, whose texts are counted once: (n_fitted, n_battles, 3) float64."""
    found = [np.empty((len(fitted), 0, 3))]
    found += [np.stack([one(counts) for one in fitted]) for counts in _batches(battles)]
    return np.concatenate(found, axis=1)


def save_regression(regression: Regression, path: Path) -> None:
    """Write a regression as a compressed .npz, whole or not at all, with the settings that `load_regression` checks."""
    arrays: dict[str, Any] = {f"scale_{number}": scale for number, scale in enumerate(regression.scales)}
    for name in ("lead", "tie"):
        arrays |= {f"{name}_{part}": array for part, array in getattr(regression, name)._asdict().items()}
    with atomic_path(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, counted=np.array(_count_settings()), **arrays)


def load_regression(path: Path) -> Regression:
    """Return the regression of a file.

    Raises:
        InputError: no such file, no regression in it, or one of a version that counts other features.
    """
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            if arrays["counted"].item() != _count_settings():
                raise ValueError("counts other features than this version of rewardmodel")
            lead, tie = (Coefficients(arrays[f"{name}_text"], arrays[f"{name}_further"]) for name in ("lead", "tie"))
            scales = tuple(arrays[f"scale_{number}"] for number in range(len(GRAMS)) if f"scale_{number}" in arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()) if path.is_file() else "no such file"
        raise InputError(
            f"{path}: cannot read a baseline ({reason}); train again with --resume, which writes it, or switch it off "
            "with --inference.blend false"
        ) from error
    return Regression(scales, lead, tie)


def _count_settings() -> str:
    return json.dumps({"grams": GRAMS, "characters": MAX_CHARACTERS})


def count_texts(battles: Dataset) -> TextCounts:
    """Return lengths and n-gram counts of battles."""
    sizes, grams = zip(*_batches(battles), strict=True)
    # grams = ([(a, b), (a, b)], ...): for each batch the pairs of GRAMS; sides = [[a, b], [a, b]] of all battles
    sides = [[vstack(parts, format="csr") for parts in zip(*pairs, strict=True)] for pairs in zip(*grams, strict=True)]
    return TextCounts(np.concatenate(sizes), [(first, second) for first, second in sides])


def _batches(battles: Dataset) -> Iterator[TextCounts]:
    """Yield the counts of the battles, `TEXTS_BATCH` at a time."""
    vectorizers = [
        HashingVectorizer(**settings, alternate_sign=False, norm=None, dtype=np.float32) for settings in GRAMS
    ]
    for batch in battles.with_format(None).select_columns(list(TEXT_COLUMNS)).iter(batch_size=TEXTS_BATCH):
        columns = [["\n".join(turns) for turns in batch[name]] for name in TEXT_COLUMNS]
        counts = [*([len(text) for text in texts] for texts in columns), [len(turns) for turns in batch["prompt"]]]
        sizes = np.log(np.array(counts, dtype=np.float64).T + np.array([1, 1, 1, 0]))
        starts = [[text[:MAX_CHARACTERS] for text in texts] for texts in columns[1:]]
        pairs = [[_dampen(vectorizer.transform(texts)) for texts in starts] for vectorizer in vectorizers]
        yield TextCounts(sizes, [(first, second) for first, second in pairs])


def _dampen(counts: Any) -> csr_array:
    """Return 1 + log(count) of the counts above zero (scikit-learn's `sublinear_tf`)."""
    matrix = csr_array(counts, dtype=np.float32)
    matrix.data = 1 + np.log(matrix.data)
    return matrix


def _length_features(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return features of the lengths: (n, 5) that change sign with the order, (n, 5) that do not, a constant first.

    The constants that are subtracted are typical of the arena; the constant feature is large so that its coefficient,
    the intercept, is hardly penalised.
    """
    prompt, first, second, turns = sizes.T
    difference, middle, longer = first - second, (first + second) / 2 - 7, np.maximum(first, second) - 7
    signed = [np.tanh(difference), difference, difference * middle, difference * (prompt - 5), difference * turns]
    constant = np.full_like(prompt, 10)
    return np.stack(signed, axis=1), np.stack([constant, abs(signed[0]), longer, prompt - 5, turns], axis=1)


class RegressionFeatures(NamedTuple):
    """The features of n_battles battles."""

    difference: csr_array
    """(n_battles, n_features) float32: A's TF-IDF vectors minus B's; its absolute value predicts a tie."""
    signed: np.ndarray
    """(n_battles, k) float64 further features that change sign with the order."""
    even: np.ndarray
    """(n_battles, l) float64 further features that do not."""


def _features(counts: TextCounts, scales: tuple[np.ndarray, ...]) -> RegressionFeatures:
    """Return the features of battles; without scales, of lengths alone."""
    signed, even = _length_features(counts.sizes)
    if not scales:
        return RegressionFeatures(csr_array((len(signed), 0), dtype=np.float32), signed, even)
    differences, cosines = [], []
    for pair, scale in zip(counts.grams, scales, strict=True):
        vectors = [_scale_to_unit(matrix, scale) for matrix in pair]
        differences.append(vectors[0] - vectors[1])
        cosine = np.asarray((vectors[0] * vectors[1]).sum(axis=1), dtype=np.float64)
        cosines += [cosine, cosine**2]
    del vectors
    return RegressionFeatures(hstack(differences, format="csr"), signed, np.column_stack([even, *cosines]))


def _inverse_document_frequency(first: csr_array, second: csr_array, mass: np.ndarray) -> np.ndarray:
    """Return log((1 + n) / (1 + df)) + 1 of each column, float32, over the responses, by their weight.

    It is the formula of scikit-learn's `TfidfTransformer`.
    """
    weight = mass.sum(axis=1)
    frequency = np.zeros(first.shape[1])
    for matrix in (first, second):
        frequency += np.bincount(matrix.indices, np.repeat(weight, np.diff(matrix.indptr)), minlength=matrix.shape[1])
    return (np.log((1 + 2 * weight.sum()) / (1 + frequency)) + 1).astype(np.float32)


def _scale_to_unit(matrix: csr_array, scale: np.ndarray) -> csr_array:
    """Return the matrix with each column times its scale, then each row at L2 norm 1; empty rows stay empty."""
    scaled = csr_array((matrix.data * scale[matrix.indices], matrix.indices, matrix.indptr), shape=matrix.shape)
    return normalize(scaled, copy=False)


def _fit_coefficients(text: csr_array, further: np.ndarray, yes: np.ndarray, no: np.ndarray) -> Coefficients:
    """Return the coefficients of an L2-penalised logistic regression without intercept.

    They minimise sum(yes log(1 + exp(-z)) + no log(1 + exp(z))) + |c|^2 / (2 `INVERSE_PENALTY`) where z = features @ c.
    Newton's method needs 3 to 5 steps here, a sixth of the time of scikit-learn's default L-BFGS.

    Args:
        text: (n, n_features) float32.
        further: (n, k) float64.
        yes: (n,) float64 weight of the label 1.
        no: (n,) float64 weight of the label 0.
    """
    # A battle with weight for both labels counts twice. The first one is added with weight 0, so that there are both.
    with_yes, with_no = np.flatnonzero(yes), np.flatnonzero(no)
    rows = np.concatenate([[0, 0], with_yes, with_no])
    labels = np.concatenate([[1, 0], np.ones(len(with_yes)), np.zeros(len(with_no))])
    weight = np.concatenate([[0, 0], yes[with_yes], no[with_no]])
    features = hstack([text, csr_array(further, dtype=np.float32)], format="csr")[rows]
    model = LogisticRegression(C=INVERSE_PENALTY, fit_intercept=False, solver="newton-cg", tol=1e-4)
    found = model.fit(features, labels, sample_weight=weight).coef_[0]
    return Coefficients(found[: text.shape[1]].astype(np.float32), found[text.shape[1] :].astype(np.float64))
