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
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rewardmodel.exports import kaggle_checks, kaggle_inputs
from rewardmodel.exports.kaggle import ACCELERATORS, INPUTS, Base, Bundle, backbone_link
from rewardmodel.exports.kaggle_inputs import MARKER, digest_config, digest_file
from rewardmodel.files import write_json, write_text
from rewardmodel.model.weights import fingerprint

COMPETITION = "llm-classification-finetuning"
"""Name of the competition in Kaggle's addresses."""

CHECKED = ("model", "models", "wheels", "rewardmodel")
"""Folders of a bundle whose files the notebook compares with their digests."""


class Backbone(NamedTuple):
    """A backbone that adapters of a bundle belong to.

    Attributes:
        base: what it is on Kaggle.
        folder: where it is here.
        fingerprint: of its weights.
    """

    base: Base
    folder: Path
    fingerprint: str


def write_notebook(
    bundle: Bundle,
    folder: Path,
    models: Sequence[str],
    backbones: Sequence[Backbone],
    pythons: Sequence[str],
    unneeded: Collection[str] = (),
) -> None:
    """Write what tells a bundle, a folder with models, source and wheels, to Kaggle and to people.

    Args:
        bundle: its settings.
        folder: its folder.
        models: folders in it, of an exported model each or of the folds of a run, whose probabilities are averaged.
        backbones: that its adapters belong to; empty if its models are whole.
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
    wanted = {
        **describe(bundle, folder, models, backbones, files),
        "pythons": list(pythons),
        "requires": required,
    }
    write_json(folder / MARKER, {**wanted, "files": files})
    script = render("kaggle.py.jinja", bundle, wanted)
    write_text(folder / "inference.py", script)
    write_text(folder / "inference.ipynb", json.dumps(build_notebook(script), indent=1) + "\n")
    write_text(folder / "README.md", render("kaggle.md.jinja", bundle, wanted))
    write_json(folder / "dataset-metadata.json", dataset_metadata(bundle))
    write_json(folder / "kernel-metadata.json", kernel_metadata(bundle))


def describe(
    bundle: Bundle, folder: Path, models: Sequence[str], backbones: Sequence[Backbone], files: dict[str, Any]
) -> dict[str, Any]:
    """Return what a notebook knows of its bundle.

    Args:
        bundle: its settings.
        folder: its folder.
        models: as for `write_notebook`.
        backbones: as for `write_notebook`.
        files: its files, with sizes and digests.

    Returns:
        `id`, a digest of its files, backbones and weights in the mean; `dataset`, `competition` and `accelerator` by
        name; `python`, the range of versions that it runs on; `models`, their folders, and `shares`, their weights in
        the mean or None; `weights`, bytes of all of them; and `backbones`: by the name that the notebook prints,
        `source`, `path`, `config` and `fingerprint`, as for `kaggle_inputs.find_backbone`, and the `link` by which
        recipes name it.
    """
    places = [one.folder for one in backbones] or [folder / name for name in models]
    weights = sum(
        path.stat().st_size for kind in ("*.safetensors", "*.bin") for one in places for path in one.rglob(kind)
    )
    bases = {
        f"backbone_{number}" if len(backbones) > 1 else "backbone": {
            "source": one.base.source or one.base.given,
            "path": one.base.folder,
            "config": digest_config(one.folder / "config.json"),
            "fingerprint": one.fingerprint,
            "link": backbone_link(one.fingerprint),
        }
        for number, one in enumerate(backbones, 1)
    }
    shares = list(bundle.weights) if bundle.weights else None
    content = [files, [one.fingerprint for one in backbones], shares]
    return {
        "id": sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16],
        "dataset": bundle.dataset,
        "competition": COMPETITION,
        "accelerator": ACCELERATORS[bundle.accelerator].menu,
        "python": metadata.metadata("rewardmodel")["Requires-Python"],
        "models": list(models),
        "shares": shares,
        "weights": weights,
        "backbones": bases,
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
    sources = list(dict.fromkeys(one.source for one in bundle.bases if one.source))
    models = [source for source in sources if source.count("/") == 4]
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
        "dataset_sources": [bundle.dataset, *[source for source in sources if source not in models]],
        "competition_sources": [COMPETITION],
        "model_sources": models,
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
