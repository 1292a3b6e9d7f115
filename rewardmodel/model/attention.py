"""Attention over rows of several battles: every sequence sees its own tokens and nothing else, and none is padded.

A packed row has branches that share a beginning: the tokens that they share, then those of the first branch, then
those of the second. A sequence is the shared beginning with one branch, and is attended to as if it were alone, by
the attention function of transformers that the model would use anyway. The layers around attention see each token
once.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import _flash_attention_forward

Layout = Sequence[Sequence[int]]
"""For each battle of a row: the tokens that its branches share, then those of each branch."""


class Packing:
    """Where the sequences of one packed row are, and the masks that all its layers use.

    Attributes:
        layout: of the row.
        lengths: tokens of each sequence, shared ones included.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.lengths = [shared + branch for shared, *branches in layout for branch in branches]
        self._pieces = [tokens for battle in layout for tokens in battle]
        self._masks: dict[Any, Any] = {}

    def sequences(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Return the states of each sequence, (1, heads, length, width), of those of the row, (1, heads, T, width)."""
        pieces = iter(states.split(self._pieces, dim=2))
        found = []
        for shared, *branches in self.layout:
            beginning = next(pieces)
            for _ in branches:
                branch = next(pieces)
                found.append(torch.cat([beginning, branch], dim=2) if shared else branch)
        return found

    def row(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Return the row, (1, T, heads, width), of each sequence's outputs, (1, length, heads, width)."""
        sequences = iter(outputs)
        kept = []
        for shared, *branches in self.layout:
            for number in range(len(branches)):
                output = next(sequences)
                kept.append(output[:, shared:] if shared and number else output)
        return torch.cat(kept, dim=1)

    def mask(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the mask of that key; it is made once a row, not once a layer."""
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]


def _seen(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which key (column) each query (row) of a causal sequence sees, (length, length) bool."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _by_sequence(
    attend: Callable, packing: Packing, mask: Callable[[int], torch.Tensor | None], states: Sequence[torch.Tensor]
) -> torch.Tensor:
    queries, keys, values = map(packing.sequences, states)
    outputs = [
        attend(query, key, value, mask(query.shape[2]))[0]
        for query, key, value in zip(queries, keys, values, strict=True)
    ]
    return packing.row(outputs)


def _sdpa(module: Any, *states: torch.Tensor, packing: Packing, window: int | None, **kwargs: Any) -> torch.Tensor:
    device = states[0].device

    def mask(length: int) -> torch.Tensor | None:
        if window is None or length <= window:
            return None  # causal, which the kernel does without a mask
        longest = max(packing.lengths)
        return packing.mask(window, lambda: _seen(longest, window, device))[:length, :length][None, None]

    attend = partial(sdpa_attention_forward, module, **kwargs)
    return _by_sequence(attend, packing, mask, states)


def _eager(module: Any, *states: torch.Tensor, packing: Packing, window: int | None, **kwargs: Any) -> torch.Tensor:
    device, dtype = states[0].device, states[0].dtype

    def make() -> torch.Tensor:
        hidden = ~_seen(max(packing.lengths), window, device)
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, torch.finfo(dtype).min)

    own = sys.modules[type(module).__module__].eager_attention_forward  # the family's own formula
    attend = partial(own, module, **kwargs)
    return _by_sequence(attend, packing, lambda n: packing.mask(window, make)[:n, :n][None, None], states)


def _flex(module: Any, *states: torch.Tensor, packing: Packing, window: int | None, **kwargs: Any) -> torch.Tensor:
    device, total = states[0].device, sum(packing.lengths)

    def make() -> Any:
        lengths = torch.tensor(packing.lengths, device=device)
        sequence = torch.repeat_interleave(lengths, output_size=total)

        def seen(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            inside = (sequence[query] == sequence[key]) & (query >= key)
            return inside if window is None else inside & (query - key < window)

        return create_block_mask(seen, 1, None, total, total, device=device, _compile=device.type == "cuda")

    joined = [torch.cat(packing.sequences(state), dim=2) for state in states]
    output = flex_attention_forward(module, *joined, packing.mask(window, make), **kwargs)[0]
    return packing.row(list(output.split(packing.lengths, dim=1)))


def _varlen(
    module: Any, *states: torch.Tensor, packing: Packing, window: int | None, scaling: float, **kwargs: Any
) -> torch.Tensor:
    device, longest = states[0].device, max(packing.lengths)
    ends = packing.mask(
        "ends", lambda: torch.tensor([0, *packing.lengths]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    )
    joined = [torch.cat(packing.sequences(state), dim=2).transpose(1, 2) for state in states]
    output = _flash_attention_forward(
        *joined,
        None,
        query_length=sum(packing.lengths),
        is_causal=True,
        softmax_scale=scaling,
        sliding_window=window,
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=longest,
        max_length_k=longest,
        attn_implementation="flash_attention_2",
        target_dtype=get_target_dtype(states[0], module),
        **kwargs,
    )
    return packing.row(list(output.split(packing.lengths, dim=1)))


KERNELS = {"sdpa": _sdpa, "eager": _eager, "flex_attention": _flex, "flash_attention_2": _varlen}
"""Attention over packed rows by the name that transformers has for the implementation."""


def _attention(
    kernel: Callable,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    packing: Packing,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention output of a packed row, (1, T, heads, width), as transformers calls for it."""
    return kernel(module, query, key, value, packing=packing, window=sliding_window, **kwargs), None


PREFIX = "packed_"
"""What the names of our attention implementations begin with."""


def packed(implementation: str) -> str:
    """Return the name under which transformers knows the packed form of an attention implementation."""
    return PREFIX + KERNELS[implementation].__name__.strip("_")


for _name, _kernel in KERNELS.items():
    AttentionInterface.register(packed(_name), partial(_attention, _kernel))
