"""Backbone families: a Hugging Face `model_type` in, what differs between families out.

A family that is not in the table still works through `GENERIC`, as long as transformers can load it as a
sequence classifier.
"""

import logging
from dataclasses import dataclass
from typing import Any

from rewardmodel.errors import InputError

logger = logging.getLogger(__name__)

ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flex_attention", "eager")

HEADS = ("score", "classifier", "pooler", "pre_classifier", "head", "lm_head")
"""Names under which transformers keeps classification heads: never quantised, never LoRA targets."""

OTHER_SENSES = ("vision_tower", "multi_modal_projector", "audio_tower")
"""Names under which transformers keeps what reads images and sounds: never LoRA targets."""

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
"""Families whose positions are counted from the padding id on, so that as many fewer are left."""


@dataclass(frozen=True)
class Family:
    """What rewardmodel must know about one family.

    Attributes:
        lora_targets: linear layers that get LoRA by default; empty: every linear layer outside the head.
        attention: implementations that the family's mathematics allows, the preferred first.
        float16: whether activations stay within float16's range; if not, such hardware computes in float32.
        float32_weights: whether frozen weights are float32 too, where they are not quantised, and autocast computes.
    """

    lora_targets: tuple[str, ...] = ATTENTION_AND_MLP
    attention: tuple[str, ...] = IMPLEMENTATIONS
    float16: bool = True
    float32_weights: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(float16=False),
    "qwen3": Family(),
    "phi3": Family(lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), float16=False),
    # Gemma 2 caps its attention logits, which torch's fused attention cannot do.
    "gemma2": Family(attention=("eager", "flash_attention_2", "flex_attention"), float16=False),
    "gemma3": Family(float16=False),
    "gemma3_text": Family(float16=False),
    # transformers computes DeBERTa's attention in one way, and bfloat16 weights are known to stall it.
    "deberta-v2": Family(
        lora_targets=("query_proj", "key_proj", "value_proj", "dense"),
        attention=("eager",),
        float16=False,
        float32_weights=True,
    ),
    "roberta": Family(lora_targets=("query", "key", "value", "dense")),
    "distilbert": Family(lora_targets=("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")),
    "modernbert": Family(lora_targets=("Wqkv", "Wo", "Wi"), float16=False),
}
"""Families with a test each, by `model_type`."""

GENERIC = Family(lora_targets=(), attention=("eager", "sdpa", "flash_attention_2", "flex_attention"), float16=False)
"""Careful rules for any other family."""


def family(model_type: str) -> Family:
    """Return the family's entry, or the generic one."""
    return FAMILIES.get(model_type, GENERIC)


def lowest_layers(config: Any, count: int | None) -> Any:
    """Return a backbone's configuration, of transformers, with so many layers from below; none: as it is.

    Raises:
        InputError: it has fewer.
    """
    text = config.get_text_config()
    if count is None:
        return config
    if not 1 <= count <= text.num_hidden_layers:
        raise InputError(
            f"model.num_hidden_layers: {count}, but the backbone has {text.num_hidden_layers}; set as many"
        )
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    text.num_hidden_layers = count
    return config


def check_length(config: Any, max_length: int) -> None:
    """Raise if sequences of so many tokens have no position embeddings in a backbone; warn if they are untried.

    Rotary positions go on beyond what a backbone was trained on; embedded ones end. Relative ones have no end.

    Args:
        config: the backbone's, of transformers.
        max_length: the recipe's `prompt.max_length`.

    Raises:
        InputError: they have none.
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
    logger.warning("prompt.max_length: %s tokens; the backbone was made for %s", f"{max_length:,}", f"{most:,}")


def stored_bits(backbone: Any) -> int | None:
    """Return in how many bits a backbone of this configuration is stored, 4 or 8; none: it is not quantised.

    Raises:
        InputError: it is stored quantised by something else than bitsandbytes.
    """
    stored = getattr(backbone, "quantization_config", None)
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
