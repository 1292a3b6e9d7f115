"""Trained runs and battles in, the predictions table out: orders, folds and runs averaged."""

import logging
from collections.abc import Sequence
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
from rewardmodel.parts import fingerprints, load_battles, split, trained_on
from rewardmodel.placement import compute_dtype
from rewardmodel.predictions import (
    BATTLE,
    PROBABILITIES,
    SEEN,
    mean_table,
    predicted,
    predictions_table,
    read_predictions,
)
from rewardmodel.runs import (
    CALIBRATION,
    CALIBRATOR,
    VALIDATION,
    check_same_inputs,
    is_k_fold,
    load_run_recipe,
    model_folder,
    trained_models,
)

logger = logging.getLogger(__name__)

OWN_PARTS = ("validation", "calibration", "holdout")
"""Parts of a run's own battles that it can be asked to predict by name."""


def predict(
    runs: str | Path | Sequence[str | Path],
    battles: Any,
    recipe: Recipe | Sequence[Recipe] | None = None,
    weights: Sequence[float] | None = None,
) -> pd.DataFrame:
    """Return the predictions table of battles by one or several trained runs, one row a battle, in their order.

    Template and truncation are those that each run was trained with. What several runs predict, each calibrated by
    itself, is averaged. A k-fold run is the mean of its folds, calibrated. One model is in memory at a time.

    A battle is predicted by those of the runs and folds alone that had no battle of its group in training, or by all
    if there are none: `seen` says so (absent if a run has no training_keys.npy).

    Args:
        runs: the run folder, or what `rewardmodel.exports` made of one; or several.
        battles: as for `battles_to_predict`, of the first run; labelled or not.
        recipe: in the place of the run's own, for another device, precision or way to predict; one for each run.
        weights: of each run in the mean; none: all alike.

    Raises:
        InputError: no trained run, no battles, a backbone that is not there, or weights that are none.
        FloatingPointError: a prediction that is no number; the battles are named.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    models = [trained_models(run) for run in folders]
    shares = _checked_weights(weights, len(folders))
    given = [recipe] * len(folders) if isinstance(recipe, Recipe) else recipe
    recipes = list(given or map(load_run_recipe, folders))
    battles = battles_to_predict(folders[0], battles)
    if min(battles["group"]) < 0:
        battles = assign_groups(battles)
    counted = [number for number, share in enumerate(shares) if share]
    use, seen = _dealt([folder for number in counted for folder in models[number]], battles)
    tables = []
    for number in counted:
        mine, use = use[: len(models[number])], use[len(models[number]) :]
        if mine.any():
            found = [
                _predict_rows(folder, recipes[number], battles, np.flatnonzero(rows))
                for folder, rows in zip(models[number], mine, strict=True)
                if rows.any()
            ]
            table = calibrate(mean_table(found, [1.0] * len(found)), folders[number], recipes[number])
            tables.append((table, shares[number]))
    result = mean_table(*map(list, zip(*tables, strict=True))).reset_index(drop=True)
    return result if seen is None else result.assign(**{SEEN: seen})


def _checked_weights(weights: Sequence[float] | None, runs: int) -> list[float]:
    shares = [1.0] * runs if weights is None else [float(weight) for weight in weights]
    if len(shares) != runs:
        raise InputError(f"weights: {len(shares)} for {runs} runs; give one for each")
    if not all(0 <= share < np.inf for share in shares) or not any(shares):
        raise InputError(
            f"weights: {', '.join(f'{share:g}' for share in shares)}; give numbers from 0, not all of them 0"
        )
    return shares


def _dealt(folders: list[Path], battles: Dataset) -> tuple[np.ndarray, np.ndarray | None]:
    """Return which model predicts which battles, (n_folders, n_battles) bool, and which all have seen, (n_battles,)."""
    trained = trained_on(folders, battles)
    if trained is None:
        logger.warning("a run has no training_keys.npy: whether it trained on the battles is not known")
        return np.ones((len(folders), len(battles)), bool), None
    seen = np.logical_and.reduce(trained)
    if seen.any():
        logger.warning(
            "%d of %d battles share a prompt or responses with training battles of every model: their predictions are "
            "no measure of how new battles are predicted", seen.sum(), len(battles),
        )  # fmt: skip
    apart = (trained.any(axis=0) & ~seen).sum()
    if apart:
        logger.info(
            "%d of %d battles are predicted by the models alone that did not train on them", apart, len(battles)
        )
    return ~trained | seen, seen


def _predict_rows(folder: Path, recipe: Recipe, battles: Dataset, rows: np.ndarray) -> pd.DataFrame:
    """Return the predictions of some battles by the model of a folder, by the battle's number."""
    model, tokenizer = load_model(recipe.model, model_folder(folder))
    chosen = battles if len(rows) == len(battles) else battles.select(rows)
    return predict_with(model, tokenizer, recipe, chosen).set_index(rows)


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
    parts = split(load_battles(data), None if is_k_fold(run) else data.fold)
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
