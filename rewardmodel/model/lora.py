"""A classifier -> the same with LoRA adapters."""

import logging

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rewardmodel.config.schema import ModelConfig
from rewardmodel.errors import InputError
from rewardmodel.model.families import HEADS, OTHER_MODALITIES, find_family
from rewardmodel.model.heads import head_names
from rewardmodel.progress import quiet

logger = logging.getLogger(__name__)


@quiet()
def add_lora(model: PreTrainedModel, config: ModelConfig) -> PeftModel:
    """Return the model with trainable float32 LoRA adapters and head, or the head only; everything else is frozen.

    Raises:
        InputError: PEFT refuses the rank or the layers.
    """
    lora = _head_only_config(model) if config.freeze_backbone else _lora_config(model, config)
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"model.lora_r, model.lora_target_modules: PEFT refuses them ({reason}); give a rank of at least 1 and "
            "names of the backbone's linear layers"
        ) from error


def _head_only_config(model: PreTrainedModel) -> LoraConfig:
    """Return a configuration without LoRA: PEFT freezes the backbone, and trains and saves the head."""
    return LoraConfig(task_type="SEQ_CLS", target_modules=DUMMY_TARGET_MODULES, modules_to_save=head_names(model))


def _lora_config(model: PreTrainedModel, config: ModelConfig) -> LoraConfig:
    """Return PEFT's configuration of the recipe's LoRA; the head, and parts for images and sound, get none."""
    layers = model.config.get_text_config().num_hidden_layers
    backbone = getattr(model, model.base_model_prefix)
    linear = {name: part for name, part in backbone.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)}
    excluded = {part for name in linear for part in name.split(".")} & {*HEADS, *OTHER_MODALITIES}
    targets = config.lora_target_modules
    if not targets or targets == "all-linear":
        targets = _lora_targets(model, [*linear], excluded, everything=targets == "all-linear")
    return LoraConfig(
        task_type="SEQ_CLS",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=rf"(.*\.)?({'|'.join(sorted(excluded))})(\..*)?" if excluded else None,
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in linear.values()),
        layers_to_transform=list(range(config.lora_first_layer, layers)) if config.lora_first_layer else None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=head_names(model),
    )


def _lora_targets(model: PreTrainedModel, linear: list[str], excluded: set[str], everything: bool) -> list[str]:
    """Return the layers that get LoRA by default: the family's, or else all linear ones that are not excluded.

    Args:
        model: the classifier.
        linear: names of the backbone's linear layers.
        excluded: parts of names that get none.
        everything: take all linear layers of any family.
    """
    known = find_family(model.config.model_type).lora_targets
    if known and not everything:
        return list(known)
    targets = sorted({name.rpartition(".")[2] for name in linear if not excluded & {*name.split(".")}})
    logger.info("LoRA on: %s", ", ".join(targets))
    return targets
