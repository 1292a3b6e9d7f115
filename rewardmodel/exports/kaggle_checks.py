"""A bundle and the machine -> what would stop the notebook later, a sentence each with what to do.

The source of this module is a cell of every bundle's notebook, which checks before it installs anything; so it has the
standard library alone.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

GIB = 2**30

OLDEST_GPU = (7, 5)
"""Compute capability from which on torch's builds for CUDA 12.8 have kernels, as `planning.gpus.OLDEST`."""

BLACKWELL, BLACKWELL_CUDA = (10, 0), 128
"""Compute capability from which on a build for CUDA 12.8 or later is needed."""

REJECTED_BELOW = {"torchao": "0.16.0", "gptqmodel": "7.0.0"}
"""Optional packages that PEFT raises an error for if they are older (its import_utils.py)."""

MEMORY_PER_PROCESS = 3 * GIB
"""Bytes of host memory that a process takes with torch and CUDA, weights left out: an estimate."""

OUTPUT_BYTES = GIB
"""Bytes that predictions of 25,000 battles, in parts and as a whole, may take: ample."""

UNPACKED = 4
"""Size of an installed wheel, relative to the wheel: an estimate, of which compiled packages need most."""

ENVIRONMENT = "Settings > Environment > Always use latest environment"
"""Where a newer image is chosen in a Kaggle notebook."""


class Gpu(NamedTuple):
    """A GPU of this machine.

    Attributes:
        name: like Tesla T4.
        capability: CUDA compute capability, like (7, 5).
    """

    name: str
    capability: tuple[int, ...]


def read_gpus() -> list[Gpu]:
    """Return the GPUs that nvidia-smi lists."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return []
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    split = [line.rpartition(",") for line in lines if "," in line]
    return [Gpu(name.strip(), read_version(capability)) for name, _, capability in split]


def launcher(processes: int) -> list[str]:
    """Return the words after `python` that start a module in several processes, a GPU each; for one, none."""
    words = ["-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_machines", "1", "--num_processes"]
    words += [str(processes), "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return words if processes > 1 else []


def check_gpus(gpus: list[Gpu], wanted: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the GPUs, and print them with the precision that each computes in.

    Args:
        gpus: of this machine.
        wanted: `accelerator`, its name in Kaggle's menu, and `weights`, bytes of the model's weights.
    """
    choose = f"choose Settings > Accelerator > {wanted['accelerator']}"
    if not gpus:
        print(f"no GPU: predicting on the CPU; to use GPUs, {choose}")
        too_slow = "KAGGLE_KERNEL_RUN_TYPE" in os.environ and wanted["weights"] > GIB
        return [f"there is no GPU, and a model of {wanted['weights'] / GIB:.1f} GiB needs one: {choose}"] * too_slow
    problems = []
    build = re.search(r"\+cu(\d+)", _installed("torch") or "")
    for number, (name, capability) in enumerate(gpus):
        shown = ".".join(map(str, capability))
        precision = "bfloat16" if capability >= (8, 0) else "float16"
        print(f"GPU {number}: {name}, compute capability {shown}: {precision}")
        if capability < OLDEST_GPU:
            oldest = ".".join(map(str, OLDEST_GPU))
            problems.append(f"{name} has compute capability {shown}, and torch has no kernels below {oldest}: {choose}")
        elif capability >= BLACKWELL and build and int(build[1]) < BLACKWELL_CUDA:
            problems.append(
                f"{name} needs torch for CUDA 12.8, and this one is for {build[0][1:]}: choose {ENVIRONMENT}"
            )
    return list(dict.fromkeys(problems))


