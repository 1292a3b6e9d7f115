"""What a run would be made of in, what of it cannot work together out: reason and mend, before any weight is loaded."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rewardmodel.config.schema import ModelConfig, ObjectiveConfig
from rewardmodel.distributed import Launch
from rewardmodel.errors import InputError
from rewardmodel.model.families import FAMILIES, family
from rewardmodel.objectives import find_objective


@dataclass(frozen=True)
class Setup:
    """What a run would be made of: all that the checks read.

    Attributes:
        model: of the recipe.
        model_type: of the backbone, Hugging Face's name.
        layers: of the backbone.
        device: kind of it: cpu or cuda.
        dtype: that the backbone computes in: bfloat16, float16 or float32.
        capability: compute capability of the GPU; none on a CPU.
        trainer: section of the recipe; none: the model is only to predict.
        launch: how it is spread over processes.
        here: whether the packages that count are this machine's.
        stored_bits: that the backbone is stored in; none: it is not quantised.
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

    @property
    def attention(self) -> str:
        """The implementation that will be used."""
        return self.model.attn_implementation or family(self.model_type).attention[0]

    @property
    def known_attention(self) -> str:
        """The implementations that the family's mathematics allows."""
        return ", ".join(family(self.model_type).attention)

    @property
    def quantised(self) -> bool:
        """Whether the backbone is quantised by bitsandbytes."""
        return self.four_bits or self.eight_bits

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
    def old(self) -> bool:
        """Whether the GPU is older than Ampere."""
        return self.capability is not None and self.capability < (8, 0)

    @property
    def pissa(self) -> bool:
        """Whether adapters start from the backbone's weights."""
        return self.model.lora_init == "pissa" and not self.model.freeze_backbone

    @property
    def last_layer(self) -> int:
        """Number of the last layer, from 0."""
        return self.layers - 1

    def said(self, key: str, default: Any = None) -> Any:
        """Return what the recipe's `trainer` says."""
        return (self.trainer or {}).get(key, default)

    def lacks(self, *packages: str) -> bool:
        """Return whether this machine is the one that counts, and has none of these packages."""
        return self.here and not any(importlib.util.find_spec(package) for package in packages)


class Check(NamedTuple):
    """One combination that cannot work.

    Attributes:
        wrong: whether a setup has it.
        message: key, reason and mend in one line; {s} is the setup.
        training: whether it only hinders training.
    """

    wrong: Callable[[Setup], bool]
    message: str
    training: bool = True


def incompatibilities(setup: Setup) -> list[str]:
    """Return what in a setup cannot work together, one line each with the mend; an empty list: nothing."""
    trains = setup.trainer is not None
    return [check.message.format(s=setup) for check in CHECKS if (trains or not check.training) and check.wrong(setup)]


def refuse(setup: Setup) -> None:
    """Raise if something in a setup cannot work together.

    Raises:
        InputError: the first of `incompatibilities`, and how many more there are.
    """
    found = incompatibilities(setup)
    if found:
        more = f" (and {len(found) - 1} more; `rewardmodel doctor` lists all)" if len(found) > 1 else ""
        raise InputError(found[0] + more)


def check_ties(model: ModelConfig, config: ObjectiveConfig) -> None:
    """Raise InputError if the tie parameter is to depend on both responses, and the objective learns none."""
    objective = find_objective(config)
    if model.pair_ties and not (objective.head.tie and objective.learns_ties):
        raise InputError(f"model.pair_ties: {config.name} has no tie parameter to learn; leave it out")


