"""A recipe -> one run a fold, and out-of-fold predictions of every battle: `train_folds`.

Each fold's folder is an ordinary run. Next to them are the files of an ordinary run: predictions and baselines, each
battle's by the fold that held it out, the calibrator that is fitted on them, and the report.
"""

import gc
import json
import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from rewardmodel.config.loader import RecipeLike, as_recipe, dump_recipe
from rewardmodel.config.schema import Recipe
from rewardmodel.data.splits import fingerprint_parts, load_battles, split
from rewardmodel.distributed import is_main, wait_for_all
from rewardmodel.errors import InputError
from rewardmodel.evaluation.results import Evaluation, read_evaluation
from rewardmodel.files import clear, write_text
from rewardmodel.pipeline import run
from rewardmodel.predictions import average_tables, read_predictions, write_predictions
from rewardmodel.run_folder import (
    RunFolder,
    alone,
    check_run,
    check_same_inputs,
    lock_run,
    of_all_folds,
    write_environment,
)

logger = logging.getLogger(__name__)

GATHERED = ("metrics", "report", "validation", "calibration", "baselines", "calibrator", "environment")
"""Files of all folds together, by their names in `RunFolder`. They are removed when a fold is trained again, first the
one by which a run counts as gathered."""


@alone
def train_folds(
    recipe: RecipeLike, battles: Any = None, *, resume: bool = False, overwrite: bool = False
) -> tuple[Path, Evaluation]:
    """Train a model for each fold on the others, and gather what each predicts of the battles it held out.

    Args:
        recipe: what to do, or the path or sections of a recipe; `recipe.run_folder` is written, and in it fold-0,
            fold-1, ...; `data.fold` does not count.
        battles: a Dataset, a DataFrame, a list of dicts or a path in the place of `recipe.data.train`.
        resume: continue an existing run; finished folds stay as they are.
        overwrite: replace an existing run.

    Returns:
        The run folder and the evaluation of the out-of-fold predictions.

    Raises:
        InputError: what was given cannot be used; nothing was written then.
    """
    whole = _of_all_folds(recipe, battles)
    check_run(whole, resume, overwrite, all_folds=True)
    files = RunFolder(whole.run_folder)
    with ExitStack() as locks:
        for fold in range(whole.data.folds):
            locks.enter_context(lock_run(files.fold(fold).path))
        battles = load_battles(whole.data, battles)
        _train(whole, battles, 0, resume=resume, overwrite=overwrite, fresh=overwrite and not resume)
        for fold in range(1, whole.data.folds):
            _train(whole, battles, fold, resume=True)
        if not _is_gathered(whole):  # in every process: none has written since the last fold
            wait_for_all()
            if is_main():
                gather(whole, battles)
            wait_for_all()
    return files.path, read_evaluation(files.metrics)


def _is_gathered(whole: Recipe) -> bool:
    """Return whether the files of all folds together are there: they are removed when a fold is trained again."""
    files = RunFolder(whole.run_folder)
    written = [getattr(files, name) for name in GATHERED if name != "calibration"]
    return all(path.is_file() for path in written) and files.recipe.read_text(encoding="utf-8") == dump_recipe(whole)


def train_fold(
    recipe: RecipeLike, fold: int, battles: Any = None, *, resume: bool = False, overwrite: bool = False
) -> Path:
    """Train and evaluate one fold of a k-fold run, for machines that share the folds; `train_folds` then gathers them.

    Args:
        recipe: as for `train_folds`.
        fold: its number.
        battles: as for `train_folds`.
        resume: continue this fold.
        overwrite: replace this fold.

    Returns:
        The folder of the fold.

    Raises:
        InputError: what was given cannot be used, or the run has folds of another recipe.
    """
    whole = _of_all_folds(recipe, battles)
    check_run(whole, resume=True, overwrite=False, all_folds=True)
    with lock_run(RunFolder(whole.run_folder).fold(fold).path):
        battles = load_battles(replace(whole.data, fold=fold), battles)
        return _train(whole, battles, fold, resume=resume, overwrite=overwrite)


def _of_all_folds(recipe: RecipeLike, battles: Any) -> Recipe:
    """Return the recipe of the k-fold run, below `whole`: it names the battles, and does not depend on `data.fold`."""
    recipe = as_recipe(recipe)
    if battles is not None:
        from rewardmodel.training.train import with_source

        recipe = with_source(recipe, battles)
    return of_all_folds(recipe)


