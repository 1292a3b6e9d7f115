"""What a command is given -> the errors that can be found within a second, before pandas, datasets and torch load.

What is wrong inside a file is found later, by who reads it.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rewardmodel.config.schema import Recipe
from rewardmodel.data.source_checks import OWN_PARTS, announce, check_source, check_sources
from rewardmodel.errors import InputError
from rewardmodel.files import check_new_folder, check_page, check_replaceable, check_writable, lock_output
from rewardmodel.planning.gpus import check_device
from rewardmodel.run_folder import RunFolder, check_run, lock_run, of_all_folds, trained_models

logger = logging.getLogger(__name__)


def check_training(recipe: Recipe, resume: bool = False, overwrite: bool = False, fold: str | None = None) -> None:
    """Check where a run is written and what is read, and say what is read; the run's own checks follow.

    Args:
        recipe: of the run.
        resume: continue the run that is there.
        overwrite: replace it.
        fold: number of the fold to train, `all` for a k-fold run; None: `data.fold`.

    Raises:
        InputError: as `run_folder.check_run` and `check_reading`, or another process writes there.
    """
    whole = recipe.run_folder
    folder = RunFolder(whole).fold(int(fold)).path if fold and fold.isdecimal() else whole
    with lock_run(folder):
        if folder == whole:
            check_run(recipe if fold is None else of_all_folds(recipe), resume, overwrite, all_folds=fold is not None)
        else:
            check_run(of_all_folds(recipe), resume=True, overwrite=False, all_folds=True)
            if not resume:  # else its recipe is compared, which the fold's own check does
                check_run(replace(recipe, trainer={**recipe.trainer, "output_dir": str(folder)}), resume, overwrite)
    check_reading(recipe)


def check_reading(recipe: Recipe, output: Path | None = None) -> None:
    """Check that a recipe's files of battles exist and that the cache can be written, and say what is read.

    Args:
        recipe: its section `data`.
        output: a folder to write, if there is one.

    Raises:
        InputError: there is no such file, or the cache or the folder cannot be written to, or another process writes
            there.
    """
    if output:
        check_writable(output, "--output")
        with lock_output(output):
            pass
    announce(check_sources(recipe.data))


def check_curve(recipe: Recipe, sizes: Sequence[int], draws: int, output: Path) -> None:
    """Check what a learning curve is measured with, where it is written and what is read, and say what is read.

    Args:
        recipe: its section `data`.
        sizes: numbers of training battles; empty: by default.
        draws: for each size.
        output: the folder to write.

    Raises:
        InputError: no draw, a size below 2, or as `check_reading`.
    """
    if draws < 1:
        raise InputError(f"--draws: {draws}; give at least 1")
    if sizes and min(sizes) < 2:
        raise InputError(f"--sizes: {min(sizes)}; give numbers of battles from 2")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output} is a file; name a folder")
    check_reading(recipe, output)


def check_planning(device: str | None, gpus: int | None) -> None:
    """Check the device to plan for, and the number of them.

    Raises:
        InputError: as `planning.gpus.check_device`, or a number below 1.
    """
    check_device(device)
    if gpus is not None and gpus < 1:
        raise InputError(f"--gpus: {gpus}; give at least 1")


def check_baseline(battles: str, output: Path | None) -> None:
    """Check a file of battles, and that of the predictions to write if there is one, and say what is read.

    Raises:
        InputError: there is no such file, or a name or a folder that cannot be written to.
    """
    if output and output.suffix != ".parquet":
        raise InputError(f"--output: {output} does not end in .parquet; give a name that does")
    if output:
        check_replaceable(output)
        check_writable(output, "--output")
    check_source(battles)
    announce([battles])


def check_predictions(given: Sequence[Path], battles: str | None = None) -> None:
    """Check that runs have validation predictions, or that files of predictions exist, and say what is read.

    Args:
        given: the runs or files.
        battles: to predict with the runs instead.

    Raises:
        InputError: there is no such file, or no trained model to predict with.
    """
    if battles:
        for run in given:
            trained_models(run)
        if battles not in OWN_PARTS:
            check_source(battles)
        announce([battles])
        return
    for path in given:
        file = RunFolder(path).validation if path.is_dir() else path
        if not file.is_file():
            raise InputError(
                f"{file}: cannot be read as predictions (no such file); give a finished run, or a predictions.parquet"
            )
    logger.info("reading %s …", ", ".join(map(str, given)))


def check_report(runs: Sequence[Path], output: Path | None) -> None:
    """Check runs to report on and the name of the page, and say what is read.

    Raises:
        InputError: as `check_predictions`, or a name that does not end in .html.
    """
    if output:
        check_page(output)
    check_predictions(runs)


def check_export(runs: Sequence[Path], output: Path) -> None:
    """Check where an export is written and that its runs have models, and say what is read.

    Raises:
        InputError: the folder exists, cannot be written to, or another process writes there, or there is no trained
            model.
    """
    check_new_folder(output)
    check_writable(output, "--output")
    for run in runs:
        trained_models(run)
    with lock_output(output):
        pass
    announce(list(map(str, runs)))
