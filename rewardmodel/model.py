"""A backbone folder in, a classifier with LoRA and a float32 head out; saving, and reloading with checks."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations import is_fsdp_enabled

from rewardmodel.attention import KERNELS, PREFIX, Packing, packed
from rewardmodel.backbone import FAMILIES, HEADS, family
from rewardmodel.batches import pack
from rewardmodel.battles import OUTCOMES
from rewardmodel.config import ModelConfig
from rewardmodel.errors import InputError
from rewardmodel.files import atomic_path
from rewardmodel.head import classifier_class
from rewardmodel.objective import Head
from rewardmodel.placement import placement
from rewardmodel.runs import BACKBONE
from rewardmodel.saved import ADAPTER, backbone_folder, check_head, is_adapter, read_about
from rewardmodel.weights import fingerprint, resolve

logger = logging.getLogger(__name__)

PACKABLE = {"full_attention", "sliding_attention"}
"""Kinds of layers through which sequences of one row pass without seeing each other."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder, with a padding token and no length limit of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def load_classifier(
    config: ModelConfig, folder: Path, head: Head, weights: torch.dtype | None = None
) -> PreTrainedModel:
    """Return the backbone of a folder under a float32 head, quantised or not, on its device.

    Its weights are loaded in the precision to compute in, or in that of `weights`.

    Raises:
        InputError: a device, precision or attention that is not to be had here.
    """
    if config.load_in_4bit and config.load_in_8bit:
        raise InputError("model: load_in_4bit and load_in_8bit exclude each other; set one of them to false")
    if (config.load_in_4bit or config.load_in_8bit) and not config.use_peft:
        raise InputError("model.use_peft: a quantised backbone cannot train itself; leave it true, or quantise nothing")
    model_config = AutoConfig.from_pretrained(folder)
    rules = family(model_config.model_type)
    device, dtype = placement(config, folder)
    dtype = weights or dtype
    attention = config.attn_implementation or rules.attention[0]
    if attention not in rules.attention:
        raise InputError(
            f"model.attn_implementation: '{attention}' is not known to compute {model_config.model_type}; "
            f"use one of: {', '.join(rules.attention)}"
        )
    quantised = (config.load_in_4bit or config.load_in_8bit) and not getattr(model_config, "quantization_config", None)
    model = classifier_class(model_config, config.pooling, head).from_pretrained(
        folder,
        **label_names(head),
        dtype=dtype if config.use_peft else torch.float32,
        attn_implementation=attention,
        device_map={"": device},
        **({"quantization_config": quantization(config, dtype)} if quantised else {}),
    )
    for module in model.modules():
        # On CPUs with bfloat16, bitsandbytes repacks a weight when it first evaluates, and then has no gradient for it.
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    for name in head_names(model):
        module = getattr(model, name).float()
        if any("bitsandbytes" in type(part).__module__ for part in module.modules()):
            raise RuntimeError(f"the head '{name}' was quantised; rewardmodel.backbone.HEADS must name it")
    pack_attention(model)
    logger.info("%s on %s: %s, %s attention, %s", model_config.model_type, device, dtype, attention, _bits(config))
    return model


def label_names(head: Head) -> dict[str, dict]:
    """Return the names of a head's outputs in the words of transformers' configurations."""
    names = dict(enumerate(OUTCOMES if head.num_labels == 3 else ["reward"]))
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def pack_attention(model: PreTrainedModel) -> None:
    """Let the model attend to packed rows, if its family is known to, or is seen to do so here."""
    config = model.config.get_text_config()
    plain = config._attn_implementation
    causal = getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)
    if plain not in KERNELS or not causal or not set(getattr(config, "layer_types", None) or []) <= PACKABLE:
        return
    config._attn_implementation = packed(plain)
    if config.model_type not in FAMILIES and not _packs(model):
        config._attn_implementation = plain
        logger.warning("%s cannot compute packed rows: its batches are padded", config.model_type)


