"""What is installed on Kaggle and what a model's prediction imports -> wheels of what is missing there, by Python.

Packages of the other machine are left as they are, with one exception: those that are too old for rewardmodel, like the
transformers of an older image, are replaced, with what their newer version needs. What other packages there are built
for (`SHARED`) is never replaced.
"""

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from rewardmodel.config.schema import Recipe
from rewardmodel.errors import InputError
from rewardmodel.files import atomic_path, write_text
from rewardmodel.model.saved_model import is_adapter
from rewardmodel.model.weights import fetch_backbone

TRAINING_ONLY = {"trl": "trl", "matplotlib": "matplotlib", "argcomplete": "argcomplete"}
"""Packages that `rewardmodel predict` never imports, and the names by which the others import them."""

BLENDING = {"scikit-learn": "sklearn"}
"""Packages that only a run with `inference.blend` imports to predict."""

QUANTISED = {"bitsandbytes": "bitsandbytes"}
"""Packages that only a model that bitsandbytes quantises imports to predict."""

SHARED = r"torch|triton|nvidia-.*|cuda-.*|numpy|scipy|pandas|pyarrow|protobuf"
"""Packages, as a regular expression, that other packages of a machine are built for: too old ones are refused."""

WRITE_LIST = "(python -VV; pip freeze) > installed.txt"
"""The command that writes a list of what is installed."""


def unneeded_packages(recipe: Recipe, model: Path, contents: str) -> set[str]:
    """Return the packages that rewardmodel requires and that the prediction of an exported run does not import.

    Args:
        recipe: of the run.
        model: folder of the run's model.
        contents: kind of the export, a name from `exports.export.EXPORTS`.
    """
    unneeded = set(TRAINING_ONLY)
    if not recipe.inference.blend:
        unneeded |= set(BLENDING)
    quantised = recipe.model.load_in_4bit or recipe.model.load_in_8bit or _is_stored_quantised(recipe, model)
    if not (contents == "merged_4bit" or (contents == "adapter" and quantised)):
        unneeded |= set(QUANTISED)
    return unneeded


def _is_stored_quantised(recipe: Recipe, model: Path) -> bool:
    """Return whether the weights below an adapter are stored quantised, or cannot be looked at."""
    if not is_adapter(model):
        return False
    try:
        below = fetch_backbone(recipe.model.model_name_or_path, recipe.model.model_revision, weights=False)
        return "quantization_config" in json.loads((below / "config.json").read_text(encoding="utf-8"))
    except (InputError, OSError, ValueError):
        return True


def find_machines(lists: Sequence[Path], pythons: Sequence[str] = ()) -> dict[str, Path]:
    """Return the list of what is installed by version of Python, like `{"3.13": Path("new.txt")}`.

    Args:
        lists: files as of `read_installed`.
        pythons: the version of each, or several of a single list; default: as the first line of each list says.

    Raises:
        InputError: a version is not known, or contradicts the list; a version twice; or one that rewardmodel does not
            run on.
    """
    versions = [*pythons] or [_python_of(file) for file in lists]
    files = [*lists] * len(versions) if len(lists) == 1 else [*lists]
    if len(files) != len(versions):
        raise InputError(f"--python: {len(versions)} versions for {len(files)} lists; give one for each, or none")
    machines = dict(zip(versions, files, strict=True))
    if len(machines) < len(files):
        raise InputError("--python: the same version twice; give one list for each version of Python")
    for python, file in machines.items():
        _check_python(python)
        found = read_python(file)
        if found and found not in (versions if len(lists) == 1 else [python]):
            raise InputError(
                f"--python: {python}, but {file} is of Python {found}; leave --python out, or give its list"
            )
    return machines


def _python_of(file: Path) -> str:
    found = read_python(file)
    if not found:
        raise InputError(
            f"--python: {file} does not begin with the version of Python; give the version there, like --python 3.13, "
            f"or write the list there with `{WRITE_LIST}`"
        )
    return found


def _check_python(python: str) -> None:
    requires = metadata.metadata("rewardmodel")["Requires-Python"]
    if not re.fullmatch(r"3\.\d+", python) or not Requirement(f"python{requires}").specifier.contains(python):
        raise InputError(f"--python: {python}; rewardmodel needs {requires}: give the version there, like 3.13")


def read_python(file: Path) -> str | None:
    """Return the version of Python in the first line of a list, like 3.13 of `Python 3.13.15 (main, ...)`, if any.

    Raises:
        InputError: as `read_installed`.
    """
    found = re.match(r"Python (3\.\d+)", _read_list(file))
    return found[1] if found else None


def _read_list(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--installed: {file}: cannot be read ({error}); give what `{WRITE_LIST}` writes there"
        ) from error


