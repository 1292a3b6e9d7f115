"""The folder of a saved model -> what it holds: an adapter or a whole model, its head, its backbone."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rewardmodel.errors import InputError
from rewardmodel.run_folder import BACKBONE_FILE

ADAPTER_FILE = "adapter_model.safetensors"
"""PEFT's file of an adapter and of the modules saved with it."""


def read_about(folder: Path) -> dict[str, Any]:
    """Return the content of `BACKBONE_FILE` in the folder of a saved model.

    For example `{"model_name_or_path": "smollm2-135m-instruct", "model_revision": "main", "fingerprint": "0f3c…",
    "head": {"num_labels": 1, "responses": 1, "tie": true, "pairs": false}}`; of a merged model also `merged` (its
    dtype and bits) and, where the objective has one, `tie`.

    Raises:
        InputError: the folder is not a saved model.
    """
    try:
        return json.loads((folder / BACKBONE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no trained model there; give a run that finished training") from error


def is_adapter(folder: Path) -> bool:
    """Return whether a saved model is an adapter, not a whole model."""
    return (folder / "adapter_config.json").is_file()


def check_head(folder: Path, heads: Iterable[str]) -> None:
    """Raise InputError unless a saved adapter holds these heads."""
    with safe_open(folder / ADAPTER_FILE, "pt") as weights:
        keys = list(weights.keys())
    for head in heads:
        if not any(f".{head}." in key for key in keys):
            raise InputError(
                f"{folder}: the saved adapter has no head '{head}'; save it with modules_to_save=['{head}']"
            )
