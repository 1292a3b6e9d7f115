"""Trained runs -> a folder for other machines, which appears only after its predictions were compared with the run's.

An export holds a model at its top, where hubs and plain transformers expect it, next to the run's recipe and
calibrator, so that `predict` takes it like a run; parity.json; and README.md, its model card.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rewardmodel.battles import TEXT_COLUMNS
from rewardmodel.config.loader import Overrides, dump_recipe
from rewardmodel.config.schema import Recipe
from rewardmodel.errors import InputError
from rewardmodel.exports.checks import Part, TrainedRun, base_of, check_options, plan_parts, unneeded_by_all
from rewardmodel.exports.kaggle import Bundle, backbone_link, write_bundle
from rewardmodel.exports.kaggle_notebook import Backbone, write_notebook
from rewardmodel.files import atomic_path, check_writable, lock_output, write_json, write_text
from rewardmodel.hub import check_repository, upload
from rewardmodel.inference.battles import battles_to_compare
from rewardmodel.model.saved_model import read_about
from rewardmodel.predictions import PROBABILITIES, predicted, read_predictions, write_predictions
from rewardmodel.run_folder import RunFolder, as_folders, load_run_recipe, trained_models

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

logger = logging.getLogger(__name__)


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
    overrides: Overrides = (),
) -> dict[str, Any]:
    """Write a run, or the mean of several, in a form that other machines load; whole and checked, or not at all.

    Args:
        runs: a run folder, several, or a k-fold run; of several, the mean of the adapters is exported, or in a bundle
            that is `separate` each model, with the runs' folders and folds as `predict` takes them.
        output: the folder to make.
        kind: a name from `EXPORTS`, or `kaggle`: one of these, `bundle.contents`, with all that a machine without a
            network needs to predict with it.
        dtype: of merged weights, one of `exports.checks.DTYPES`; default: the precision that the run's backbone
            was loaded in.
        battles: to compare export and run on, as of `inference.battles.battles_to_compare`; an adapter that is copied
            is compared on battles only if they are given, and by its files otherwise.
        rewardmodel_only: accept a model that plain transformers does not read as it was trained.
        push_to_hub: owner/name of a repository on the hub; it is made, private, if it does not exist.
        bundle: what a Kaggle bundle is for.
        overrides: keys of the runs' recipes: `{"model.model_name_or_path": "..."}` says where their backbone is now.

    Returns:
        What `exports.parity.check_parity` found, or `check_copy` of an adapter that is copied; where there are several
        models, by folder in `models`. Of the mean of several runs also `probability_average`, the distance of the
        export's predictions from the mean of the runs'; and of a run in 8 bits or fp8 `rounded_run`, the distance of
        its weights in float32 from what the run itself predicts, whose activations are rounded to 8 bits, too.

    Raises:
        InputError: what was given cannot be exported so; raised before torch is imported wherever no model is needed.
        FloatingPointError: the export does not predict as the run does.
    """
    # check options, runs and battles, which needs no model
    output, given = Path(output), as_folders(runs)
    parts = plan_parts(given, bundle, overrides)
    contents = check_options(
        parts,
        output,
        kind,
        EXPORTS,
        dtype=dtype,
        push_to_hub=push_to_hub,
        bundle=bundle,
    )
    check_writable(output, "--output")
    with lock_output(output):
        compared = {part.place: _battles_of(part, contents, battles) for part in parts}
        if push_to_hub:
            check_repository(push_to_hub, "--push-to-hub")
        import torch

        from rewardmodel.exports.card import write_card
        from rewardmodel.exports.parity import format_parity

        form = EXPORTS[contents]
        elsewhere = form.merged and not rewardmodel_only  # plain transformers loads it, by code in it if need be
        plain = {part.place: elsewhere and (part.plain_head or not bundle) for part in parts}
        for part in parts:
            if form.merged:
                _check_mergeable(part.runs[0], plain[part.place] and not part.plain_head)
        with atomic_path(output) as folder:
            # each model with its recipe and its model card, compared with its run
            found = {}
            logger.info("writing %s …", output)
            for part in parts:
                model, weights = folder / part.place, getattr(torch, dtype or part.runs[0].dtype)
                checked = _write_model(part, model, form, weights, compared[part.place], plain[part.place])
                found[part.place] = checked
                one = {"kind": kind, **checked}
                write_card([run.folder for run in part.runs], model, one, format_parity(one), part.runs[0].recipe)
            parity = {"kind": kind, **(found[parts[0].place] if len(parts) == 1 else {"models": found})}
            write_json(folder / "parity.json", parity)
            for part in parts:
                if part.root != part.place and part.place.endswith("/fold-0"):
                    _copy_k_fold(given[part.number], folder / part.root, form, overrides)

            # the other files of a bundle
            if bundle:
                backbones = _move_backbones(parts, bundle, folder)
                unneeded = unneeded_by_all(parts, contents)
                write_bundle(bundle, unneeded, folder)
                models = list(dict.fromkeys(part.root for part in parts))
                write_notebook(bundle, folder, models, backbones, [*bundle.machines], unneeded)
        if push_to_hub:
            upload(output, push_to_hub)
        return parity


def _battles_of(part: Part, contents: str, battles: Any) -> "Dataset | None":
    """Return the battles to compare a model and its run on; None: it is copied, so its predictions are the run's."""
    copied = contents == "adapter" and len(part.runs) == 1 and battles is None
    return None if copied else battles_to_compare(part.runs[0].folder, battles)