def _train(
    whole: Recipe, battles: Dataset, fold: int, *, resume: bool, overwrite: bool = False, fresh: bool = False
) -> Path:
    """Train and evaluate a fold unless it is done; `fresh`: remove the existing k-fold run first. Return its folder."""
    folder, parts = RunFolder(whole.run_folder).fold(fold).path, split(battles, fold)
    data = replace(whole.data, fold=fold, test=None, sample_submission=None)
    recipe = replace(whole, data=data, trainer={**whole.trainer, "output_dir": str(folder)})
    check_run(recipe, resume, overwrite)
    files = RunFolder(folder)
    written = [files.validation, files.baselines, files.report]
    written += [files.blend_baseline] if whole.inference.blend else []
    if resume and all(path.is_file() for path in written):
        check_same_inputs(folder, {"data": fingerprint_parts(parts)})
        logger.info("%s: done", folder)
        return folder

    def before_write() -> None:
        if fresh and whole.run_folder.is_dir():
            clear(whole.run_folder)
        for name in GATHERED:
            getattr(RunFolder(whole.run_folder), name).unlink(missing_ok=True)
        write_text(RunFolder(whole.run_folder).recipe, dump_recipe(whole))

    logger.info("fold %d of 0 to %d: %s", fold, whole.data.folds - 1, folder)
    run(recipe, parts=parts, resume=resume, overwrite=overwrite, before_write=before_write)
    import torch

    gc.collect()  # frees this fold's model before the next one loads
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    wait_for_all()
    return folder


def gather(recipe: Recipe, battles: Dataset) -> None:
    """Write the out-of-fold predictions of a run's folds as those of the run, evaluate them, and report.

    Args:
        recipe: of the run.
        battles: its battles, with folds; the predictions are in their order, with the column `fold`.

    Raises:
        InputError: a fold is missing, was trained on another backbone, or predicted other battles.
    """
    # the folds, which must have the same backbone
    folder, folds = recipe.run_folder, range(recipe.data.folds)
    folders = [RunFolder(folder).fold(fold).path for fold in folds]
    environments = [json.loads(RunFolder(one).environment.read_text(encoding="utf-8")) for one in folders]
    for one, environment in zip(folders, environments, strict=True):
        if environment["backbone"] != environments[0]["backbone"]:
            raise InputError(f"{one}: trained on another backbone than {folders[0]}; train it again with --overwrite")

    # out-of-fold predictions of the model and of the baselines; the calibration part is predicted by every fold
    parts = split(battles, None)
    ids = parts.validation["id"][:]
    predictions = [
        read_predictions(RunFolder(one).validation).assign(fold=fold) for fold, one in zip(folds, folders, strict=True)
    ]
    write_predictions(_in_order(predictions, ids, folder), RunFolder(folder).validation)
    baselines = [pd.read_parquet(RunFolder(one).baselines) for one in folders]
    write_predictions(_in_order(baselines, ids, folder), RunFolder(folder).baselines)
    if len(parts.calibration):
        kept = [read_predictions(RunFolder(one).calibration) for one in folders]
        write_predictions(average_tables(kept, [1.0] * len(kept)), RunFolder(folder).calibration)

    # what an ordinary run has besides: recipe, environment, calibrator, report
    compute = {one.name: environment["compute"] for one, environment in zip(folders, environments, strict=True)}
    facts = {"data": fingerprint_parts(parts), "backbone": environments[0]["backbone"], "compute": compute}
    write_text(RunFolder(folder).recipe, dump_recipe(recipe))
    write_environment(folder, facts)

    from rewardmodel.evaluation.evaluate import evaluate_run
    from rewardmodel.evaluation.report import report

    report(folder, evaluations=[evaluate_run(folder)])


def _in_order(tables: list[pd.DataFrame], ids: list[str], run: Path) -> pd.DataFrame:
    """Return the tables of all folds as one, a row for each of these battles."""
    together = pd.concat(tables, ignore_index=True)
    index = pd.Index(together["id"])
    if len(together) != len(ids) or set(index) != set(ids):
        raise InputError(f"{run}: its folds did not predict each battle once; train it again with --overwrite")
    return together.iloc[index.get_indexer(pd.Index(ids))].reset_index(drop=True)
