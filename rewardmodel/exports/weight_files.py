"""A folder of weights in, which file has which tensor and what loads it out; and tensors in, such a folder out."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from rewardmodel.errors import InputError
from rewardmodel.files import write_json

SHARD = 2 * 10**9
"""Bytes of an output file, but for a tensor that is larger by itself."""

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a model folder, in the order of the names.

    Raises:
        InputError: its weights are no safetensors.
    """
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {key: folder / names[key] for key in sorted(names)}
    file = folder / "model.safetensors"
    if not file.is_file():
        raise InputError(f"{folder}: no model.safetensors there; save the backbone with save_pretrained first")
    with safe_open(file, "pt") as weights:
        return dict.fromkeys(sorted(weights.keys()), file)


def parameter_names(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Return into which weight of a model transformers loads each tensor of a checkpoint; those of no use are left out.

    Raises:
        InputError: transformers computes a weight out of several tensors, or out of one by more than its name.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    known = model.state_dict()
    found = {}
    for key in keys:
        name, fused = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, fused = key, None
        if fused and name in known:
            raise InputError(f"{model.config.model_type}: {name} is made of several tensors; export the adapter")
        if name in known:
            found[key] = name
    return found


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, limit: int) -> None:
    """Write tensors as safetensors of at most `limit` bytes each, with an index if there are several."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(held, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, value in tensors:
        total += value.nbytes
        if held and sum(one.nbytes for one in held.values()) + value.nbytes > limit:
            flush()
        held[name] = value
    flush()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for number, name in enumerate(names):
        (folder / f"{number}.safetensors").rename(folder / name)
    where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
