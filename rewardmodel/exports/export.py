"""Trained runs in, a folder that leaves the machine out: checked beside the run before it is there.

An export holds a model at its top, as hubs and plain transformers expect it, with the run's recipe and calibrator
beside, so that `predict` takes it like a run; parity.json; and README.md, its model card.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig

from rewardmodel.battles import TEXT_COLUMNS
from rewardmodel.config.loader import dump_recipe
from rewardmodel.config.schema import ModelConfig, Recipe
from rewardmodel.errors import InputError, nearest
from rewardmodel.evaluation.calibration import BLEND, NO_CALIBRATION, load_calibrator
from rewardmodel.evaluation.text_regression import load_regression
from rewardmodel.exports.card import write_card
from rewardmodel.exports.kaggle import BUNDLED_MODEL, Bundle, check_installed, write_bundle
from rewardmodel.exports.merge import Trained, merge, trained
from rewardmodel.exports.parity import (
    EXACT,
    ROUNDED,
    Facts,
    Limits,
    battles_to_compare,
    check_parity,
    differences,
    format_parity,
    predict_run,
)
from rewardmodel.exports.soup import soup
from rewardmodel.files import atomic_path, write_json, write_text
from rewardmodel.model.backbone import resolve_backbone, saved_backbone_folder
from rewardmodel.model.families import stored_bits
from rewardmodel.model.precision import bits_and_bytes, dtype_name
from rewardmodel.model.saved_model import is_adapter
from rewardmodel.predictions import PROBABILITIES, predicted, read_predictions, write_predictions
from rewardmodel.run_folder import RunFolder, trained_models

logger = logging.getLogger(__name__)

PARITY = "parity.json"
"""What was measured of an export beside its run."""

DTYPES = ("bfloat16", "float16", "float32")
"""Precisions of merged weights."""


def export(
    runs: str | Path | Sequence[str | Path],
    output: str | Path,
    kind: str = "merged",
    *,
    dtype: str | None = None,
    battles: Any = None,
    rewardmodel_only: bool = False,
    push_to_hub: str | None = None,
    bundle: Bundle | None = None,
) -> Facts:
    """Write a run, or the mean of several, in a form that other machines load; whole and checked, or not at all.

    Args:
        runs: a run folder, several, or a k-fold run; of several, the adapters' mean.
        output: the folder to make.
        kind: a name out of `EXPORTS`.
        dtype: of merged weights, out of `DTYPES`; none: bfloat16.
        battles: what `exports.parity.battles_to_compare` takes, to compare export and run on.
        rewardmodel_only: accept a model that plain transformers does not read as it was trained.
        push_to_hub: owner/name of a repository, made private if it is not there.
        bundle: what a Kaggle bundle is for.

    Returns:
        What `exports.parity.check_parity` found; of several runs also `probability_average`: how far the export is
        from the mean of the runs' predictions; and of a run in 8 bits `rounded_run`: how far its weights in float32 are
        from it as it predicts by itself, which rounds activations, too.

    Raises:
        InputError: what was given cannot be exported so.
        FloatingPointError: the export does not predict as the run does.
    """
    output = Path(output)
    found = [trained(folder) for folder in run_folders(runs)]
    contents = _check_asked(found, output, kind, dtype, push_to_hub, bundle)
    stored = stored_bits(AutoConfig.from_pretrained(saved_backbone_folder(found[0].recipe.model, found[0].model)))
    if stored and contents != "adapter":
        raise InputError(f"--kind: the backbone is stored in {stored} bits, which merging does not read; use adapter")
    if not found[0].recipe.model.plain_head and contents != "adapter" and not (rewardmodel_only or bundle):
        raise InputError(
            f"{found[0].folder}: model.pooling or model.pair_ties make a head that plain transformers does not know; "
            "--kind adapter, or accept with --rewardmodel-only that only rewardmodel loads it"
        )
    compared = battles_to_compare(found[0], battles)
    with tempfile.TemporaryDirectory() as work, atomic_path(output) as folder:
        run = found[0] if len(found) == 1 else soup(found, Path(work))
        model = folder / BUNDLED_MODEL if bundle else folder
        weights = getattr(torch, dtype or DTYPES[0])
        EXPORTS[contents].write(run, model, weights)
        recipe = EXPORTS[contents].recipe(run.recipe)
        write_text(RunFolder(model).recipe, dump_recipe(recipe))
        if len(found) == 1:
            _copy_calibrator(run.folder, model)
        beside = predict_run(run, compared)
        plain = run.recipe.model.plain_head and contents != "adapter" and not rewardmodel_only
        precision, limits = _precision(run, contents, weights), _limits(contents, weights)
        facts = {"kind": kind, **check_parity(run, beside, model, compared, precision, limits, plain)}
        if len(found) > 1:
            tables = [predict_run(one, compared) for one in found]
            facts["probability_average"] = differences(_averaged(tables), beside)
        if run.recipe.model.load_in_8bit:
            facts["rounded_run"] = differences(predict_run(run, compared, rounded=True), beside)
        write_json(folder / PARITY, facts)
        write_card([one.folder for one in found], model, facts, format_parity(facts))
        if bundle:
            if bundle.base:
                moved = replace(recipe, model=replace(recipe.model, model_name_or_path=bundle.base))
                write_text(RunFolder(model).recipe, dump_recipe(moved))
            write_bundle(bundle, folder)
    if push_to_hub:
        push(output, push_to_hub)
    return facts


def run_folders(runs: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the folders of runs, with the folds of a k-fold run in its place.

    Raises:
        InputError: one is no run, or has not finished training.
    """
    given = [Path(runs)] if isinstance(runs, str | Path) else [Path(one) for one in runs]
    return [folder for run in given for folder in trained_models(run)]


