"""Trained runs and battles -> the predictions table: orders, folds and runs averaged."""

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

from rewardmodel.config.schema import Recipe
from rewardmodel.data.folds import assign_groups
from rewardmodel.data.splits import find_seen_battles
from rewardmodel.distributed import is_main
from rewardmodel.errors import plural
from rewardmodel.evaluation.calibration import BLEND, NO_CALIBRATION, Calibrator, load_calibrator
from rewardmodel.inference.battles import battles_to_predict, check_time_limit, check_weights
from rewardmodel.inference.shards import Deadline, shard_folder, sharded_logits
from rewardmodel.model.features import layer_logits, read_features
from rewardmodel.model.forward import Predictor
from rewardmodel.model.loading import load_predictor, trained_layer
from rewardmodel.objectives import find_objective
from rewardmodel.predictions import (
    IDENTITY_COLUMNS,
    PROBABILITIES,
    SEEN_COLUMN,
    apply_rules,
    average_tables,
    build_predictions,
    has_both_orders,
    predicted,
    read_predictions,
    rule_probabilities,
    stack_baseline,
    with_baseline,
)
from rewardmodel.prompt.tokenization import tokenize
from rewardmodel.run_folder import BACKBONE_FILE, RunFolder, as_folders, load_run_recipe, model_folder, trained_models

logger = logging.getLogger(__name__)


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

    Template and truncation are those that each run was trained with. The predictions of several runs, each with its
    calibrator applied, are averaged. A k-fold run is the mean of its folds, calibrated. One model is in memory at a
    time. Where a run blends (`inference.blend`), its baseline predicts the same battles, in `baseline_*`.

    A battle is predicted only by those runs and folds that had no battle of its group in training, or by all of them
    if there is none; the column `seen` says so (absent if a run has no training_keys.npy).

    Args:
        runs: a run folder, or an export (`exports`); or several.
        battles: as for `battles_to_predict`, of the first run; labelled or not. One battle may be a dict, several a
            list of dicts or a dict of columns; one that may be either is refused (`data.tables.rows_as_table`).
        recipe: overrides the run's own, for another device, precision or way to predict; one for each run.
        weights: of each run in the mean; default: equal.
        work: a folder for intermediate results, shard by shard, so that the same call continues after a kill; remove
            it with `inference.shards.remove_shards`. Default: nothing is kept.
        time_limit: seconds. Every battle is predicted as given first, by all models and however long it takes; then
            with A and B exchanged, the shortest first, as far as time allows. `ba_*` of the others is NaN, and their
            prediction comes from one order. Default: both orders at once, which is quickest.

    Raises:
        InputError: no trained run, no battles, a backbone that cannot be found, or weights or a time out of range.
        FloatingPointError: a prediction that is NaN or infinite; the battles are named.
    """
    # check everything that was given before a model is loaded
    check_time_limit(time_limit)
    deadline = None if time_limit is None else Deadline(time_limit)
    folders = as_folders(runs)
    models = [trained_models(run) for run in folders]
    shares = check_weights(weights, len(folders))
    given = [recipe] * len(folders) if isinstance(recipe, Recipe) else recipe
    recipes = list(given or map(load_run_recipe, folders))
    calibrations = [read_calibration(run, own) for run, own in zip(folders, recipes, strict=True)]
    battles = battles_to_predict(folders[0], battles)
    if min(battles["group"]) < 0:
        battles = assign_groups(battles)

    # one job for each model, with the battles that it may predict; numbered: [(0, runs/a/fold-0), (0, runs/a/fold-1)]
    numbered = [(number, folder) for number, share in enumerate(shares) if share for folder in models[number]]
    use, seen = _models_by_battle([folder for _, folder in numbered], battles)
    jobs = [
        PredictionJob(number, folder, recipes[number], np.flatnonzero(rows))
        for (number, folder), rows in zip(numbered, use, strict=True)
        if rows.any()
    ]
    baselines = _baseline_predictions(jobs, [one.blends for one in calibrations], battles)
    tables = _predict_jobs(jobs, battles, work, deadline)
    for place, probabilities in baselines.items():
        tables[place] = with_baseline(tables[place], probabilities)

    # the mean over the folds of each run, calibrated; then the mean over runs
    averaged = []
    for number in dict.fromkeys(job.run for job in jobs):
        own = [table for job, table in zip(jobs, tables, strict=True) if job.run == number]
        table = calibrations[number].apply(average_tables(own, [1.0] * len(own)))
        averaged.append((apply_recipe_rules(table, recipes[number], battles), shares[number]))
    result = average_tables(*map(list, zip(*averaged, strict=True))).reset_index(drop=True)
    if deadline is not None and is_main():  # a warning would be printed by each process
        _log_deadline(result, deadline)
    return result if seen is None else result.assign(**{SEEN_COLUMN: seen})


class PredictionJob(NamedTuple):
    """What one model is to predict.

    Attributes:
        run: number of its run.
        folder: of the run, or of the fold.
        recipe: to predict by.
        rows: (n,) numbers of the battles.
    """

    run: int
    folder: Path
    recipe: Recipe
    rows: np.ndarray


def _log_deadline(table: pd.DataFrame, deadline: Deadline) -> None:
    """Log how many battles were predicted in both orders before the deadline."""
    if "ba_p_tie" not in table:
        late = "" if deadline.left() > 0 else "; that took longer than the time limit"
        logger.info(
            "%s predicted, each in one order: another was not asked for, or changes nothing%s",
            plural(len(table), "battle"),
            late,
        )
        return
    both = int(has_both_orders(table).sum())
    if both == len(table):
        logger.info("%s predicted, each in both orders", plural(both, "battle"))
    else:
        logger.warning(
            "time is up: %d of %s were predicted in both orders, all in one", both, plural(len(table), "battle")
        )


def _baseline_predictions(jobs: list[PredictionJob], run_blends: list[bool], battles: Dataset) -> dict[int, np.ndarray]:
    """Return what the baselines to blend with predict of the jobs' battles.

    Args:
        jobs: of the models.
        run_blends: for each run whether its predictions are blended with its baseline's.
        battles: all of them.

    Returns:
        Index of a job whose run blends -> (n, 3) float64 of the job's battles.
    """
    places = [place for place, job in enumerate(jobs) if run_blends[job.run]]
    if not places:
        return {}
    # here, because it imports scikit-learn, which is not bundled for Kaggle unless the run blends
    from rewardmodel.evaluation.text_regression import load_regression, predict_each

    baselines = [load_regression(RunFolder(jobs[place].folder).blend_baseline) for place in places]
    found = predict_each(baselines, battles)
    return {place: one[jobs[place].rows] for place, one in zip(places, found, strict=True)}


def _predict_jobs(
    jobs: list[PredictionJob], battles: Dataset, work: Path | None, deadline: Deadline | None
) -> list[pd.DataFrame]:
    """Return the predictions of each job; before a deadline all jobs do one order before any starts the other."""
    if deadline is None or len(jobs) == 1:
        return [_predict_job(job, battles, work, deadline) for job in jobs]
    with TemporaryDirectory() as temporary:
        work = work or Path(temporary)
        tables = [_predict_job(job, battles, work, deadline.over()) for job in jobs]
        for number, job in enumerate(jobs):
            if deadline.allows(0) and "ba_p_tie" in tables[number]:
                tables[number] = _predict_job(job, battles, work, deadline.share(len(jobs) - number))
    return tables


def _predict_job(job: PredictionJob, battles: Dataset, work: Path | None, deadline: Deadline | None) -> pd.DataFrame:
    """Return the predictions of a job, indexed by the battle's number."""
    model = model_folder(job.folder)
    predictor = load_predictor(job.recipe.model, model, job.recipe.inference.batch_tokens)
    chosen = battles if len(job.rows) == len(battles) else battles.select(job.rows)
    shards = (work, model) if work else None
    return predict_with(predictor, job.recipe, chosen, shards, deadline).set_index(job.rows)