CHECKS = (
    Check(
        lambda s: s.model.load_in_4bit and s.model.load_in_8bit,
        "model: load_in_4bit and load_in_8bit exclude each other; set one of them to false",
        training=False,
    ),
    Check(
        lambda s: s.quantised and not s.model.use_peft,
        "model.use_peft: a quantised backbone cannot train itself; leave it true, or quantise nothing",
    ),
    Check(
        lambda s: s.model.freeze_backbone and not s.model.use_peft,
        "model.freeze_backbone: the backbone cannot stay as it is while use_peft is false, which trains all weights; "
        "set one of them",
    ),
    Check(
        lambda s: s.model.freeze_backbone and s.model.keep_head,
        "model.keep_head: freeze_backbone fits the last layer of the head anew, whatever it was; leave it out",
    ),
    Check(
        lambda s: s.model.freeze_backbone and s.fsdp,
        "model.freeze_backbone: FSDP spreads weights that train, and these do not; launch with "
        "recipes/accelerate/ddp.yaml",
    ),
    Check(
        lambda s: s.model.head_init == "fitted" and (s.model.keep_head or s.model.freeze_backbone),
        "model.head_init: keep_head starts from the head that is there, and freeze_backbone always fits one; leave it "
        "out",
    ),
    Check(
        lambda s: s.model.head_init == "fitted" and s.fsdp,
        "model.head_init: FSDP has no process that holds the backbone whole before training; launch with "
        "recipes/accelerate/ddp.yaml, or leave it out",
    ),
    Check(
        lambda s: s.dtype == "bfloat16" and s.old,
        "model.dtype: bfloat16 is emulated below compute capability 8.0 (Turing, like the T4), many times slower; set "
        "auto, float16 or float32",
        training=False,
    ),
    Check(
        lambda s: s.dtype == "float16" and s.model_type in FAMILIES and not family(s.model_type).float16,
        "model.dtype: activations of {s.model_type} leave float16's range and become infinite; set auto, bfloat16 or "
        "float32",
        training=False,
    ),
    Check(
        lambda s: s.attention not in family(s.model_type).attention,
        "model.attn_implementation: '{s.attention}' is not known to compute {s.model_type}; use one of: "
        "{s.known_attention}",
        training=False,
    ),
    Check(
        lambda s: s.attention == "flash_attention_2" and (s.device == "cpu" or s.old),
        "model.attn_implementation: flash_attention_2 needs a GPU of compute capability 8.0 (Ampere) or later; leave "
        "it out, or use one of: {s.known_attention}",
        training=False,
    ),
    Check(
        lambda s: s.attention == "flash_attention_2" and s.dtype == "float32",
        "model.attn_implementation: flash_attention_2 computes in bfloat16 and float16 only; set model.dtype, or leave "
        "it out",
        training=False,
    ),
    Check(
        lambda s: s.attention == "flash_attention_2" and s.lacks("flash_attn", "kernels"),
        "model.attn_implementation: flash_attention_2 needs the package flash-attn, which is not installed; install "
        "it, or leave it out",
        training=False,
    ),
    Check(
        lambda s: s.attention == "flex_attention" and s.device == "cpu",
        "model.attn_implementation: flex_attention has no backward pass on a CPU; use one of: {s.known_attention}",
    ),
    Check(
        lambda s: s.model.use_peft and not s.model.freeze_backbone and s.model.lora_r < 1,
        "model.lora_r: {s.model.lora_r}; the rank is at least 1",
    ),
    Check(
        lambda s: s.model.use_peft and not s.model.freeze_backbone and s.model.lora_first_layer >= s.layers,
        "model.lora_first_layer: {s.model.lora_first_layer}, but the backbone has layers 0 to {s.last_layer}",
    ),
    Check(
        lambda s: s.pissa and s.quantised,
        "model.lora_init: pissa splits the backbone's own weights; set load_in_4bit and load_in_8bit false, and give "
        "a backbone that is not stored quantised",
    ),
    Check(
        lambda s: s.pissa and s.model.use_dora,
        "model.lora_init: pissa and use_dora both rewrite the backbone's weights; choose one of them",
    ),
    Check(
        lambda s: s.pissa and not s.quantised and s.dtype != "float32",
        "model.lora_init: pissa is exact on a float32 backbone only; set model.dtype float32",
    ),
    Check(
        lambda s: bool((s.said("gradient_checkpointing_kwargs") or {}).get("use_reentrant")),
        "trainer.gradient_checkpointing_kwargs: re-entrant checkpointing gives no gradient to layers whose input has "
        "none, and adapters stay as they are; set use_reentrant false, or leave it out",
    ),
    Check(
        lambda s: bool(s.said("torch_compile")),
        "trainer.torch_compile: every packed micro-batch has another layout, which torch would compile anew; leave it "
        "out",
    ),
    Check(
        lambda s: bool(s.said("use_liger_kernel")) and (s.device == "cpu" or s.lacks("liger_kernel")),
        "trainer.use_liger_kernel: needs a GPU and the package liger-kernel; run: pip install 'rewardmodel[gpu]', or "
        "leave it out",
    ),
    Check(
        lambda s: bool(s.said("fsdp") or s.said("fsdp_config") or s.said("deepspeed")),
        "trainer: fsdp and deepspeed must be known before weights are loaded; give them to the launcher instead, like "
        "ACCELERATE_CONFIG=fsdp2 scripts/launch.sh",
    ),
    Check(
        lambda s: s.fsdp and s.launch.version < 2,
        "fsdp_version: FSDP 1 flattens weights of one dtype only, and a backbone and its float32 adapters have two; "
        "set fsdp_version 2 (recipes/accelerate/fsdp2.yaml)",
    ),
    Check(
        lambda s: s.fsdp and s.dtype == "float16",
        "model.dtype: accelerate lets FSDP cast every weight to float16, the float32 head too; set bfloat16 or "
        "float32, or launch with recipes/accelerate/ddp.yaml",
    ),
    Check(
        lambda s: s.fsdp and s.eight_bits,
        "model.load_in_8bit: FSDP takes the scales from bitsandbytes' 8-bit weights when it spreads them; set "
        "load_in_4bit, or launch with recipes/accelerate/ddp.yaml",
    ),
    Check(
        lambda s: s.fsdp and s.four_bits and s.launch.ram_efficient,
        "fsdp_cpu_ram_efficient_loading: accelerate sends no 4-bit weights around, and all processes but the first "
        "would keep a head of arbitrary numbers; set it false (recipes/accelerate/fsdp2_qlora.yaml)",
    ),
    Check(
        lambda s: s.fsdp and s.four_bits and s.model.use_dora,
        "model.use_dora: PEFT takes the norms of 4-bit weights out of bytes that FSDP has spread; set it false, or "
        "launch with recipes/accelerate/ddp.yaml",
    ),
    Check(
        lambda s: s.fsdp and s.launch.ram_efficient and s.model_type not in FAMILIES,
        "fsdp_cpu_ram_efficient_loading: whether {s.model_type} can compute packed rows is tried on its weights, which "
        "only the first process has; set it false",
    ),
    Check(
        lambda s: s.fsdp and any(kind in str(s.said("optim")) for kind in ("8bit", "paged", "bnb")),
        "trainer.optim: bitsandbytes' optimisers know no weights spread by FSDP; set adamw_torch, or launch with "
        "recipes/accelerate/ddp.yaml",
    ),
    Check(
        lambda s: s.launch.strategy == "deepspeed" and s.lacks("deepspeed"),
        "distributed_type: DEEPSPEED needs the package deepspeed, which is not installed; install it, or launch with "
        "recipes/accelerate/ddp.yaml or fsdp2.yaml",
    ),
    Check(
        lambda s: s.launch.strategy == "deepspeed" and s.launch.version == 3 and not s.quantised,
        "zero_stage: ZeRO 3 cuts weights up while transformers loads them, which a model that is loaded onto its "
        "device cannot be; set 2 (recipes/accelerate/deepspeed_zero2.yaml), or use fsdp2.yaml",
    ),
    Check(
        lambda s: s.launch.strategy == "deepspeed" and s.launch.version == 3 and s.quantised,
        "zero_stage: ZeRO 3 cannot spread weights that bitsandbytes packs; set 2, launch with recipes/accelerate/"
        "ddp.yaml, or with fsdp2_qlora.yaml and model.load_in_4bit",
    ),
)
"""All that is known not to work together."""
