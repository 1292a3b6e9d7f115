"""A recipe in, a whole run out: `run` trains, judges and predicts; `prepare` only reads and audits its battles."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from rewardmodel.battles import write_parquet
from rewardmodel.config.schema import Recipe
from rewardmodel.data.audit import audit
from rewardmodel.data.formats import read_battles
from rewardmodel.data.splits import Parts, load_battles
from rewardmodel.distributed import is_main, wait_for_all
from rewardmodel.errors import InputError
from rewardmodel.evaluation.baselines import fit_baselines, predict_baselines
from rewardmodel.evaluation.calibration import BLEND_BASELINE
from rewardmodel.evaluation.evaluate import evaluate_run
from rewardmodel.evaluation.report import report
from rewardmodel.evaluation.results import Evaluation, read_evaluation
from rewardmodel.evaluation.text_regression import Regression, predict_each, save_regression
from rewardmodel.files import atomic_path, write_json
from rewardmodel.inference.predict import apply_recipe_rules, predict_with, read_calibration
from rewardmodel.model.loading import load_predictor, load_tokenizer
from rewardmodel.model.weights import fetch_backbone
from rewardmodel.objectives import find_objective
from rewardmodel.predictions import check_sample, with_baseline, write_predictions, write_submission
from rewardmodel.prompt.encoder import PromptEncoder
from rewardmodel.prompt.token_counts import count_tokens
from rewardmodel.run_folder import RunFolder
from rewardmodel.training.train import train

logger = logging.getLogger(__name__)

BATTLES, AUDIT = "battles.parquet", "audit.json"
"""What `prepare` writes."""


def run(
    recipe: Recipe,
    *,
    parts: Parts | None = None,
    resume: bool = False,
    overwrite: bool = False,
    before_write: Callable[[], None] = lambda: None,
) -> tuple[Path, Evaluation]:
    """Train, evaluate on the held-out fold next to the baselines, report, and predict `data.test` if there is one.

    The model that predicts is read back from disk, so that what is judged is what was saved.

    Args:
        recipe: what to do; `recipe.run_folder` is written.
        parts: its battles, if they were read before.
        resume: continue the run that is there.
        overwrite: replace the run that is there.
        before_write: as for `train`.

    Returns:
        The run folder and the evaluation of its held-out fold.

    Raises:
        InputError: what was given cannot be used.
    """
    data = recipe.data
    test = read_battles(data.test, role="test") if data.test else None
    if data.sample_submission:
        if test is None:
            raise InputError("data.sample_submission: there is no data.test to submit; give it, or leave this out")
        check_sample(Path(data.sample_submission), test["id"])
    folder, parts = train(recipe, parts=parts, resume=resume, overwrite=overwrite, before_write=before_write)

    files = RunFolder(folder)
    predictor = load_predictor(recipe.model, files.model, recipe.inference.batch_tokens)
    if is_main():
        for path in (files.predictions, files.submission):  # of another data.test, perhaps
            path.unlink(missing_ok=True)
    judged = {"validation": parts.validation, "calibration": parts.calibration, "test": test}
    tables = {name: predict_with(predictor, recipe, part, cached=True) for name, part in judged.items() if part}
    if is_main():
        write_predictions(tables["validation"], files.validation)
        baselines = fit_baselines(parts.training)
        blended = cast(Regression, baselines[BLEND_BASELINE])
        save_regression(blended, files.blend_baseline)
        write_predictions(predict_baselines(baselines, parts.validation), files.baselines)
        if "calibration" in tables:
            stacked = with_baseline(tables["calibration"], predict_each([blended], parts.calibration)[0])
            write_predictions(stacked, files.calibration)
        report(folder, evaluations=[evaluate_run(folder)])
        if test is not None:
            submitted = tables["test"]
            calibration = read_calibration(folder, recipe)
            if calibration.blends:
                submitted = with_baseline(submitted, predict_each([blended], test)[0])
            submitted = apply_recipe_rules(calibration.apply(submitted), recipe, test)
            write_predictions(submitted, files.predictions)
            write_submission(submitted, files.submission)
    wait_for_all()
    return folder, read_evaluation(files.metrics)


def prepare(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Read, group and deal the recipe's battles, audit them, and write battles.parquet and audit.json.

    Args:
        recipe: its sections data, prompt and model (for the tokenizer) are read.
        folder: where both files go.

    Returns:
        What `data.audit.audit` found.

    Raises:
        InputError: what was given cannot be used; nothing was written then.
    """
    battles = load_battles(recipe.data)
    try:
        backbone = fetch_backbone(recipe.model.model_name_or_path, recipe.model.model_revision, weights=False)
        encoding = find_objective(recipe.objective).encoding
        encoder = PromptEncoder(load_tokenizer(backbone), recipe.prompt, encoding)
        tokens = count_tokens(battles, encoder, recipe.data.seed)
    except InputError as error:  # a licence that is not accepted yet, or no network: the rest can be audited anyway
        logger.warning("no tokenizer, so tokens are not counted: %s", error)
        tokens = None
    facts = audit(battles, tokens)
    with atomic_path(folder / BATTLES) as partial:
        write_parquet(battles, partial)
    write_json(folder / AUDIT, facts)
    return facts
