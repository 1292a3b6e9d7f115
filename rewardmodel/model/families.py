"""A Hugging Face `model_type` -> what differs between families of backbones.

Families that are not in the table get the rules of `GENERIC`; they work if transformers has a sequence classifier.
"""

import copy
import logging
from dataclasses import dataclass
from typing import Any

from rewardmodel.errors import InputError

logger = logging.getLogger(__name__)

ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IMPLEMENTATIONS = ("varlen", "sdpa", "flash_attention_2", "flex_attention", "eager")

HEADS = ("score", "classifier", "pooler", "pre_classifier", "head", "lm_head")
"""Names of the modules of classification heads in transformers: never quantised, never LoRA targets."""

OTHER_MODALITIES = ("vision_tower", "multi_modal_projector", "audio_tower")
"""Names of the modules that read images and sound in transformers: never LoRA targets."""

AFTER_PADDING = (
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "data2vec-text",
    "longformer",
    "luke",
    "mpnet",
    "xmod",
)
"""Families whose position ids start after the padding id, so that fewer positions are left for tokens."""


@dataclass(frozen=True)
class Family:
    """What rewardmodel has to know about a family.

    Attributes:
        lora_targets: linear layers that get LoRA by default; empty: all linear layers outside the head.
        attention: attention implementations that compute the family correctly; the default is the first of them that
            works on the device (`model.configuration.default_attention`).
        float16: whether activations stay in the range of float16; if not, hardware without bfloat16 uses float32.
        float32_weights: whether frozen weights that are not quantised stay in float32 under autocast.
    """

    lora_targets: tuple[str, ...] = ATTENTION_AND_MLP
    attention: tuple[str, ...] = IMPLEMENTATIONS
    float16: bool = True
    float32_weights: bool = False


LIGER_FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), "silu"),
    **dict.fromkeys(("gemma2", "gemma3_text"), "gelu_pytorch_tanh"),
}
"""Families whose logits and gradients by liger's kernels were compared with those without -> the activation of its
gated MLP, which it does not check."""

FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(float16=False),
    "qwen3": Family(),
    "phi3": Family(lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), float16=False),
    # Gemma 2 soft-caps its attention logits, which torch's fused attention cannot do.
    "gemma2": Family(attention=("flex_attention", "eager", "flash_attention_2"), float16=False),
    "gemma3": Family(float16=False),
    "gemma3_text": Family(float16=False),
    # transformers has only one implementation of DeBERTa's attention, and bfloat16 weights stall its training.
    "deberta-v2": Family(
        lora_targets=("query_proj", "key_proj", "value_proj", "dense"),
        attention=("eager",),
        float16=False,
        float32_weights=True,
    ),
    "bert": Family(lora_targets=("query", "key", "value", "dense")),
    "roberta": Family(lora_targets=("query", "key", "value", "dense")),
    "distilbert": Family(lora_targets=("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")),
    "modernbert": Family(lora_targets=("Wqkv", "Wo", "Wi"), float16=False),
}
"""Families that the tests cover, by `model_type`."""

GENERIC = Family(lora_targets=(), attention=("eager", *IMPLEMENTATIONS[:-1]), float16=False)
"""Conservative rules for all other families."""


def find_family(model_type: str) -> Family:
    """Return the family of a `model_type`, or `GENERIC`."""
    return FAMILIES.get(model_type, GENERIC)


def lowest_layers(config: Any, count: int | None) -> Any:
    """Return a copy of a transformers configuration with the lowest `count` layers; None: with all layers.

    Raises:
        InputError: the backbone has fewer layers.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if count is None:
        return config
    if not 1 <= count <= text.num_hidden_layers:
        raise InputError(
            f"model.num_hidden_layers: {count}, but the backbone has {text.num_hidden_layers}; set at most that"
        )
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    text.num_hidden_layers = count
    return config


def check_length(config: Any, max_length: int) -> None:
    """Raise if a backbone has no positions for sequences of `max_length` tokens; warn if it was trained on fewer.

    Rotary and relative positions work beyond the length that a backbone was trained on; learned position embeddings
    do not.

    Args:
        config: transformers configuration of the backbone.
        max_length: the recipe's `prompt.max_length`.

    Raises:
        InputError: more tokens than there are learned position embeddings.
    """
    config = config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is None or not getattr(config, "position_biased_input", True):
        return
    if config.model_type in AFTER_PADDING:
        most -= config.pad_token_id + 1
    if max_length <= most:
        return
    if not getattr(config, "rope_parameters", None):
        raise InputError(
            f"prompt.max_length: {max_length:,}, but a backbone of type '{config.model_type}' has positions for "
            f"{most:,} tokens; set at most that"
        )
    logger.warning(
        "prompt.max_length: %s tokens; the backbone was trained on at most %s", f"{max_length:,}", f"{most:,}"
    )


def stored_bits(config: Any) -> int | None:
    """Return 4 or 8 if a backbone's weight files are quantised by bitsandbytes; None: they are not quantised.

    Raises:
        InputError: they are quantised by another library.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    bits = [bits for bits in (4, 8) if stored.get(f"load_in_{bits}bit") or stored.get(f"_load_in_{bits}bit")]
    if not bits:
        method = stored.get("quant_method")
        raise InputError(
            f"model.model_name_or_path: the backbone is stored quantised by {method}; give one that is not quantised, "
            "or by bitsandbytes"
        )
    return bits[0]
