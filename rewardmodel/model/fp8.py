"""Frozen linear layers of MLPs -> the same in 8-bit floating point, which newer GPUs multiply faster than 16-bit ones.

Weights and activations are e4m3 (Micikevicius et al. 2022, arXiv:2209.05433: 3 bits of mantissa, at most 448) with a
float32 scale per row: w[o] = scale[o] · q[o]. The weight is quantised once, the activations of each token when they
arrive, and a product of both is exact up to the rounding of its sum. The backward pass quantises in the same way.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from rewardmodel.errors import InputError
from rewardmodel.model.families import HEADS

logger = logging.getLogger(__name__)

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
LEAST_AMPLITUDE = 1e-30
"""Rows whose largest value is smaller count as zero: their scale would leave float32's normal range."""

MULTIPLE = 16
"""Rows and columns of a GPU's fp8 products: multiples of it."""


def quantise_rows(rows: torch.Tensor, column_scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as e4m3 numbers, (n, width), and their scales, (n, 1) float32: the largest value of a row over 448.

    The same rows give the same bytes on every device. A row with a value that is NaN or infinite becomes NaN.

    Args:
        rows: (n, width), floating point.
        column_scales: (width,) float32 to multiply the columns by first.
    """
    values = rows.float() if column_scales is None else rows.float() * column_scales
    scales = values.abs().amax(dim=1, keepdim=True).clamp(min=LEAST_AMPLITUDE) * (1 / LARGEST)
    return (values / scales).to(E4M3), scales


def dequantise_rows(quantised: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return what `quantise_rows` was given, up to rounding: (n, width) float32."""
    return quantised.float() * scales


def _quantise_padded(rows: torch.Tensor, column_scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `quantise_rows` of rows and of as many rows of zeros as make their number a multiple of 16."""
    return quantise_rows(torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % MULTIPLE)), column_scales)


@cache
def _fused_quantise() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return `_quantise_padded` as one operation, for any number of rows."""
    return torch.compile(_quantise_padded, dynamic=True)


def multiply(
    rows: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    row_scales: torch.Tensor | None = None,
    column_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return rows @ weight.t(), (n, out), in a precision; the rows are quantised first.

    On GPUs by their fp8 units, whose product is rounded to bfloat16. On CPUs emulated in float32.

    Args:
        rows: (n, in), floating point.
        weight: (out, in) e4m3, contiguous.
        dtype: of the result.
        row_scales: (out,) float32, of the weight's rows; default: 1.
        column_scales: (in,) float32, of the weight's columns; default: 1.
    """
    factors = weight.new_ones(len(weight), dtype=torch.float32) if row_scales is None else row_scales
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        if not has_fp8_units(rows.device):
            quantised, scales = quantise_rows(rows, column_scales)
            return (quantised.float() @ weight.float().t() * scales * factors).to(dtype)

        # torch compiles again for a single row, for what needs a gradient, and for each shape of a parameter
        quantise = _quantise_padded if len(rows) == 1 else _fused_quantise()
        columns = None if column_scales is None else column_scales.detach()
        quantised, scales = quantise(rows.detach().contiguous(), columns)
        product = torch._scaled_mm(quantised, weight.t(), scales, factors[None], out_dtype=torch.bfloat16)
        return product[: len(rows)].to(dtype)


def has_fp8_units(device: torch.device) -> bool:
    """Return whether products are computed by torch's fp8 kernel; older GPUs are refused before any weight is loaded.

    torch's kernel for CPUs (2.13) has the same result as the emulation and is not faster.
    """
    return device.type == "cuda"


class _Product(torch.autograd.Function):
    """Inputs times a frozen quantised weight, with a gradient for the inputs; neither of them is copied for it."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.dtype = inputs.dtype
        return multiply(inputs, weight.view(E4M3), dtype, row_scales=scales)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        weight, scales = ctx.saved_tensors
        # The kernel reads both operands along the dimension that is summed over, here the weight's rows.
        transposed = weight.t().contiguous().view(E4M3)
        return multiply(gradient, transposed, ctx.dtype, column_scales=scales), None, None, None


class Fp8Linear(torch.nn.Linear):
    """A frozen linear layer in e4m3 with a scale per row; PEFT adapts it as it does any linear layer.

    `weight` has the bytes of the e4m3 numbers, (out, in) uint8: a cast of floating-point weights leaves bytes alone,
    PEFT does not round new adapters to their type, and gloo and NCCL can send them to other processes.

    Args:
        linear: the layer.
        device: to quantise on and to hold the weight; default: the layer's.
    """

    def __init__(self, linear: torch.nn.Linear, device: torch.device | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scales = quantise_rows(linear.weight.detach().to(device))
        self.weight = torch.nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        self.scales = torch.nn.Parameter(scales[:, 0].clone(), requires_grad=False)
        self.bias = linear.bias
        self.train(linear.training)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return outputs (..., out) of inputs (..., in), in autocast's precision or else the inputs'."""
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        rows = inputs.reshape(-1, self.in_features)
        product = _Product.apply(rows, self.weight, self.scales, dtype)
        product = product if self.bias is None else product + self.bias.to(dtype)
        return product.view(*inputs.shape[:-1], self.out_features)

    def dequantise(self) -> torch.nn.Linear:
        """Return the layer with its weight in float32, which does not round its inputs."""
        plain = torch.nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = dequantise_rows(self.weight.view(E4M3), self.scales[:, None])
        plain.weight, plain.bias = torch.nn.Parameter(weight, requires_grad=False), self.bias
        return plain


def layers_to_quantise(model: torch.nn.Module) -> list[str]:
    """Return the names of the linear layers that are held in fp8: those of the MLPs that a GPU's fp8 units can take.

    Attention's projections stay as they are: they have a fifth of the weights and cause half of the error, and the
    narrow ones, of keys and values, are faster in 16 bits than with quantised inputs.
    """
    return [
        name
        for name, layer in _linear_layers(model).items()
        if layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
    ]


def _linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the linear layers outside heads and attention, by name."""
    linear = {name: part for name, part in model.named_modules() if type(part) is torch.nn.Linear}
    return {
        name: part
        for name, part in linear.items()
        if not ({*name.split(".")} & {*HEADS} or "attn" in name or "attention" in name)
    }


def quantise_model(model: torch.nn.Module, device: torch.device) -> None:
    """Move a model to a device, its linear layers one after another and in fp8, so that it never holds them in 16 bits.

    Args:
        model: a classifier, anywhere.
        device: where to.

    Raises:
        InputError: no layer can be quantised, or torch's fp8 kernel does not run on this GPU.
    """
    if has_fp8_units(device):
        _try_kernel(device)
    names = layers_to_quantise(model)
    if not names:
        raise InputError(
            f"model.load_in_fp8: {type(model).__name__} has no linear layer outside head and attention whose "
            f"widths are multiples of {MULTIPLE}; set model.load_in_4bit instead"
        )
    for name in names:
        linear: Any = model.get_submodule(name)
        model.set_submodule(name, Fp8Linear(linear, device))
    model.to(device)
    rest = [*_linear_layers(model)]
    if rest:
        logger.info("%d linear layers are not in fp8, as their widths are no multiples of 16: %s", len(rest), rest[0])


def _try_kernel(device: torch.device) -> None:
    """Raise InputError unless torch has an fp8 kernel with a scale per row for a GPU, which new GPUs lack at first."""
    try:
        ones = torch.ones(MULTIPLE, 2 * MULTIPLE, device=device, dtype=torch.bfloat16)
        multiply(ones, quantise_rows(ones)[0], torch.bfloat16)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"model.load_in_fp8: torch {torch.__version__} has no fp8 product with a scale per row for "
            f"{torch.cuda.get_device_name(device)} ({reason}); set model.load_in_4bit instead"
        ) from error