def is_packed(model: Any) -> bool:
    """Return whether a model, wrapped or not, takes packed rows."""
    return model.config.get_text_config()._attn_implementation.startswith(PREFIX)


@torch.no_grad()
def _packs(model: PreTrainedModel) -> bool:
    """Return whether three short sequences, two with a beginning in common, come out of one row as of a row each."""
    decoder = getattr(model, model.base_model_prefix)

    def row(ids: list[int], branches: list[int]) -> dict[str, Any]:
        return {"input_ids": ids, "segment_ids": [0] * len(ids), "branches": branches, "length": len(ids)}

    start, first, second, other = (list(ids) for ids in (range(3, 9), range(9, 15), range(20, 28), range(8, 29)))
    whole = [row(start + first + second, [len(start), len(first), len(second)]), row(other, [0, len(other)])]
    single = [row(ids, [0, len(ids)]) for ids in (start + first, start + second, other)]

    def states(rows: list[dict[str, Any]]) -> torch.Tensor:
        batch = pack(rows)
        ids, positions = (batch[name].to(model.device) for name in ("input_ids", "position_ids"))
        return decoder(ids, position_ids=positions, packing=Packing(batch["layout"]), use_cache=False)[0][0].float()

    try:
        together, (one, two, three) = states(whole), (states([row]) for row in single)
        alone = torch.cat([one, two[len(start) :], three])
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
        return False
    return bool((together - alone).abs().max() <= 0.05 * alone.abs().max())