def choose_wheels(folder: Path, pythons: Iterable[str] = ()) -> tuple[dict[str, Path], list[str]]:
    """Return the wheels of a folder that fit this Python, by package, and the packages that have none that does.

    Of the latter, those that are installed in the same or a later version are left out.

    Args:
        folder: of the wheels, or of folders by version of Python, like 3.13/, of which this Python's is read.
        pythons: versions that the bundle is for: one without a folder lacks nothing.
    """
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    by_version = any(re.fullmatch(r"\d+\.\d+", path.name) for path in folder.glob("*/"))
    own = folder / here if by_version else folder
    if by_version and not own.is_dir() and here in pythons:
        return {}, []
    wheels = sorted((own if own.is_dir() else folder).rglob("*.whl"))
    fitting = {_package(path): path for path in wheels if own.is_dir() and fits(path.name)}
    others = {_package(path): path.name.split("-")[1] for path in wheels if _package(path) not in fitting}
    return fitting, sorted(name for name, version in others.items() if not _is_installed(name, version))


def fits(wheel: str) -> bool:
    """Return whether this Python on this machine can install a wheel, from its file name."""
    pythons, interfaces, platforms = wheel.removesuffix(".whl").split("-")[-3:]
    major, minor = sys.version_info[:2]
    python = any(
        tag in (f"cp{major}{minor}", f"py{major}", f"py{major}{minor}")
        or (tag.startswith(f"cp{major}") and "abi3" in interfaces and 2 <= int(tag[3:] or 2) <= minor)
        for tag in pythons.split(".")
    )
    return python and any(tag == "any" or _runs_here(tag) for tag in platforms.split("."))


def _runs_here(tag: str) -> bool:
    """Return whether a wheel's platform, like manylinux_2_28_x86_64, is this machine's, its glibc included."""
    if not tag.endswith(f"_{platform.machine().lower()}") or "linux" not in tag:
        return False
    needed = {"manylinux1": "2.5", "manylinux2010": "2.12", "manylinux2014": "2.17"}.get(tag.partition("_")[0])
    match = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    needed = f"{match[1]}.{match[2]}" if match else needed
    here = platform.libc_ver()[1]
    return needed is None or not here or read_version(needed) <= read_version(here)


def check_packages(wanted: Mapping[str, Any], wheels: Mapping[str, Path], unfit: Iterable[str]) -> list[str]:
    """Return what is wrong with Python and the packages, those in the bundle's wheels included.

    Args:
        wanted: `python`, like >=3.11; `pythons`, like ["3.12"], that the wheels are for; and `requires`, like
            {"torch": ">=2.10"}.
        wheels: those that fit, by package.
        unfit: packages whose wheels are all for another Python or machine.
    """
    here, names = f"{sys.version_info[0]}.{sys.version_info[1]}", ", ".join(unfit)
    pythons = " and ".join(wanted["pythons"])
    if not satisfies(here, wanted["python"]):
        return [f"this is Python {here}, and the model needs {wanted['python']}: choose {ENVIRONMENT}"]
    if names:
        what = f"the wheels of {names} are for Python {pythons} on Linux, x86_64"
        machine = f"this is Python {here} on {platform.system()}, {platform.machine()}"
        other = f"choose another image in Settings > Environment, or export again with --python {here}"
        return [f"{what}, and {machine}: {other}"]
    missing = {}  # package -> what there is and what is needed: {"peft": "peft 0.10 (needs >=0.21)"}
    for name, specifier in wanted["requires"].items():
        version = wheels[name].name.split("-")[1] if name in wheels else _installed(name)
        if version is None or not satisfies(version, specifier):
            missing[name] = f"{name} {version or 'is not installed'} (needs {specifier})"
    torch = missing.pop("torch", None)
    problems = [f"{torch}, which belongs to the image: choose {ENVIRONMENT}"] * bool(torch)
    if missing:
        fix = f"choose {ENVIRONMENT}, or export again with --installed of what pip freeze prints here"
        problems.append(
            f"missing or too old here, and not in the bundle's wheels: {', '.join(missing.values())}: {fix}"
        )
    return problems


