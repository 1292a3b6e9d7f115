"""The recipe's `model` section -> a backbone as this machine runs it: folder, configuration, device, precision."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rewardmodel.config.schema import ModelConfig
from rewardmodel.distributed import Launch, current_launch
from rewardmodel.errors import InputError
from rewardmodel.files import cache_folder
from rewardmodel.model.compatibility import refuse
from rewardmodel.model.configuration import Configuration, default_attention
from rewardmodel.model.families import Family, check_length, find_family, lowest_layers
from rewardmodel.model.precision import capability_of, compute_device, compute_dtype, dtype_name, quantized_bits
from rewardmodel.model.saved_model import is_adapter, read_about
from rewardmodel.model.weights import fetch_backbone, fingerprint

CACHE_FORMAT = 1
"""Part of the key of cached features: to be raised when other features are computed from the same settings."""

FEATURE_SETTINGS = (
    "num_hidden_layers",
    "pooling",
    "attn_implementation",
    "load_in_4bit",
    "load_in_8bit",
    "load_in_fp8",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "use_peft",
)
"""Keys of the recipe's `model` section that features depend on, besides the backbone's weights."""


@dataclass(frozen=True)
class Backbone:
    """A backbone as this machine runs it; every verb resolves it once and hands it on.

    Attributes:
        model: section of the recipe.
        folder: local folder of configuration, tokenizer and, unless resolved without them, weights.
        config: its transformers configuration, with `model.num_hidden_layers` layers.
        stored_layers: how many layers its weight files have.
        family: what is known of its architecture.
        device: where it computes.
        dtype: precision that it computes in.
        bits: 4 or 8 if bitsandbytes quantises it; None: it does not.
        liger: whether liger's kernels compute parts of it.
        launch: how it is spread over processes.
    """

    model: ModelConfig
    folder: Path
    config: Any
    stored_layers: int
    family: Family
    device: torch.device
    dtype: torch.dtype
    bits: int | None
    liger: bool
    launch: Launch

    @property
    def attention(self) -> str:
        """The attention implementation, a key of `model.attention.KERNELS`."""
        set_by_recipe = self.model.attn_implementation
        return set_by_recipe or default_attention(self.family, dtype_name(self.dtype), capability_of(self.device))

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the weight files: see `model.weights.fingerprint`."""
        return fingerprint(self.folder)

    @cached_property
    def feature_cache(self) -> Path:
        """The folder of the cache for features of this backbone with these settings (`model.features`)."""
        settings = {name: value for name, value in asdict(self.model).items() if name in FEATURE_SETTINGS}
        if not self.model.load_in_fp8:  # caches from before this key existed stay valid
            del settings["load_in_fp8"]
        settings |= {"format": CACHE_FORMAT, "dtype": str(self.dtype), "backbone": self.fingerprint}
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
        return cache_folder() / "features" / digest.hexdigest()

    def with_weights(self) -> "Backbone":
        """Return the same backbone with its weights fetched, where it was resolved without them.

        Raises:
            InputError: the weights cannot be fetched.
        """
        return replace(self, folder=fetch_backbone(self.model.model_name_or_path, self.model.model_revision))


def resolve_backbone(
    model: ModelConfig,
    *,
    trainer: dict[str, Any] | None = None,
    max_length: int | None = None,
    folder: Path | None = None,
    weights: bool = True,
) -> Backbone:
    """Return the backbone that a recipe names, or raise if this machine cannot run it as the recipe says.

    Args:
        model: section of the recipe.
        trainer: section of the recipe; default: the model only predicts.
        max_length: tokens of the longest sequence, to be checked against the backbone's positions.
        folder: where the backbone is, if that is known; default: `model.model_name_or_path` is looked up.
        weights: whether weights are needed; without them, configuration and tokenizer of a hub id are fetched alone.

    Raises:
        InputError: no such backbone; a device, precision, attention or quantisation that does not work here, or not
            together (`model.compatibility`); or fewer positions than `max_length`.
    """
    folder = folder or fetch_backbone(model.model_name_or_path, model.model_revision, weights)
    stored = AutoConfig.from_pretrained(folder)
    config = lowest_layers(stored, model.num_hidden_layers)
    if max_length is not None:
        check_length(config, max_length)
    family, device, launch = find_family(config.model_type), compute_device(model), current_launch()
    dtype = compute_dtype(model, device, family)
    configuration = Configuration.of(model, config, device.type, dtype, capability_of(device), trainer, launch)
    refuse(configuration)
    bits = quantized_bits(model, config)
    layers = stored.get_text_config().num_hidden_layers
    return Backbone(model, folder, config, layers, family, device, dtype, bits, configuration.liger, launch)


def resolve_saved_backbone(model: ModelConfig, folder: Path) -> Backbone:
    """Return the backbone under a saved model: the one that its adapter was trained on, or its own if it is whole.

    Args:
        model: section of the recipe that it was trained with.
        folder: of the saved model.

    Raises:
        InputError: no saved model there, a backbone with other weights than it was trained on, or as
            `resolve_backbone`.
    """
    below = saved_backbone_folder(model, folder)
    whole = below == folder
    return resolve_backbone(replace(model, keep_head=True) if whole else model, folder=below)


def saved_backbone_folder(model: ModelConfig, folder: Path) -> Path:
    """Return the folder with the weights under a saved model: its backbone's, or its own if it is whole.

    Raises:
        InputError: no saved model there, or a backbone with other weights than it was trained on.
    """
    about = read_about(folder)
    if not is_adapter(folder):
        return folder
    try:
        below = fetch_backbone(model.model_name_or_path, model.model_revision)
    except InputError as error:
        raise InputError(
            f"{error}; {folder} was trained on it: if it is elsewhere now, say where with --model.model_name_or_path"
        ) from error
    if fingerprint(below) != about["fingerprint"]:
        raise InputError(
            f"{folder}: trained on other weights of {about['model_name_or_path']} than those in {below}; "
            "give the backbone that it was trained on"
        )
    return below