def quantization(config: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return bitsandbytes settings that leave every head alone."""
    return BitsAndBytesConfig(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if is_fsdp_enabled() else None,  # FSDP shards weights of one dtype only
        llm_int8_skip_modules=list(HEADS),
    )


def head_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules with weights that stand on the backbone: the head."""
    children = model.named_children()
    return [
        name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def add_lora(model: PreTrainedModel, config: ModelConfig) -> PeftModel:
    """Return the model with trainable float32 LoRA adapters and head, everything else frozen.

    Raises:
        InputError: PiSSA on a quantised backbone, or no layer left for LoRA.
    """
    quantised = config.load_in_4bit or config.load_in_8bit
    if config.lora_init == "pissa" and quantised:
        raise InputError(
            "model.lora_init: pissa splits the backbone's own weights; set load_in_4bit and load_in_8bit false"
        )
    if config.lora_init == "pissa" and config.use_dora:
        raise InputError("model.lora_init: pissa and use_dora both rewrite the backbone's weights; choose one of them")
    if config.lora_init == "pissa" and model.dtype != torch.float32:
        raise InputError("model.lora_init: pissa is exact on a float32 backbone only; set model.dtype float32")
    layers = model.config.get_text_config().num_hidden_layers
    if config.lora_first_layer >= layers:
        raise InputError(
            f"model.lora_first_layer: {config.lora_first_layer}, but the backbone has layers 0 to {layers - 1}"
        )
    if config.lora_r < 1:
        raise InputError(f"model.lora_r: {config.lora_r}; the rank is at least 1")
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or _lora_targets(model),
        layers_to_transform=list(range(config.lora_first_layer, layers)) if config.lora_first_layer else None,
        init_lora_weights="pissa" if config.lora_init == "pissa" else True,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=head_names(model),
    )
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model.lora_r, model.lora_target_modules: PEFT refuses them: {reason}") from error
    if config.lora_init == "pissa":
        adapted.pissa_start = {name: weight.clone() for name, weight in get_peft_model_state_dict(adapted).items()}
    return adapted


def build_model(config: ModelConfig, head: Head, seed: int) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a new model to train, its adapters drawn with `seed`, and the tokenizer.

    Raises:
        InputError: as `resolve`, `load_classifier` and `add_lora`.
    """
    folder = resolve(config.model_name_or_path, config.model_revision)
    set_seed(seed)
    model: Any = load_classifier(config, folder, head)
    if config.use_peft:
        model = add_lora(model, config)
        if folder.parent.name == "snapshots":  # of the hub's cache: PEFT shall find the backbone on other machines too
            model.peft_config["default"].base_model_name_or_path = config.model_name_or_path
            model.peft_config["default"].revision = folder.name
        count, total = model.get_nb_trainable_parameters()
        logger.info("LoRA r%d: %s of %s weights train", config.lora_r, f"{count:,}", f"{total:,}")
    return model, load_tokenizer(folder)


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    folder: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write adapter and head (or the full model), tokenizer and the backbone's fingerprint, whole or not at all.

    `state` has the weights of a model that is spread over processes. A PiSSA adapter holds a part of the backbone; it
    is saved as its difference from the start of training, an ordinary LoRA of twice the rank on the untouched backbone.
    """
    backbone = resolve(config.model_name_or_path, config.model_revision)
    about = {
        "model_name_or_path": config.model_name_or_path,
        "model_revision": config.model_revision,
        "fingerprint": fingerprint(backbone),
        "head": classifier(model).head._asdict(),
    }
    with atomic_path(folder) as partial:
        model.save_pretrained(partial, **({} if state is None else {"state_dict": state}))
        if config.use_peft and config.lora_init == "pissa":
            _subtract_start(partial, model.pissa_start)
        tokenizer.save_pretrained(partial)
        (partial / BACKBONE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def classifier(model: Any) -> Any:
    """Return the transformers model, out of PEFT's wrapper if it has one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _subtract_start(folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Rewrite a saved PiSSA adapter as B A - B0 A0 = [B, -B0] [A; A0].

    PEFT's own conversion leaves out the modules to save, and so the head.
    """
    weights = load_file(folder / ADAPTER)
    for name in weights:
        if ".lora_A." in name:
            weights[name] = torch.cat([weights[name], start[name].to("cpu")], dim=0)
        elif ".lora_B." in name:
            weights[name] = torch.cat([weights[name], -start[name].to("cpu")], dim=1)
    save_file(weights, folder / ADAPTER, metadata={"format": "pt"})
    lora = LoraConfig.from_pretrained(folder)
    lora.init_lora_weights = True
    lora.lora_alpha *= math.sqrt(2) if lora.use_rslora else 2
    lora.r *= 2
    lora.save_pretrained(folder)


def load_model(
    config: ModelConfig, folder: Path, weights: torch.dtype | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a saved model, ready to predict, and its tokenizer; `weights` as `load_classifier` has it.

    Raises:
        InputError: no saved model there, one without its head, or a backbone that is not the one it was trained on.
    """
    about = read_about(folder)
    classifier: Any = load_classifier(config, backbone_folder(config, folder), Head(**about["head"]), weights)
    if not is_adapter(folder):
        if "tie" in about:  # of a merged model, whose files have no place for it
            classifier.score.tie.data.fill_(about["tie"])
        return classifier.eval(), load_tokenizer(folder)
    check_head(folder, head_names(classifier))
    model = PeftModel.from_pretrained(classifier, folder)
    return model.eval(), load_tokenizer(folder)


def _lora_targets(model: PreTrainedModel) -> list[str]:
    targets = family(model.config.model_type).lora_targets
    if targets:
        return list(targets)
    backbone = getattr(model, model.base_model_prefix)
    linear = {
        name.rpartition(".")[2] for name, module in backbone.named_modules() if isinstance(module, torch.nn.Linear)
    }
    logger.info("%s is not in the table of families; LoRA on: %s", model.config.model_type, ", ".join(sorted(linear)))
    return sorted(linear - set(HEADS))


def _bits(config: ModelConfig) -> str:
    if config.load_in_4bit:
        return f"4-bit {config.bnb_4bit_quant_type}"
    return "8-bit" if config.load_in_8bit else "not quantised"
