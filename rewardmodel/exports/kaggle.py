"""An exported model -> a folder that is ready to be a Kaggle data set: its settings, the source, and the wheels.

What is written next to them, the notebook and the metadata, is made by `kaggle_notebook`.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import rewardmodel
from rewardmodel.errors import InputError, nearest

INPUTS = "/kaggle/input"
"""Folder of all inputs of a Kaggle notebook."""

HIDDEN_BATTLES = 25_000
"""Battles that the competition scores a notebook on, about."""

RUN_SECONDS = 9 * 3600
"""Seconds after which Kaggle ends a notebook."""


class Accelerator(NamedTuple):
    """GPUs that a Kaggle notebook can have.

    Attributes:
        menu: what Kaggle's menu calls them.
        machine_shape: what kernel-metadata.json calls them.
        device: one of them in `planning.devices.DEVICES`.
        gpus: how many.
    """

    menu: str
    machine_shape: str
    device: str
    gpus: int


ACCELERATORS = {
    "t4x2": Accelerator("GPU T4 x2", "NvidiaTeslaT4", "T4", 2),
    "rtx-pro-6000": Accelerator("RTX PRO 6000", "NvidiaRtxPro6000", "RTX-PRO-6000", 1),
}
"""Accelerators by name. Machine shapes are those of docs/kernels.md in Kaggle's command line: NvidiaTeslaT4 is two T4s.
For a shape that it does not have, Kaggle silently takes another GPU, which the notebook's checks then name."""


@dataclass(frozen=True)
class Bundle:
    """Settings of a Kaggle bundle: the data set that it becomes, and the machine that it runs on.

    Attributes:
        dataset: owner/name of the Kaggle data set.
        installed: a file with what is installed there, as `pip freeze` prints it.
        contents: the model inside, a name from `exports.export.EXPORTS`.
        base: the backbone there, for an adapter: a Kaggle model, owner/model/framework/variation/version, a data set,
            owner/name, or the folder where it is mounted.
        python: the version there.
        accelerator: a name from `ACCELERATORS`.
        time_limit: seconds of the notebook in which battles are still predicted in the second order of A and B.

    Raises:
        InputError: a name that Kaggle does not accept, or a time limit beyond that of Kaggle.
    """

    dataset: str
    installed: Path
    contents: str = "adapter"
    base: str | None = None
    python: str = "3.12"
    accelerator: str = "t4x2"
    time_limit: float = 8.5 * 3600

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9-]+/[a-z0-9-]{6,50}", self.dataset):
            raise InputError(
                f"--dataset: '{self.dataset}'; give owner/name, the name 6 to 50 small letters, digits and hyphens"
            )
        if self.accelerator not in ACCELERATORS:
            hint = nearest(self.accelerator, ACCELERATORS)
            raise InputError(f"--accelerator: '{self.accelerator}'{hint}; known: {', '.join(ACCELERATORS)}")
        if not 0 < self.time_limit < RUN_SECONDS:
            raise InputError(f"--time-limit: {self.time_limit:g}; give seconds below {RUN_SECONDS}, Kaggle's own limit")

    @property
    def base_source(self) -> str | None:
        """The backbone's name on Kaggle, like google/gemma-2/transformers/gemma-2-9b-it/2; None: not known."""
        name = (self.base or "").rstrip("/")
        for kind in ("models", "datasets"):
            name = name.removeprefix(f"{INPUTS}/{kind}/")
        return name if name.count("/") in (1, 4) and all(name.split("/")) else None

    @property
    def base_folder(self) -> str | None:
        """Where the backbone is expected to be mounted."""
        source = self.base_source
        if source is None:
            return self.base
        return f"{INPUTS}/{'models' if source.count('/') == 4 else 'datasets'}/{source}"

    @property
    def name(self) -> str:
        """The data set's name without its owner."""
        return self.dataset.partition("/")[2]

    @property
    def title(self) -> str:
        """The data set's title."""
        return self.name.replace("-", " ")


def write_bundle(bundle: Bundle, folder: Path) -> None:
    """Write source and wheels of a bundle.

    Args:
        bundle: its settings.
        folder: its folder.

    Raises:
        InputError: as `download_wheels`.
    """
    copy_source(folder)
    download_wheels(bundle.installed, bundle.python, folder / "wheels")


