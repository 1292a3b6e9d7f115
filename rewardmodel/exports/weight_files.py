"""The weight files of a model folder: which file has which tensor, which parameter it is loaded into; writing them."""

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

INDEX_FILE = "model.safetensors.index.json"
"""Where transformers lists the tensors of several weight files."""


def find_weight_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a model folder, ordered by the tensors' names.

    Raises:
        InputError: its weights are not in safetensors files.
    """
    if (folder / INDEX_FILE).is_file():
        names = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        return {key: folder / names[key] for key in sorted(names)}
    file = folder / "model.safetensors"
    if not file.is_file():
        raise InputError(f"{folder}: no model.safetensors there; save the backbone with save_pretrained first")
    with safe_open(file, "pt") as weights:
        return dict.fromkeys(sorted(weights.keys()), file)


def match_parameters(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Return the weight of a model that transformers loads each tensor of a checkpoint into.

    Args:
        model: whose weights may be on the meta device.
        keys: names of the checkpoint's tensors; those that the model has no weight for are left out of the result.

    Returns:
        For instance `{"norm.weight": "model.norm.weight"}`.

    Raises:
        InputError: transformers computes a weight from several tensors.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    known = model.state_dict()
    matched = {}
    for key in keys:
        name, fused = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, fused = key, None
        if fused and name in known:
            raise InputError(f"{model.config.model_type}: {name} is made of several tensors; use --kind adapter")
        if name in known:
            matched[key] = name
    return matched


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, limit: int) -> None:
    """Write tensors as safetensors files, with an index if there are several.

    Args:
        tensors: names and contents; one file's worth of them is in memory at a time.
        folder: where to.
        limit: bytes of a file; a larger tensor gets a separate file.
    """
    shards: list[list[str]] = []  # names of the tensors in each file
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

    # names as transformers expects them, now that the number of files is known
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for number, name in enumerate(names):
        (folder / f"{number}.safetensors").rename(folder / name)
    where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