def read_installed(file: Path) -> dict[str, Version]:
    """Return versions by canonical name from the output of `pip freeze` or `pip list --format freeze`.

    Raises:
        InputError: the file cannot be read, or names no package.
    """
    found: dict[str, Version] = {}
    for line in _read_list(file).splitlines():
        name, separator, version = line.partition(" @ ") if " @ " in line else line.partition("==")
        if separator == " @ ":  # conda and offline installations: torch @ file:///wheels/torch-2.11.0-cp312-….whl
            version = "".join(unquote(version).rpartition("/")[2].split("-")[1:2])
        try:
            found[canonicalize_name(name.strip())] = Version(version.split(";")[0].strip())
        except InvalidVersion:
            continue  # a comment, the version of Python, or a package from a folder
    if not found:
        raise InputError(f"--installed: {file} has no line like name==1.0; give what `{WRITE_LIST}` writes there")
    return found


def check_machines(machines: dict[str, Path], unneeded: Collection[str]) -> None:
    """Raise unless the wheels that the other machines lack could be downloaded for them.

    Args:
        machines: as of `find_machines`.
        unneeded: as for `find_missing`.

    Raises:
        InputError: as `read_installed` and `find_missing`.
    """
    for python, file in machines.items():
        find_missing(read_installed(file), python, unneeded)


def find_missing(installed: dict[str, Version], python: str, unneeded: Collection[str] = ()) -> dict[str, str]:
    """Return packages that are absent or too old there, with this machine's versions, dependencies included.

    Args:
        installed: versions there, by canonical name.
        python: the version there.
        unneeded: packages that rewardmodel requires and the model does not need, as of `unneeded_packages`.

    Returns:
        Versions by canonical name, like `{"peft": "0.21.2"}`.

    Raises:
        InputError: one that may not be replaced (`SHARED`) is too old.
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
            name = canonicalize_name(requirement.name)
            if not _applies(requirement, target, extras) or (package == "rewardmodel" and name in unneeded):
                continue
            version = installed.get(name)
            satisfied = version is not None and requirement.specifier.contains(version, prereleases=True)
            if not satisfied and (version or name == "torch") and re.fullmatch(SHARED, name):
                has = f"{name} {version}" if version else f"no {name}"
                raise InputError(
                    f"--installed: has {has}, but {package} needs {name}{requirement.specifier}; it is not bundled, "
                    "because drivers or other packages there depend on it: use a newer image there"
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


def download_wheels(machines: dict[str, Path], unneeded: Collection[str], folder: Path) -> None:
    """Download the wheels that the other machines lack into a folder for each Python, with a list of them.

    Args:
        machines: lists of what is installed, by version of Python, as of `find_machines`.
        unneeded: as for `find_missing`.
        folder: where to; of 3.13 in folder/3.13, with requirements.txt, which is there even if nothing is missing.

    Raises:
        InputError: as `find_missing`, or a wheel that pip cannot download.
    """
    for python, file in machines.items():
        installed = read_installed(file)
        missing = find_missing(installed, python, unneeded)
        wanted = [f"{name}=={version}" for name, version in sorted(missing.items())]
        listed = [f"# not installed, or too old, on the Python {python} that this bundle is for", *wanted]
        write_text(folder / python / "requirements.txt", "\n".join(listed) + "\n")
        _download(wanted, python, folder / python)
        cuda = re.fullmatch(r"cu(\d+)", installed["torch"].local or "")  # of 2.11.0+cu128
        for wheel in (folder / python).glob("bitsandbytes-*.whl"):
            if cuda:
                keep_cuda(wheel, cuda[1])


def _download(wanted: Sequence[str], python: str, folder: Path) -> None:
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


def keep_cuda(wheel: Path, version: str) -> None:
    """Rewrite bitsandbytes' wheel without the libraries of other GPUs and CUDA versions: they are most of its size.

    Args:
        wheel: left as it is if it has no library for that version.
        version: of the CUDA that torch was built with, like 128 for 12.8.
    """
    kept = f"bitsandbytes/libbitsandbytes_cuda{version}.so"
    with zipfile.ZipFile(wheel) as source:
        names = source.namelist()
        libraries = {name for name in names if re.search(r"/libbitsandbytes_(cuda|rocm|xpu)\w*\.so$", name)}
        if kept not in libraries:
            return
        dropped = libraries - {kept}
        with atomic_path(wheel) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as target:
            for name in [name for name in names if name not in dropped]:
                content = source.read(name)
                if name.endswith(".dist-info/RECORD"):  # lines like: file,sha256=...,size
                    lines = content.decode().splitlines(keepends=True)
                    content = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
                target.writestr(name, content)
