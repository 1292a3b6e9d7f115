"""The run folder: what its files are called, and when a run may be written there.

recipe.yaml          the resolved recipe; prediction reads template and truncation from here
environment.json     versions, hardware, backbone and data fingerprints
training_keys.npy    by what the groups are known again that it trained on
checkpoint-N/        states to resume from, while training
fold-K/              in a k-fold run, the run of each fold; what is beside them is of all folds, each out of fold
model/               the trained model: PEFT's own layout with the head, and the tokenizer
validation.parquet   predictions of the held-out fold
calibration.parquet  predictions of the battles kept to fit calibration on (data.calibration)
predictions.parquet, submission.csv     predictions of data.test
floors.parquet       predictions of the same battles by scikit-learn floors
floor.npz            one of these floors, to blend predictions with (inference.blend)
calibrator.json      what calibrates predictions, if anything
metrics.json         what `evaluate` found
report.html          the same to look at
"""

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from rewardmodel.battles import FEATURES, TEACHER, taught
from rewardmodel.config.loader import dump_recipe, load_recipe
from rewardmodel.config.schema import Recipe
from rewardmodel.errors import InputError
from rewardmodel.files import clear, write_json, write_text

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
TRAINING_KEYS = "training_keys.npy"
MODEL = "model"
BACKBONE = "backbone.json"  # in the folder of a model: the weights on which it stands
VALIDATION = "validation.parquet"
CALIBRATION = "calibration.parquet"
PREDICTIONS = "predictions.parquet"
SUBMISSION = "submission.csv"
FLOORS = "floors.parquet"
FLOOR = "floor.npz"
BLENDED = "tfidf"  # which of the floors that is
CALIBRATOR = "calibrator.json"
METRICS = "metrics.json"
REPORT = "report.html"

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "scikit-learn")


def check_run(recipe: Recipe, resume: bool, overwrite: bool, all_folds: bool = False) -> None:
    """Raise if the run, of one fold or of all, may not be written to its folder; touch nothing.

    Raises:
        InputError: the folder holds a run already and neither `resume` nor `overwrite` is set, or holds
            something else, or `resume` finds a run of another recipe, or one of all folds where one is meant.
    """
    folder = recipe.run_folder
    above = next(path for path in folder.absolute().parents if path.exists())
    if not above.is_dir():
        raise InputError(f"trainer.output_dir: {folder}: {above} is no folder; name another")
    if not folder.exists() or (folder.is_dir() and all(path.suffix == ".partial" for path in folder.iterdir())):
        return
    if not (folder / RECIPE).is_file() and not (all_folds and is_k_fold(folder)):
        raise InputError(f"trainer.output_dir: {folder} is there and is no run folder; name another")
    whole = "--fold all --overwrite" if all_folds else "--overwrite"
    if resume:
        if not all_folds and is_k_fold(folder):
            raise InputError(f"{folder}: the run there is of all folds; continue it with rewardmodel train --fold all")
        if all_folds and (folder / MODEL).exists():
            raise InputError(
                f"{folder}: the run there is of one fold; name another folder (trainer.output_dir) for one of all "
                f"folds, or replace it with {whole}"
            )
        if (folder / RECIPE).is_file():
            _check_same_recipe(folder, recipe, all_folds)
    elif not overwrite:
        raise InputError(
            f"trainer.output_dir: {folder} already holds a run; continue it with --resume, replace it with "
            f"{whole}, or name another"
        )


def open_run(recipe: Recipe, resume: bool, overwrite: bool, opening: Callable[[], None] = lambda: None) -> Path:
    """Return the run folder, holding the resolved recipe and nothing of another run.

    `opening` is called before anything is written there.

    Raises:
        InputError: as `check_run`.
    """
    check_run(recipe, resume, overwrite)
    folder = recipe.run_folder
    opening()
    if (folder / RECIPE).is_file() and not resume:
        clear(folder)
    write_text(folder / RECIPE, dump_recipe(recipe))
    return folder


