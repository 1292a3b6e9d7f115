"""A classifier -> whether it computes packed rows, and its attention switched to them."""

import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from rewardmodel.model.attention import KERNELS, PACKED_PREFIX, Packing, packed_name
from rewardmodel.model.batching import pack
from rewardmodel.model.families import FAMILIES
from rewardmodel.model.heads import PooledHead

logger = logging.getLogger(__name__)

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
"""Types of layers that can keep the sequences of one row apart."""


def may_pack(model: Any) -> bool:
    """Return whether head, attention and layers of a classifier are of types that can compute packed rows."""
    config = model.config.get_text_config()
    causal = getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)
    layers = set(getattr(config, "layer_types", None) or [])
    attention = config._attn_implementation in KERNELS
    return isinstance(model, PooledHead) and attention and causal and layers <= PACKABLE_LAYERS


def pack_attention(model: Any) -> None:
    """Switch the model to attention over packed rows, if its family is known for it or passes the self-test."""
    if not may_pack(model):
        return
    config = model.config.get_text_config()
    plain = config._attn_implementation
    config._attn_implementation = packed_name(plain)
    if config.model_type not in FAMILIES and not _passes_self_test(model):
        config._attn_implementation = plain
        logger.warning("%s cannot compute packed rows: its batches are padded", config.model_type)


def is_packed(model: Any) -> bool:
    """Return whether a model, wrapped or not, takes packed rows."""
    return model.config.get_text_config()._attn_implementation.startswith(PACKED_PREFIX)


@torch.no_grad()
def _passes_self_test(model: PreTrainedModel) -> bool:
    """Self-test: does a packed forward pass reproduce the unpacked hidden states?

    Three short sequences, the first two with a shared beginning, are computed in one row and in a row each.
    """
    decoder = getattr(model, model.base_model_prefix)

    def row(ids: list[int], branches: list[int]) -> dict[str, Any]:
        return {"input_ids": ids, "segment_ids": [0] * len(ids), "branches": branches, "length": len(ids)}

    start, first, second, other = (list(ids) for ids in (range(3, 9), range(9, 15), range(20, 28), range(8, 29)))
    together = [row(start + first + second, [len(start), len(first), len(second)]), row(other, [0, len(other)])]
    alone = [row(ids, [0, len(ids)]) for ids in (start + first, start + second, other)]

    def hidden_states(rows: list[dict[str, Any]]) -> torch.Tensor:
        batch = pack(rows)
        ids, positions = (batch[name].to(model.device) for name in ("input_ids", "position_ids"))
        return decoder(ids, position_ids=positions, packing=Packing(batch["layout"]), use_cache=False)[0][0].float()

    try:
        found, (one, two, three) = hidden_states(together), (hidden_states([row]) for row in alone)
        expected = torch.cat([one, two[len(start) :], three])
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
        return False
    return bool((found - expected).abs().max() <= 0.05 * expected.abs().max())
