"""A classifier in, the same with LoRA adapters out; and PiSSA adapters as ordinary ones of the untouched backbone."""

import logging
import math
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rewardmodel.config.schema import ModelConfig
from rewardmodel.errors import InputError
from rewardmodel.model.families import HEADS, OTHER_SENSES, family
from rewardmodel.model.heads import head_names

logger = logging.getLogger(__name__)


def add_lora(model: PreTrainedModel, config: ModelConfig) -> PeftModel:
    """Return the model with trainable float32 LoRA adapters and head, or the head alone, everything else frozen.

    Raises:
        InputError: PEFT refuses the rank or the layers.
    """
    lora = _head_alone(model) if config.freeze_backbone else _settings(model, config)
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model.lora_r, model.lora_target_modules: PEFT refuses them: {reason}") from error
    if lora.init_lora_weights == "pissa":
        adapted.pissa_start = {name: weight.clone() for name, weight in get_peft_model_state_dict(adapted).items()}
    return adapted


def _head_alone(model: PreTrainedModel) -> LoraConfig:
    return LoraConfig(task_type="SEQ_CLS", target_modules=DUMMY_TARGET_MODULES, modules_to_save=head_names(model))


def _settings(model: PreTrainedModel, config: ModelConfig) -> LoraConfig:
    layers = model.config.get_text_config().num_hidden_layers
    backbone = getattr(model, model.base_model_prefix)
    linear = {name: part for name, part in backbone.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)}
    barred = {part for name in linear for part in name.split(".")} & {*HEADS, *OTHER_SENSES}
    return LoraConfig(
        task_type="SEQ_CLS",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or _lora_targets(model, [*linear], barred),
        exclude_modules=rf"(.*\.)?({'|'.join(sorted(barred))})(\..*)?" if barred else None,
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in linear.values()),
        layers_to_transform=list(range(config.lora_first_layer, layers)) if config.lora_first_layer else None,
        init_lora_weights="pissa" if config.lora_init == "pissa" else True,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=head_names(model),
    )


def subtract_start(folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Rewrite a saved PiSSA adapter as B A - B0 A0 = [B, -B0] [A; A0].

    PEFT's own conversion leaves out the modules to save, and so the head.
    """
    weights = load_file(folder / "adapter_model.safetensors")
    for name in weights:
        if ".lora_A." in name:
            weights[name] = torch.cat([weights[name], start[name].to("cpu")], dim=0)
        elif ".lora_B." in name:
            weights[name] = torch.cat([weights[name], -start[name].to("cpu")], dim=1)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    lora = LoraConfig.from_pretrained(folder)
    lora.init_lora_weights = True
    lora.lora_alpha *= math.sqrt(2) if lora.use_rslora else 2
    lora.r *= 2
    lora.save_pretrained(folder)


def _lora_targets(model: PreTrainedModel, linear: list[str], barred: set[str]) -> list[str]:
    """Return the layers that get LoRA where a recipe names none: the family's, or all linear ones but those barred."""
    targets = family(model.config.model_type).lora_targets
    if targets:
        return list(targets)
    found = sorted({name.rpartition(".")[2] for name in linear if not barred & {*name.split(".")}})
    logger.info("LoRA on: %s", ", ".join(found))
    return found
