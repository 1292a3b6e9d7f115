"""A trained run and battles in, the predictions table out: length-sorted batches, both orders averaged."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rewardmodel.backbone import family
from rewardmodel.battles import swap
from rewardmodel.calibration import NONE, load
from rewardmodel.config import Recipe
from rewardmodel.errors import InputError
from rewardmodel.folds import assign_groups
from rewardmodel.formats import read_battles
from rewardmodel.model import autocast, compute_dtype, load_model
from rewardmodel.objective import OBJECTIVES, Objective
from rewardmodel.pairs import MODEL_INPUTS, PadCollator, length_sorted_batches, tokenize
from rewardmodel.parts import fingerprints, load_battles, split
from rewardmodel.predictions import PROBABILITIES, predicted, predictions_table, read_predictions
from rewardmodel.runs import CALIBRATION, CALIBRATOR, MODEL, VALIDATION, check_same_inputs, load_run_recipe

logger = logging.getLogger(__name__)

BATTLE = ("id", "prompt_chars", "response_a_chars", "response_b_chars")
"""Columns by which a battle is known again; ids alone may be row numbers."""

OWN_PARTS = ("validation", "calibration", "holdout")
"""Parts of a run's own battles that it can be asked to predict by name."""


def predict(run: str | Path, battles: Any, recipe: Recipe | None = None) -> pd.DataFrame:
    """Return the predictions table of battles by a trained run, one row a battle, in their order.

    Template and truncation are those that the run was trained with.

    Args:
        run: the run folder.
        battles: as for `battles_to_predict`; labelled or not.
        recipe: in the place of the run's own, for another device, precision or way to predict.

    Raises:
        InputError: no trained run, no battles, or a backbone that is not there.
        FloatingPointError: a prediction that is no number; the battles are named.
    """
    run = Path(run)
    recipe = recipe or load_run_recipe(run)
    battles = battles_to_predict(run, battles)
    model, tokenizer = load_model(recipe.model, run / MODEL)
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
    objective = OBJECTIVES[recipe.objective.name]
    dtype = compute_dtype(recipe.model, next(model.parameters()).device, family(model.config.model_type))

    def one_order(battles: Dataset, name: str) -> np.ndarray:
        rows = tokenize(battles, tokenizer, recipe.prompt, recipe.trainer.get("dataset_num_proc"))
        return probabilities(model, rows, tokenizer.pad_token_id, objective, dtype, inference.batch_tokens, name)

    if min(battles["group"]) < 0:
        battles = assign_groups(battles)
    as_given = one_order(battles, "A first")
    exchanged = one_order(swap(battles), "B first")[:, [1, 0, 2]] if inference.swap_tta == "both" else None
    table = predictions_table(battles, as_given, exchanged)
    bad = ~np.isfinite(table.filter(like="p_").to_numpy(np.float64)).all(axis=1)
    if bad.any():
        ids = ", ".join(table["id"][bad][:5])
        raise FloatingPointError(f"{bad.sum()} predictions are no numbers ({dtype}); the first ids: {ids}")
    return table


@torch.inference_mode()
def probabilities(
    model: Any,
    rows: Dataset,
    pad_token_id: int,
    objective: Objective,
    dtype: torch.dtype,
    batch_tokens: int,
    name: str = "",
) -> np.ndarray:
    """Return the outcome probabilities of rows, (n_rows, 3) float32, in their order.

    Args:
        model: in evaluation mode, on its device.
        rows: of `rewardmodel.pairs.ROWS`.
        pad_token_id: what fills the ends of shorter rows.
        objective: its link makes probabilities of logits.
        dtype: precision to compute in.
        batch_tokens: tokens of a batch, padding included.
        name: of the progress bar.
    """
    collate = PadCollator(pad_token_id)
    lengths = np.asarray(rows["length"][:])
    result = np.empty((len(rows), 3), dtype=np.float32)
    device = next(model.parameters()).device
    with tqdm(total=len(rows), desc=f"predicting {name}".strip(), unit="battle") as progress:
        for numbers in length_sorted_batches(lengths, batch_tokens):
            batch = collate([rows[int(number)] for number in numbers])
            with autocast(device, dtype):
                logits = model(**{name: batch[name].to(device) for name in MODEL_INPUTS}).logits
            result[numbers] = objective.probabilities(logits).cpu().numpy()
            progress.update(len(numbers))
    return result
