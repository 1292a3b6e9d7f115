"""The options of `export` -> trained runs and battles to compare on, checked before torch is imported."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from rewardmodel.config.loader import Overrides
from rewardmodel.config.schema import Recipe
from rewardmodel.errors import InputError, nearest
from rewardmodel.exports.kaggle import Base, Bundle
from rewardmodel.exports.wheels import check_machines, unneeded_packages
from rewardmodel.files import check_new_folder
from rewardmodel.inference.battles import check_weights
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


class Part(NamedTuple):
    """One model of an export.

    Attributes:
        place: its folder in the export, like `models/2/fold-0`; empty: the export itself.
        number: of the given run that it is of; 0 if it is of all of them.
        runs: the run that it is of, or those whose mean it is.
    """

    place: str
    number: int
    runs: list[TrainedRun]

    @property
    def root(self) -> str:
        """The folder in the export that `predict` takes: its own, or that of the folds which it is one of."""
        return "/".join(self.place.split("/")[:2])

    @property
    def plain_head(self) -> bool:
        """Whether plain transformers has such a head."""
        return self.runs[0].recipe.model.plain_head


def plan_parts(runs: Sequence[Path], bundle: Bundle | None, overrides: Overrides = ()) -> list[Part]:
    """Return the models of an export: one, or in a bundle of separate models one for each run and fold.

    Args:
        runs: run folders.
        bundle: what a Kaggle bundle is for; None: it is none.
        overrides: on the runs' recipes.

    Raises:
        InputError: as `load_trained_runs`.
    """
    if bundle is None or not bundle.separate:
        return [Part("model" if bundle else "", 0, load_trained_runs(runs, overrides))]
    return [
        Part(
            f"models/{number + 1}/{folder.relative_to(run)}".removesuffix("/."),
            number,
            [load_trained_run(folder, overrides)],
        )
        for number, run in enumerate(runs)
        for folder in trained_models(run)
    ]


def check_options(
    parts: Sequence[Part],
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
        parts: to export.
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
    if contents == "soup" and len(parts[0].runs) < 2:
        raise InputError("--kind: a soup is of several runs; give their folders, and no --separate")
    for part in parts:
        if contents == "adapter" and not is_adapter(part.runs[0].model):
            raise InputError(f"{part.runs[0].folder}: was trained whole and has no adapter; use --kind merged")

    # dtype
    if contents == "adapter" and dtype is not None:
        raise InputError("--dtype: an adapter is saved as it was trained; leave it out")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype: no precision '{dtype}'; known: {', '.join(DTYPES)}")

    if bundle is not None:
        if push_to_hub:
            raise InputError("--push-to-hub: a Kaggle bundle is not a model repository; export its model by itself")
        _check_bundle(parts, bundle, contents)
    return contents


def _check_bundle(parts: Sequence[Part], bundle: Bundle, contents: str) -> None:
    """Raise InputError unless the models, their backbones and what is installed there go together in a bundle."""
    if (contents == "adapter") != (bundle.base is not None):
        raise InputError("--base: the backbone on Kaggle; --contents adapter needs it, and only that")
    if bundle.separate and len(parts) < 2:
        raise InputError("--separate: keeps the models of several runs apart; give their folders")
    if bundle.separate:
        check_weights(bundle.weights, parts[-1].number + 1)
    if bundle.base is not None:
        _check_bases(parts, bundle)
    check_machines(bundle.machines, unneeded_by_all(parts, contents))


def _check_bases(parts: Sequence[Part], bundle: Bundle) -> None:
    """Raise InputError unless there is one name on Kaggle for each backbone of the runs."""
    runs = parts[-1].number + 1
    if len(bundle.bases) not in (1, runs):
        raise InputError(
            f"--base: {len(bundle.bases)} backbones; give one, or with --separate one for each of {runs} runs"
        )
    named: dict[Base, str] = {}
    for part in parts:
        fingerprint = read_about(part.runs[0].model)["fingerprint"]
        if named.setdefault(base_of(part, bundle), fingerprint) != fingerprint:
            raise InputError(
                f"--base: {part.runs[0].folder} is of another backbone than the runs before it; give one for each run"
            )


def base_of(part: Part, bundle: Bundle) -> Base:
    """Return the backbone on Kaggle of a model that is an adapter."""
    return bundle.bases[part.number if len(bundle.bases) > 1 else 0]


def unneeded_by_all(parts: Sequence[Part], contents: str) -> set[str]:
    """Return the packages that rewardmodel requires and that the prediction of none of these models imports.

    Args:
        parts: the models.
        contents: kind of the export, a name from `exports.export.EXPORTS`.
    """
    return set.intersection(*(unneeded_packages(one.runs[0].recipe, one.runs[0].model, contents) for one in parts))
