"""A classifier -> whether it computes packed rows, and its attention switched to them."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from rewardmodel.model.attention import KERNELS, PACKED_PREFIX, kernel_of
from rewardmodel.model.batching import Batch, pack, to_device
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


def pack_attention(model: Any, attention: str) -> None:
    """Switch the model to attention over packed rows, if its family is known for it or passes the self-test.

    Args:
        model: a classifier.
        attention: a key of `model.attention.KERNELS`.
    """
    if not may_pack(model):
        return
    config = model.config.get_text_config()
    plain = config._attn_implementation
    config._attn_implementation = PACKED_PREFIX + attention
    if config.model_type not in FAMILIES and not _passes_self_test(model):
        config._attn_implementation = plain
        logger.warning("%s cannot compute packed rows: its batches are padded", config.model_type)


def is_packed(model: Any) -> bool:
    """Return whether a model, wrapped or not, takes packed rows."""
    return model.config.get_text_config()._attn_implementation.startswith(PACKED_PREFIX)


def packing_of(model: Any) -> Callable[[Sequence[dict[str, Any]]], Batch]:
    """Return the function that packs token rows for a model that takes packed rows.

    On a GPU, rows and padded groups get lengths that are multiples of 128 and 64 tokens: few shapes, and whole tiles.
    """
    windows = {None, getattr(model.config.get_text_config(), "sliding_window", None)}
    row, group = (128, 64) if next(model.parameters()).device.type == "cuda" else (1, 1)
    return partial(pack, arrange=lambda layout: kernel_of(model).arrange(layout, windows, group), multiple=row)


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
        batch = to_device(packing_of(model)(rows), model.device)
        packing, total = kernel_of(model).prepare(batch["packing"]), sum(row["length"] for row in rows)
        states = decoder(batch["input_ids"], position_ids=batch["position_ids"], packing=packing, use_cache=False)[0]
        return states[0, :total].float()

    try:
        found, (one, two, three) = hidden_states(together), (hidden_states([row]) for row in alone)
        expected = torch.cat([one, two[len(start) :], three])
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
        return False
    return bool((found - expected).abs().max() <= 0.05 * expected.abs().max())
