"""A device by name, or the one of this machine -> memory, speed and compute capability; operations of a sequence."""

import os
import time
from functools import cache
from typing import Any

import torch

from rewardmodel.planning.gpus import DEVICES, OLDEST, Device, check_device, too_old


def find_device(name: str | None) -> Device:
    """Return a device by name; None: the first GPU of this machine, or else its CPU; `cpu`: its CPU.

    Raises:
        InputError: no such device in the table, or a GPU that torch has no kernels for.
    """
    check_device(name)
    if name is None or name == "cpu":
        gpu = name is None and torch.cuda.is_available()
        return _measure_device(torch.device("cuda", 0) if gpu else torch.device("cpu"))
    return DEVICES[name]


def check_kernels(name: str, capability: tuple[int, int]) -> None:
    """Raise InputError if the installed torch has no kernels for a GPU, because it is too old.

    Args:
        name: of the GPU, as torch reports it.
        capability: its CUDA compute capability.
    """
    built = [arch.removeprefix("sm_") for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    oldest = min((divmod(int(arch), 10) for arch in built if arch.isdigit()), default=OLDEST)
    if capability < oldest:
        raise too_old(name, capability)


def _measure_device(device: torch.device) -> Device:
    """Return a device of this machine, its speeds measured."""
    if device.type == "cpu":
        half, single = measure_matmul(device, torch.bfloat16), measure_matmul(device, torch.float32)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device("this CPU", "cpu", memory, half, single, measured=True)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    check_kernels(properties.name, capability)  # what is computed without them fails with a CUDA error
    fast = torch.float16 if capability < (8, 0) else torch.bfloat16  # bfloat16 is emulated before Ampere
    half, single = measure_matmul(device, fast), measure_matmul(device, torch.float32)
    return Device(properties.name, "cuda", properties.total_memory, half, single, capability, measured=True)


@cache
def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large matrix product, the best of up to five.

    It is measured once in a process.
    """
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
