"""The run folder: what its files are called, and when a run may be written there.

Besides the files of `RunFolder` it holds, while training, checkpoint-N/ (states to resume from), and in a k-fold run
fold-0/, fold-1/, ...: the run of each fold, next to the out-of-fold predictions of all of them.
"""

import json
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import wraps
from importlib import metadata
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import rewardmodel
from rewardmodel.config.loader import Overrides, RecipeLike, as_recipe, dump_recipe, load_recipe
from rewardmodel.config.schema import Recipe
from rewardmodel.config.trainer import trainer_default
from rewardmodel.distributed import is_main
from rewardmodel.errors import InputError
from rewardmodel.files import check_writable, clear, lock, lock_file, write_json, write_text

P = ParamSpec("P")
T = TypeVar("T")

BACKBONE_FILE = "backbone.json"
"""In the folder of a saved model: which weights it stands on, their fingerprint, and the shape of the head."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run's files, by name; whether they exist is for the caller to ask."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; prediction reads template and truncation from here."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """Versions, hardware, fingerprints of backbone and data."""
        return self.path / "environment.json"

    @property
    def training_keys(self) -> Path:
        """Hashes of the training prompts and response pairs, to detect leakage at prediction time."""
        return self.path / "training_keys.npy"

    @property
    def model(self) -> Path:
        """The folder of the trained model: PEFT's own layout with the head, and the tokenizer."""
        return self.path / "model"

    @property
    def validation(self) -> Path:
        """Predictions of the validation fold."""
        return self.path / "validation.parquet"

    @property
    def calibration(self) -> Path:
        """Predictions of the battles that `data.calibration` keeps to fit calibration on."""
        return self.path / "calibration.parquet"

    @property
    def predictions(self) -> Path:
        """Predictions of `data.test`."""
        return self.path / "predictions.parquet"

    @property
    def submission(self) -> Path:
        """The same as a submission of the competition."""
        return self.path / "submission.csv"

    @property
    def baselines(self) -> Path:
        """Predictions of the validation fold by baselines that need no language model."""
        return self._older("baselines.parquet", "floors.parquet")

    @property
    def blend_baseline(self) -> Path:
        """The fitted baseline that predictions are blended with (`inference.blend`)."""
        return self._older("blend_baseline.npz", "floor.npz")

    @property
    def calibrator(self) -> Path:
        """What calibrates predictions, if anything does."""
        return self.path / "calibrator.json"

    @property
    def metrics(self) -> Path:
        """What `evaluate` found."""
        return self.path / "metrics.json"

    @property
    def report(self) -> Path:
        """The same as a page for people."""
        return self.path / "report.html"

    def benchmark(self, name: str) -> Path:
        """The folder of what a benchmark found, by its name."""
        return self.path / "benchmarks" / name

    @property
    def lock(self) -> Path:
        """The lock of who writes here, next to the run; a fold's is next to the k-fold run, which may be replaced."""
        path = self.path.absolute()
        if re.fullmatch(r"fold-\d+", path.name):
            return path.parent.with_name(f".{path.parent.name}.{path.name}.lock")
        return lock_file(path)

    @property
    def calibrated_on(self) -> Path:
        """The predictions that the calibrator was fitted on: the calibration part if there is one."""
        return self.calibration if self.calibration.is_file() else self.validation

    def fold(self, number: int) -> "RunFolder":
        """Return the folder of one fold of a k-fold run."""
        return RunFolder(self.path / f"fold-{number}")

    def _older(self, name: str, before: str) -> Path:
        """Return a file by its name, or by the name that earlier releases gave it where only that exists."""
        path, older = self.path / name, self.path / before
        return older if older.is_file() and not path.is_file() else path


PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "scikit-learn")
"""Packages whose versions environment.json records."""


def check_run(recipe: Recipe, resume: bool, overwrite: bool, all_folds: bool = False) -> None:
    """Raise if the run may not be written to its folder, or cannot be; nothing remains there.

    Args:
        recipe: of the run; `recipe.run_folder` is looked at.
        resume: continue the run that is there.
        overwrite: replace it.
        all_folds: whether a k-fold run is to be written, not a run of one fold.

    Raises:
        InputError: the folder cannot be written to, holds a run already and neither `resume` nor `overwrite` is set,
            or holds something else, or `resume` finds a run of another recipe, or one of all folds where one is meant.
    """
    folder = recipe.run_folder
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir():
        raise InputError(f"trainer.output_dir: {folder}: {parent} is not a folder; name another")
    if not folder.is_file():
        check_writable(folder, "trainer.output_dir")
    if not folder.exists() or (folder.is_dir() and all(path.suffix == ".partial" for path in folder.iterdir())):
        return
    if not RunFolder(folder).recipe.is_file() and not (all_folds and is_k_fold(folder)):
        raise InputError(f"trainer.output_dir: {folder} exists and is not a run folder; name another")
    whole = "--fold all --overwrite" if all_folds else "--overwrite"
    if resume:
        if not all_folds and is_k_fold(folder):
            raise InputError(f"{folder}: the run there is of all folds; continue it with rewardmodel train --fold all")
        if all_folds and RunFolder(folder).model.exists():
            raise InputError(
                f"{folder}: the run there is of one fold; name another folder (trainer.output_dir) for one of all "
                f"folds, or replace it with {whole}"
            )
        if RunFolder(folder).recipe.is_file():
            _check_same_recipe(folder, recipe, all_folds)
    elif not overwrite:
        raise InputError(
            f"trainer.output_dir: {folder} already holds a run; continue it with --resume, replace it with "
            f"{whole}, or name another"
        )


