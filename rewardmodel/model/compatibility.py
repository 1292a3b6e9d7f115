"""A planned run -> the settings that cannot work together, with reason and fix, before any weight is loaded."""

from collections.abc import Callable
from typing import NamedTuple

from rewardmodel.config.schema import ModelConfig, ObjectiveConfig
from rewardmodel.errors import InputError
from rewardmodel.model.configuration import Configuration
from rewardmodel.model.families import FAMILIES, find_family
from rewardmodel.objectives import find_objective


class Check(NamedTuple):
    """One combination of settings that cannot work.

    Attributes:
        wrong: whether a configuration has it.
        message: key, reason and fix in one line; {s} is the configuration.
        training: whether it matters to training only.
    """

    wrong: Callable[[Configuration], bool]
    message: str
    training: bool = True


def incompatibilities(configuration: Configuration) -> list[str]:
    """Return the settings that cannot work together, one line each with reason and fix; empty if all can."""
    trains = configuration.trainer is not None
    checks = [check for check in CHECKS if trains or not check.training]
    return [check.message.format(s=configuration) for check in checks if check.wrong(configuration)]


def refuse(configuration: Configuration) -> None:
    """Raise if some settings cannot work together.

    Raises:
        InputError: the first of `incompatibilities`, and how many more there are.
    """
    found = incompatibilities(configuration)
    if found:
        more = f" (and {len(found) - 1} more; `rewardmodel doctor` lists all)" if len(found) > 1 else ""
        raise InputError(found[0] + more)


def check_head(model: ModelConfig, config: ObjectiveConfig) -> None:
    """Check the head that a recipe describes against its objective.

    Raises:
        InputError: the tie parameter is to depend on both responses, and the objective has none to learn; or the head
            is to start from the answers A, B and tie, and does not read the token before them in a joint sequence.
    """
    objective = find_objective(config)
    if model.pair_ties and not (objective.head.tie and objective.learns_ties):
        raise InputError(f"model.pair_ties: {config.name} has no tie parameter to learn; leave it out")
    if model.head_init == "answer" and objective.encoding != "joint":
        raise InputError(
            f"model.head_init: {config.name} reads one response at a time, to which A, B and tie are no answers; set "
            "zero or fitted, or objective.name: cross_entropy"
        )
    if model.head_init == "answer" and model.pooling == "responses":
        raise InputError(
            "model.head_init: the head of model.pooling: responses does not read the token before the answer; set "
            "pooling to last or last_and_responses"
        )


