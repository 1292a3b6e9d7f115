"""Several runs' adapters in, their exact mean as one adapter out.

The mean of updates B A is no product of mean factors, but one of stacked factors: (1/k) sum s_i B_i A_i =
[s_1/k B_1, ..., s_k/k B_k] [A_1; ...; A_k], an ordinary LoRA of the summed rank. Weights trained whole are averaged.
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
from rewardmodel.exports.merge import Trained
from rewardmodel.files import write_text
from rewardmodel.model.saved_model import ADAPTER_FILE, is_adapter, read_about
from rewardmodel.run_folder import RunFolder

SAME = {
    "model": (
        "pooling", "pair_ties", "num_hidden_layers", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
        "use_bnb_nested_quant",
    ),
    "prompt": ("template", "max_length", "truncation"),
    "objective": ("name",),
}  # fmt: skip
"""Keys of the recipes that runs of one soup have in common, by section."""


def soup(runs: Sequence[Trained], folder: Path) -> Trained:
    """Write the mean of several runs as a run of its own, with the first one's recipe.

    Args:
        runs: two or more, of one backbone, template, objective and quantisation.
        folder: where to.

    Raises:
        InputError: runs that do not add up; what differs is named.
    """
    first = runs[0]
    for run in runs:
        _check_fit(first, run)
    adapters, scales = zip(*map(_adapter_and_scale, runs), strict=True)
    for run, adapter in zip(runs, adapters, strict=True):
        if adapter.keys() != adapters[0].keys():
            name = sorted(adapter.keys() ^ adapters[0].keys())[0]
            raise InputError(f"{run.folder}: other layers have adapters than in {first.folder}, for one {name}")
    ignored = shutil.ignore_patterns(ADAPTER_FILE)
    shutil.copytree(first.model, RunFolder(folder).model, ignore=ignored)
    mean = {name: _mean(name, [adapter[name] for adapter in adapters], scales) for name in adapters[0]}
    save_file(mean, RunFolder(folder).model / ADAPTER_FILE, metadata={"format": "pt"})
    lora = LoraConfig.from_pretrained(first.model)
    ranks = [len(value) for name, value in mean.items() if ".lora_A." in name]
    if ranks:  # else heads alone were trained
        lora.r = lora.lora_alpha = max(ranks)
    lora.use_rslora = False
    lora.save_pretrained(RunFolder(folder).model)
    write_text(RunFolder(folder).recipe, dump_recipe(first.recipe))
    shutil.copy(RunFolder(first.folder).environment, RunFolder(folder).environment)
    return Trained(folder, first.recipe, first.dtype)


def _check_fit(first: Trained, other: Trained) -> None:
    if not is_adapter(other.model):
        raise InputError(f"{other.folder}: has no adapter, and only adapters are averaged; export it by itself")
    if other.recipe.model.use_dora:
        raise InputError(f"{other.folder}: model.use_dora: DoRA's updates have no exact mean; export it by itself")
    facts = [
        {
            "backbone": read_about(run.model)["fingerprint"],
            "precision": run.dtype,
            **{
                f"{section}.{key}": getattr(getattr(run.recipe, section), key)
                for section in SAME
                for key in SAME[section]
            },
        }
        for run in (first, other)
    ]
    for key in facts[0]:
        if facts[0][key] != facts[1][key]:
            raise InputError(
                f"{other.folder}: {key} is {facts[1][key]!r}, but {facts[0][key]!r} in {first.folder}; only runs that "
                "have it in common can be averaged"
            )


def _adapter_and_scale(run: Trained) -> tuple[dict[str, torch.Tensor], float]:
    """Return the weights of a run's adapter, and what its updates B A are multiplied by."""
    lora = LoraConfig.from_pretrained(run.model)
    return load_file(run.model / ADAPTER_FILE), lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)


def _mean(name: str, values: Sequence[torch.Tensor], scales: Sequence[float]) -> torch.Tensor:
    """Return one weight of the mean adapter, whose own scale is 1."""
    if ".lora_A." in name:
        return torch.cat(list(values), dim=0)
    if ".lora_B." in name:
        return torch.cat([value * (scale / len(values)) for value, scale in zip(values, scales, strict=True)], dim=1)
    return torch.stack([value.double() for value in values]).mean(dim=0).to(values[0].dtype)