def of_all_folds(recipe: Recipe) -> Recipe:
    """Return the recipe of a k-fold run, which does not depend on `data.fold`."""
    return replace(recipe, data=replace(recipe.data, fold=0))


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Let one process, or the processes of one launch, write to a run folder.

    Raises:
        InputError: another one writes there; the message names its host and process.
    """
    if not is_main():
        yield
        return
    with lock(RunFolder(folder).lock, f"trainer.output_dir: {folder}"):
        yield


def alone(work: Callable[Concatenate[RecipeLike, P], T]) -> Callable[Concatenate[RecipeLike, P], T]:
    """Let a function, whose first argument is a recipe, hold the lock of its run folder (`lock_run`)."""

    @wraps(work)
    def locked(recipe: RecipeLike, *args: P.args, **options: P.kwargs) -> T:
        recipe = as_recipe(recipe)
        with lock_run(recipe.run_folder):
            return work(recipe, *args, **options)

    return locked


def open_run(recipe: Recipe, resume: bool, overwrite: bool, before_write: Callable[[], None] = lambda: None) -> Path:
    """Return the run folder, holding the resolved recipe and nothing of another run.

    Args:
        recipe: of the run.
        resume: keep what is there.
        overwrite: remove what is there.
        before_write: called before anything is written there.

    Raises:
        InputError: as `check_run`.
    """
    check_run(recipe, resume, overwrite)
    folder = recipe.run_folder
    before_write()
    if RunFolder(folder).recipe.is_file() and not resume:
        clear(folder)
    write_text(RunFolder(folder).recipe, dump_recipe(recipe))
    return folder


def _check_same_recipe(folder: Path, recipe: Recipe, all_folds: bool) -> None:
    before, now = asdict(load_run_recipe(folder)), asdict(recipe)
    for section, key in (("data", "test"), ("data", "sample_submission"), ("trainer", "output_dir")):
        before[section][key] = now[section][key]  # do not matter to training
    for section in ("data", "prompt", "model", "objective", "trainer"):
        for key in {**now[section], **before[section]}:
            default = trainer_default(key) if section == "trainer" else None
            there, here = (one[section].get(key, default) for one in (before, now))
            if there != here:
                hint = "resume with the same recipe, or start again with --overwrite"
                if all_folds:
                    hint = "folds share one recipe: give that one, or train all folds again with --fold all --overwrite"
                raise InputError(f"{folder}: the run there has {section}.{key}: {there!r}, not {here!r}; {hint}")


def model_folder(run: Path) -> Path:
    """Return the folder of a run's model; an export is a model folder itself, with a recipe in it."""
    return run if (run / BACKBONE_FILE).is_file() else RunFolder(run).model


def as_folders(runs: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return run folders that a function was given, one or several, as a list.

    Raises:
        InputError: an empty list.
        TypeError: something else than paths.
    """
    given = [runs] if isinstance(runs, str | Path) else runs
    for one in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(one, str | Path):
            raise TypeError(f"a run is given as the path of its folder, or several as a list, not {type(one).__name__}")
    if not given:
        raise InputError("runs: an empty list; give at least one run folder")
    return [Path(run) for run in given]


def load_run_recipe(folder: Path, overrides: Overrides = ()) -> Recipe:
    """Return the recipe that a run carries, with overrides for this call on top.

    Raises:
        InputError: the folder is not a run.
    """
    if not RunFolder(folder).recipe.is_file():
        raise InputError(f"{folder}: no recipe.yaml there; give the folder of a run")
    return load_recipe(RunFolder(folder).recipe, overrides, of_run=True)


def is_k_fold(run: Path) -> bool:
    """Return whether a folder is a run of all folds, or of some of them."""
    return any(run.glob("fold-*/recipe.yaml"))


def trained_models(run: Path) -> list[Path]:
    """Return the folders whose models predict for a run: itself, or its folds.

    Raises:
        InputError: it is not a run, or has not finished training.
    """
    folds = is_k_fold(run)
    if folds and not RunFolder(run).metrics.is_file():
        raise InputError(f"{run}: its folds are not gathered; finish with rewardmodel train RECIPE --fold all --resume")
    recipe = load_run_recipe(run)
    folders = [RunFolder(run).fold(fold).path for fold in range(recipe.data.folds)] if folds else [run]
    for folder in folders:
        if not model_folder(folder).is_dir():
            raise InputError(f"{RunFolder(folder).model}: no trained model there; give a run that finished training")
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


def check_same_inputs(folder: Path, facts: dict[str, Any]) -> None:
    """Raise if the run in a folder was started with another backbone or other battles.

    Args:
        folder: of the run.
        facts: what `write_environment` would write; `backbone` and `data` are compared where it has them.

    Raises:
        InputError: one of them differs from that in the run's environment.json, or the file is not JSON.
    """
    if not RunFolder(folder).environment.is_file():
        return
    try:
        before = json.loads(RunFolder(folder).environment.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder}: environment.json is not JSON; replace the run with --overwrite") from error
    for what in facts.keys() & {"backbone", "data"}:
        if before.get(what) != facts[what]:
            raise InputError(
                f"{folder}: the run there was started with another {what}; give the same, or use --overwrite"
            )


def add_to_environment(folder: Path, facts: dict[str, Any]) -> None:
    """Add facts to a run's environment.json, like `{"training": {"battles": 800, "seconds": 163.2}}`."""
    file = RunFolder(folder).environment
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **facts})


def write_environment(folder: Path, facts: dict[str, Any]) -> None:
    """Write what the run was made with: versions, machine, and the given facts."""
    packages = {"rewardmodel": rewardmodel.__version__, **{name: metadata.version(name) for name in PACKAGES}}
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        **facts,
    }
    write_json(RunFolder(folder).environment, environment)
