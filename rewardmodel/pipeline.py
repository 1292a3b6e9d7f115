"""A recipe in, a whole run out: `run` trains, judges and predicts; `prepare` only reads and audits its battles.

Both read and check every file before they import what imports torch or scikit-learn.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from rewardmodel.battles import write_parquet
from rewardmodel.config.schema import Recipe
from rewardmodel.data.formats import read_battles
from rewardmodel.data.splits import Parts, load_battles, split
from rewardmodel.distributed import is_main, wait_for_all
from rewardmodel.errors import InputError
from rewardmodel.files import atomic_path, write_json
from rewardmodel.predictions import check_sample, with_baseline, write_predictions, write_submission
from rewardmodel.run_folder import RunFolder

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
) -> tuple[Path, dict[str, Any]]:
    """Train, judge on the held-out fold beside the floors, report, and predict `data.test` if there is one.

    The model that predicts is read back from disk, so that what is judged is what was saved.

    Args:
        recipe: what to do; `recipe.run_folder` is written.
        parts: its battles, if they were read before.
        resume: continue the run that is there.
        overwrite: replace the run that is there.
        before_write: as for `train`.

    Returns:
        The run folder and what `evaluate` found.

    Raises:
        InputError: what was given cannot be used.
    """
    data = recipe.data
    test = read_battles(data.test, role="test") if data.test else None
    if data.sample_submission:
        if test is None:
            raise InputError("data.sample_submission: there is no data.test to submit; give it, or leave this out")
        check_sample(Path(data.sample_submission), test["id"])
    parts = parts or split(load_battles(data), data.fold)

    from rewardmodel.evaluation.baselines import fit, predictions
    from rewardmodel.evaluation.calibration import BLENDED
    from rewardmodel.evaluation.report import report
    from rewardmodel.evaluation.text_regression import Regression, predict_each, save
    from rewardmodel.inference.predict import apply_recipe_rules, predict_with, read_calibration
    from rewardmodel.model.loading import load_predictor
    from rewardmodel.training.train import train

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
        floors = fit(parts.training)
        floor = cast(Regression, floors[BLENDED])
        save(floor, files.blend_baseline)
        write_predictions(predictions(floors, parts.validation), files.baselines)
        if "calibration" in tables:
            beside = with_baseline(tables["calibration"], predict_each([floor], parts.calibration)[0])
            write_predictions(beside, files.calibration)
        report(folder)
        if test is not None:
            submitted = tables["test"]
            calibration = read_calibration(folder, recipe)
            if calibration.blends:
                submitted = with_baseline(submitted, predict_each([floor], test)[0])
            submitted = apply_recipe_rules(calibration.apply(submitted), recipe, test)
            write_predictions(submitted, files.predictions)
            write_submission(submitted, files.submission)
    wait_for_all()
    return folder, json.loads(files.metrics.read_text(encoding="utf-8"))


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
    facts = audit(battles, tokens)
    with atomic_path(folder / BATTLES) as partial:
        write_parquet(battles, partial)
    write_json(folder / AUDIT, facts)
    return facts
