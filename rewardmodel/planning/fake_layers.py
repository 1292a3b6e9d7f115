"""Fake layers as large as quantised layers but without weights to compute with, to count memory."""

import copy
from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch

from rewardmodel.config.schema import ModelConfig
from rewardmodel.model.fusion import join_layers


def count_quantised_bytes(weights: int, model: ModelConfig, out_features: int) -> int:
    """Return the bytes of a quantised linear layer's weights, quantisation constants included.

    8 bits, fp8: a byte per weight, and a float32 per row. 4 bits: half a byte per weight, and a float32 per block of 64
    weights; or, with double quantisation, a byte per block and a float32 per 256 blocks (QLoRA, Dettmers et al. 2023).

    Args:
        weights: their number.
        model: section of the recipe, with `load_in_4bit`, `load_in_8bit` or `load_in_fp8`.
        out_features: rows of the weight matrix.
    """
    if model.load_in_8bit or model.load_in_fp8:
        return weights + 4 * out_features
    blocks = -(-weights // 64)
    constants = blocks + 4 * -(-blocks // 256) if model.use_bnb_nested_quant else 4 * blocks
    return -(-weights // 2) + constants


class _FakeProduct(torch.autograd.Function):
    """A product with a temporary dequantised weight that is not kept for the backward pass, as in bitsandbytes."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, out_features: int) -> torch.Tensor:
        ctx.shape = (out_features, inputs.shape[-1])
        return torch.nn.functional.linear(inputs, inputs.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return torch.matmul(gradient, gradient.new_empty(ctx.shape)), None


def _compute_product(self: Any, inputs: torch.Tensor) -> torch.Tensor:
    product = _FakeProduct.apply(inputs.to(self.compute_dtype), self.out_features).to(inputs.dtype)
    return product if self.bias is None else product + self.bias.to(product.dtype)


class Fake4bitLinear(bnb.nn.Linear4bit):
    """A 4-bit layer of the size of a linear layer; a subclass, so that PEFT adapts it as it does bitsandbytes'."""

    def __init__(self, linear: torch.nn.Linear, model: ModelConfig, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        _copy_size(self, linear, model, dtype)
        self.weight.compress_statistics = model.use_bnb_nested_quant
        self.weight.quant_type = model.bnb_4bit_quant_type

    forward = _compute_product


class Fake8bitLinear(bnb.nn.Linear8bitLt):
    """An 8-bit layer of the size of a linear layer."""

    def __init__(self, linear: torch.nn.Linear, model: ModelConfig, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        _copy_size(self, linear, model, dtype)
        self.state = bnb.MatmulLtState()
        self.index = None

    forward = _compute_product


class _FakeFp8Product(torch.autograd.Function):
    """A product with quantised copies of its inputs, and of the weight in the backward pass, as in `model.fp8`."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, out_features: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.shape, ctx.dtype = (out_features, inputs.shape[-1]), inputs.dtype
        quantised = inputs.new_empty(inputs.shape, dtype=torch.uint8)
        return quantised.new_empty((*inputs.shape[:-1], out_features), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        quantised = [gradient.new_empty(shape, dtype=torch.uint8) for shape in (ctx.shape, gradient.shape)]
        return quantised[0].new_empty((*gradient.shape[:-1], ctx.shape[1]), dtype=ctx.dtype), None, None


class FakeFp8Linear(torch.nn.Linear):
    """An fp8 layer of the size of a linear layer."""

    def __init__(self, linear: torch.nn.Linear, model: ModelConfig, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        _copy_size(self, linear, model, dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return outputs in the layer's precision, without content."""
        product = _FakeFp8Product.apply(inputs, self.out_features, self.compute_dtype)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def _copy_size(layer: Any, linear: torch.nn.Linear, model: ModelConfig, dtype: torch.dtype) -> None:
    layer.in_features, layer.out_features = linear.in_features, linear.out_features
    size = count_quantised_bytes(linear.weight.numel(), model, linear.out_features)
    layer.weight = torch.nn.Parameter(torch.empty(size, 1, dtype=torch.uint8), requires_grad=False)
    layer.bias = linear.bias
    layer.compute_dtype = dtype


class FakeGpuDropout(torch.nn.Dropout):
    """Dropout that keeps for the backward pass what it keeps on a GPU: one byte per element."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the inputs with some elements set to zero in training."""
        return torch.native_dropout(inputs, self.p, True)[0] if self.training and self.p else inputs


def join_fake_layers(layers: Sequence[Any]) -> Any:
    """Stand in for `model.fusion.join_layers`: the same sizes, also of constants that are not quantised any more."""
    if not isinstance(layers[0], Fake4bitLinear):
        return join_layers(layers)
    joined = copy.copy(layers[0])
    joined.out_features = sum(one.out_features for one in layers)
    bias = None if joined.bias is None else torch.nn.Parameter(joined.bias.new_empty(joined.out_features), False)
    joined._parameters = {"weight": joined.weight, "bias": bias}
    for one in layers:
        weights = one.in_features * one.out_features
        size = -(-weights // 2) + 4 * -(-weights // 64)
        one.weight = torch.nn.Parameter(one.weight.new_empty(size, 1), requires_grad=False)
    return joined
