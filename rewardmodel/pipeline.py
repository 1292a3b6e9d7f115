"""A recipe -> a whole run: `run` trains, predicts, evaluates and reports; `prepare` only reads and audits its battles.

Both read and check every file that they need before they import torch, transformers or scikit-learn.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from datasets import Dataset

from rewardmodel.battles import write_parquet
from rewardmodel.config.loader import RecipeLike, as_recipe, dump_recipe
from rewardmodel.config.schema import DataConfig, Recipe
from rewardmodel.data.formats import SourceReport, read_battles
from rewardmodel.data.splits import Parts, fingerprint_parts, load_battles, split
from rewardmodel.distributed import is_main, wait_for_all
from rewardmodel.errors import InputError
from rewardmodel.evaluation.results import Evaluation, read_evaluation
from rewardmodel.files import atomic_path, lock_output, write_json
from rewardmodel.predictions import (
    IDENTITY_COLUMNS,
    build_predictions,
    check_sample,
    read_labels,
    read_predictions,
    with_baseline,
    write_predictions,
    write_submission,
)
from rewardmodel.run_folder import RunFolder, alone, check_run, check_same_inputs

if TYPE_CHECKING:
    from rewardmodel.evaluation.text_regression import Regression

logger = logging.getLogger(__name__)


@alone
def run(
    recipe: RecipeLike,
    *,
    parts: Parts | None = None,
    resume: bool = False,
    overwrite: bool = False,
    before_write: Callable[[], None] = lambda: None,
) -> tuple[Path, Evaluation]:
    """Train, predict, evaluate against the baselines, report, and predict `data.test` if there is one.

    The model that predicts is loaded from disk, so that what is evaluated is what was saved.

    Args:
        recipe: what to do, or the path or sections of a recipe; `recipe.run_folder` is written.
        parts: its battles, if they were read before.
        resume: continue an existing run.
        overwrite: replace an existing run.
        before_write: as for `train`.

    Returns:
        The run folder and the evaluation of its validation fold.

    Raises:
        InputError: the recipe or its files cannot be used; nothing was written then.
        FloatingPointError: a loss, a weight or a prediction is NaN or infinite.
    """
    recipe = as_recipe(recipe)
    check_run(recipe, resume, overwrite)
    reports: list[SourceReport] = []
    test = read_test(recipe.data, reports)
    parts = parts or split(load_battles(recipe.data), recipe.data.fold)
    if resume and is_finished(recipe, parts, test):
        return recipe.run_folder, read_evaluation(RunFolder(recipe.run_folder).metrics)

    def begin() -> None:
        before_write()
        for path in LAST_FILES:  # by which a run counts as finished
            getattr(RunFolder(recipe.run_folder), path).unlink(missing_ok=True)

    from rewardmodel.evaluation.evaluate import evaluate_run  # scikit-learn and torch from here on
    from rewardmodel.evaluation.report import report
    from rewardmodel.training.train import train

    folder, parts = train(recipe, parts=parts, resume=resume, overwrite=overwrite, before_write=begin)
    files = RunFolder(folder)
    to_predict = {"validation": parts.validation, "calibration": parts.calibration, "test": test}
    predictions = _predict_parts(recipe, to_predict)
    if is_main():
        baseline = _fit_run_baselines(files, parts)
        _write_validation(files, predictions, baseline, parts)
        report(folder, evaluations=[evaluate_run(folder)])
        _write_submission(recipe, predictions.get("test"), baseline, test, any(one.tossed for one in reports))
    wait_for_all()
    return folder, read_evaluation(files.metrics)


def is_trained(recipe: Recipe, parts: Parts) -> bool:
    """Return whether the run folder holds a model that was trained by this very recipe on these battles.

    Raises:
        InputError: it holds one that was trained on others.
    """
    files = RunFolder(recipe.run_folder)
    if not (files.model.is_dir() and files.recipe.is_file()):
        return False
    check_same_inputs(files.path, {"data": fingerprint_parts(parts)})
    return files.recipe.read_text(encoding="utf-8") == dump_recipe(recipe)


def is_finished(recipe: Recipe, parts: Parts, test: Dataset | None) -> bool:
    """Return whether the run folder holds all that `run` would write, of these battles; then say so.

    Raises:
        InputError: as `is_trained`.
    """
    files = RunFolder(recipe.run_folder)
    names = [*RESULTS, *(LAST_FILES if test else ("report",)), *(["calibration"] if len(parts.calibration) else [])]
    if not is_trained(recipe, parts) or not all(getattr(files, name).is_file() for name in names):
        return False
    if test is None:
        same = not (files.predictions.is_file() or files.submission.is_file())
    else:
        asked = build_predictions(test, np.full((len(test), 3), 1 / 3))[list(IDENTITY_COLUMNS)]
        there = read_predictions(files.predictions)
        same = [*asked.itertuples(index=False)] == [*there[list(IDENTITY_COLUMNS)].itertuples(index=False)]
    if same:
        logger.info("%s: finished before; start again with --overwrite", files.path)
    return same


RESULTS = ("validation", "baselines", "blend_baseline", "calibrator", "metrics")
LAST_FILES = ("report", "predictions", "submission")
"""Files of a finished run, by their names in `RunFolder`; the last ones are written last."""


def read_test(data: DataConfig, reports: list[SourceReport] | None = None) -> Dataset | None:
    """Return the battles of `data.test`, checked against the sample submission; None: there are none to predict.

    Args:
        data: names them.
        reports: gets a report of the source.

    Raises:
        InputError: battles that cannot be read, or a sample submission without them or of others.
    """
    test = read_battles(data.test, role="test", reports=reports) if data.test else None
    if data.sample_submission:
        if test is None:
            raise InputError("data.sample_submission: there is no data.test to submit; give it, or leave this out")
        check_sample(Path(data.sample_submission), test["id"])
    return test


def _predict_parts(recipe: Recipe, parts: dict[str, Dataset | None]) -> dict[str, pd.DataFrame]:
    """Return the predictions of each part that has battles, by the run's saved model."""
    from rewardmodel.inference.predict import predict_with
    from rewardmodel.model.loading import load_predictor

    predictor = load_predictor(recipe.model, RunFolder(recipe.run_folder).model, recipe.inference.batch_tokens)
    return {name: predict_with(predictor, recipe, part, cached=True) for name, part in parts.items() if part}


