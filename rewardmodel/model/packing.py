"""Which classifiers take packed rows, and how their attention is switched to them."""

import logging
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
)

from rewardmodel.model.attention import KERNELS, PREFIX, Packing, packed
from rewardmodel.model.batching import pack
from rewardmodel.model.families import FAMILIES
from rewardmodel.model.heads import PooledHead

logger = logging.getLogger(__name__)

PACKABLE = {"full_attention", "sliding_attention"}
"""Kinds of layers through which sequences of one row pass without seeing each other."""


def may_pack(model: Any) -> bool:
    """Return whether a model's head, attention and layers are of the kinds that packed rows go through."""
    config = model.config.get_text_config()
    causal = getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)
    kinds = set(getattr(config, "layer_types", None) or [])
    return isinstance(model, PooledHead) and config._attn_implementation in KERNELS and causal and kinds <= PACKABLE


def pack_attention(model: Any) -> None:
    """Let the model attend to packed rows, if its family is known to, or is seen to do so here."""
    if not may_pack(model):
        return
    config = model.config.get_text_config()
    plain = config._attn_implementation
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