def _explain_no_record(folders: Sequence[Path]) -> str:
    """Return why it is not known what the model in one of these folders trained on."""
    folder = next(one for one in folders if not RunFolder(one).training_keys.is_file())
    exported = (folder / BACKBONE_FILE).is_file()
    reason = "is an export, which has no record of training battles" if exported else "has no training_keys.npy"
    return f"{folder} {reason}"


def _models_by_battle(folders: list[Path], battles: Dataset) -> tuple[np.ndarray, np.ndarray | None]:
    """Return which model predicts which battles, (n_models, n_battles) bool, and which battles all models have seen.

    The second is (n_battles,) bool, or None where a run has no record of what it trained on; every model then predicts
    every battle.
    """
    trained = find_seen_battles(folders, battles)
    if trained is None:
        logger.warning("%s: whether it trained on the battles is unknown", _explain_no_record(folders))
        return np.ones((len(folders), len(battles)), bool), None
    seen = np.logical_and.reduce(trained)
    if seen.any():
        logger.warning(
            "%d of %s share a prompt or responses with training battles of every model: their predictions do not "
            "measure how new battles are predicted",
            seen.sum(),
            plural(len(battles), "battle"),
        )
    separate = (trained.any(axis=0) & ~seen).sum()
    if separate:
        of = plural(len(battles), "battle")
        logger.info("%d of %s: predicted only by models that did not train on them", separate, of)
    return ~trained | seen, seen


