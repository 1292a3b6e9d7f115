"""An exported model in, a folder out that is ready to be a Kaggle data set: wheels, a notebook, metadata.

The notebook installs without an index, predicts on all GPUs, one process each, writes submission.csv and checks it.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rewardmodel.errors import InputError
from rewardmodel.exports.wheels import collect
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
        InputError: as `exports.wheels.collect`.
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