def push(folder: Path, repository: str) -> None:
    """Upload an export to a model repository on the hub, made private if it is not there.

    Raises:
        InputError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--push-to-hub: {repository}: {reason}; {folder} is whole, upload it again") from error


def _check_asked(
    runs: Sequence[Trained], output: Path, kind: str, dtype: str | None, push_to_hub: str | None, bundle: Bundle | None
) -> str:
    """Raise InputError if what was asked for does not go together, and return the kind of the model inside."""
    if kind not in EXPORTS and kind != KAGGLE:
        raise InputError(f"--kind: no export '{kind}'{nearest(kind, [*EXPORTS, KAGGLE])}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"--output: {output} is there already; remove it, or name another")
    if (kind == KAGGLE) != (bundle is not None):
        raise InputError(f"--kind: {KAGGLE} needs --dataset and --installed, and no other kind takes them")
    contents = kind if bundle is None else bundle.contents
    if bundle is not None:
        if contents not in EXPORTS:
            raise InputError(f"--contents: no export '{contents}'{nearest(contents, EXPORTS)}")
        if push_to_hub:
            raise InputError(f"--push-to-hub: a {KAGGLE} bundle is no model repository; export its model by itself")
        if (contents == "adapter") != (bundle.base is not None):
            raise InputError("--base: where the backbone is mounted; --contents adapter needs it, and only that")
        check_installed(bundle.installed, bundle.python)
    if contents == "soup" and len(runs) < 2:
        raise InputError("--kind: a soup is of several runs; give their folders")
    if contents == "adapter" and dtype is not None:
        raise InputError("--dtype: an adapter is saved as it was trained; leave it out")
    if contents == "adapter" and not is_adapter(runs[0].model):
        raise InputError(f"{runs[0].folder}: was trained whole and has no adapter; use --kind merged")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype: no precision '{dtype}'; there are: {', '.join(DTYPES)}")
    return contents


def _copy_calibrator(run: Path, model: Path) -> None:
    """Copy a run's calibrator, if it has one, and what it needs: predictions, without any text, and a baseline."""
    calibrator = load_calibrator(RunFolder(run).calibrator)
    if calibrator == NO_CALIBRATION:
        return
    shutil.copy(RunFolder(run).calibrator, RunFolder(model).calibrator)
    if calibrator.method == BLEND:
        load_regression(RunFolder(run).blend_baseline)  # raises if it is something else
        shutil.copy(RunFolder(run).blend_baseline, RunFolder(model).blend_baseline)
    fitted_on = RunFolder(run).calibrated_on
    table = read_predictions(fitted_on).drop(columns=list(TEXT_COLUMNS), errors="ignore")
    write_predictions(table, model / fitted_on.name)


def _averaged(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return predictions with the mean probabilities of several."""
    mean = tables[0].copy()
    mean[list(PROBABILITIES)] = np.mean([predicted(table) for table in tables], axis=0)
    return mean


def _precision(run: Trained, contents: str, weights: torch.dtype) -> str:
    """Return the precision that an export is compared in: its own, where the machine computes it."""
    name, config = dtype_name(weights), run.recipe.model
    if contents == "adapter":
        return "float32"
    try:
        planned = replace(config, dtype=name, attn_implementation=None)  # type: ignore[arg-type]
        resolve_backbone(planned, folder=saved_backbone_folder(config, run.model))
    except InputError:
        return "float32"
    return name


def _limits(contents: str, weights: torch.dtype) -> Limits | None:
    if EXPORTS[contents].bits:
        return None
    return EXACT if contents == "adapter" or weights == torch.float32 else ROUNDED


@dataclass(frozen=True)
class Export:
    """One form that a model leaves in.

    Attributes:
        write: writes the model of a run to a folder, in a precision.
        bits: that merged weights are quantised to once more, which moves predictions: measured, not limited.
        whole: whether it is without an adapter.
    """

    write: Callable[[Trained, Path, torch.dtype], None]
    bits: int | None = None
    whole: bool = True

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return the run's recipe as the export is to be loaded: nothing of it trains or is yet to be quantised."""
        if not self.whole:
            return recipe
        return replace(recipe, model=_quantised(replace(recipe.model, use_peft=True), self.bits))


def _quantised(config: ModelConfig, bits: int | None) -> ModelConfig:
    return replace(config, load_in_4bit=bits == 4, load_in_8bit=bits == 8)


def _adapter(run: Trained, folder: Path, dtype: torch.dtype) -> None:
    shutil.copytree(run.model, folder)


def _requantised(run: Trained, folder: Path, dtype: torch.dtype, bits: int) -> None:
    merge(run, folder, dtype, bits_and_bytes(_quantised(run.recipe.model, bits), dtype))


EXPORTS = {
    "adapter": Export(_adapter, whole=False),
    "merged": Export(merge),
    "merged_4bit": Export(partial(_requantised, bits=4), bits=4),
    "soup": Export(merge),
}
"""Exports by name. `adapter`: as it was trained, for PEFT. `merged`: a plain model. `merged_4bit`: that quantised
once more, the head left out. `soup`: `merged` of the mean of several runs."""

KAGGLE = "kaggle"
"""An export, out of `EXPORTS`, with all that a machine without a network needs to predict with it."""