def _fit_run_baselines(files: RunFolder, parts: Parts) -> "Regression":
    """Fit the baselines to the training battles, write what they predict, and return the one to blend with."""
    from rewardmodel.evaluation.baselines import fit_baselines, predict_baselines
    from rewardmodel.evaluation.calibration import BLEND_BASELINE
    from rewardmodel.evaluation.text_regression import Regression, save_regression

    baselines = fit_baselines(parts.training)
    write_predictions(predict_baselines(baselines, parts.validation), files.baselines)
    blend_baseline = baselines[BLEND_BASELINE]
    assert isinstance(blend_baseline, Regression)
    save_regression(blend_baseline, files.blend_baseline)
    return blend_baseline


def _write_validation(
    files: RunFolder, predictions: dict[str, pd.DataFrame], baseline: "Regression", parts: Parts
) -> None:
    """Write what the evaluation reads: predictions of the validation fold and of the calibration part."""
    from rewardmodel.evaluation.text_regression import predict_each

    write_predictions(predictions["validation"], files.validation)
    if "calibration" in predictions:
        found = predict_each([baseline], parts.calibration)[0]
        write_predictions(with_baseline(predictions["calibration"], found), files.calibration)


def _write_submission(
    recipe: Recipe, predictions: pd.DataFrame | None, baseline: "Regression", test: Dataset | None, tossed: bool
) -> None:
    """Write the calibrated predictions of the test battles, and none of another `data.test`.

    Args:
        recipe: of the run.
        predictions: of the test battles.
        baseline: to blend with.
        test: the battles; None: there are none.
        tossed: whether a coin decided which of their responses is A.
    """
    from rewardmodel.evaluation.text_regression import predict_each
    from rewardmodel.inference.predict import apply_recipe_rules, read_calibration

    files = RunFolder(recipe.run_folder)
    for path in (files.predictions, files.submission):
        path.unlink(missing_ok=True)
    if predictions is None or test is None:
        return
    calibration = read_calibration(files.path, recipe)
    if calibration.blends:
        predictions = with_baseline(predictions, predict_each([baseline], test)[0])
    table = apply_recipe_rules(calibration.apply(predictions), recipe, test)
    write_predictions(table, files.predictions)
    sample = recipe.data.sample_submission
    write_submission(table, files.submission, read_labels(Path(sample)) if sample else None, tossed and not sample)


def prepare(recipe: RecipeLike, folder: str | Path) -> dict[str, Any]:
    """Read, group and split the recipe's battles, audit them, and write battles.parquet and audit.json.

    Args:
        recipe: its sections data, prompt and model (for the tokenizer) are read; or its path, or its sections.
        folder: where both files go.

    Returns:
        The audit, as `data.audit.audit` returns it.

    Raises:
        InputError: the recipe or its battles cannot be used, or another process writes there; nothing was written then.
    """
    recipe, folder = as_recipe(recipe), Path(folder)
    with lock_output(folder):
        return _prepare(recipe, folder)


def _prepare(recipe: Recipe, folder: Path) -> dict[str, Any]:
    reports: list[SourceReport] = []
    battles = load_battles(recipe.data, reports=reports)

    from rewardmodel.data.audit import audit
    from rewardmodel.model.loading import load_tokenizer
    from rewardmodel.model.weights import fetch_backbone
    from rewardmodel.objectives import find_objective
    from rewardmodel.prompt.encoder import PromptEncoder
    from rewardmodel.prompt.token_counts import count_tokens

    try:
        backbone = fetch_backbone(recipe.model.model_name_or_path, recipe.model.model_revision, weights=False)
        encoding = find_objective(recipe.objective).encoding
        encoder = PromptEncoder(load_tokenizer(backbone), recipe.prompt, encoding)
        tokens = count_tokens(battles, encoder, recipe.data.seed)
    except InputError as error:  # a licence that is not accepted yet, or no network: the rest can be audited anyway
        logger.warning("no tokenizer, so tokens are not counted: %s", error)
        tokens = None
    facts = audit(battles, tokens, {one.where: one.unread for one in reports if one.unread})
    with atomic_path(folder / "battles.parquet") as partial:
        write_parquet(battles, partial)
    write_json(folder / "audit.json", facts)
    return facts
