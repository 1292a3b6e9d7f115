"""A device by name, or the one of this machine -> memory, speed and compute capability; operations of a sequence."""

import os
import time
from dataclasses import dataclass
from functools import cache
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
        _gpu("RTX-5070-Ti", 15.5, 87.9, 43.9, (12, 0)),
        _gpu("RTX-5080", 15.5, 112.6, 56.3, (12, 0)),
        _gpu("A10", 22.0, 125, 31.2, (8, 6)),
        _gpu("A10G", 22.0, 70, 35, (8, 6)),
        _gpu("L4", 22.0, 121, 30.3, (8, 9)),
        _gpu("RTX-4090", 23.5, 165, 82.6, (8, 9)),
        _gpu("RTX-3090", 23.7, 71, 35.6, (8, 6)),
        _gpu("RTX-5090", 31.4, 209.5, 104.8, (12, 0)),
        _gpu("A100-40GB", 39.4, 312, 19.5, (8, 0)),
        _gpu("L40S", 44.4, 362, 91.6, (8, 9)),
        _gpu("RTX-6000-Ada", 44.4, 364, 91.1, (8, 9)),
        _gpu("A100-80GB", 79.1, 312, 19.5, (8, 0)),
        _gpu("H100", 79.1, 989, 67, (9, 0)),
        _gpu("RTX-PRO-6000", 95.0, 503.8, 126, (12, 0)),
        _gpu("H200", 139.8, 989, 67, (9, 0)),
        _gpu("B200", 178.4, 2250, 75, (10, 0)),
    )
}
"""GPUs by name: memory as torch reports it, with ECC where it is on by default; speed from Nvidia's data sheets and
architecture whitepapers, without sparsity. GeForce cards accumulate in float32 at half the rate that is advertised,
which is for float16: 165 of the RTX 4090's 330. RTX-PRO-6000 is the Blackwell card (Workstation Edition), A10G the card
of AWS, T4 one of Kaggle's two."""

OLDEST = (7, 5)
"""Compute capability from which on torch has kernels in its builds for CUDA 12.8 and later (Turing): its support matrix
since release 2.11. The build for CUDA 12.6 still has them for older GPUs, so that of a GPU at hand the build is asked.
"""

TOO_OLD = {"P100": (6, 0), "V100": (7, 0)}
"""GPUs that people ask for and that are older, by name."""


def find_device(name: str | None) -> Device:
    """Return a device by name; None: the first GPU of this machine, or else its CPU; `cpu`: its CPU.

    Raises:
        InputError: no such device in the table, or a GPU that torch has no kernels for.
    """
    if name is None or name == "cpu":
        gpu = name is None and torch.cuda.is_available()
        return _measure_device(torch.device("cuda", 0) if gpu else torch.device("cpu"))
    if name in TOO_OLD:
        raise _too_old(f"--device: {name}", TOO_OLD[name])
    if name not in DEVICES:
        raise InputError(f"--device: no '{name}'{nearest(name, DEVICES)}; there are: cpu, {', '.join(DEVICES)}")
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
        raise _too_old(name, capability)


def _too_old(name: str, capability: tuple[int, int]) -> InputError:
    """Return the error to raise of a GPU that torch has no kernels for."""
    number = "{}.{}".format(*capability)
    return InputError(
        f"{name} has compute capability {number}, and torch's builds for CUDA 12.8 and later have no kernels below "
        f"{OLDEST[0]}.{OLDEST[1]}; choose a newer GPU, on Kaggle the accelerator T4 x2"
    )


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
