"""GPUs by name -> memory, speed and compute capability; needs no torch, so that a wrong name is told at once."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewardmodel.errors import InputError, nearest

if TYPE_CHECKING:
    import torch

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

    def rate(self, dtype: "torch.dtype") -> float:
        """Return the floating-point operations per second in a precision."""
        return self.single if str(dtype) == "torch.float32" else self.half


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


def check_device(name: str | None) -> None:
    """Raise unless a name is None (this machine's device), `cpu`, or that of a GPU in the table.

    Raises:
        InputError: no such device in the table, or a GPU that torch has no kernels for.
    """
    if name in TOO_OLD:
        raise too_old(f"--device: {name}", TOO_OLD[name])
    known = ("cpu", *DEVICES)
    if name is not None and name not in known:
        raise InputError(f"--device: no device '{name}'{nearest(name, known)}; known: {', '.join(known)}")


def too_old(name: str, capability: tuple[int, int]) -> InputError:
    """Return the error to raise of a GPU that torch has no kernels for."""
    number = "{}.{}".format(*capability)
    return InputError(
        f"{name} has compute capability {number}, and torch's builds for CUDA 12.8 and later have no kernels below "
        f"{OLDEST[0]}.{OLDEST[1]}; choose a newer GPU, on Kaggle the accelerator T4 x2"
    )
