"""A bundle with model, source and wheels -> its marker, its notebook, Kaggle's metadata and a README.

The notebook has the standard library alone until its bundle is found and its wheels are installed, so the sources of
`kaggle_inputs`, `kaggle_checks` and `model.weights.fingerprint` are cells of it.
"""

import inspect
import json
import pprint
import re
from collections.abc import Collection, Sequence
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rewardmodel.exports import kaggle_checks, kaggle_inputs
from rewardmodel.exports.kaggle import ACCELERATORS, INPUTS, Bundle
from rewardmodel.exports.kaggle_inputs import MARKER, digest_config, digest_file
from rewardmodel.files import write_json, write_text
from rewardmodel.model.saved_model import read_about
from rewardmodel.model.weights import fingerprint

COMPETITION = "llm-classification-finetuning"
"""Name of the competition in Kaggle's addresses."""

CHECKED = ("model", "wheels", "rewardmodel")
"""Folders of a bundle whose files the notebook compares with their digests."""


def write_notebook(
    bundle: Bundle, folder: Path, backbone: Path | None, pythons: Sequence[str], unneeded: Collection[str] = ()
) -> None:
    """Write what tells a bundle, a folder with model, source and wheels, to Kaggle and to people.

    Args:
        bundle: its settings.
        folder: its folder.
        backbone: folder here of the backbone that its adapter belongs to; None: the model is whole.
        pythons: versions of Python that its wheels are for.
        unneeded: packages that rewardmodel requires and that this model's prediction does not import.
    """
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, digest_file(path)]
        for name in CHECKED
        for path in sorted((folder / name).rglob("*"))
        if path.is_file() and path.stat().st_size  # some ways to upload leave empty files out
    }
    required = read_requirements(unneeded)
    wanted = {**describe(bundle, folder / "model", backbone, files), "pythons": list(pythons), "requires": required}
    write_json(folder / MARKER, {**wanted, "files": files})
    script = render("kaggle.py.jinja", bundle, wanted)
    write_text(folder / "inference.py", script)
    write_text(folder / "inference.ipynb", json.dumps(build_notebook(script), indent=1) + "\n")
    write_text(folder / "README.md", render("kaggle.md.jinja", bundle, wanted))
    write_json(folder / "dataset-metadata.json", dataset_metadata(bundle))
    write_json(folder / "kernel-metadata.json", kernel_metadata(bundle))


def describe(bundle: Bundle, model: Path, backbone: Path | None, files: dict[str, Any]) -> dict[str, Any]:
    """Return what a notebook knows of its bundle.

    Args:
        bundle: its settings.
        model: folder of its model.
        backbone: as for `write_notebook`.
        files: its files, with sizes and digests.

    Returns:
        `id`, a digest of all files; `dataset`, `competition` and `accelerator` by name; `python`, the range of
        versions that it runs on; `weights`, their bytes; and `backbone`: None, or its `source`, `path`, `config` and
        `fingerprint`, as for `kaggle_inputs.find_backbone`.
    """
    folder = backbone or model
    weights = sum(path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
    base = None
    if backbone:
        base = {
            "source": bundle.base_source or bundle.base,
            "path": bundle.base_folder,
            "config": digest_config(backbone / "config.json"),
            "fingerprint": read_about(model)["fingerprint"],
        }
    return {
        "id": sha256(json.dumps([files, base], sort_keys=True).encode()).hexdigest()[:16],
        "dataset": bundle.dataset,
        "competition": COMPETITION,
        "accelerator": ACCELERATORS[bundle.accelerator].menu,
        "python": metadata.metadata("rewardmodel")["Requires-Python"],
        "weights": weights,
        "backbone": base,
    }


def read_requirements(unneeded: Collection[str] = ()) -> dict[str, str]:
    """Return the versions that rewardmodel needs by package, like `{"torch": ">=2.10"}`, without unneeded packages."""
    required = [Requirement(text) for text in metadata.requires("rewardmodel") or []]
    named = {canonicalize_name(one.name): str(one.specifier) for one in required if one.marker is None}
    return {name: versions for name, versions in named.items() if name not in unneeded}


def dataset_metadata(bundle: Bundle) -> dict[str, Any]:
    """Return the content of dataset-metadata.json, which `kaggle datasets create` reads."""
    return {"title": bundle.title, "id": bundle.dataset, "licenses": [{"name": "other"}]}


def kernel_metadata(bundle: Bundle) -> dict[str, Any]:
    """Return the content of kernel-metadata.json, which `kaggle kernels push` reads."""
    source = bundle.base_source
    is_model = source is not None and source.count("/") == 4
    return {
        "id": bundle.dataset,
        "title": bundle.title,
        "code_file": "inference.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": False,
        "machine_shape": ACCELERATORS[bundle.accelerator].machine_shape,
        "dataset_sources": [bundle.dataset, *([source] if source and not is_model else [])],
        "competition_sources": [COMPETITION],
        "model_sources": [source] if source and is_model else [],
        "kernel_sources": [],
    }


def render(template: str, bundle: Bundle, wanted: dict[str, Any]) -> str:
    """Return the notebook's program, its cells separated by `# %%`, or the README.

    Args:
        template: file in this folder.
        bundle: its settings.
        wanted: as `describe` returns it.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template(template).render(
        bundle=bundle,
        wanted=wanted,
        wanted_code=pprint.pformat(wanted, width=110, sort_dicts=False),
        inputs=INPUTS,
        search=f"{inspect.getsource(kaggle_inputs)}\n\n{inspect.getsource(fingerprint)}".strip(),
        checks=inspect.getsource(kaggle_checks).strip(),
    )


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
