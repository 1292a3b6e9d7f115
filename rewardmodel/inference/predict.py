"""Trained runs and battles in, the predictions table out: orders, folds and runs averaged."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rewardmodel.config.schema import Recipe
from rewardmodel.data.folds import assign_groups
from rewardmodel.data.formats import read_battles
from rewardmodel.data.splits import fingerprints, load_battles, split, trained_on
from rewardmodel.errors import InputError
from rewardmodel.evaluation.calibration import BLEND, NONE, load
from rewardmodel.evaluation.text_regression import load as load_floor
from rewardmodel.evaluation.text_regression import predict_each
from rewardmodel.inference.shards import Deadline, shard_folder, sharded_logits
from rewardmodel.model.families import family
from rewardmodel.model.features import feature_folder, features, layer_logits
from rewardmodel.model.loading import load_model, trained_layer
from rewardmodel.model.precision import compute_dtype
from rewardmodel.objectives import find_objective
from rewardmodel.predictions import (
    BATTLE,
    PROBABILITIES,
    SEEN,
    beside_floor,
    in_both_orders,
    mean_table,
    overrule,
    predicted,
    predictions_table,
    read_predictions,
    ruled,
    with_floor,
)
from rewardmodel.prompt.tokenization import tokenize
from rewardmodel.run_folder import (
    RunFolder,
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
    *,
    work: Path | None = None,
    time_limit: float | None = None,
) -> pd.DataFrame:
    """Return the predictions table of battles by one or several trained runs, one row a battle, in their order.

    Template and truncation are those that each run was trained with. What several runs predict, each calibrated by
    itself, is averaged. A k-fold run is the mean of its folds, calibrated. One model is in memory at a time. Beside a
    model whose run blends (`inference.blend`), its floor predicts the same battles; `floor_*` is averaged likewise.

    A battle is predicted by those of the runs and folds alone that had no battle of its group in training, or by all
    if there are none: `seen` says so (absent if a run has no training_keys.npy).

    Args:
        runs: the run folder, or what `exports.export` made of one; or several.
        battles: as for `battles_to_predict`, of the first run; labelled or not.
        recipe: in the place of the run's own, for another device, precision or way to predict; one for each run.
        weights: of each run in the mean; none: all alike.
        work: a folder to keep what is computed in, shard by shard, so that the same call goes on after a kill; remove
            it with `inference.shards.remove_shards`. None: nothing is kept.
        time_limit: seconds. Every battle is predicted as given first, by all models and however long it takes; then
            with A and B exchanged, the shortest first, as far as time allows. `ba_*` of the others is NaN, and only
            one order of theirs is in what is predicted. None: both orders at once, which is quickest.

    Raises:
        InputError: no trained run, no battles, a backbone that is not there, or weights or a time that are none.
        FloatingPointError: a prediction that is no number; the battles are named.
    """
    if time_limit is not None and not 0 <= time_limit < np.inf:
        raise InputError(f"time limit: {time_limit:g}; give seconds, from 0")
    deadline = None if time_limit is None else Deadline(time_limit)
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    models = [trained_models(run) for run in folders]
    shares = _checked_weights(weights, len(folders))
    given = [recipe] * len(folders) if isinstance(recipe, Recipe) else recipe
    recipes = list(given or map(load_run_recipe, folders))
    battles = battles_to_predict(folders[0], battles)
    if min(battles["group"]) < 0:
        battles = assign_groups(battles)
    counted = [number for number, share in enumerate(shares) if share]
    jobs = [(number, folder) for number in counted for folder in models[number]]
    use, seen = _dealt([folder for _, folder in jobs], battles)
    asked = [
        _Asked(number, folder, recipes[number], np.flatnonzero(rows))
        for (number, folder), rows in zip(jobs, use, strict=True)
        if rows.any()
    ]
    floors = _floors(asked, [blends(run, own) for run, own in zip(folders, recipes, strict=True)], battles)
    found = _predict_each(asked, battles, work, deadline)
    found = [with_floor(table, floors[at]) if at in floors else table for at, table in enumerate(found)]
    tables = []
    for number in dict.fromkeys(one.run for one in asked):
        mine = [table for one, table in zip(asked, found, strict=True) if one.run == number]
        table = calibrate(mean_table(mine, [1.0] * len(mine)), folders[number], recipes[number])
        tables.append((by_rule(table, recipes[number], battles), shares[number]))
    result = mean_table(*map(list, zip(*tables, strict=True))).reset_index(drop=True)
    if deadline is not None:
        _tell(result, deadline)
    return result if seen is None else result.assign(**{SEEN: seen})


def _tell(table: pd.DataFrame, deadline: Deadline) -> None:
    """Log what the time was enough for."""
    if "ba_p_tie" not in table:
        late = "" if deadline.left() > 0 else ", and took longer than the time limit"
        logger.info("all %d battles were predicted; no second order was asked of all runs%s", len(table), late)
        return
    both = int(in_both_orders(table).sum())
    if both == len(table):
        logger.info("all %d battles were predicted in both orders", both)
    else:
        logger.warning("time is up: %d of %d battles were predicted in both orders, all in one", both, len(table))


class _Asked(NamedTuple):
    """What one model is asked for: number of its run, its folder, the recipe to predict by, (n,) battle numbers."""

    run: int
    folder: Path
    recipe: Recipe
    rows: np.ndarray


def _floors(asked: list[_Asked], blended: list[bool], battles: Dataset) -> dict[int, np.ndarray]:
    """Return what the floors beside the models predict of the same battles, (n, 3), by the place of those asked.

    Args:
        asked: of the models.
        blended: for each run whether it has floors to blend with.
        battles: all of them.
    """
    places = [place for place, one in enumerate(asked) if blended[one.run]]
    floors = [load_floor(RunFolder(asked[place].folder).blend_baseline) for place in places]
    found = predict_each(floors, battles) if floors else ()
    return {place: one[asked[place].rows] for place, one in zip(places, found, strict=True)}


def _predict_each(
    asked: list[_Asked], battles: Dataset, work: Path | None, deadline: Deadline | None
) -> list[pd.DataFrame]:
    """Return what each model predicts; before a deadline all predict one order before any begins with the other."""
    if deadline is None or len(asked) == 1:
        return [_predict_rows(one, battles, work, deadline) for one in asked]
    with TemporaryDirectory() as kept:
        work = work or Path(kept)
        tables = [_predict_rows(one, battles, work, deadline.over()) for one in asked]
        for number, one in enumerate(asked):
            if deadline.allows(0) and "ba_p_tie" in tables[number]:
                tables[number] = _predict_rows(one, battles, work, deadline.share(len(asked) - number))
    return tables


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


def _predict_rows(one: _Asked, battles: Dataset, work: Path | None, deadline: Deadline | None) -> pd.DataFrame:
    """Return the predictions of some battles by a model, by the battle's number."""
    model, tokenizer = load_model(one.recipe.model, model_folder(one.folder))
    chosen = battles if len(one.rows) == len(battles) else battles.select(one.rows)
    kept = (work, model_folder(one.folder)) if work else None
    return predict_with(model, tokenizer, one.recipe, chosen, kept, deadline).set_index(one.rows)