def copy_source(folder: Path) -> None:
    """Copy the package that is running, installed or from a source tree, into a folder, which then can be imported."""
    package = Path(rewardmodel.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def download_wheels(installed: Path, python: str, folder: Path) -> None:
    """Download the wheels that the other machine lacks for rewardmodel; without any, no folder is made.

    Args:
        installed: as of `check_installed`.
        python: the version there.
        folder: where to.

    Raises:
        InputError: as `check_installed`, or a wheel that pip cannot download.
    """
    wanted = [f"{name}=={version}" for name, version in sorted(check_installed(installed, python).items())]
    if not wanted:
        return
    # wheels for CPython on Linux with glibc 2.35 or later
    platforms = ["manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(17, 36))]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    command += [word for platform in platforms for word in ("--platform", platform)]
    done = subprocess.run([*command, "--dest", str(folder), *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise InputError(
            f"--installed: pip cannot download {', '.join(wanted)} ({reason}); install them there, or go online"
        )


def check_installed(installed: Path, python: str) -> dict[str, str]:
    """Return the packages, with versions, that the other machine lacks for rewardmodel, like `{"peft": "0.21.0"}`.

    Args:
        installed: a file with what is installed there, as of `read_installed`.
        python: the version there, like 3.11.

    Raises:
        InputError: no such list, a Python that rewardmodel does not run on, or torch is too old there.
    """
    requires = metadata.metadata("rewardmodel")["Requires-Python"]
    if not re.fullmatch(r"3\.\d+", python) or not Requirement(f"python{requires}").specifier.contains(python):
        raise InputError(f"--python: {python}; rewardmodel needs {requires}: give the version there, like 3.11")
    return find_missing(read_installed(installed), python)


def read_installed(file: Path) -> dict[str, Version]:
    """Return versions by canonical name from the output of `pip freeze` or `pip list --format freeze`.

    Raises:
        InputError: the file cannot be read, or names no package.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--installed: {file}: cannot be read ({error}); give what pip freeze prints there") from error
    found: dict[str, Version] = {}
    for line in lines:
        name, separator, version = line.partition(" @ ") if " @ " in line else line.partition("==")
        if separator == " @ ":  # conda and offline installations: torch @ file:///wheels/torch-2.11.0-cp312-….whl
            version = "".join(unquote(version).rpartition("/")[2].split("-")[1:2])
        try:
            found[canonicalize_name(name.strip())] = Version(version.split(";")[0].strip())
        except InvalidVersion:
            continue  # a comment, or a package from a folder
    if not found:
        raise InputError(f"--installed: {file} has no line like name==1.0; give what pip freeze prints there")
    return found


def find_missing(installed: dict[str, Version], python: str) -> dict[str, str]:
    """Return packages that are absent or too old there, with this machine's versions, dependencies included.

    Args:
        installed: versions there, by canonical name.
        python: the version there.

    Raises:
        InputError: torch, or another package that belongs to the machine's drivers, is too old.
    """
    target = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    target |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    missing: dict[str, str] = {}
    seen = set()
    # packages whose requirements are still to be checked, and their extras: [("rewardmodel", {}), ("httpx", {"http2"})]
    queue = [("rewardmodel", frozenset[str]())]
    while queue:
        package, extras = queue.pop()
        for text in metadata.requires(package) or []:
            requirement = Requirement(text)
            if not _applies(requirement, target, extras):
                continue
            name = canonicalize_name(requirement.name)
            version = installed.get(name)
            satisfied = version is not None and requirement.specifier.contains(version, prereleases=True)
            if version and not satisfied and re.fullmatch(r"torch|triton|nvidia-.*|cuda-.*", name):
                raise InputError(
                    f"--installed: has {name} {version}, but {package} needs {requirement.specifier}; {name} belongs "
                    "to the machine's drivers and is not bundled: use a newer image there"
                )
            key = (name, frozenset(requirement.extras))
            if (satisfied and not requirement.extras) or key in seen:
                continue
            seen.add(key)
            if not satisfied:
                missing[name] = metadata.version(name)
            queue.append(key)
    return missing


def _applies(requirement: Requirement, target: dict[str, Any], extras: frozenset[str]) -> bool:
    """Return whether a requirement's marker holds on the other machine for any of the extras, or without one."""
    return requirement.marker is None or any(
        requirement.marker.evaluate({**target, "extra": extra}) for extra in (extras or {""})
    )
