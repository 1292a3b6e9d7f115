"""What a machine without a network has installed in, the wheels that it lacks for rewardmodel out.

Versions are those of this machine, with which the run was made: what is missing there is downloaded at them.
"""

import base64
import hashlib
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import rewardmodel
from rewardmodel.errors import InputError

NAME = "rewardmodel"

NEVER = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
"""Packages that fit the drivers of their machine: used as they are there, or refused."""

PLATFORMS = ["manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(17, 36))]
"""Of wheels that a Linux machine with glibc 2.35 can install."""


def read_installed(file: Path) -> dict[str, Version]:
    """Return versions by canonical name out of the text of `pip freeze` or `pip list --format freeze`.

    Raises:
        InputError: it cannot be read, or names no package.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--installed: {file}: no list can be read there ({error}); give what pip freeze prints"
        ) from error
    found: dict[str, Version] = {}
    for line in lines:
        name, at, version = line.partition(" @ ") if " @ " in line else line.partition("==")
        if at == " @ ":  # as conda and offline installations have it: only the file's name tells the version
            version = "".join(unquote(version).rpartition("/")[2].split("-")[1:2])
        try:
            found[canonicalize_name(name.strip())] = Version(version.split(";")[0].strip())
        except InvalidVersion:
            continue  # a comment, or a package from a folder
    if not found:
        raise InputError(f"--installed: {file} has no line like name==1.0; give what pip freeze prints there")
    return found


def check_installed(file: Path, python: str) -> dict[str, str]:
    """Return the packages, with versions, that a machine with such a list lacks for rewardmodel.

    Args:
        file: as `read_installed` takes it.
        python: the version there, like 3.11.

    Raises:
        InputError: no such list, a Python that rewardmodel does not run on, or too old a torch.
    """
    requires = metadata.metadata(NAME)["Requires-Python"]
    if not re.fullmatch(r"3\.\d+", python) or not Requirement(f"python{requires}").specifier.contains(python):
        raise InputError(f"--python: {python}; rewardmodel needs {requires}: give the version there, like 3.11")
    return missing(read_installed(file), python)


def missing(installed: dict[str, Version], python: str) -> dict[str, str]:
    """Return name -> version of what is absent or too old, at this machine's versions, their dependencies included."""
    there = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    there |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    wanted: dict[str, str] = {}
    seen = set()
    queue = [(NAME, frozenset[str]())]
    while queue:
        package, extras = queue.pop()
        for text in metadata.requires(package) or []:
            one = Requirement(text)
            if not _applies(one, there, extras):
                continue
            name, has = canonicalize_name(one.name), installed.get(canonicalize_name(one.name))
            satisfied = has is not None and one.specifier.contains(has, prereleases=True)
            if not satisfied and has and NEVER.fullmatch(name):
                raise InputError(
                    f"--installed: has {name} {has}, but {package} needs {one.specifier}; {name} goes with the machine "
                    "and is not bundled: use a newer image there"
                )
            key = (name, frozenset(one.extras))
            if (satisfied and not one.extras) or key in seen:
                continue
            seen.add(key)
            if not satisfied:
                wanted[name] = metadata.version(name)
            queue.append(key)
    return wanted


def _applies(requirement: Requirement, there: dict[str, Any], extras: frozenset[str]) -> bool:
    return requirement.marker is None or any(
        requirement.marker.evaluate({**there, "extra": extra}) for extra in (extras or {""})
    )


def collect(file: Path, python: str, folder: Path) -> None:
    """Write to a folder the wheel of rewardmodel and those that a machine lacks; arguments as of `check_installed`.

    Raises:
        InputError: as `check_installed`, or a wheel that pip cannot get.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own_wheel(folder)
    wanted = [f"{name}=={version}" for name, version in sorted(check_installed(file, python).items())]
    if not wanted:
        return
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    done = subprocess.run([*pip, *target, "--dest", str(folder), *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"--installed: pip cannot download {', '.join(wanted)}: {reason}")


def own_wheel(folder: Path) -> Path:
    """Write the wheel of the rewardmodel that is running, installed or in a source tree, and return its path.

    The format is that of https://packaging.python.org/en/latest/specifications/binary-distribution-format/.
    """
    package, version = Path(rewardmodel.__file__).parent, metadata.version(NAME)
    about = f"{NAME}-{version}.dist-info"
    installed = metadata.distribution(NAME)
    files = {
        f"{NAME}/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    told = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""  # the latter in a source tree
    files[f"{about}/METADATA"] = told.encode()
    files[f"{about}/entry_points.txt"] = (installed.read_text("entry_points.txt") or "").encode()
    files[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: rewardmodel\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in files.items()]
    files[f"{about}/RECORD"] = ("\n".join([*record, f"{about}/RECORD,,"]) + "\n").encode()
    wheel = folder / f"{NAME}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return wheel


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
