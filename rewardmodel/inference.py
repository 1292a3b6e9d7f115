"""A trained run and battles in, the predictions table out: both orders averaged."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rewardmodel.backbone import family
from rewardmodel.calibration import NONE, load
from rewardmodel.config import Recipe
from rewardmodel.errors import InputError
from rewardmodel.folds import assign_groups
from rewardmodel.formats import read_battles
from rewardmodel.forward import forward_budget, row_logits
from rewardmodel.model import load_model
from rewardmodel.objective import find_objective
from rewardmodel.pairs import tokenize
from rewardmodel.parts import fingerprints, load_battles, split
from rewardmodel.placement import compute_dtype
from rewardmodel.predictions import PROBABILITIES, predicted, predictions_table, read_predictions
from rewardmodel.runs import (
    CALIBRATION,
    CALIBRATOR,
    VALIDATION,
    check_same_inputs,
    load_run_recipe,
    model_folder,
)

logger = logging.getLogger(__name__)

BATTLE = ("id", "prompt_chars", "response_a_chars", "response_b_chars")
"""Columns by which a battle is known again; ids alone may be row numbers."""

OWN_PARTS = ("validation", "calibration", "holdout")
"""Parts of a run's own battles that it can be asked to predict by name."""


def predict(run: str | Path, battles: Any, recipe: Recipe | None = None) -> pd.DataFrame:
    """Return the predictions table of battles by a trained run, one row a battle, in their order.

    Template and truncation are those that the run was trained with.

    Args:
        run: the run folder, or what `rewardmodel.exports` made of one.
        battles: as for `battles_to_predict`; labelled or not.
        recipe: in the place of the run's own, for another device, precision or way to predict.

    Raises:
        InputError: no trained run, no battles, or a backbone that is not there.
        FloatingPointError: a prediction that is no number; the battles are named.
    """
    run = Path(run)
    recipe = recipe or load_run_recipe(run)
    battles = battles_to_predict(run, battles)
    model, tokenizer = load_model(recipe.model, model_folder(run))
    return calibrate(predict_with(model, tokenizer, recipe, battles), run, recipe)


def calibrate(table: pd.DataFrame, run: Path, recipe: Recipe) -> pd.DataFrame:
    """Return predictions of a run with its calibrator applied to the probabilities that are stated in the end.

    Battles that the calibrator was fitted on stay as the model states them; and so do all, if the recipe switches
    calibration off, or predicts another number of orders than the calibrator knows.
    """
    calibrator = load(run / CALIBRATOR)
    if calibrator == NONE or not recipe.inference.calibrate:
        return table
    fitted = read_predictions(run / (CALIBRATION if (run / CALIBRATION).is_file() else VALIDATION))
    if ("ba_p_tie" in fitted) != ("ba_p_tie" in table):
        logger.warning("not calibrated: the run's calibrator was fitted with another inference.swap_tta")
        return table
    same = [pd.MultiIndex.from_frame(one[list(BATTLE)]) for one in (table, fitted)]
    fresh = ~same[0].isin(same[1])
    if not fresh.all():
        logger.info("%d battles are left uncalibrated: the calibrator was fitted on them", (~fresh).sum())
    table.loc[fresh, list(PROBABILITIES)] = calibrator(predicted(table))[fresh]
    return table


def battles_to_predict(run: Path, battles: Any) -> Dataset:
    """Return the battles of a Dataset, a DataFrame or a path, or a part of the run's own that never trained.

    Args:
        run: the run folder.
        battles: what to read; `validation`, `calibration` and `holdout` are the run's own.

    Raises:
        InputError: nothing there, or the run's own battles are not what they were.
    """
    if not (isinstance(battles, str) and battles in OWN_PARTS):
        return read_battles(battles, role="test")
    data = load_run_recipe(run).data
    parts = split(load_battles(data), data.fold)
    check_same_inputs(run, {"data": fingerprints(parts)})
    part: Dataset = getattr(parts, battles)
    if not len(part):
        raise InputError(f"{run}: its data.{battles} is 0: no battles were kept for that; set it before training")
    return part


def predict_with(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    battles: Dataset,
) -> pd.DataFrame:
    """Return the predictions table of battles by a model in memory; `recipe` is the one it was trained with."""
    inference = recipe.inference
    objective = find_objective(recipe.objective)
    dtype = compute_dtype(recipe.model, next(model.parameters()).device, family(model.config.model_type))
    if min(battles["group"]) < 0:
        battles = assign_groups(battles)
    rows = tokenize(
        battles,
        tokenizer,
        recipe.prompt,
        recipe.trainer.get("dataset_num_proc"),
        encoding=objective.encoding,
        both_orders=objective.encoding == "joint" and inference.swap_tta == "both",
    )
    budget = inference.batch_tokens or forward_budget(model, rows, tokenizer.pad_token_id, dtype)
    logits = torch.from_numpy(row_logits(model, rows, tokenizer.pad_token_id, dtype, budget, "predicting"))
    as_given, *exchanged = [order.numpy() for order in objective.orders(logits)]
    table = predictions_table(battles, as_given, *exchanged)
    bad = ~np.isfinite(table.filter(like="p_").to_numpy(np.float64)).all(axis=1)
    if bad.any():
        ids = ", ".join(table["id"][bad][:5])
        raise FloatingPointError(f"{bad.sum()} predictions are no numbers ({dtype}); the first ids: {ids}")
    return table
