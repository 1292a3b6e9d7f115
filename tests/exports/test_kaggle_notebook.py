import ast
import json
import os
import re
import shutil
import subprocess
from contextlib import chdir
from pathlib import Path

import pytest
from kaggle_trees import BASE, SLUG, make_bundle, make_competition

from rewardmodel.exports.kaggle_notebook import build_notebook


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path)


def run_notebook(bundle, root, monkeypatch, gpus="", failing=None, **environment):
    """Run all cells but the last; return the commands that they would have started, each with its PYTHONPATH."""
    commands = []

    def run(command, **_):
        if command[0] == "nvidia-smi":
            return subprocess.CompletedProcess(command, 0, gpus)
        commands.append((" ".join(map(str, command)), os.environ.get("PYTHONPATH")))
        return subprocess.CompletedProcess(command, 2 if failing and failing in commands[-1][0] else 0)

    (root.parent / "work").mkdir()
    monkeypatch.setattr(os, "environ", {"INPUTS": str(root), "PATH": os.environ["PATH"], **environment})
    monkeypatch.setattr(subprocess, "run", run)
    with chdir(root.parent / "work"):
        exec(bundle.script.rpartition("# %%")[0], {})
    return commands


@pytest.fixture
def inputs(bundle, tmp_path):
    """Return the folder that the bundle, the competition and the backbone are mounted in."""
    root = tmp_path / "input"
    make_competition(root / "competitions" / SLUG)
    shutil.copytree(bundle.folder, root / "datasets" / "me" / "my-reward-model")
    shutil.copytree(bundle.backbone, root / "models" / BASE)
    return root


def test_the_script_is_the_notebook(bundle):
    made = json.loads((bundle.folder / "inference.ipynb").read_text())
    assert made == build_notebook(bundle.script)
    code = "\n".join(cell["source"] for cell in made["cells"] if cell["cell_type"] == "code")
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(bundle.script))
    assert made["nbformat"] == 4
    assert [cell["cell_type"] for cell in made["cells"]] == ["markdown", *["code"] * 8]
    assert all(set(cell) >= {"id", "metadata", "source"} for cell in made["cells"])
    assert f"the backbone `{BASE}`" in made["cells"][0]["source"]
    assert "Settings > Accelerator > GPU T4 x2" in made["cells"][0]["source"]


def test_two_gpus_get_a_process_each(bundle, inputs, monkeypatch):
    commands = run_notebook(bundle, inputs, monkeypatch, "Tesla T4, 7.5\nTesla T4, 7.5\n", PYTHONPATH="/mine")
    ((command, path),) = commands
    assert "--multi_gpu --num_machines 1 --num_processes 2 " in command
    mounted = inputs / "datasets" / "me" / "my-reward-model"
    test = inputs / "competitions" / SLUG / "test.csv"
    assert f"-m rewardmodel.cli predict {mounted}/model {test} --output submission.csv --time-limit " in command
    assert Path(bundle.wanted["backbones"]["backbone"]["link"]).resolve() == inputs / "models" / BASE
    assert path == f"{mounted}:/mine"
    assert 30_500 < int(re.search(r"--time-limit (\d+)", command)[1]) <= 30_600


def test_one_blackwell_gpu_needs_no_launcher(tmp_path, monkeypatch):
    made = make_bundle(tmp_path, whole=True, accelerator="rtx-pro-6000", time_limit=3600)
    make_competition(tmp_path / "input")
    shutil.copytree(made.folder, tmp_path / "input" / "b")
    ((command, _),) = run_notebook(made, tmp_path / "input", monkeypatch, "NVIDIA RTX PRO 6000 Blackwell, 12.0\n")
    assert "accelerate" not in command
    assert re.search(r"--time-limit 3\d\d\d$", command)


