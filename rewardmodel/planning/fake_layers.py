"""A linear layer in, one of the size of a quantised one out, without content, to count memory by."""

from typing import Any

import bitsandbytes as bnb
import torch

from rewardmodel.config.schema import ModelConfig

BLOCK = 64
"""Weights that share a constant in bitsandbytes' 4-bit format."""

NESTED = 256
"""Constants that share one of their own under double quantisation, and states that share one in 8-bit optimisers."""


def quantised_bytes(weights: int, model: ModelConfig, out_features: int) -> int:
    """Return the bytes of a linear layer's weights as bitsandbytes keeps them, with their constants.

    4 bits: half a byte, and a float32 constant for `BLOCK` weights, or a byte for it and a float32 for `NESTED` of
    those (QLoRA's double quantisation). 8 bits: a byte, and a float32 for a row.
    """
    if model.load_in_8bit:
        return weights + 4 * out_features
    blocks = -(-weights // BLOCK)
    constants = blocks + 4 * -(-blocks // NESTED) if model.use_bnb_nested_quant else 4 * blocks
    return -(-weights // 2) + constants


class _Product(torch.autograd.Function):
    """A product with a weight that is made for it and kept by nobody, as bitsandbytes' are."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, out_features: int) -> torch.Tensor:
        ctx.shape = (out_features, given.shape[-1])
        return torch.nn.functional.linear(given, given.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return torch.matmul(gradient, gradient.new_empty(ctx.shape)), None


def _forward(self: Any, given: torch.Tensor) -> torch.Tensor:
    product = _Product.apply(given.to(self.compute_dtype), self.out_features).to(given.dtype)
    return product if self.bias is None else product + self.bias.to(product.dtype)


class FourBits(bnb.nn.Linear4bit):
    """A 4-bit linear layer of the size of another, which PEFT takes for one of bitsandbytes'."""

    def __init__(self, linear: torch.nn.Linear, model: ModelConfig, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        _take_size(self, linear, model, dtype)
        self.weight.compress_statistics = model.use_bnb_nested_quant
        self.weight.quant_type = model.bnb_4bit_quant_type

    forward = _forward


class EightBits(bnb.nn.Linear8bitLt):
    """The same of 8 bits."""

    def __init__(self, linear: torch.nn.Linear, model: ModelConfig, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        _take_size(self, linear, model, dtype)
        self.state = bnb.MatmulLtState()
        self.index = None

    forward = _forward


def _take_size(self: Any, linear: torch.nn.Linear, model: ModelConfig, dtype: torch.dtype) -> None:
    self.in_features, self.out_features = linear.in_features, linear.out_features
    size = quantised_bytes(linear.weight.numel(), model, linear.out_features)
    self.weight = torch.nn.Parameter(torch.empty(size, 1, dtype=torch.uint8), requires_grad=False)
    self.bias = linear.bias
    self.compute_dtype = dtype


class ByteDropout(torch.nn.Dropout):
    """Dropout as a GPU computes it: what it keeps is a byte a number."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Drop numbers in training."""
        return torch.native_dropout(given, self.p, True)[0] if self.training and self.p else given