def find_rejected(wheels: Mapping[str, Path]) -> dict[str, str]:
    """Return installed packages that PEFT rejects because they are too old, with their versions."""
    found = {name: _installed(name) for name in REJECTED_BELOW if name not in wheels}
    return {name: here for name, here in found.items() if here and not satisfies(here, f">={REJECTED_BELOW[name]}")}


def check_rejected(rejected: Mapping[str, str]) -> list[str]:
    """Return what to do where a rejected package is not this notebook's to remove: outside of Kaggle."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return []  # the notebook uninstalls them for its session
    return [
        f"{name} {here} is installed, and PEFT rejects it below {REJECTED_BELOW[name]}: run pip uninstall {name}"
        for name, here in rejected.items()
    ]


def check_room(output: Path, wheels: Iterable[Path], processes: int) -> list[str]:
    """Return what is wrong with disk and memory.

    Args:
        output: the submission, in whose folder is written.
        wheels: to install.
        processes: that predict.
    """
    problems = []
    places = [(output.absolute().parent, OUTPUT_BYTES)]
    unpacked = UNPACKED * sum(path.stat().st_size for path in wheels)
    places += [(Path(sys.prefix), unpacked)] * bool(unpacked)
    for place, needed in places:
        free = _free_bytes(place)
        if free is None:
            problems.append(f"{place} cannot be written to: in Kaggle's menu, choose Run > Restart session")
        elif free < needed:
            what = f"{place} has {free / GIB:.1f} GiB free, and {needed / GIB:.1f} are needed"
            problems.append(f"{what}: delete what is in /kaggle/working, or choose Run > Restart session")
    available = _available_memory()
    if available is not None and available < processes * MEMORY_PER_PROCESS:
        what = f"{available / GIB:.1f} GiB of memory are free, and {processes} processes need about"
        fix = "choose Run > Restart session, and nothing else in this notebook"
        problems.append(f"{what} {processes * MEMORY_PER_PROCESS / GIB:.0f}: {fix}")
    return problems


def _free_bytes(folder: Path) -> int | None:
    """Return the bytes that are free in a folder; None: it cannot be written to."""
    try:
        return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else None
    except OSError:
        return None


def _available_memory() -> int | None:
    """Return the bytes of memory that can be taken, as Linux estimates them; None: it does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"^MemAvailable: *(\d+) kB", text, flags=re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def read_version(text: str) -> tuple[int, ...]:
    """Return the release of a version: (2, 11, 0) of 2.11.0+cu128."""
    match = re.match(r"\s*v?(\d+(?:\.\d+)*)", text)
    return tuple(map(int, match[1].split("."))) if match else ()


def satisfies(version: str, specifier: str) -> bool:
    """Return whether a version is in a range like `>=5.17,<6`; releases are compared, and 6.0.0rc1 counts as 6.0.0.

    Raises:
        ValueError: an operator that is not one of these six.
    """
    operators: dict[str, Callable[[Any, Any], bool]] = {
        ">=": lambda here, there: here >= there,
        "<=": lambda here, there: here <= there,
        "==": lambda here, there: here == there,
        "!=": lambda here, there: here != there,
        ">": lambda here, there: here > there,
        "<": lambda here, there: here < there,
    }
    for clause in filter(None, specifier.replace(" ", "").split(",")):
        operator = next((one for one in operators if clause.startswith(one)), "")
        if not operator:
            raise ValueError(f"{specifier}: only {', '.join(operators)} are understood")
        here, there = read_version(version), read_version(clause.removeprefix(operator))
        size = max(len(here), len(there))
        padded = ((*one, *[0] * (size - len(one))) for one in (here, there))
        if not operators[operator](*padded):
            return False
    return True


def _package(wheel: Path) -> str:
    """Return the canonical name of a wheel's package."""
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


def _is_installed(name: str, version: str) -> bool:
    """Return whether a package is installed in a version or a later one."""
    here = _installed(name)
    return here is not None and satisfies(here, f">={version}")


def _installed(name: str) -> str | None:
    """Return the version of an installed package; None: it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
