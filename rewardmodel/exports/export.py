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
from rewardmodel.exports.checks import TrainedRun, check_options, load_trained_runs
from rewardmodel.exports.kaggle import Bundle, write_bundle
from rewardmodel.exports.kaggle_notebook import write_notebook
from rewardmodel.exports.wheels import unneeded_packages
from rewardmodel.files import atomic_path, check_writable, lock_output, write_json, write_text
from rewardmodel.hub import check_repository, upload
from rewardmodel.inference.battles import battles_to_compare
from rewardmodel.predictions import PROBABILITIES, predicted, read_predictions, write_predictions
from rewardmodel.run_folder import RunFolder

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
        runs: a run folder, several, or a k-fold run; of several, the mean of the adapters is exported.
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
        What `exports.parity.check_parity` found, or `check_copy` of an adapter that is copied. Of several runs also
        `probability_average`, the distance of the export's predictions from the mean of the runs'; and of a run in 8
        bits or fp8 `rounded_run`, the distance of its weights in float32 from what the run itself predicts, whose
        activations are rounded to 8 bits, too.

    Raises:
        InputError: what was given cannot be exported so; raised before torch is imported wherever no model is needed.
        FloatingPointError: the export does not predict as the run does.
    """
    # check options, runs and battles, which needs no model
    output = Path(output)
    trained = load_trained_runs(runs, overrides)
    contents = check_options(
        trained,
        output,
        kind,
        EXPORTS,
        dtype=dtype,
        push_to_hub=push_to_hub,
        bundle=bundle,
    )
    check_writable(output, "--output")
    with lock_output(output):
        copied = contents == "adapter" and len(trained) == 1 and battles is None  # its predictions are the run's
        compared = None if copied else battles_to_compare(trained[0].folder, battles)
        if push_to_hub:
            check_repository(push_to_hub, "--push-to-hub")
        import torch

        from rewardmodel.exports.card import write_card
        from rewardmodel.exports.parity import check_copy, format_parity
        from rewardmodel.exports.remote_code import write_remote_code
        from rewardmodel.exports.soup import average_adapters
        from rewardmodel.model.backbone import saved_backbone_folder

        form, weights = EXPORTS[contents], getattr(torch, dtype or trained[0].dtype)
        plain_head = trained[0].recipe.model.plain_head
        plain = form.merged and not rewardmodel_only and (plain_head or not bundle)
        with_code = plain and not plain_head
        if form.merged:
            _check_mergeable(trained[0], with_code)
        with tempfile.TemporaryDirectory() as work, atomic_path(output) as folder:
            # the model, its recipe and its calibrator
            run = trained[0] if len(trained) == 1 else average_adapters(trained, Path(work))
            model = folder / "model" if bundle else folder
            logger.info("writing %s …", output)
            form.write(run, model, weights)
            if with_code:
                write_remote_code(run.recipe, model)
            recipe = form.adapt_recipe(run.recipe)
            write_text(RunFolder(model).recipe, dump_recipe(recipe))
            if len(trained) == 1:
                _copy_calibrator(run.folder, model)

            # compare its predictions with the run's, or its files
            if compared is None:
                checked = check_copy(run.model, model)
            else:
                checked = _compare(trained, run, model, compared, weights, form, plain)
            parity = {"kind": kind, **checked}

            # parity.json, the model card, and the other files of a bundle
            write_json(folder / "parity.json", parity)
            write_card([one.folder for one in trained], model, parity, format_parity(parity), trained[0].recipe)
            if bundle:
                backbone = None
                if bundle.base_folder:  # the backbone is elsewhere on the other machine
                    backbone = saved_backbone_folder(run.recipe.model, run.model)
                    recipe = replace(recipe, model=replace(recipe.model, model_name_or_path=bundle.base_folder))
                    write_text(RunFolder(model).recipe, dump_recipe(recipe))
                unneeded = unneeded_packages(run.recipe, run.model, contents)
                write_bundle(bundle, unneeded, folder)
                write_notebook(bundle, folder, backbone, [*bundle.machines], unneeded)
        if push_to_hub:
            upload(output, push_to_hub)
        return parity


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
    """Copy a run's calibrator, if it has one, with the predictions that it was fitted on and the baseline it blends.

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

        load_regression(source.blend_baseline)  # raises if it cannot be read
        shutil.copy(source.blend_baseline, target.blend_baseline)
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
