"""The name of a device, or the machine at hand, in; its memory, its speed and what it can compute in out."""

import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from rewardmodel.errors import InputError, nearest

GIB = 2**30
TERA = 1e12


@dataclass(frozen=True)
class Device:
    """What is to be known of a device before anything runs on it.

    Attributes:
        name: as a person calls it.
        kind: cpu or cuda.
        memory: bytes that torch can allocate.
        half: operations a second of dense matrix products in bfloat16 or float16, summed in float32.
        single: the same in float32.
        capability: compute capability; none: a CPU.
        measured: whether both speeds were measured here; else the maker lists them.
    """

    name: str
    kind: str
    memory: int
    half: float
    single: float
    capability: tuple[int, int] | None = None
    measured: bool = False

    def rate(self, dtype: torch.dtype) -> float:
        """Return the operations a second in a precision, as listed or measured."""
        return self.single if dtype == torch.float32 else self.half


def _gpu(name: str, gib: float, half: float, single: float, capability: tuple[int, int]) -> Device:
    return Device(name, "cuda", int(gib * GIB), half * TERA, single * TERA, capability)


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
"""GPUs by name: what torch reports of their memory, and Nvidia's data sheets without sparsity."""


def find_device(name: str | None) -> Device:
    """Return a device by name; none: the first GPU here, or the CPU; `cpu`: the CPU.

    Raises:
        InputError: no such device in the table.
    """
    if name is None or name == "cpu":
        gpu = name is None and torch.cuda.is_available()
        return _here(torch.device("cuda", 0) if gpu else torch.device("cpu"))
    if name not in DEVICES:
        raise InputError(f"--device: no '{name}'{nearest(name, DEVICES)}; there are: cpu, {', '.join(DEVICES)}")
    return DEVICES[name]


def _here(device: torch.device) -> Device:
    half, single = matrix_rate(device, torch.bfloat16), matrix_rate(device, torch.float32)
    if device.type == "cpu":
        return Device(
            "this CPU", "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), half, single, None, True
        )
    about = torch.cuda.get_device_properties(device)
    capability = (about.major, about.minor)
    if capability < (8, 0):
        half = matrix_rate(device, torch.float16)
    return Device(about.name, "cuda", about.total_memory, half, single, capability, True)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of a large matrix product, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product = one @ other
        product[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


def battle_flops(backbone: Any, weights: int, length: float, square: float, backward: float) -> float:
    """Return the operations that a sequence needs, however it is computed.

    A weight costs 2 a token forward and, frozen under LoRA, 2 more backward. Causal attention costs 2 layers · heads ·
    head size · length² a sequence forward, and twice that more backward. Adapters and head count nothing.

    Args:
        backbone: transformers configuration.
        weights: of the backbone, embedding left out.
        length: tokens of the sequence.
        square: their square, or the mean of squares where `length` is a mean.
        backward: share of the layers that are gone through backward; 2: and their own weights train.
    """
    text = backbone.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2.0 * text.num_hidden_layers * text.num_attention_heads * head * square
    return 2.0 * weights * length * (1 + backward) + attention * (1 + 2 * min(backward, 1))
