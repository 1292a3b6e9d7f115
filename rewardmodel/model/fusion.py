"""A loaded classifier -> the same with fewer operations: linear layers that share their input compute together.

Attention multiplies one input by three matrices, and a gated MLP by two. Where these are frozen, the rows of all are
one matrix, of which each layer keeps its part: parameters, their names and their values stay as they are, and so does
all that reads them. LoRA adapters of one input share its dropout, and their A's are one product, as in the LoRA
authors' own layer for such projections (`MergedLinear` of loralib); each B is added to the layer's output by one
operation. Without dropout the outputs are those of the layers alone up to rounding.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear

from rewardmodel.model.families import FAMILIES
from rewardmodel.model.packing import is_packed

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of the layers of one module that decoders of `FAMILIES` call with the same input."""

Join = Callable[[Sequence[Any]], Any]
"""Linear layers -> one with the outputs of all, in their order; None: they cannot be joined."""


class _Group:
    """Layers that are called with the same input, one after the other; the first call computes the outputs of all.

    Args:
        layers: linear ones, with a LoRA adapter or without.
        joined: their frozen parts in one layer; None: each computes its own.
    """

    def __init__(self, layers: Sequence[Any], joined: Any) -> None:
        self.layers, self.joined = layers, joined
        self.adapted = [isinstance(layer, LoraLayer) for layer in layers]
        self.widths = [_frozen(layer).out_features for layer in layers]
        self.inputs: Any = None
        self.outputs: list[Any] = []

    def forward(self, number: int, inputs: torch.Tensor) -> torch.Tensor:
        """Return the output of a layer."""
        if inputs is not self.inputs or self.outputs[number] is None:
            self.inputs, self.outputs = inputs, self._compute(inputs)
        output, self.outputs[number] = self.outputs[number], None
        if all(one is None for one in self.outputs):
            self.inputs = None  # nothing is kept longer than the model keeps it
        return output

    def _compute(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        adapters = [layer for layer, adapted in zip(self.layers, self.adapted, strict=True) if adapted]
        in_autocast = torch.is_autocast_enabled(inputs.device.type)
        fits = in_autocast or all(one.lora_A["default"].weight.dtype == inputs.dtype for one in adapters)
        if not fits or any(one.disable_adapters or one.merged for one in adapters):
            return [type(layer).forward(layer, inputs) for layer in self.layers]

        # what is frozen: (n, out) of each layer
        rows = inputs.flatten(0, -2)
        if self.joined is None:
            outputs = [type(layer).forward(layer, rows) for layer in map(_frozen, self.layers)]
        else:
            outputs = [*self.joined(rows).split(self.widths, dim=1)]

        # A of all adapters, (n, sum of ranks), then B of each
        if adapters:
            matrices = [one.lora_A["default"].weight for one in adapters]
            first = adapters[0]
            low = linear(first.lora_dropout["default"](rows), torch.cat(matrices) if matrices[1:] else matrices[0])
            parts = iter((low * first.scaling["default"]).split([len(one) for one in matrices], dim=1))
            for number, layer in enumerate(self.layers):
                if self.adapted[number]:
                    added = torch.addmm(outputs[number], next(parts), layer.lora_B["default"].weight.t())
                    outputs[number] = added.to(outputs[number].dtype)
        return [output.view(*inputs.shape[:-1], -1) for output in outputs]


def fuse_projections(model: Any, join: Join | None = None) -> None:
    """Let the linear layers of a model that share an input compute together, in place.

    One product for several layers means that the gradients of their outputs are copied into one matrix, 2 values moved
    for each, and those of their inputs need not be added up, 3 values moved for each. Layers are joined where the
    latter is not less. That is so for queries, keys and values. For gate and up it is not, and while predicting, both
    outputs would stay in memory for longer: they share what their adapters do, and no more.

    Args:
        model: a classifier whose backbone is frozen but for LoRA adapters, if it has any.
        join: of frozen layers; default: `join_layers`.
    """
    if not is_packed(model) or model.config.model_type not in FAMILIES:
        return
    grouped: set[Any] = set()
    for module in list(model.modules()):
        for names in TOGETHER:
            layers = [getattr(module, name, None) for name in names]
            if all(map(_may_compute, layers)):
                frozen = [_frozen(layer) for layer in layers]
                width, copied = frozen[0].in_features, 2 * sum(layer.out_features for layer in frozen)
                joined = (join or join_layers)(frozen) if copied <= 3 * width * (len(layers) - 1) else None
                if joined is not None or sum(isinstance(layer, LoraLayer) for layer in layers) > 1:
                    grouped.update(layers)
                    _compute_by(_Group(layers, joined))
    for module in list(model.modules()):
        if isinstance(module, LoraLayer) and module not in grouped and _may_compute(module):
            _compute_by(_Group([module], None))


def separate_projections(model: Any) -> None:
    """Let the linear layers of a model compute one by one again; their frozen weights stay where they are, as views."""
    for module in model.modules():
        if module.__dict__.get("forward") and isinstance(module, LoraLayer | torch.nn.Linear):
            del module.forward


def _compute_by(group: _Group) -> None:
    for number, layer in enumerate(group.layers):
        layer.forward = partial(group.forward, number)


def _frozen(layer: Any) -> Any:
    """Return a linear layer without its adapter."""
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _may_compute(layer: Any) -> bool:
    """Return whether a layer is linear, and has no adapter but one of plain LoRA."""
    if not isinstance(layer, LoraLayer):
        return isinstance(layer, torch.nn.Linear)
    plain = not layer.lora_variant and not any(layer.lora_bias.values())
    return plain and [*layer.lora_A] == ["default"] and isinstance(layer.lora_A["default"], torch.nn.Linear)


def join_layers(layers: Sequence[Any]) -> Any:
    """Return frozen linear layers as one, whose weights theirs become parts of; None: they cannot be joined.

    The numbers stay the same. 4-bit weights have a scale for each block; scales that are quantised themselves, relative
    to a mean of their layer, become float32: 3 bytes more for each block of 64 weights.
    """
    first = layers[0]
    kinds = {(type(one), one.weight.dtype, one.weight.device, one.bias is None) for one in layers}
    four_bits = hasattr(first.weight, "quant_state")
    if len(kinds) > 1 or not (four_bits or type(first) is torch.nn.Linear):
        return None
    if four_bits and any(one.in_features * one.out_features % one.weight.blocksize for one in layers):
        return None
    joined = copy.copy(first)
    joined.out_features = sum(one.out_features for one in layers)
    together = {name: [one._parameters[name] for one in layers] for name in first._parameters}
    joined._parameters = {name: None if weights[0] is None else _stack(weights) for name, weights in together.items()}
    return joined


def _stack(weights: list[Any]) -> torch.nn.Parameter:
    """Return weights one below the other; they become views of the result."""
    if not hasattr(weights[0], "quant_state"):
        return torch.nn.Parameter(_stack_tensors(weights), requires_grad=False)
    states = [_without_nesting(one.quant_state) for one in weights]
    state = copy.copy(states[0])
    state.absmax = _stack_tensors([one.absmax for one in states])
    state.shape = torch.Size([sum(one.shape[0] for one in states), state.shape[1]])
    joined = copy.copy(weights[0])
    joined.data, joined.quant_state = _stack_tensors(weights), state
    return joined


def _stack_tensors(tensors: list[torch.Tensor]) -> torch.Tensor:
    joined = torch.cat([one.data for one in tensors])
    for one, part in zip(tensors, joined.split([len(one) for one in tensors]), strict=True):
        one.data = part
    return joined


def _without_nesting(state: Any) -> Any:
    """Return the constants of a 4-bit weight, in place with a float32 scale for each block."""
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise  # here, as in `model.loading`

        state.absmax = dequantize_blockwise(state.absmax, state.state2).float() + state.offset
        state.nested, state.state2, state.offset = False, None, None
    return state