CHECKS = (
    Check(
        lambda s: len(s.quantisations) > 1,
        "model: load_in_4bit, load_in_8bit and load_in_fp8 exclude each other; set one of them only",
        training=False,
    ),
    Check(
        lambda s: s.model.load_in_fp8 and s.stored_bits is not None,
        "model.load_in_fp8: the backbone is stored in {s.stored_bits} bits; leave it out, or give an unquantised "
        "backbone",
        training=False,
    ),
    Check(
        lambda s: s.model.load_in_fp8 and s.lacks_fp8,
        "model.load_in_fp8: a GPU has fp8 units from compute capability 8.9 (Ada, Hopper) on; set load_in_4bit or "
        "load_in_8bit instead, or leave it out",
        training=False,
    ),
    Check(
        lambda s: s.model.load_in_fp8 and s.model.use_dora,
        "model.use_dora: PEFT takes the norms of weights from bytes that stand for fp8 numbers; set it false, or "
        "load_in_4bit",
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
        "model.keep_head: freeze_backbone fits a new last layer of the head, whatever was there; leave it out",
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
        lambda s: s.model.head_init == "answer" and s.model.keep_head,
        "model.head_init: keep_head starts from the head that is there; leave it out",
    ),
    Check(
        lambda s: s.model.head_init == "answer" and s.model.num_hidden_layers is not None,
        "model.head_init: the language model answers from its last layer; leave model.num_hidden_layers out, or set "
        "zero or fitted",
    ),
    Check(
        lambda s: s.model.head_init != "zero" and s.fsdp,
        "model.head_init: FSDP has no process that holds the backbone whole before training; launch with "
        "recipes/accelerate/ddp.yaml, or leave it out",
    ),
    Check(
        lambda s: s.dtype == "bfloat16" and s.pre_ampere,
        "model.dtype: bfloat16 is emulated below compute capability 8.0 (Turing, like the T4), many times slower; set "
        "auto, float16 or float32",
        training=False,
    ),
    Check(
        lambda s: s.dtype == "float16" and s.model_type in FAMILIES and not find_family(s.model_type).float16,
        "model.dtype: activations of {s.model_type} leave float16's range and become infinite; set auto, bfloat16 or "
        "float32",
        training=False,
    ),
    Check(
        lambda s: s.attention not in find_family(s.model_type).attention,
        "model.attn_implementation: '{s.attention}' is not known to compute {s.model_type}; use one of: "
        "{s.known_attention}",
        training=False,
    ),
    Check(
        lambda s: s.attention_problem is not None,
        "model.attn_implementation: {s.attention} {s.attention_problem}",
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
        lambda s: bool((s.trainer_key("gradient_checkpointing_kwargs") or {}).get("use_reentrant")),
        "trainer.gradient_checkpointing_kwargs: re-entrant checkpointing gives no gradient to layers whose input has "
        "none, and adapters stay as they are; set use_reentrant false, or leave it out",
    ),
    Check(
        lambda s: bool(s.trainer_key("torch_compile")) and s.model.freeze_backbone,
        "trainer.torch_compile: freeze_backbone reads each battle once, which takes less than compiling; leave it out",
    ),
    Check(
        lambda s: bool(s.trainer_key("torch_compile")) and s.fsdp,
        "trainer.torch_compile: FSDP gathers weights between the blocks' operations, which was not tried compiled; "
        "leave it out, or launch with recipes/accelerate/ddp.yaml",
    ),
    Check(
        lambda s: bool(s.trainer_key("torch_compile")) and s.model.load_in_fp8,
        "trainer.torch_compile: torch 2.13 fails to trace layers of model.load_in_fp8; leave out one of them",
    ),
    Check(
        lambda s: bool(s.trainer_key("torch_compile")) and s.lacks_compiler,
        "trainer.torch_compile: needs a C++ compiler, and none is found; install gcc, or leave it out",
    ),
    Check(
        lambda s: s.attention == "flex_attention" and s.lacks_compiler,
        "model.attn_implementation: flex_attention needs a C compiler, and none is found; install gcc, or set eager",
        training=False,
    ),
    Check(
        lambda s: str(s.trainer_key("optim")) in ("lomo", "adalomo"),
        "trainer.optim: lomo and adalomo update weights in every backward pass, of which a step has several; "
        "set another, like adamw_torch_fused",
    ),
    Check(
        lambda s: bool(s.model.use_liger_kernel and s.trainer_key("torch_compile")),
        "model.use_liger_kernel: trainer.torch_compile generates kernels for the same operations; leave one out",
    ),
    Check(
        lambda s: bool(s.model.use_liger_kernel and s.liger_problem),
        "model.use_liger_kernel: {s.liger_problem}",
        training=False,
    ),
    Check(
        lambda s: bool(s.trainer_key("fsdp") or s.trainer_key("fsdp_config") or s.trainer_key("deepspeed")),
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
        lambda s: s.fsdp and s.model.load_in_fp8,
        "model.load_in_fp8: FSDP spreads floating-point weights only, and these are bytes with a scale per row; set "
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
        lambda s: s.fsdp and any(kind in str(s.trainer_key("optim")) for kind in ("8bit", "paged", "bnb")),
        "trainer.optim: bitsandbytes' optimisers know no weights spread by FSDP; set adamw_torch, or launch with "
        "recipes/accelerate/ddp.yaml",
    ),
)
"""All combinations that are known not to work."""
