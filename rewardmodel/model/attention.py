"""Attention over packed rows: several battles in one row without padding, each sequence attending only to itself.

The sequences of a battle may share a prefix, which is in the row once: `[shared | branch A | branch B]`. A sequence is
the shared prefix followed by one branch. Attention treats it as if it were alone in a batch, with the attention
function of transformers that the model would use anyway; all other layers compute each token of the row once.

Shapes: T tokens of a row, n tokens of one sequence; transformers' attention takes queries, keys and values as
(1, heads, tokens, head_dim) and returns outputs as (1, tokens, heads, head_dim).
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
"""Tokens of each battle of a row: [shared by its branches, first branch, second branch, ...].

Example: `[[0, 3], [2, 2, 3]]` is a battle of one sequence of 3 tokens, and one of two sequences of 4 and 5 tokens that
share their first 2; the row has 3 + 7 tokens.
"""


class Packing:
    """Where the sequences of one packed row are, and the masks that all layers share.

    Attributes:
        layout: of the row.
        lengths: tokens of each sequence, including the shared ones; [3, 4, 5] in the example of `Layout`.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.lengths = [shared + branch for shared, *branches in layout for branch in branches]
        self._pieces = [tokens for battle in layout for tokens in battle]  # [0, 3, 2, 2, 3]
        self._masks: dict[Any, Any] = {}

    def split(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Return the states of each sequence, (1, heads, n, head_dim), from those of the row, (1, heads, T, head_dim).

        The states of a shared prefix are repeated for each of its branches.
        """
        pieces = iter(states.split(self._pieces, dim=2))
        sequences = []
        for shared, *branches in self.layout:
            prefix = next(pieces)
            for _ in branches:
                branch = next(pieces)
                sequences.append(torch.cat([prefix, branch], dim=2) if shared else branch)
        return sequences

    def join(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Return the outputs of the row, (1, T, heads, head_dim), from those of each sequence, (1, n, heads, head_dim).

        The outputs of a shared prefix are taken from the first of its sequences; they are the same in the others.
        """
        sequences = iter(outputs)
        pieces = []
        for shared, *branches in self.layout:
            for number in range(len(branches)):
                output = next(sequences)
                pieces.append(output[:, shared:] if shared and number else output)
        return torch.cat(pieces, dim=1)

    def mask(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the mask cached under a key; `make` is called once per row, not once per layer."""
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]


def _causal_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return whether each query (row) attends to each key (column), (length, length) bool.

    Args:
        length: tokens of the sequence.
        window: a query attends to itself and the `window - 1` tokens before it; None: to all tokens before it.
        device: where to make the mask.
    """
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _attend_by_sequence(
    attend: Callable, packing: Packing, mask: Callable[[int], torch.Tensor | None], states: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the outputs of a row, attending to one sequence after the other.

    Args:
        attend: (query, key, value, mask) -> outputs and attention weights, for one sequence.
        packing: of the row.
        mask: tokens of a sequence -> its mask.
        states: queries, keys and values of the row.
    """
    queries, keys, values = map(packing.split, states)
    outputs = [
        attend(query, key, value, mask(query.shape[2]))[0]
        for query, key, value in zip(queries, keys, values, strict=True)
    ]
    return packing.join(outputs)


def _sdpa(module: Any, *states: torch.Tensor, packing: Packing, window: int | None, **kwargs: Any) -> torch.Tensor:
    device = states[0].device

    def mask(length: int) -> torch.Tensor | None:
        if window is None or length <= window:
            return None  # plain causal attention, which the kernel computes faster without a mask
        longest = max(packing.lengths)
        return packing.mask(window, lambda: _causal_mask(longest, window, device))[:length, :length][None, None]

    attend = partial(sdpa_attention_forward, module, **kwargs)
    return _attend_by_sequence(attend, packing, mask, states)


def _eager(module: Any, *states: torch.Tensor, packing: Packing, window: int | None, **kwargs: Any) -> torch.Tensor:
    device, dtype = states[0].device, states[0].dtype

    def make() -> torch.Tensor:
        masked = ~_causal_mask(max(packing.lengths), window, device)
        return torch.zeros(masked.shape, dtype=dtype, device=device).masked_fill(masked, torch.finfo(dtype).min)

    # the eager attention of the model's own module: families differ, for instance Gemma 2 soft-caps its logits
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = partial(eager, module, **kwargs)
    return _attend_by_sequence(attend, packing, lambda n: packing.mask(window, make)[:n, :n][None, None], states)


def _flex(module: Any, *states: torch.Tensor, packing: Packing, window: int | None, **kwargs: Any) -> torch.Tensor:
    device, total = states[0].device, sum(packing.lengths)

    def make() -> Any:
        lengths = torch.tensor(packing.lengths, device=device)
        sequence = torch.repeat_interleave(lengths, output_size=total)  # [0, 0, 0, 1, 1, 1, 1, 2, ...]

        def attends(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            inside = (sequence[query] == sequence[key]) & (query >= key)
            return inside if window is None else inside & (query - key < window)

        return create_block_mask(attends, 1, None, total, total, device=device, _compile=device.type == "cuda")

    joined = [torch.cat(packing.split(state), dim=2) for state in states]
    output = flex_attention_forward(module, *joined, packing.mask(window, make), **kwargs)[0]
    return packing.join(list(output.split(packing.lengths, dim=1)))


def _varlen(
    module: Any, *states: torch.Tensor, packing: Packing, window: int | None, scaling: float, **kwargs: Any
) -> torch.Tensor:
    device, longest = states[0].device, max(packing.lengths)
    ends = packing.mask(  # ends of the sequences: [0, 3, 7, 12]
        "ends", lambda: torch.tensor([0, *packing.lengths]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    )
    joined = [torch.cat(packing.split(state), dim=2).transpose(1, 2) for state in states]
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
    return packing.join(list(output.split(packing.lengths, dim=1)))


KERNELS = {"sdpa": _sdpa, "eager": _eager, "flex_attention": _flex, "flash_attention_2": _varlen}
"""Attention over packed rows, by transformers' name of the attention implementation that it calls."""


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
    """Return the attention output of a packed row, (1, T, heads, head_dim); the signature is transformers'."""
    return kernel(module, query, key, value, packing=packing, window=sliding_window, **kwargs), None


PACKED_PREFIX = "packed_"
"""Start of the names under which these kernels are registered with transformers."""


def packed_name(implementation: str) -> str:
    """Return the registered name of the packed form of an attention implementation: sdpa -> packed_sdpa."""
    return PACKED_PREFIX + KERNELS[implementation].__name__.strip("_")


for _name, _kernel in KERNELS.items():
    AttentionInterface.register(packed_name(_name), partial(_attention, _kernel))
