"""A recipe's model section and a machine -> device, compute dtype and bitsandbytes settings."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig

from rewardmodel.config.schema import ModelConfig
from rewardmodel.distributed import Launch, launch
from rewardmodel.errors import InputError
from rewardmodel.model.compatibility import Setup
from rewardmodel.model.families import HEADS, Family, check_length, family, lowest_layers, stored_bits


def placement(config: ModelConfig, folder: Path) -> tuple[torch.device, torch.dtype]:
    """Return the device and the precision that a backbone computes in here.

    Raises:
        InputError: CUDA asked for and absent, or float16 on a CPU.
    """
    device = compute_device(config)
    return device, compute_dtype(config, device, family(AutoConfig.from_pretrained(folder).model_type))


def check_positions(folder: Path, max_length: int) -> None:
    """Raise if a backbone has no positions for sequences of so many tokens, as `model.families.check_length`."""
    check_length(AutoConfig.from_pretrained(folder), max_length)


def setup(config: ModelConfig, folder: Path, trainer: dict[str, Any] | None = None) -> Setup:
    """Return what a backbone would be run with here, for `model.compatibility.refuse`.

    Args:
        config: of the recipe.
        folder: of the backbone; its configuration is enough.
        trainer: section of the recipe; none: the model is only to predict.

    Raises:
        InputError: as `placement`.
    """
    device, dtype = placement(config, folder)
    backbone = lowest_layers(AutoConfig.from_pretrained(folder), config.num_hidden_layers)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return setup_on(config, backbone, device.type, dtype, capability, trainer, launch())


def setup_on(
    config: ModelConfig,
    backbone: Any,
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    trainer: dict[str, Any] | None,
    launched: Launch,
    here: bool = True,
) -> Setup:
    """Return what a backbone would be run with on any device, as `model.compatibility.Setup` has it.

    `backbone` is its transformers configuration.
    """
    return Setup(
        config, backbone.model_type, backbone.get_text_config().num_hidden_layers, device,
        str(dtype).removeprefix("torch."), capability, trainer, launched, here, stored_bits(backbone),
    )  # fmt: skip


def compute_device(config: ModelConfig) -> torch.device:
    """Return the device to compute on.

    Raises:
        InputError: CUDA is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "model.device: cuda is asked for, but torch sees no CUDA device; use --model.device cpu or auto"
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # set by accelerate launch and torchrun


def compute_dtype(
    config: ModelConfig, device: torch.device, rules: Family, capability: tuple[int, int] | None = None
) -> torch.dtype:
    """Return the precision of the backbone: bfloat16 where the hardware has it, else float16, else float32.

    float16 (Turing and older) is left out for families whose activations leave its range, and on CPUs. `capability` is
    that of a GPU which is not here.
    """
    if config.dtype != "auto":
        if config.dtype == "float16" and device.type == "cpu":
            raise InputError("model.dtype: float16 does not train on a CPU; use bfloat16, float32 or auto")
        return getattr(torch, config.dtype)
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    if (capability or torch.cuda.get_device_capability(device)) >= (8, 0):
        return torch.bfloat16
    return torch.float16 if rules.float16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return the context in which a forward pass computes in `dtype`, the same in training and in prediction."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


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
