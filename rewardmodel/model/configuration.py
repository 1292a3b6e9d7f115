"""What a run would be made of: the recipe, the backbone and the hardware, before any weight is loaded."""

import importlib.util
import os
import shutil
from dataclasses import dataclass, field
from typing import Any

import torch

from rewardmodel.config.schema import ModelConfig
from rewardmodel.distributed import Launch
from rewardmodel.model.attention import HAS_VARLEN
from rewardmodel.model.families import LIGER_FAMILIES, Family, find_family, stored_bits

LIGER_MISSING = "needs the package liger-kernel; run: pip install 'rewardmodel[gpu]', or set it false"
"""Why liger's kernels cannot compute where nothing but their package is missing."""


@dataclass(frozen=True)
class Configuration:
    """What a run would be made of: all that the checks read.

    Attributes:
        model: section of the recipe.
        model_type: of the backbone, Hugging Face's name.
        layers: of the backbone.
        device: its kind: cpu or cuda.
        dtype: precision of the forward pass: bfloat16, float16 or float32.
        capability: compute capability of the GPU; None on a CPU.
        trainer: section of the recipe; None: the model is only to predict.
        launch: how it is spread over processes.
        here: whether it is to run on this machine, whose installed packages then matter.
        stored_bits: 4 or 8 if the weight files are quantised; None: they are not.
        activation: of the MLP, transformers' name.
    """

    model: ModelConfig
    model_type: str
    layers: int
    device: str
    dtype: str
    capability: tuple[int, int] | None = None
    trainer: dict[str, Any] | None = None
    launch: Launch = field(default_factory=Launch)
    here: bool = True
    stored_bits: int | None = None
    activation: str = "silu"

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        config: Any,
        device: str,
        dtype: torch.dtype,
        capability: tuple[int, int] | None,
        trainer: dict[str, Any] | None,
        launch: Launch,
        here: bool = True,
    ) -> "Configuration":
        """Return the configuration of a backbone by its transformers `config`; the other arguments are attributes."""
        text, name = config.get_text_config(), str(dtype).removeprefix("torch.")
        activation = str(getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None))
        return cls(
            model,
            config.model_type,
            text.num_hidden_layers,
            device,
            name,
            capability,
            trainer,
            launch,
            here,
            stored_bits(config),
            activation,
        )

    @property
    def attention(self) -> str:
        """The attention implementation that would be used."""
        family = find_family(self.model_type)
        return self.model.attn_implementation or default_attention(family, self.dtype, self.capability)

    @property
    def known_attention(self) -> str:
        """The attention implementations that compute the family correctly."""
        return ", ".join(find_family(self.model_type).attention)

    @property
    def quantised(self) -> bool:
        """Whether the backbone is quantised, by bitsandbytes or to fp8."""
        return self.four_bits or self.eight_bits or self.model.load_in_fp8

    @property
    def four_bits(self) -> bool:
        """Whether the backbone is held in 4 bits."""
        return self.model.load_in_4bit or self.stored_bits == 4

    @property
    def eight_bits(self) -> bool:
        """Whether the backbone is held in 8 bits."""
        return self.model.load_in_8bit or self.stored_bits == 8

    @property
    def fsdp(self) -> bool:
        """Whether FSDP spreads the weights over processes."""
        return self.launch.strategy == "fsdp"

    @property
    def pre_ampere(self) -> bool:
        """Whether the GPU is older than Ampere (compute capability 8.0)."""
        return self.capability is not None and self.capability < (8, 0)

    @property
    def lacks_fp8(self) -> bool:
        """Whether the GPU has no fp8 units: those older than Ada (compute capability 8.9)."""
        return self.capability is not None and self.capability < (8, 9)

    @property
    def quantisations(self) -> list[str]:
        """The keys that are set of those that quantise the backbone."""
        return [key for key in ("load_in_4bit", "load_in_8bit", "load_in_fp8") if getattr(self.model, key)]

    @property
    def last_layer(self) -> int:
        """Number of the last layer, from 0."""
        return self.layers - 1

    def trainer_key(self, key: str, default: Any = None) -> Any:
        """Return a key of the recipe's `trainer` section."""
        return (self.trainer or {}).get(key, default)

    @property
    def attention_problem(self) -> str | None:
        """Why the device cannot attend with the implementation that would be used; None: it can."""
        return attention_problem(self.attention, self.dtype, self.capability, self.here)

    @property
    def lacks_compiler(self) -> bool:
        """Whether the run is to be on this machine and torch finds no compiler for the code that it generates."""
        return self.here and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))

    @property
    def liger(self) -> bool:
        """Whether liger's kernels compute parts of the decoder (`model.use_liger_kernel`)."""
        if self.model.use_liger_kernel is not None:
            return self.model.use_liger_kernel
        return self._may_use_liger and not self.liger_problem

    @property
    def misses_liger(self) -> bool:
        """Whether only the package is missing for `liger`."""
        return self.model.use_liger_kernel is None and self._may_use_liger and self.liger_problem == LIGER_MISSING

    @property
    def _may_use_liger(self) -> bool:
        excluded = self.fsdp or self.trainer_key("torch_compile") or not self.model.use_peft
        return _is_ampere(self.capability) and not excluded

    @property
    def liger_problem(self) -> str | None:
        """Why liger's kernels cannot compute, and what to do; None: they can."""
        if self.capability is None:
            return "needs a GPU; set it false"
        if LIGER_FAMILIES.get(self.model_type) != self.activation:
            known = ", ".join(f"{family} ({activation})" for family, activation in sorted(LIGER_FAMILIES.items()))
            return f"is not known for {self.model_type} ({self.activation}), but for {known}; set it false"
        if self.lacks("liger_kernel"):
            return LIGER_MISSING
        if self.lacks_compiler:
            return "needs a C++ compiler, and none is found; install g++, or set it false"
        return None

    def lacks(self, *packages: str) -> bool:
        """Return whether the run is to be on this machine and none of these packages is installed."""
        return self.here and not any(importlib.util.find_spec(package) for package in packages)


