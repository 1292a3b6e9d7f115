"""The folder of a saved model in, what stands in it out: an adapter or a whole model, and on which backbone."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rewardmodel.config.schema import ModelConfig
from rewardmodel.errors import InputError
from rewardmodel.model.weights import fingerprint, resolve
from rewardmodel.run_folder import BACKBONE

ADAPTER = "adapter_model.safetensors"
"""PEFT's file of an adapter and of the modules saved with it."""


def read_about(folder: Path) -> dict[str, Any]:
    """Return what `BACKBONE` in the folder of a saved model tells.

    Raises:
        InputError: there is none.
    """
    try:
        return json.loads((folder / BACKBONE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no trained model there; has the run finished training?") from error


def is_adapter(folder: Path) -> bool:
    """Return whether a saved model is an adapter; else it is whole."""
    return (folder / "adapter_config.json").is_file()


def backbone_folder(config: ModelConfig, folder: Path) -> Path:
    """Return the folder with the weights under a saved model: its backbone's, or its own if it is whole.

    Raises:
        InputError: no saved model there, or a backbone that is not the one it was trained on.
    """
    about = read_about(folder)
    if not is_adapter(folder):
        return folder
    backbone = resolve(config.model_name_or_path, config.model_revision)
    if fingerprint(backbone) != about["fingerprint"]:
        raise InputError(
            f"{folder}: trained on other weights of {about['model_name_or_path']} than those in {backbone}; "
            "give the backbone that it was trained on"
        )
    return backbone


def check_head(folder: Path, heads: Iterable[str]) -> None:
    """Raise InputError unless a saved adapter has these heads with it."""
    with safe_open(folder / ADAPTER, "pt") as weights:
        keys = list(weights.keys())
    for head in heads:
        if not any(f".{head}." in key for key in keys):
            raise InputError(
                f"{folder}: the saved adapter has no head '{head}'; save it with modules_to_save=['{head}']"
            )
