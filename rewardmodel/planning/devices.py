"""A device by name, or the one of this machine -> memory, speed and compute capability; operations of a sequence."""

import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from rewardmodel.errors import InputError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A device to plan for.

    Attributes:
        name: shown to people.
        kind: cpu or cuda.
        memory: bytes that torch can allocate.
        half: floating-point operations per second of dense matrix products in bfloat16 or float16, accumulated in
            float32.
        single: the same in float32.
        capability: CUDA compute capability, like (8, 0); None: a CPU.
        measured: whether both speeds were measured on this machine; otherwise they are from the data sheet.
    """

    name: str
    kind: str
    memory: int
    half: float
    single: float
    capability: tuple[int, int] | None = None
    measured: bool = False

    def rate(self, dtype: torch.dtype) -> float:
        """Return the floating-point operations per second in a precision."""
        return self.single if dtype == torch.float32 else self.half


def _gpu(name: str, gib: float, half: float, single: float, capability: tuple[int, int]) -> Device:
    """Return a GPU of `gib` GiB with speeds in teraflops."""
    return Device(name, "cuda", int(gib * GIB), half * 1e12, single * 1e12, capability)


DEVICES = {
    device.name: device
    for device in (
        _gpu("T4", 14.7, 65, 8.1, (7, 5)),
        _gpu("L4", 22.0, 121, 30.3, (8, 9)),
        _gpu("RTX-4090", 23.5, 165, 82.6, (8, 9)),
        _gpu("A100-40GB", 39.4, 312, 19.5, (8, 0)),
        _gpu("L40S", 44.4, 362, 91.6, (8, 9)),
        _gpu("A100-80GB", 79.1, 312, 19.5, (8, 0)),
        _gpu("H100", 79.1, 989, 67, (9, 0)),
        _gpu("H200", 139.8, 989, 67, (9, 0)),
    )
}
"""GPUs by name: memory as torch reports it, speed from Nvidia's data sheets, without sparsity."""


def find_device(name: str | None) -> Device:
    """Return a device by name; None: the first GPU of this machine, or else its CPU; `cpu`: its CPU.

    Raises:
        InputError: no such device in the table.
    """
    if name is None or name == "cpu":
        gpu = name is None and torch.cuda.is_available()
        return _measure_device(torch.device("cuda", 0) if gpu else torch.device("cpu"))
    if name not in DEVICES:
        raise InputError(f"--device: no '{name}'{nearest(name, DEVICES)}; there are: cpu, {', '.join(DEVICES)}")
    return DEVICES[name]


def _measure_device(device: torch.device) -> Device:
    """Return a device of this machine, its speeds measured."""
    half, single = measure_matmul(device, torch.bfloat16), measure_matmul(device, torch.float32)
    if device.type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device("this CPU", "cpu", memory, half, single, measured=True)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if capability < (8, 0):  # bfloat16 is emulated there
        half = measure_matmul(device, torch.float16)
    return Device(properties.name, "cuda", properties.total_memory, half, single, capability, measured=True)


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large matrix product, the best of up to five."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < 1.0:  # bfloat16 takes seconds on CPUs that emulate it
        start = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


def count_flops(backbone: Any, weights: int, length: float, square: float, backward: float) -> float:
    """Return the floating-point operations that one sequence needs; recomputation under checkpointing not included.

    A weight costs 2 per token in the forward pass and, frozen under LoRA, 2 more in the backward pass (for the gradient
    of its input). Causal attention costs 2 · layers · heads · head size · length² per sequence in the forward pass, and
    twice that in the backward pass. Adapters and head are left out.

    Args:
        backbone: transformers configuration.
        weights: number of weights of the backbone, token embeddings left out.
        length: tokens of the sequence.
        square: length², or the mean of squares where `length` is a mean.
        backward: share of the layers that the backward pass goes through, 0 to 1; 2: through all, and their weights are
            trained, too (2 more per weight).
    """
    text = backbone.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2.0 * text.num_hidden_layers * text.num_attention_heads * head_size * square
    return 2.0 * weights * length * (1 + backward) + attention * (1 + 2 * min(backward, 1))
