"""Several runs' adapters -> their exact mean as one adapter (a model soup, Wortsman et al. 2022, of adapters).

The mean of the updates B A is not the product of mean factors, but of concatenated factors: (1/k) sum s_i B_i A_i =
[s_1/k B_1, ..., s_k/k B_k] [A_1; ...; A_k], an ordinary LoRA of the summed rank. Weights that were trained whole, like
the head, are averaged.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from rewardmodel.config.loader import dump_recipe
from rewardmodel.errors import InputError
from rewardmodel.exports.checks import TrainedRun
from rewardmodel.files import write_text
from rewardmodel.model.saved_model import ADAPTER_FILE, is_adapter, read_about
from rewardmodel.run_folder import RunFolder

COMMON_KEYS = {
    "model": (
        "pooling",
        "pair_ties",
        "num_hidden_layers",
        "load_in_4bit",
        "load_in_8bit",
        "load_in_fp8",
        "bnb_4bit_quant_type",
        "use_bnb_nested_quant",
    ),
    "prompt": ("template", "max_length", "truncation"),
    "objective": ("name",),
}
"""Keys of the recipe that all runs of one mean must have in common, by section."""


def average_adapters(runs: Sequence[TrainedRun], folder: Path) -> TrainedRun:
    """Write the mean of several runs as a run with the first one's recipe.

    Args:
        runs: two or more, of one backbone, precision, template, objective and quantisation.
        folder: where to.

    Raises:
        InputError: runs that cannot be averaged; what differs is named.
    """
    first = runs[0]
    for run in runs:
        _check_common(first, run)
    adapters, scales = zip(*map(_load_adapter, runs), strict=True)
    for run, adapter in zip(runs, adapters, strict=True):
        if adapter.keys() != adapters[0].keys():
            name = sorted(adapter.keys() ^ adapters[0].keys())[0]
            raise InputError(
                f"{run.folder}: its adapters are on other layers than in {first.folder}, for instance {name}; only "
                "runs that have them in common can be averaged"
            )

    # the first run's model folder with the mean adapter, whose own scale is 1
    files = RunFolder(folder)
    shutil.copytree(first.model, files.model, ignore=shutil.ignore_patterns(ADAPTER_FILE))
    mean = {name: _average_weight(name, [adapter[name] for adapter in adapters], scales) for name in adapters[0]}
    save_file(mean, files.model / ADAPTER_FILE, metadata={"format": "pt"})
    lora = LoraConfig.from_pretrained(first.model)
    ranks = [len(value) for name, value in mean.items() if ".lora_A." in name]
    if ranks:  # there are none if only heads were trained
        lora.r = lora.lora_alpha = max(ranks)
    lora.use_rslora = False
    lora.save_pretrained(files.model)
    write_text(files.recipe, dump_recipe(first.recipe))
    shutil.copy(RunFolder(first.folder).environment, files.environment)
    return TrainedRun(folder, first.recipe, first.dtype)


def _check_common(first: TrainedRun, other: TrainedRun) -> None:
    if not is_adapter(other.model):
        raise InputError(f"{other.folder}: has no adapter, and only adapters can be averaged; export it by itself")
    if other.recipe.model.use_dora:
        raise InputError(f"{other.folder}: model.use_dora: DoRA's updates have no exact mean; export it by itself")
    mine, theirs = _collect_keys(first), _collect_keys(other)
    for key in mine:
        if mine[key] != theirs[key]:
            raise InputError(
                f"{other.folder}: {key} is {theirs[key]!r}, but {mine[key]!r} in {first.folder}; only runs that have "
                "it in common can be averaged"
            )


def _collect_keys(run: TrainedRun) -> dict[str, object]:
    """Return what runs must have in common, like `{"backbone": "0f3c…", "model.pooling": "last", …}`."""
    keys = {
        f"{section}.{key}": getattr(getattr(run.recipe, section), key)
        for section, names in COMMON_KEYS.items()
        for key in names
    }
    return {"backbone": read_about(run.model)["fingerprint"], "precision": run.dtype, **keys}


def _load_adapter(run: TrainedRun) -> tuple[dict[str, torch.Tensor], float]:
    """Return the weights of a run's adapter, and the scale of its updates B A."""
    lora = LoraConfig.from_pretrained(run.model)
    return load_file(run.model / ADAPTER_FILE), lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)


def _average_weight(name: str, values: Sequence[torch.Tensor], scales: Sequence[float]) -> torch.Tensor:
    """Return one weight of the mean adapter: A (sum of ranks, in), B (out, sum of ranks), or the mean of any other."""
    if ".lora_A." in name:
        return torch.cat(list(values), dim=0)
    if ".lora_B." in name:
        return torch.cat([value * (scale / len(values)) for value, scale in zip(values, scales, strict=True)], dim=1)
    return torch.stack([value.double() for value in values]).mean(dim=0).to(values[0].dtype)
