"""An exported model -> a folder that is ready to be a Kaggle data set: source, wheels, notebook, metadata.

The notebook installs wheels without an index, imports rewardmodel from the data set, predicts on all GPUs, one process
each, writes submission.csv and checks it.
"""

import json
import re
import shutil
import subprocess
import sys
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


@dataclass(frozen=True)
class Bundle:
    """Settings of a Kaggle bundle: the data set that it becomes, and the machine that it runs on.

    Attributes:
        dataset: owner/name of the Kaggle data set.
        installed: a file with what is installed there, as `pip freeze` prints it.
        contents: the model inside, a name from `exports.export.EXPORTS`.
        base: where the backbone is mounted there; for an adapter.
        python: the version there.

    Raises:
        InputError: a name that Kaggle does not accept.
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

    @property
    def title(self) -> str:
        """The data set's title."""
        return self.name.replace("-", " ")


def write_bundle(bundle: Bundle, folder: Path) -> None:
    """Write all of a bundle except its model.

    Args:
        bundle: its settings.
        folder: its folder, with the model in model/.

    Raises:
        InputError: as `download_wheels`.
    """
    copy_source(folder)
    download_wheels(bundle.installed, bundle.python, folder / "wheels")
    about = {"title": bundle.title, "id": bundle.dataset, "licenses": [{"name": "other"}]}
    write_text(folder / "dataset-metadata.json", json.dumps(about, indent=2) + "\n")
    script = render_script(bundle)
    write_text(folder / "inference.py", script)
    write_text(folder / "inference.ipynb", json.dumps(build_notebook(script), indent=1) + "\n")


def copy_source(folder: Path) -> None:
    """Copy the package that is running, installed or from a source tree, into a folder, which then can be imported."""
    package = Path(rewardmodel.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def render_script(bundle: Bundle) -> str:
    """Return the notebook's program, its cells separated by `# %%`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("kaggle.py.jinja").render(bundle=bundle)


def build_notebook(script: str) -> dict[str, Any]:
    """Return the Jupyter notebook (nbformat 4.5) of a program whose cells are separated by `# %%`."""
    cells = []
    for number, part in enumerate(re.split(r"^# %%", script, flags=re.MULTILINE)[1:]):
        kind, _, body = part.partition("\n")
        cell: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
        if "[markdown]" in kind:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append({**cell, "cell_type": "markdown", "source": "\n".join(lines)})
        else:
            cells.append({**cell, "cell_type": "code", "execution_count": None, "outputs": [], "source": body.strip()})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


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
