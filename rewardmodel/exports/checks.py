"""The options of `export` -> trained runs and battles to compare on, checked before torch is imported."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from rewardmodel.config.loader import Overrides
from rewardmodel.config.schema import Recipe
from rewardmodel.errors import InputError, nearest
from rewardmodel.exports.kaggle import Bundle
from rewardmodel.exports.wheels import check_machines, unneeded_packages
from rewardmodel.files import check_new_folder
from rewardmodel.model.saved_model import is_adapter, read_about
from rewardmodel.run_folder import (
    BACKBONE_FILE,
    RunFolder,
    as_folders,
    load_run_recipe,
    model_folder,
    trained_models,
)

DTYPES = ("bfloat16", "float16", "float32")
"""Precisions of merged weights."""


class TrainedRun(NamedTuple):
    """A run that has finished training.

    Attributes:
        folder: of the run.
        recipe: that it was trained with.
        dtype: precision that the backbone's weights were loaded in, like `bfloat16`.
    """

    folder: Path
    recipe: Recipe
    dtype: str

    @property
    def model(self) -> Path:
        """The folder of its model."""
        return model_folder(self.folder)


def load_trained_run(folder: Path, overrides: Overrides = ()) -> TrainedRun:
    """Return a run that has finished training, with overrides on its recipe.

    Raises:
        InputError: no run, an export of one, no model in it, or no precision in its environment.json.
    """
    recipe = load_run_recipe(folder, overrides)
    if (folder / BACKBONE_FILE).is_file():
        raise InputError(f"{folder}: is an export already; give the run folder that it was exported from")
    read_about(RunFolder(folder).model)
    environment = RunFolder(folder).environment
    try:
        dtype = json.loads(environment.read_text(encoding="utf-8"))["compute"]["dtype"]
    except (OSError, ValueError, LookupError, TypeError):
        dtype = None
    if dtype not in DTYPES:
        raise InputError(f"{environment}: compute.dtype: none of {', '.join(DTYPES)}; give a run folder of `train`")
    return TrainedRun(folder, recipe, dtype if recipe.model.use_peft else "float32")


def load_trained_runs(runs: str | Path | Sequence[str | Path], overrides: Overrides = ()) -> list[TrainedRun]:
    """Return runs that have finished training; a k-fold run is replaced by its folds.

    Args:
        runs: a run folder, or several.
        overrides: on their recipes.

    Raises:
        InputError: one is not a run, or has not finished training.
    """
    return [load_trained_run(model, overrides) for folder in as_folders(runs) for model in trained_models(folder)]


def check_options(
    runs: Sequence[TrainedRun],
    output: Path,
    kind: str,
    kinds: Collection[str],
    *,
    dtype: str | None,
    push_to_hub: str | None,
    bundle: Bundle | None,
) -> str:
    """Return the kind of the exported model, which inside a Kaggle bundle is `bundle.contents`.

    Args:
        runs: to export.
        output: the folder to make.
        kind: one of `kinds`, or `kaggle`.
        kinds: names of the exports.
        dtype: of merged weights; None: the default.
        push_to_hub: a repository; None: none.
        bundle: what a Kaggle bundle is for; None: it is none.

    Raises:
        InputError: an option that does not exist, or that does not go with the others or with the runs.
    """
    # the folder
    check_new_folder(output)

    # kind and contents
    names = [*kinds, "kaggle"]
    if kind not in names:
        raise InputError(f"--kind: no export '{kind}'{nearest(kind, names)}; known: {', '.join(names)}")
    if (kind == "kaggle") != (bundle is not None):
        raise InputError("--kind: kaggle needs --dataset and --installed, and no other kind takes them")
    contents = kind if bundle is None else bundle.contents
    if contents not in kinds:
        raise InputError(f"--contents: no export '{contents}'{nearest(contents, kinds)}; known: {', '.join(kinds)}")
    first = runs[0]
    if contents == "soup" and len(runs) < 2:
        raise InputError("--kind: a soup is of several runs; give their folders")
    if contents == "adapter" and not is_adapter(first.model):
        raise InputError(f"{first.folder}: was trained whole and has no adapter; use --kind merged")

    # dtype
    if contents == "adapter" and dtype is not None:
        raise InputError("--dtype: an adapter is saved as it was trained; leave it out")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype: no precision '{dtype}'; known: {', '.join(DTYPES)}")

    # the bundle, and what is installed where it goes
    if bundle is not None:
        if push_to_hub:
            raise InputError("--push-to-hub: a Kaggle bundle is not a model repository; export its model by itself")
        if (contents == "adapter") != (bundle.base is not None):
            raise InputError("--base: the backbone on Kaggle; --contents adapter needs it, and only that")
        check_machines(bundle.machines, unneeded_packages(first.recipe, first.model, contents))
    return contents