def default_attention(family: Family, dtype: str, capability: tuple[int, int] | None) -> str:
    """Return the attention implementation of a family where no recipe sets one: the first of `usable_attention`."""
    return usable_attention(family, dtype, capability)[0]


def usable_attention(family: Family, dtype: str, capability: tuple[int, int] | None) -> list[str]:
    """Return the attention implementations of a family that compute fast on a device, in the order of preference.

    Args:
        family: of the backbone.
        dtype: precision of the forward pass: bfloat16, float16 or float32.
        capability: compute capability of the GPU; None on a CPU.
    """
    slow = set() if _is_ampere(capability) else {"flex_attention"}
    usable = [name for name in family.attention if not attention_problem(name, dtype, capability)]
    return [name for name in usable if name not in slow]


def attention_problem(name: str, dtype: str, capability: tuple[int, int] | None, here: bool = True) -> str | None:
    """Return why a device cannot attend with an implementation, and what to do; None: it can.

    Args:
        name: of the implementation, a key of `model.attention.KERNELS`.
        dtype: precision of the forward pass: bfloat16, float16 or float32.
        capability: compute capability of the GPU; None on a CPU.
        here: whether this machine's torch is to run it.
    """
    if name in ("varlen", "flash_attention_2") and not _is_ampere(capability):
        return "needs a GPU of compute capability 8.0 (Ampere) or later; leave it out"
    if name in ("varlen", "flash_attention_2") and dtype == "float32":
        return "computes in bfloat16 and float16 only; set model.dtype, or leave it out"
    if name == "varlen" and here and not HAS_VARLEN:
        return "needs torch 2.11 or later; leave it out, or upgrade torch"
    return None


def _is_ampere(capability: tuple[int, int] | None) -> bool:
    """Return whether a GPU is Ampere (compute capability 8.0) or newer; None is a CPU."""
    return capability is not None and capability >= (8, 0)
