"""Small bundles, competitions and backbones to mount like Kaggle does, and a way to run a notebook's first cells."""

import csv
import json
import os
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from rewardmodel.exports.kaggle import Bundle
from rewardmodel.exports.kaggle_notebook import Backbone, write_notebook
from rewardmodel.model.weights import fingerprint

SLUG = "llm-classification-finetuning"
BASE = "google/gemma-2/transformers/gemma-2-9b-it/2"


class Made(NamedTuple):
    """A bundle: its folder, its notebook's program, what that knows of it, and the backbone of its adapter."""

    folder: Path
    script: str
    wanted: dict
    backbone: Path


def make_backbone_folder(folder: Path, seed: int = 0) -> Path:
    """Write a folder that looks like a backbone's."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    (folder / "model.safetensors").write_bytes(bytes([seed]) * 5000)
    return folder


def make_bundle(work: Path, whole: bool = False, **settings) -> Made:
    """Write a bundle whose model, source and wheels are a few bytes."""
    backbone = make_backbone_folder(work / "backbone")
    folder = work / "bundle"
    for name, content in {
        "model/adapter_model.safetensors": b"m" * 2000,
        "model/tokenizer.json": b'{"a": 1}',
        "model/backbone.json": json.dumps({"fingerprint": fingerprint(backbone)}).encode(),
        "rewardmodel/__init__.py": b"",
        "rewardmodel/cli.py": b"main = None\n",
        "rewardmodel/data/sample/test.csv": b"id,prompt,response_a,response_b\n",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    given = {"contents": "merged"} if whole else {"base": BASE}
    bundle = Bundle("me/my-reward-model", work / "installed.txt", **{**given, **settings})
    with patch("rewardmodel.exports.kaggle.LINKS", str(work / "links")):
        return _write(bundle, folder, backbone)


def _write(bundle: Bundle, folder: Path, backbone: Path) -> Made:
    backbones = [Backbone(one, backbone, fingerprint(backbone)) for one in bundle.bases]
    write_notebook(bundle, folder, ["model"], backbones, ["3.12"], ["trl"])
    wanted = json.loads((folder / "bundle.json").read_text())
    del wanted["files"]
    return Made(folder, (folder / "inference.py").read_text(), wanted, backbone)


def make_competition(folder: Path, rows: int = 3, labelled: bool = False) -> None:
    """Write the files of the competition: test.csv, or one with the outcomes, and sample_submission.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = ["winner_model_a", "winner_model_b", "winner_tie"]
    columns = ["id", "prompt", "response_a", "response_b", *(outcomes if labelled else [])]
    with (folder / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([number, '["x\ny"]', '["a"]', '["b"]', *[0] * len(columns[4:])] for number in range(rows))
    with (folder / "sample_submission.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", *outcomes], *([number, 0.3, 0.3, 0.4] for number in range(rows))])


def run_cells(bundle: Made, root: Path, until: int = 6, **environment: str) -> dict:
    """Run a notebook's cells up to its checks in an empty folder, with inputs mounted in `root`; return its names."""
    work = root.parent / "work"
    work.mkdir(exist_ok=True)
    names: dict = {}
    given = {"INPUTS": str(root), "PATH": os.environ["PATH"], **environment}
    with chdir(work), patch.dict(os.environ, given, clear=True):
        for cell in bundle.script.split("# %%\n")[1:until]:
            exec(compile(cell, "cell", "exec"), names)
    return names


def tree_of(root: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
