"""An exported model in, a folder out that is ready to be a Kaggle data set: wheels, a notebook, metadata.

The notebook installs without an index, predicts on all GPUs, one process each, writes submission.csv and checks it.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import rewardmodel
from rewardmodel.errors import InputError
from rewardmodel.files import write_text

BUNDLED_MODEL = "model"
WHEELS, SCRIPT, NOTEBOOK, METADATA = "wheels", "inference.py", "inference.ipynb", "dataset-metadata.json"
"""What stands in a bundle, beside the model."""


@dataclass(frozen=True)
class Bundle:
    """What a bundle is for.

    Attributes:
        dataset: owner/name of the Kaggle data set.
        installed: a file of what is installed there, as `pip freeze` prints it.
        contents: the model inside, a name out of `exports.export.EXPORTS`.
        base: where the backbone is mounted there; for an adapter.
        python: the version there.

    Raises:
        InputError: no name that Kaggle takes.
    """

    dataset: str
    installed: Path
    contents: str = "adapter"
    base: str | None = None
    python: str = "3.12"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9-]+/[a-z0-9-]{6,50}", self.dataset):
            raise InputError(
                f"--dataset: '{self.dataset}'; give owner/name, the name 6 to 50 small letters, digits and hyphens"
            )

    @property
    def name(self) -> str:
        """The data set's name without its owner."""
        return self.dataset.partition("/")[2]


def write_bundle(bundle: Bundle, folder: Path) -> None:
    """Write all of a bundle but its model.

    Args:
        bundle: what it is for.
        folder: its folder, with the model in `BUNDLED_MODEL`.

    Raises:
        InputError: as `exports.kaggle.collect`.
    """
    collect(bundle.installed, bundle.python, folder / WHEELS)
    about = {"title": bundle.name.replace("-", " "), "id": bundle.dataset, "licenses": [{"name": "other"}]}
    write_text(folder / METADATA, json.dumps(about, indent=2) + "\n")
    text = script(bundle)
    write_text(folder / SCRIPT, text)
    write_text(folder / NOTEBOOK, json.dumps(notebook(text), indent=1) + "\n")


def script(bundle: Bundle) -> str:
    """Return the program of the notebook, its cells parted by `# %%`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    names = {"title": bundle.name.replace("-", " "), "dataset": bundle.dataset, "name": bundle.name}
    return environment.get_template("kaggle.py.jinja").render(**names, base=bundle.base, model=BUNDLED_MODEL)


def notebook(text: str) -> dict[str, Any]:
    """Return the Jupyter notebook (nbformat 4.5) of a program whose cells are parted by `# %%`."""
    cells = []
    for number, part in enumerate(re.split(r"^# %%", text, flags=re.MULTILINE)[1:]):
        kind, _, body = part.partition("\n")
        cell: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
        if "[markdown]" in kind:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append({**cell, "cell_type": "markdown", "source": "\n".join(lines)})
        else:
            cells.append({**cell, "cell_type": "code", "execution_count": None, "outputs": [], "source": body.strip()})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


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