class RunCalibration(NamedTuple):
    """A run's calibrator and what it was fitted on.

    Attributes:
        calibrator: to apply; `NO_CALIBRATION` where the run has none, or its recipe switches it off.
        fitted_on: predictions that it was fitted on; None without a calibrator.
    """

    calibrator: Calibrator
    fitted_on: pd.DataFrame | None

    @property
    def blends(self) -> bool:
        """Whether it blends a run's predictions with its baseline's, and so needs both."""
        return self.calibrator.method == BLEND

    def apply(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return predictions of the run, calibrated.

        Battles that the calibrator was fitted on stay as they are, and so do those that were predicted in another
        number of orders than it was fitted on. To blend, the table has the baseline's predictions (`with_baseline`).
        """
        if self.fitted_on is None:
            return table
        alike = has_both_orders(table) == ("ba_p_tie" in self.fitted_on)
        if not alike.any():
            logger.warning("not calibrated: the run's calibrator was fitted with another inference.swap_tta")
            return table
        if not alike.all():
            logger.warning(
                "left uncalibrated: %s, as the calibrator was fitted on both orders", plural((~alike).sum(), "battle")
            )
        here, fitted = (pd.MultiIndex.from_frame(one[list(IDENTITY_COLUMNS)]) for one in (table, self.fitted_on))
        new = ~here.isin(fitted)
        if not new.all():
            logger.info("left uncalibrated: %s that the calibrator was fitted on", plural((~new).sum(), "battle"))
        rows = new & alike
        calibrated = table.copy()
        inputs = stack_baseline(table) if self.blends else predicted(table)
        calibrated.loc[rows, list(PROBABILITIES)] = self.calibrator(inputs)[rows]
        return calibrated


def read_calibration(run: Path, recipe: Recipe) -> RunCalibration:
    """Return the calibrator to apply to a run's predictions.

    Args:
        run: the run folder.
        recipe: its section `inference` says whether to calibrate and to blend.

    Raises:
        InputError: a calibrator, or the predictions that it was fitted on, that cannot be read.
    """
    files = RunFolder(run)
    calibrator = load_calibrator(files.calibrator)
    if calibrator == NO_CALIBRATION or not recipe.inference.calibrate:
        return RunCalibration(NO_CALIBRATION, None)
    if calibrator.method == BLEND and not recipe.inference.blend:
        logger.info("not calibrated: the run's calibrator is a blend, which inference.blend switches off")
        return RunCalibration(NO_CALIBRATION, None)
    return RunCalibration(calibrator, read_predictions(files.calibrated_on))


def apply_recipe_rules(table: pd.DataFrame, recipe: Recipe, battles: Dataset) -> pd.DataFrame:
    """Return predictions, indexed by the battle's number, with the recipe's rules for same and empty responses."""
    rules = rule_probabilities(battles, recipe.inference.tie_if_same, recipe.inference.win_if_other_empty)
    return apply_rules(table, rules[table.index])


def predict_with(
    predictor: Predictor,
    recipe: Recipe,
    battles: Dataset,
    shards: tuple[Path, Path] | None = None,
    deadline: Deadline | None = None,
    cached: bool = False,
) -> pd.DataFrame:
    """Return the predictions table of battles by a model in memory.

    Args:
        predictor: the model.
        recipe: the one that the model was trained with.
        battles: what to predict.
        shards: a folder for shards, and the folder of the saved model; None: nothing is kept.
        deadline: for the second order, as `time_limit` of `predict`.
        cached: read a frozen backbone's features from the cache, and write them there, as training does.

    Raises:
        FloatingPointError: a prediction that is NaN or infinite; the battles are named.
    """
    # one row of tokens per battle, with the sequences of both orders if both are to be predicted
    objective = find_objective(recipe.objective)
    if min(battles["group"]) < 0:
        battles = assign_groups(battles)
    both_orders = objective.encoding == "joint" and recipe.inference.swap_tta == "both"
    rows = tokenize(
        battles,
        predictor.tokenizer,
        recipe.prompt,
        recipe.trainer.get("dataset_num_proc"),
        encoding=objective.encoding,
        both_orders=both_orders,
    )

    # logits, from cached features or shard by shard
    if cached and recipe.model.freeze_backbone:
        logits = layer_logits(trained_layer(predictor.model), read_features(predictor, rows))
    else:
        settings = {**asdict(recipe.model), "dtype": str(predictor.dtype), "batch_tokens": predictor.budget}
        folder = shard_folder(*shards, rows, settings) if shards else None
        logits = sharded_logits(predictor, rows, folder, deadline if both_orders else None)
    orders = objective.probabilities_by_order(torch.from_numpy(logits))
    first, *second = (order.numpy() for order in orders)
    rewards = logits[..., 0] if objective.encoding == "separate" else None
    return build_predictions(battles, first, second[0] if second else None, rewards)