def by_rule(table: pd.DataFrame, recipe: Recipe, battles: Dataset) -> pd.DataFrame:
    """Return predictions, whose index is the battle's number, with the recipe's rules for same and empty responses."""
    rules = ruled(battles, recipe.inference.tie_if_same, recipe.inference.win_if_other_empty)
    return overrule(table, rules[table.index])


def blends(run: Path, recipe: Recipe) -> bool:
    """Return whether `calibrate` blends a run's predictions with its floors', and so needs these beside."""
    asked = recipe.inference.calibrate and recipe.inference.blend
    return asked and load(RunFolder(run).calibrator).method == BLEND


def calibrate(table: pd.DataFrame, run: Path, recipe: Recipe) -> pd.DataFrame:
    """Return predictions of a run with its calibrator applied to the probabilities that are stated in the end.

    Battles that the calibrator was fitted on stay as the model states them; and so do those that were predicted in
    another number of orders than it was fitted on, and all, if the recipe switches calibration off, or the blend that
    it is. For a blend, the table has the floor's predictions as `with_floor` puts them there.
    """
    calibrator = load(RunFolder(run).calibrator)
    if calibrator == NONE or not recipe.inference.calibrate:
        return table
    blended = calibrator.method == BLEND
    if blended and not recipe.inference.blend:
        logger.info("not calibrated: the run's calibrator is a blend, which inference.blend switches off")
        return table
    fitted = read_predictions(RunFolder(run).calibrated_on)
    alike = in_both_orders(table) == ("ba_p_tie" in fitted)
    if not alike.any():
        logger.warning("not calibrated: the run's calibrator was fitted with another inference.swap_tta")
        return table
    if not alike.all():
        logger.warning("%d battles are left uncalibrated: the calibrator was fitted on both orders", (~alike).sum())
    same = [pd.MultiIndex.from_frame(one[list(BATTLE)]) for one in (table, fitted)]
    fresh = ~same[0].isin(same[1])
    if not fresh.all():
        logger.info("%d battles are left uncalibrated: the calibrator was fitted on them", (~fresh).sum())
    fresh &= alike
    table.loc[fresh, list(PROBABILITIES)] = calibrator(beside_floor(table) if blended else predicted(table))[fresh]
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
    kept: tuple[Path, Path] | None = None,
    deadline: Deadline | None = None,
    cached: bool = False,
) -> pd.DataFrame:
    """Return the predictions table of battles by a model in memory.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        recipe: the one that the model was trained with.
        battles: what to predict.
        kept: a folder to keep shards in, and the folder of the saved model; none: nothing is kept.
        deadline: for the second order, as `time_limit` of `predict`.
        cached: read a frozen backbone's features from the cache, and keep them there, as training does.

    Raises:
        FloatingPointError: a prediction that is no number; the battles are named.
    """
    inference = recipe.inference
    objective = find_objective(recipe.objective)
    dtype = compute_dtype(recipe.model, next(model.parameters()).device, family(model.config.model_type))
    if min(battles["group"]) < 0:
        battles = assign_groups(battles)
    both_orders = objective.encoding == "joint" and inference.swap_tta == "both"
    rows = tokenize(
        battles,
        tokenizer,
        recipe.prompt,
        recipe.trainer.get("dataset_num_proc"),
        encoding=objective.encoding,
        both_orders=both_orders,
    )
    given = (rows, tokenizer.pad_token_id, dtype)
    if cached and recipe.model.freeze_backbone:
        layer = trained_layer(model)
        folder = feature_folder(recipe.model, dtype)
        found = layer_logits(layer, features(model, layer, *given, folder, inference.batch_tokens))
    else:
        settings = {**asdict(recipe.model), "dtype": str(dtype), "batch_tokens": inference.batch_tokens}
        shards = shard_folder(*kept, rows, settings) if kept else None
        until = deadline if both_orders else None
        found = sharded_logits(model, *given, inference.batch_tokens, shards, until)
    return predictions_table(battles, *(order.numpy() for order in objective.orders(torch.from_numpy(found))))
