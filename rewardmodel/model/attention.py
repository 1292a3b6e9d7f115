"""Attention over packed rows: each sequence of a row (`model.layout`) attends only to itself, as if it were alone.

All other layers compute each token of the row once. A kernel has two halves: `arrange` makes index tensors of the
layout, once a micro-batch; `attend` uses them in every layer, in a number of operations that depends neither on how
many sequences there are nor on how long they are.

Shapes: T tokens of a row; transformers' attention takes queries, keys and values as (1, heads, T, head_dim) and returns
outputs as (1, T, heads, head_dim).
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from rewardmodel.model.layout import (
    BLOCK,
    Blocks,
    Layout,
    Padded,
    Varlen,
    arrange_blocks,
    arrange_padded,
    arrange_varlen,
)


def block_masks(arrangement: Blocks) -> dict[int | None, BlockMask]:
    """Return the masks of all layers of a micro-batch, by window, on the device of the arrangement."""
    segment, prefix, position, blocks = arrangement

    def mask(window: int | None) -> BlockMask:
        def attends(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            inside = (segment[query] == segment[key]) | (prefix[query] == segment[key])
            inside = inside & (position[query] >= position[key])
            return inside if window is None else inside & (position[query] - position[key] < window)

        lengths = (len(segment), len(segment))
        return BlockMask.from_kv_blocks(*blocks[window], BLOCK_SIZE=BLOCK, mask_mod=attends, seq_lengths=lengths)

    return {window: mask(window) for window in blocks}


def _padded(attend: Callable, states: Sequence[torch.Tensor], packing: Padded, window: int | None) -> torch.Tensor:
    """Return the outputs of a row, attending to one group of sequences after the other.

    Args:
        attend: (query, key, value, mask) -> outputs (n_sequences, longest, heads, head_dim), and attention weights; the
            states are (n_sequences, heads, longest, head_dim).
        states: queries, keys and values of the row.
        packing: of the row.
        window: of the layer.
    """
    rows = [state[0].transpose(0, 1) for state in states]  # (T, heads, head_dim)
    outputs = []
    for tokens, mask in zip(packing.tokens, packing.masks[window], strict=True):
        flat = tokens.flatten()
        group = (row.index_select(0, flat).unflatten(0, tokens.shape).transpose(1, 2) for row in rows)
        outputs.append(attend(*group, mask)[0].flatten(0, 1))
    return torch.cat(outputs).index_select(0, packing.outputs)[None]


def _sdpa(module: Any, *states: torch.Tensor, packing: Padded, window: int | None, **kwargs: Any) -> torch.Tensor:
    return _padded(partial(sdpa_attention_forward, module, **kwargs), states, packing, window)


def _eager(module: Any, *states: torch.Tensor, packing: Padded, window: int | None, **kwargs: Any) -> torch.Tensor:
    # the eager attention of the model's own module: families differ, for instance Gemma 2 soft-caps its logits
    eager = sys.modules[type(module).__module__].eager_attention_forward
    lowest = torch.finfo(states[0].dtype).min

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> Any:
        added = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)[None, None]
        return eager(module, query, key, value, added, **kwargs)

    return _padded(attend, states, packing, window)


@cache
def _compiled_flex() -> Callable:
    """Return flex_attention, compiled once for all lengths."""
    keep_floats_constant()
    return torch.compile(flex_attention, dynamic=True)


def keep_floats_constant() -> None:
    """Let torch's compiler take the floats that functions capture, like a soft cap, as constants.

    With dynamic shapes it makes tensors on the CPU of them, which the kernels of flex_attention cannot read
    (torch 2.11 and 2.13).
    """
    torch._dynamo.config.specialize_float = True


def _flex(
    module: Any,
    *states: torch.Tensor,
    packing: dict[int | None, BlockMask],
    window: int | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> torch.Tensor:
    def cap(score: torch.Tensor, *_: Any) -> torch.Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    output = attend(
        *_in_one_dtype(*states),
        score_mod=None if softcap is None else cap,
        block_mask=packing[window],
        scale=scaling,
        enable_gqa=states[0].shape[1] != states[1].shape[1],
    )
    return output.transpose(1, 2)


def _in_one_dtype(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values in autocast's precision, for kernels to which autocast does not apply.

    Where all weights train, in float32, rotary embeddings return float32 queries and keys.
    """
    device = states[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states[-1].dtype
    return tuple(state.to(dtype) for state in states)


_PARAMETERS = signature(varlen_attn).parameters

HAS_VARLEN = {"scale", "window_size"} <= {*_PARAMETERS}
"""Whether this torch's `varlen_attn` takes all that a decoder needs."""


def _segmented(
    attend: Callable, module: Any, *states: torch.Tensor, packing: Varlen, window: int | None, **kwargs: Any
) -> torch.Tensor:
    """Return the outputs of a row, attending to all segments at once.

    Args:
        attend: (queries, keys, values, packing, window, ...) -> outputs (T, heads, head_dim); queries are those of the
            row, (T, heads, head_dim), keys and values those of all segments, (n_keys, heads, head_dim).
        module: of the layer.
        states: queries, keys and values of the row.
        packing: of the row.
        window: of the layer.
        kwargs: transformers' arguments.
    """
    queries, *others = (state[0].transpose(0, 1) for state in _in_one_dtype(*states))
    if packing.keys is not None:
        others = [state.index_select(0, packing.keys) for state in others]
    return attend(queries, *others, packing, window, **kwargs)[None]


def _varlen(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    packing: Varlen,
    window: int | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> Any:
    # the kernel takes fewer heads of keys than of queries; torch 2.13 wants to be told
    grouped: dict[str, Any] = {}
    if "enable_gqa" in _PARAMETERS:
        grouped["enable_gqa"] = queries.shape[1] != keys.shape[1]
    window_size = (-1, 0) if window is None else (window - 1, 0)
    return varlen_attn(queries, keys, values, *_ends(packing), scale=scaling, window_size=window_size, **grouped)


def _flash(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    packing: Varlen,
    window: int | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return _flash_attention_forward(
        queries[None],
        keys[None],
        values[None],
        None,
        query_length=len(queries),
        is_causal=True,
        softmax_scale=scaling,
        sliding_window=window,
        attn_implementation="flash_attention_2",
        **dict(zip(names, _ends(packing), strict=True)),
        **kwargs,
    )[0]


def _ends(packing: Varlen) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Return what kernels of variable length are told of the segments, in the order in which `varlen_attn` takes it."""
    return packing.query_ends, packing.key_ends, packing.most_queries, packing.most_keys


class Kernel(NamedTuple):
    """Attention over packed rows."""

    arrange: Callable[[Layout, Iterable[int | None], int], Any]
    """(layout, windows of the model's layers, multiple of padded lengths) -> tensors on the CPU."""
    attend: Callable
    """(module, query, key, value, packing=..., window=..., and transformers' arguments) -> outputs of a layer."""
    prepare: Callable[[Any], Any] = lambda arrangement: arrangement
    """The arrangement, on the device -> what all layers share, `packing` of `attend`."""


KERNELS = {
    "varlen": Kernel(arrange_varlen, partial(_segmented, _varlen)),
    "sdpa": Kernel(arrange_padded, _sdpa),
    "eager": Kernel(partial(arrange_padded, masked=True), _eager),
    "flex_attention": Kernel(arrange_blocks, _flex, block_masks),
    "flash_attention_2": Kernel(arrange_varlen, partial(_segmented, _flash)),
}
"""By the name of the attention implementation: transformers' names, and `varlen` for torch's `varlen_attn`."""


def _attention(
    attend: Callable,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    packing: Any,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention output of a packed row, (1, T, heads, head_dim); the signature is transformers'."""
    return attend(module, query, key, value, packing=packing, window=sliding_window, **kwargs), None


LOADED_AS = {"varlen": "sdpa"}
"""Implementations that transformers does not have -> the one that it is to load a model with."""

PACKED_PREFIX = "packed_"
"""Start of the names under which these kernels are registered with transformers: sdpa -> packed_sdpa."""

for _name, _kernel in KERNELS.items():
    AttentionInterface.register(PACKED_PREFIX + _name, partial(_attention, _kernel.attend))


def kernel_of(model: Any) -> Kernel:
    """Return the kernel of a model that takes packed rows."""
    return KERNELS[model.config.get_text_config()._attn_implementation.removeprefix(PACKED_PREFIX)]
