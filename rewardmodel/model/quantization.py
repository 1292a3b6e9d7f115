"""A recipe's wishes and what a backbone is stored in, in; bitsandbytes settings that leave every head alone, out."""

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from rewardmodel.config.schema import ModelConfig
from rewardmodel.errors import InputError
from rewardmodel.launches import launch
from rewardmodel.model.families import HEADS, stored_bits

SPARED = (*HEADS, *(rf".*\.{name}" for name in HEADS))
"""What transformers is told not to quantise: heads that stand on a backbone, and parts of them inside it."""


def quantized_bits(config: ModelConfig, backbone: Any) -> int | None:
    """Return in how many bits the backbone is to be held, 4 or 8; none: not quantised.

    Args:
        config: the recipe's wishes.
        backbone: its configuration, of transformers; one that is stored quantised stays as it is.

    Raises:
        InputError: a backbone that is stored otherwise.
    """
    asked = 4 if config.load_in_4bit else 8 if config.load_in_8bit else None
    stored = stored_bits(backbone)
    if asked and stored and asked != stored:
        raise InputError(
            f"model.load_in_{asked}bit: the backbone {config.model_name_or_path} is stored in {stored} bits already; "
            "leave it out, or give an unquantised backbone"
        )
    return asked or stored


def quantization(config: ModelConfig, backbone: Any, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return bitsandbytes settings that leave every head alone; none: nothing is to be quantised.

    Those of a backbone that is stored quantised are changed in its configuration instead, and none are returned.

    Raises:
        InputError: as `quantized_bits`.
    """
    bits = quantized_bits(config, backbone)
    if stored_bits(backbone):
        stored = backbone.quantization_config
        stored["llm_int8_skip_modules"] = sorted({*(stored.get("llm_int8_skip_modules") or []), *SPARED})
        stored["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        return None
    if not bits:
        return None
    return bits_and_bytes(config, dtype)


def quantisation_name(config: ModelConfig) -> str | None:
    """Return how a recipe quantises, in words; none: it does not."""
    if config.load_in_4bit:
        nested = " with double quantisation" if config.use_bnb_nested_quant else ""
        return f"4-bit {config.bnb_4bit_quant_type}{nested}"
    return "8-bit int8" if config.load_in_8bit else None


def bits_and_bytes(config: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return bitsandbytes settings of what the recipe wishes, that leave every head alone."""
    return BitsAndBytesConfig(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if launch().strategy == "fsdp" else None,  # FSDP spreads floating types only
        llm_int8_skip_modules=list(SPARED),
    )
