"""An exported model -> a folder that is ready to be a Kaggle data set: source, wheels, notebook, metadata.

The notebook installs wheels without an index, imports rewardmodel from the data set, predicts on all GPUs, one process
each, writes submission.csv and checks it.
"""

import json
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import rewardmodel
from rewardmodel.errors import InputError
from rewardmodel.exports.wheels import download_wheels, find_machines
from rewardmodel.files import write_text


@dataclass(frozen=True)
class Bundle:
    """Settings of a Kaggle bundle: the data set that it becomes, and the machine that it runs on.

    Attributes:
        dataset: owner/name of the Kaggle data set.
        installed: a file with what is installed there, as `wheels.read_installed` takes it; or several.
        contents: the model inside, a name from `exports.export.EXPORTS`.
        base: where the backbone is mounted there; for an adapter.
        python: the version there, or that of each file; default: the first line of each file says it.

    Raises:
        InputError: a name that Kaggle does not accept.
    """

    dataset: str
    installed: Path | Sequence[Path]
    contents: str = "adapter"
    base: str | None = None
    python: str | Sequence[str] = ()

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

    @property
    def machines(self) -> dict[str, Path]:
        """The files of `installed` by version of Python, as of `wheels.find_machines`."""
        lists = [self.installed] if isinstance(self.installed, Path) else self.installed
        return find_machines(lists, [self.python] if isinstance(self.python, str) else self.python)


def write_bundle(bundle: Bundle, unneeded: Collection[str], folder: Path) -> None:
    """Write all of a bundle except its model.

    Args:
        bundle: its settings.
        unneeded: packages that the model's prediction does not import, as of `wheels.unneeded_packages`.
        folder: its folder, with the model in model/.

    Raises:
        InputError: as `wheels.find_machines` and `wheels.download_wheels`.
    """
    copy_source(folder)
    download_wheels(bundle.machines, unneeded, folder / "wheels")
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
