"""The recipe's `model` section and the hardware -> device, compute precision, and bitsandbytes settings."""

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from rewardmodel.config.schema import ModelConfig
from rewardmodel.distributed import current_launch
from rewardmodel.errors import InputError
from rewardmodel.model.families import HEADS, Family, stored_bits

NOT_QUANTIZED = (*HEADS, *(rf".*\.{name}" for name in HEADS))
"""Modules that transformers must not quantise: heads on top of a backbone, and parts of heads inside it."""


def compute_device(model: ModelConfig) -> torch.device:
    """Return the device to compute on.

    Raises:
        InputError: CUDA is asked for and torch sees no CUDA device.
    """
    if model.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "model.device: cuda is asked for, but torch sees no CUDA device; use --model.device cpu or auto"
        )
    if model.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # set by accelerate launch and torchrun


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a GPU; None: a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def compute_dtype(
    model: ModelConfig, device: torch.device, family: Family, capability: tuple[int, int] | None = None
) -> torch.dtype:
    """Return the precision of the forward pass: bfloat16 where the hardware has it, else float16, else float32.

    float16 (Turing and older) is not used for families whose activations leave its range, nor on CPUs.

    Args:
        model: section of the recipe.
        device: where to compute.
        family: of the backbone.
        capability: compute capability of a GPU that is not in this machine; default: that of `device`.

    Raises:
        InputError: float16 is asked for on a CPU.
    """
    if model.dtype != "auto":
        if model.dtype == "float16" and device.type == "cpu":
            raise InputError("model.dtype: float16 does not train on a CPU; use bfloat16, float32 or auto")
        return getattr(torch, model.dtype)
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    if (capability or capability_of(device) or (0, 0)) >= (8, 0):
        return torch.bfloat16
    return torch.float16 if family.float16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return the context in which a forward pass computes in `dtype`, the same in training and in prediction."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a precision as recipes and JSON files write it, like `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def quantized_bits(model: ModelConfig, config: Any) -> int | None:
    """Return 4 or 8 if bitsandbytes is to quantise the backbone, or it is stored so; None: not quantised.

    Args:
        model: section of the recipe.
        config: transformers configuration of the backbone.

    Raises:
        InputError: the recipe and the weight files disagree, or another library than bitsandbytes quantised the files.
    """
    requested = 4 if model.load_in_4bit else 8 if model.load_in_8bit else None
    stored = stored_bits(config)
    if requested and stored and requested != stored:
        raise InputError(
            f"model.load_in_{requested}bit: the backbone {model.model_name_or_path} is stored in {stored} bits; "
            "leave it out, or give an unquantised backbone"
        )
    return requested or stored


def quantization_settings(model: ModelConfig, config: Any, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return how transformers quantises a backbone while loading it; None: it does not.

    Raises:
        InputError: as `quantized_bits`.
    """
    bits = quantized_bits(model, config)
    return bits_and_bytes(model, dtype) if bits and not stored_bits(config) else None


def spare_head(config: Any, dtype: torch.dtype) -> None:
    """Change the configuration of a backbone that is stored quantised: its head is not, and it computes in `dtype`."""
    stored = config.quantization_config
    stored["llm_int8_skip_modules"] = sorted({*(stored.get("llm_int8_skip_modules") or []), *NOT_QUANTIZED})
    stored["bnb_4bit_compute_dtype"] = dtype_name(dtype)


def quantization_name(model: ModelConfig) -> str | None:
    """Return how a recipe quantises, in words; None: it does not."""
    if model.load_in_4bit:
        nested = " with double quantisation" if model.use_bnb_nested_quant else ""
        return f"4-bit {model.bnb_4bit_quant_type}{nested}"
    return "8-bit int8" if model.load_in_8bit else "fp8 e4m3" if model.load_in_fp8 else None


def bits_and_bytes(model: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the recipe's quantisation as bitsandbytes settings that leave every head alone."""
    return BitsAndBytesConfig(
        load_in_4bit=model.load_in_4bit,
        load_in_8bit=model.load_in_8bit,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if current_launch().strategy == "fsdp" else None,  # FSDP shards floats only
        llm_int8_skip_modules=list(NOT_QUANTIZED),
    )