def test_wheels_are_installed_and_what_peft_rejects_is_removed(tmp_path, monkeypatch):
    from importlib import metadata

    (tmp_path / "bundle" / "wheels").mkdir(parents=True)
    (tmp_path / "bundle" / "wheels" / "one-1.0-py3-none-any.whl").touch()
    made = make_bundle(tmp_path, whole=True)
    make_competition(tmp_path / "input")
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.10.0" if name == "torchao" else version(name))
    given = {"BUNDLE": str(made.folder), "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    commands = run_notebook(made, tmp_path / "input", monkeypatch, "Tesla T4, 7.5\n", **given)
    uninstall, install, _ = (command for command, _ in commands)
    assert uninstall.endswith("uninstall --yes torchao")
    assert install.endswith(f"install --no-index --no-deps {made.folder}/wheels/one-1.0-py3-none-any.whl")


def test_an_earlier_session_is_continued(bundle, inputs, monkeypatch, capsys):
    shards = inputs / "notebooks" / "me" / "mine" / "submission.csv.shards" / f"{'a' * 16}-{'b' * 16}"
    shards.mkdir(parents=True)
    (shards / "first-00000000.npz").write_text("x")
    run_notebook(bundle, inputs, monkeypatch)
    copied = inputs.parent / "work" / "submission.csv.shards" / shards.name / "first-00000000.npz"
    assert copied.read_text() == "x"
    assert "files of an earlier session: 1; predicting continues from them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("failing", "message"), [(" install ", "pip could not install"), (" predict ", "predicting ended with exit code 2")]
)
def test_a_step_that_fails_ends_the_notebook_with_one_sentence(failing, message, tmp_path, monkeypatch):
    (tmp_path / "bundle" / "wheels").mkdir(parents=True)
    (tmp_path / "bundle" / "wheels" / "one-1.0-py3-none-any.whl").write_bytes(b"w")
    made = make_bundle(tmp_path, whole=True)
    make_competition(tmp_path / "input")
    with pytest.raises(SystemExit, match=message) as stopped:
        run_notebook(made, tmp_path / "input", monkeypatch, failing=failing, BUNDLE=str(made.folder))
    assert len(str(stopped.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("id,winner_model_a,winner_model_b,winner_tie\nb,0.2,0.3,0.5\na,0.2,0.3,0.5\n", "ids or their order"),
        ("id,winner_model_a,winner_model_b,winner_tie\na,0.2,0.3,0.5\nb,0.9,0.3,0.5\n", r"\('b', "),
        ("id,winner_model_a,winner_model_b,winner_tie\na,0.2,0.3,0.5\nb,nan,0.3,0.5\n", r"\('b', "),
        ("id,a,b,tie\na,0.2,0.3,0.5\nb,0.2,0.3,0.5\n", "'tie'"),
    ],
)
def test_the_notebook_checks_the_submission(broken, message, bundle, tmp_path, monkeypatch):
    (tmp_path / "submission.csv").write_text(broken)
    cells = bundle.script.split("# %%\n")
    monkeypatch.setattr(os, "environ", {"SUBMISSION": str(tmp_path / "submission.csv")})
    with pytest.raises(AssertionError, match=message):
        exec(cells[1] + cells[2] + cells[-1], {"ids": ["a", "b"]})


def test_the_same_files_have_the_same_id_and_others_another(tmp_path):
    first, second, third = (make_bundle(tmp_path / name) for name in ("a", "b", "c"))
    assert first.wanted["id"] == second.wanted["id"]
    (third.folder / "model" / "tokenizer.json").write_text("{}")
    from rewardmodel.exports.kaggle import Base, Bundle
    from rewardmodel.exports.kaggle_notebook import Backbone, write_notebook

    backbones = [Backbone(Base(BASE), third.backbone, "f")]
    write_notebook(Bundle("me/my-reward-model", tmp_path, base=BASE), third.folder, ["model"], backbones, ["3.12"])
    assert json.loads((third.folder / "bundle.json").read_text())["id"] != first.wanted["id"]


def test_only_what_the_prediction_imports_is_required(bundle):
    required = bundle.wanted["requires"]
    assert {"torch", "transformers", "peft"} <= required.keys()
    assert "trl" not in required
    assert "pytest" not in required
    assert bundle.wanted["pythons"] == ["3.12"]


def test_two_commands_are_left(bundle):
    assert json.loads((bundle.folder / "dataset-metadata.json").read_text()) == {
        "title": "my reward model",
        "id": "me/my-reward-model",
        "licenses": [{"name": "other"}],
    }
    kernel = json.loads((bundle.folder / "kernel-metadata.json").read_text())
    assert kernel == {
        "id": "me/my-reward-model",
        "title": "my reward model",
        "code_file": "inference.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": ["me/my-reward-model"],
        "competition_sources": [SLUG],
        "model_sources": [BASE],
        "kernel_sources": [],
    }
    text = (bundle.folder / "README.md").read_text()
    assert "kaggle datasets create -p . --dir-mode zip " in text
    assert "kaggle kernels push -p . " in text
    assert bundle.wanted["id"] in text
    assert (bundle.folder / kernel["code_file"]).is_file()


@pytest.mark.parametrize(
    ("base", "sources", "by_hand"),
    [
        ("me/gemma-2-9b", ["me/my-reward-model", "me/gemma-2-9b"], False),
        ("/kaggle/input/g", ["me/my-reward-model"], True),
    ],
)
def test_a_backbone_in_a_data_set_is_attached_as_one(base, sources, by_hand, tmp_path):
    made = make_bundle(tmp_path, base=base, accelerator="rtx-pro-6000")
    kernel = json.loads((made.folder / "kernel-metadata.json").read_text())
    assert kernel["dataset_sources"] == sources
    assert kernel["model_sources"] == []
    assert kernel["machine_shape"] == "NvidiaRtxPro6000"
    assert ("by hand: Add Input" in (made.folder / "README.md").read_text()) == by_hand
