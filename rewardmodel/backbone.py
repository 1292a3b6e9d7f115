"""Backbone families: a Hugging Face `model_type` in, what differs between families out.

A family that is not in the table still works through `GENERIC`, as long as transformers can load it as a
sequence classifier.
"""

from dataclasses import dataclass

ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

HEADS = ("score", "classifier", "pooler", "pre_classifier", "head", "lm_head")
"""Names under which transformers keeps classification heads: never quantised, never LoRA targets."""


@dataclass(frozen=True)
class Family:
    """What rewardmodel must know about one family.

    Attributes:
        lora_targets: linear layers that get LoRA by default; empty: every linear layer outside the head.
        attention: implementations that the family's mathematics allows, the preferred first.
        float16: whether activations stay within float16's range; if not, such hardware computes in float32.
    """

    lora_targets: tuple[str, ...] = ATTENTION_AND_MLP
    attention: tuple[str, ...] = ("sdpa", "flash_attention_2", "flex_attention", "eager")
    float16: bool = True


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen3": Family(),
    # Gemma 2 caps its attention logits, which torch's fused attention cannot do.
    "gemma2": Family(attention=("eager", "flash_attention_2", "flex_attention"), float16=False),
    "gemma3_text": Family(float16=False),
}
"""Families with a test each, by `model_type`."""

GENERIC = Family(lora_targets=(), attention=("eager", "sdpa", "flash_attention_2", "flex_attention"), float16=False)
"""Careful rules for any other family."""


def family(model_type: str) -> Family:
    """Return the family's entry, or the generic one."""
    return FAMILIES.get(model_type, GENERIC)