def _check_same_recipe(folder: Path, recipe: Recipe, all_folds: bool) -> None:
    from trl import RewardConfig  # here, because evaluation reads this module and must not load torch

    before, now = asdict(load_run_recipe(folder)), asdict(recipe)
    for section, key in (("data", "test"), ("data", "sample_submission"), ("trainer", "output_dir")):
        before[section][key] = now[section][key]  # not a matter of training
    for section in ("data", "prompt", "model", "objective", "trainer"):
        for key in before[section].keys() | now[section].keys():
            field = RewardConfig.__dataclass_fields__.get(key) if section == "trainer" else None
            there, here = (one[section].get(key, field.default if field else None) for one in (before, now))
            if there != here:
                mend = "resume with the same recipe, or start anew with --overwrite"
                if all_folds:
                    mend = "folds have one recipe: give that, or train all of them anew with --fold all --overwrite"
                raise InputError(f"{folder}: the run there has {section}.{key}: {there!r}, not {here!r}; {mend}")


def model_folder(run: Path) -> Path:
    """Return where the model of a run is, or of an export, which is a model with its recipe beside."""
    return run if (run / BACKBONE).is_file() else run / MODEL


def load_run_recipe(folder: Path) -> Recipe:
    """Return the recipe that a run carries.

    Raises:
        InputError: the folder is no run.
    """
    if not (folder / RECIPE).is_file():
        raise InputError(f"{folder}: no {RECIPE} there; give the folder of a run")
    return load_recipe(folder / RECIPE)


def fold_folder(run: Path, fold: int) -> Path:
    """Return the folder of one fold of a k-fold run."""
    return run / f"fold-{fold}"


def is_k_fold(run: Path) -> bool:
    """Return whether a folder is a run of all folds, or of some of them."""
    return any(run.glob(f"fold-*/{RECIPE}"))


def trained_models(run: Path) -> list[Path]:
    """Return the folders whose models predict for a run: itself, or its folds.

    Raises:
        InputError: it is no run, or has not finished training.
    """
    folds = is_k_fold(run)
    if folds and not (run / METRICS).is_file():
        raise InputError(f"{run}: its folds are not gathered; finish with rewardmodel train RECIPE --fold all --resume")
    recipe = load_run_recipe(run)
    folders = [fold_folder(run, fold) for fold in range(recipe.data.folds)] if folds else [run]
    for folder in folders:
        if not model_folder(folder).is_dir():
            raise InputError(f"{folder / MODEL}: no trained model there; has the run finished training?")
    return folders


def last_checkpoint(folder: Path) -> Path | None:
    """Return the latest complete checkpoint: its trainer_state.json, which is written last, can be read."""
    checkpoints = [(path.name.rpartition("-")[2], path) for path in folder.glob("checkpoint-*")]
    numbered = [(int(number), path) for number, path in checkpoints if number.isdecimal()]
    for _, path in sorted(numbered, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def data_fingerprint(battles: Dataset) -> str:
    """Return a digest of battles in their order, the same in whatever file they stand and however they are split.

    A teacher's probabilities are in it where there are any.
    """
    digest = hashlib.sha256()
    left_out = ["group", "fold", "source", *(() if np.isfinite(taught(battles)).any() else TEACHER)]
    columns = [name for name in FEATURES if name not in left_out]
    for batch in battles.with_format(None).select_columns(columns).iter(batch_size=1000):
        digest.update(json.dumps(batch, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def check_same_inputs(folder: Path, facts: dict[str, Any]) -> None:
    """Raise if the run in a folder began on another backbone or on other battles.

    Raises:
        InputError: the fingerprints in its environment.json are others than those in `facts`.
    """
    if not (folder / ENVIRONMENT).is_file():
        return
    try:
        before = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / ENVIRONMENT}: not JSON; the run cannot be resumed, use --overwrite") from error
    for what in facts.keys() & {"backbone", "data"}:
        if before.get(what) != facts[what]:
            raise InputError(f"{folder}: the run there began on another {what}; give the same, or use --overwrite")


def write_environment(folder: Path, facts: dict[str, Any]) -> None:
    """Write what the run was made with: versions, machine, and the given facts."""
    packages = {name: metadata.version(name) for name in ("rewardmodel", *PACKAGES)}
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        **facts,
    }
    write_json(folder / ENVIRONMENT, environment)
