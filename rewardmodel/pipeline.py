"""A recipe in, a whole run out: train, predict the held-out fold, evaluate, predict the test file."""

import logging
from pathlib import Path
from typing import Any

from rewardmodel.config import Recipe
from rewardmodel.errors import InputError
from rewardmodel.formats import read_battles
from rewardmodel.inference import predict_with
from rewardmodel.model import load_model
from rewardmodel.predictions import check_sample, write_predictions, write_submission
from rewardmodel.report import evaluate
from rewardmodel.runs import MODEL, PREDICTIONS, SUBMISSION, VALIDATION
from rewardmodel.trainer import train

logger = logging.getLogger(__name__)


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> tuple[Path, dict[str, Any]]:
    """Train, judge on the held-out fold, and predict `data.test` if there is one.

    The model that predicts is read back from disk, so that what is judged is what was saved.

    Args:
        recipe: what to do; `recipe.run_folder` is written.
        resume: continue the run that is there.
        overwrite: replace the run that is there.

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
    folder, validation = train(recipe, resume=resume, overwrite=overwrite)

    model, tokenizer = load_model(recipe.model, folder / MODEL)
    held_out = predict_with(model, tokenizer, recipe, validation)
    write_predictions(held_out, folder / VALIDATION)
    metrics = evaluate(folder)
    if test is not None:
        predictions = predict_with(model, tokenizer, recipe, test)
        write_predictions(predictions, folder / PREDICTIONS)
        write_submission(predictions, folder / SUBMISSION)
    return folder, metrics