def _write_model(
    part: Part,
    model: Path,
    form: "Export",
    weights: "torch.dtype",
    battles: "Dataset | None",
    plain: bool,
) -> dict[str, Any]:
    """Write a model with its recipe and its calibrator, and return how far it is from its run.

    Args:
        part: of the export.
        model: the folder to write.
        form: of the export.
        weights: dtype of merged weights.
        battles: as of `_battles_of`.
        plain: whether plain transformers is to load it.
    """
    from rewardmodel.exports.parity import check_copy
    from rewardmodel.exports.remote_code import write_remote_code
    from rewardmodel.exports.soup import average_adapters

    with tempfile.TemporaryDirectory() as work:
        run = part.runs[0] if len(part.runs) == 1 else average_adapters(part.runs, Path(work))
        form.write(run, model, weights)
        if plain and not part.plain_head:
            write_remote_code(run.recipe, model)
        write_text(RunFolder(model).recipe, dump_recipe(form.adapt_recipe(run.recipe)))
        if len(part.runs) == 1:
            _copy_calibrator(run.folder, model)
        if battles is None:
            return check_copy(run.model, model)
        return _compare(part.runs, run, model, battles, weights, form, plain)


def _copy_k_fold(run: Path, target: Path, form: "Export", overrides: Overrides) -> None:
    """Copy what a k-fold run has besides its folds, which are in the target already, so that `predict` takes that."""
    write_text(RunFolder(target).recipe, dump_recipe(form.adapt_recipe(load_run_recipe(run, overrides))))
    shutil.copy(RunFolder(run).metrics, RunFolder(target).metrics)
    _copy_calibrator(run, target)


def _move_backbones(parts: Sequence[Part], bundle: Bundle, folder: Path) -> list[Backbone]:
    """Let the recipes of a bundle's adapters name their backbones by links, which its notebook makes; return them."""
    from rewardmodel.model.backbone import saved_backbone_folder

    found = {}
    for part in parts if bundle.bases else []:
        run = part.runs[0]
        fingerprint = read_about(run.model)["fingerprint"]
        backbone = saved_backbone_folder(run.recipe.model, run.model)
        found[fingerprint] = Backbone(base_of(part, bundle), backbone, fingerprint)
        for place in {folder / part.place, folder / part.root}:
            moved = load_run_recipe(place, {"model.model_name_or_path": backbone_link(fingerprint)})
            write_text(RunFolder(place).recipe, dump_recipe(moved))
    return list(found.values())


def _compare(
    trained: list[TrainedRun],
    run: TrainedRun,
    folder: Path,
    battles: "Dataset",
    weights: "torch.dtype",
    form: "Export",
    plain: bool,
) -> dict[str, Any]:
    """Return how far an export's predictions are from its run's, and those of several runs' mean from theirs.

    Args:
        trained: the runs.
        run: that is exported: the only one of them, or their mean.
        folder: of the exported model.
        battles: to compare on.
        weights: dtype of the exported weights.
        form: of the export.
        plain: whether plain transformers must read it too.
    """
    import torch

    from rewardmodel.exports.parity import (
        EXACT,
        ROUNDED,
        check_parity,
        choose_precision,
        measure_differences,
        predict_in_float32,
    )

    expected = predict_in_float32(run, battles)
    precision = choose_precision(run, weights) if form.merged else "float32"
    limits = EXACT if not form.merged or weights == torch.float32 else ROUNDED
    parity = check_parity(run, expected, folder, battles, precision, None if form.four_bits else limits, plain)
    if len(trained) > 1:
        tables = [predict_in_float32(one, battles) for one in trained]
        parity["probability_average"] = measure_differences(_average_tables(tables), expected)
    if run.recipe.model.load_in_8bit or run.recipe.model.load_in_fp8:
        rounded = predict_in_float32(run, battles, round_activations=True)
        parity["rounded_run"] = measure_differences(rounded, expected)
    return parity


def _check_mergeable(run: TrainedRun, with_code: bool) -> None:
    """Raise InputError if the backbone's files are quantised, or there is no code for its head and there must be."""
    from transformers import AutoConfig

    from rewardmodel.exports.remote_code import check_remote_code
    from rewardmodel.model.backbone import saved_backbone_folder
    from rewardmodel.model.families import stored_bits

    config = AutoConfig.from_pretrained(saved_backbone_folder(run.recipe.model, run.model))
    bits = stored_bits(config)
    if bits:
        raise InputError(f"--kind: the backbone is stored in {bits} bits, which merging does not read; use adapter")
    if with_code:
        check_remote_code(run, config)


def _copy_calibrator(run: Path, model: Path) -> None:
    """Copy a run's calibrator, if it has one, with the predictions that it was fitted on and the baselines it blends.

    The texts of the battles are left out.
    """
    # Imported here because it imports scipy.
    from rewardmodel.evaluation.calibration import BLEND, NO_CALIBRATION, load_calibrator

    source, target = RunFolder(run), RunFolder(model)
    calibrator = load_calibrator(source.calibrator)
    if calibrator == NO_CALIBRATION:
        return
    shutil.copy(source.calibrator, target.calibrator)
    if calibrator.method == BLEND:
        from rewardmodel.evaluation.text_regression import load_regression  # here, because it imports scikit-learn

        for folder in trained_models(run):
            baseline = RunFolder(folder).blend_baseline
            load_regression(baseline)  # raises if it cannot be read
            shutil.copy(baseline, RunFolder(model / folder.relative_to(run)).blend_baseline)
    fitted_on = source.calibrated_on
    table = read_predictions(fitted_on).drop(columns=list(TEXT_COLUMNS), errors="ignore")
    write_predictions(table, model / fitted_on.name)


def _average_tables(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return predictions with the mean probabilities of several."""
    mean = tables[0].copy()
    mean[list(PROBABILITIES)] = np.mean([predicted(table) for table in tables], axis=0)
    return mean


@dataclass(frozen=True)
class Export:
    """A form of exported models.

    Attributes:
        write: (run, folder, dtype of the weights) -> writes the model.
        merged: whether it is a whole model, without an adapter.
        four_bits: whether merged weights are quantised to 4 bits; how far that moves predictions is measured only.
    """

    write: Callable[[TrainedRun, Path, "torch.dtype"], None]
    merged: bool = True
    four_bits: bool = False

    def adapt_recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe that the export is loaded with: a merged model is not quantised while it is loaded."""
        if not self.merged:
            return recipe
        model = replace(recipe.model, use_peft=True, load_in_4bit=self.four_bits, load_in_8bit=False, load_in_fp8=False)
        return replace(recipe, model=model)


def _write_adapter(run: TrainedRun, folder: Path, dtype: "torch.dtype") -> None:
    shutil.copytree(run.model, folder)


def _write_merged(run: TrainedRun, folder: Path, dtype: "torch.dtype") -> None:
    from rewardmodel.exports.merge import merge_run

    merge_run(run, folder, dtype)


def _write_4bit(run: TrainedRun, folder: Path, dtype: "torch.dtype") -> None:
    from rewardmodel.exports.merge import merge_run

    merge_run(run, folder, dtype, to_4_bits=True)


EXPORTS = {
    "adapter": Export(_write_adapter, merged=False),
    "merged": Export(_write_merged),
    "merged_4bit": Export(_write_4bit, four_bits=True),
    "soup": Export(_write_merged),
}
"""Exports by name. `adapter`: as it was trained, for PEFT. `merged`: a plain model. `merged_4bit`: the same quantised
to 4 bits, except for its head. `soup`: `merged` of the mean of several runs."""
