import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import battle_frame, write_csv
from kaggle_trees import SLUG, make_competition
from safetensors.torch import load_file, save_file

import rewardmodel
from rewardmodel import export
from rewardmodel.battles import OUTCOMES
from rewardmodel.cli import main
from rewardmodel.config.loader import dump_recipe, load_recipe
from rewardmodel.config.schema import InferenceConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.evaluation.baselines import fit_baselines
from rewardmodel.evaluation.calibration import Calibrator, save_calibrator
from rewardmodel.evaluation.text_regression import save_regression
from rewardmodel.exports import kaggle
from rewardmodel.exports.kaggle import Bundle, copy_source
from rewardmodel.exports.kaggle_inputs import check_bundle, link_backbones
from rewardmodel.exports.wheels import BLENDING, TRAINING_ONLY
from rewardmodel.inference.predict import predict
from rewardmodel.predictions import predicted, write_predictions
from rewardmodel.run_folder import RunFolder

UNPLUGGED = """
import socket

def refuse(*_, **__):
    raise OSError("this machine has no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""
"""What simulates a machine without a network where the kernel does not allow a network namespace."""

NOT_INSTALLED = """
from importlib import metadata, util
assert util.find_spec("rewardmodel") is None
try:
    metadata.version("rewardmodel")
except metadata.PackageNotFoundError:
    pass
else:
    raise AssertionError("there is metadata of rewardmodel")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a list of what is installed here, without rewardmodel, as `(python -VV; pip freeze)` writes it."""
    path = tmp_path_factory.mktemp("list") / "installed.txt"
    lines = {f"{one.name}=={one.version}" for one in metadata.distributions() if one.name != "rewardmodel"}
    path.write_text("\n".join([f"Python {sys.version}".replace("\n", ""), *sorted(lines)]))
    return path


@pytest.fixture(autouse=True)
def links(tmp_path, monkeypatch):
    """Let bundles name backbones by links in the test's folder."""
    monkeypatch.setattr(kaggle, "LINKS", str(tmp_path / "links"))


def link(bundle: Path, *backbones: str) -> None:
    """Make the links to a bundle's backbones, as its notebook does."""
    wanted = json.loads((bundle / "bundle.json").read_text())
    link_backbones(wanted, dict(zip(wanted["backbones"], map(Path, backbones), strict=True)))


@pytest.fixture
def clean_python(tmp_path):
    """Return the Python of a virtual environment with the packages of this one that predict, without rewardmodel."""
    venv.create(tmp_path / "venv", with_pip=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    for path in site.glob("setuptools*"):  # older than that of this environment, which comes later in the path
        shutil.rmtree(path)
    others = tmp_path / "others"  # everything but rewardmodel and what only trains, with metadata
    others.mkdir()
    left_out = {"rewardmodel", *TRAINING_ONLY.values(), *BLENDING.values(), "scikit_learn"}
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not any(path.name.strip("_").startswith(name) for name in left_out):
            (others / path.name).symlink_to(path)
    (site / "others.pth").write_text(f"import sys; sys.path.append({str(others)!r})\n")
    (site / "sitecustomize.py").write_text(UNPLUGGED)
    return tmp_path / "venv" / "bin" / "python"


def notebook_code(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    return "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "code")


def without_network() -> list[str]:
    """Return the words before a command that give it a network namespace without a network, if the kernel allows it."""
    for words in (["unshare", "-rn"], ["unshare", "-n"]):
        if (
            shutil.which("unshare")
            and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
        ):
            return words
    return []


def run_offline(python: Path, code: Path, bundle: Path, battles: Path, work: Path) -> subprocess.CompletedProcess:
    work.mkdir()
    keep = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "GOMP_SPINCOUNT") if name in os.environ}
    given = {"BUNDLE": str(bundle), "BATTLES": str(battles), "HOME": str(work), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*without_network(), str(python), str(code)],
        cwd=work,
        env={**keep, **given},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow  # exports a whole run
def test_a_bundle_has_all_that_an_offline_machine_needs(run_folder, installed, tmp_path, in_this_process):
    base = load_recipe(run_folder / "recipe.yaml").model.model_name_or_path
    asked = Bundle("me/my-reward-model", installed, base=f"{base}/.")
    export(run_folder, tmp_path / "bundle", "kaggle", bundle=asked)
    names = {path.name for path in (tmp_path / "bundle").iterdir()}
    files = {"inference.py", "inference.ipynb", "dataset-metadata.json", "kernel-metadata.json", "parity.json"}
    files |= {"bundle.json", "README.md"}
    assert names == {"model", "rewardmodel", "wheels"} | files
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert [path.name for path in (tmp_path / "bundle" / "wheels" / version).iterdir()] == ["requirements.txt"]
    link(tmp_path / "bundle", base)
    battles = battle_frame(3, seed=5)
    found, expected = (predicted(predict(folder, battles)) for folder in (tmp_path / "bundle" / "model", run_folder))
    assert abs(found - expected).max() <= 1e-5


def test_a_merged_model_can_be_bundled(run_folder, installed, tmp_path, in_this_process):
    asked = Bundle("me/my-reward-model", installed, contents="merged")
    facts = export(run_folder, tmp_path / "bundle", "kaggle", dtype="float32", bundle=asked)
    assert facts["max_abs_dp"] <= 1e-4
    assert json.loads((tmp_path / "bundle" / "dataset-metadata.json").read_text()) == {
        "title": "my reward model",
        "id": "me/my-reward-model",
        "licenses": [{"name": "other"}],
    }
    assert load_recipe(tmp_path / "bundle" / "model" / "recipe.yaml").model.model_name_or_path


@pytest.mark.slow  # seconds a case
@pytest.mark.parametrize("k_fold", [False, True], ids=["two runs", "folds"])
def test_of_several_runs_the_mean_is_bundled(k_fold, untrained_run, installed, tmp_path, in_this_process):
    runs = [untrained_run("mean"), tmp_path / "other"]
    shutil.copytree(runs[0], runs[1])
    weights = load_file(runs[1] / "model" / "adapter_model.safetensors")
    save_file({name: -value for name, value in weights.items()}, runs[1] / "model" / "adapter_model.safetensors")
    if k_fold:
        for number, run in enumerate(runs):
            shutil.copytree(run, tmp_path / "folds" / f"fold-{number}")
        recipe = load_recipe(runs[0] / "recipe.yaml")
        recipe = replace(recipe, data=replace(recipe.data, folds=2))
        (tmp_path / "folds" / "recipe.yaml").write_text(dump_recipe(recipe))
        (tmp_path / "folds" / "metrics.json").write_text("{}")
    asked = Bundle("me/my-reward-model", installed, base=load_recipe(runs[0] / "recipe.yaml").model.model_name_or_path)
    facts = export(tmp_path / "folds" if k_fold else runs, tmp_path / "bundle", "kaggle", bundle=asked)
    assert facts["max_abs_dp"] <= 1e-5
    assert facts["probability_average"]["max_abs_dp"] > 1e-4
    link(tmp_path / "bundle", asked.base)
    mean = predicted(predict(tmp_path / "bundle" / "model", battle_frame(2)))
    assert np.ptp(mean, axis=0).max() <= 1e-6  # heads that cancel out predict the same of every battle
    assert check_bundle(tmp_path / "bundle") == []


@pytest.fixture
def folds_that_blend(untrained_run, tmp_path):
    """Return a k-fold run of two untrained folds, which blends with a baseline of each."""
    run, folder = untrained_run("mean"), tmp_path / "folds"
    recipe = load_recipe(run / "recipe.yaml")
    recipe = replace(recipe, data=replace(recipe.data, folds=2), inference=InferenceConfig(blend=True))
    for number, sign in enumerate((1, -1)):
        fold = shutil.copytree(run, folder / f"fold-{number}")
        weights = load_file(fold / "model" / "adapter_model.safetensors")
        save_file({name: sign * one for name, one in weights.items()}, fold / "model" / "adapter_model.safetensors")
        (fold / "recipe.yaml").write_text(dump_recipe(recipe))
        baseline = fit_baselines(read_battles(battle_frame(12, seed=number)))["tfidf"]
        save_regression(baseline, RunFolder(fold).blend_baseline)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "metrics.json").write_text("{}")
    uncalibrated = replace(recipe, inference=InferenceConfig(calibrate=False))
    write_predictions(predict(folder, battle_frame(2, seed=9), uncalibrated), RunFolder(folder).validation)
    save_calibrator(Calibrator("blend", (0.5, 1.5, -0.5)), RunFolder(folder).calibrator)
    return folder


def test_models_of_two_backbones_and_folds_are_bundled_each_and_predict_as_the_runs_do(
    folds_that_blend, untrained_run, backbone, installed, tmp_path, monkeypatch
):
    runs = [
        folds_that_blend,
        untrained_run("rewards", "davidson", "response", model_name_or_path=str(backbone("qwen2"))),
    ]
    handles = ["me/llama/transformers/tiny/1", "me/qwen"]
    asked = Bundle("me/my-reward-model", installed, base=handles, separate=True, weights=[3, 1])
    root = tmp_path / "input"
    found = export(runs, root / "datasets" / "me" / "my-reward-model", "kaggle", bundle=asked)
    assert found["models"].keys() == {"models/1/fold-0", "models/1/fold-1", "models/2"}
    make_competition(root / "competitions" / SLUG, rows=0)
    test = write_csv(battle_frame(3, seed=7).drop(columns=list(OUTCOMES)), root / "competitions" / SLUG / "test.csv")
    shutil.copytree(backbone("llama"), root / "models" / handles[0])
    shutil.copytree(backbone("qwen2"), root / "elsewhere")

    def run(command, **_):
        if "rewardmodel.cli" not in command:
            return subprocess.CompletedProcess(command, 1, "")
        return subprocess.CompletedProcess(command, main(command[command.index("rewardmodel.cli") + 1 :]))

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(os, "environ", {**os.environ, "INPUTS": str(root), "CUDA_VISIBLE_DEVICES": ""})
    monkeypatch.setattr(subprocess, "run", run)
    exec((root / "datasets" / "me" / "my-reward-model" / "inference.py").read_text(), {})
    submission = pd.read_csv("submission.csv")[list(OUTCOMES)].to_numpy()
    expected = predicted(predict(runs, test, weights=[3, 1]))
    assert np.abs(submission - expected).max() <= 1e-6
    alone = predicted(predict(runs[1], test))
    assert np.abs(submission - alone).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "me/llama", "separate": True}, "other is of another backbone than the runs before it"),
        ({"base": ["me/llama"] * 2, "separate": True}, "other is of another backbone than the runs before it"),
        ({"base": ["me/llama", "me/b", "me/c"], "separate": True}, "--base: 3 backbones; give one, or with --separate"),
        ({"base": ["me/llama", "me/b"]}, "--base: 2 backbones; give one, or with --separate one for each of 1 runs"),
        ({"base": ["me/llama", "me/b"], "separate": True, "weights": [1]}, "weights: 1 for 2 runs"),
        ({"contents": "soup", "separate": True}, "a soup is of several runs; give their folders, and no --separate"),
    ],
)
def test_separate_models_must_have_backbones_and_weights_that_fit(
    settings, message, untrained_run, installed, tmp_path
):
    run, other = untrained_run("mean"), tmp_path / "other"
    shutil.copytree(run, other)
    about = json.loads((run / "model" / "backbone.json").read_text())
    (other / "model" / "backbone.json").write_text(json.dumps({**about, "fingerprint": "0" * 64}))
    with pytest.raises(InputError, match=re.escape(message)):
        export([run, other], tmp_path / "bundle", "kaggle", bundle=Bundle("me/my-reward-model", installed, **settings))
    assert not (tmp_path / "bundle").exists()


def test_one_run_has_nothing_to_keep_apart(untrained_run, installed, tmp_path):
    asked = Bundle("me/my-reward-model", installed, base="me/llama", separate=True)
    with pytest.raises(InputError, match="--separate: keeps the models of several runs apart"):
        export(untrained_run("mean"), tmp_path / "bundle", "kaggle", bundle=asked)
    with pytest.raises(InputError, match="--weights: of the models of several runs, which only --separate bundles"):
        Bundle("me/my-reward-model", installed, base="me/llama", weights=[1, 2])


def test_the_command_line_takes_several_lists_and_versions(run_folder, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).write_text("numpy==2.1.3\n")
    lists = [str(tmp_path / name) for name in ("one", "two")]
    asked = [
        *["--kind", "kaggle", "--dataset", "me/my-reward-model", "--base", "/base", "--output"],
        str(tmp_path / "out"),
    ]
    for python, message in [
        ([], f"--python: {lists[0]} does not begin with the version of Python"),
        (["--python", "3.12"], "--python: 1 versions for 2 lists"),
        (["--python", "3.12", "3.13"], "--installed: has no torch"),
    ]:
        assert main(["export", str(run_folder), *asked, "--installed", *lists, *python]) == 2
        assert message in capsys.readouterr().err


def test_a_bundle_needs_a_name_that_kaggle_takes(tmp_path):
    with pytest.raises(InputError, match="give owner/name"):
        Bundle("Some Name", tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"accelerator": "t4x1"},
            "--accelerator: no 't4x1' (did you mean 't4x2'?); known: t4x2, rtx-pro-6000",
        ),
        ({"time_limit": 32400}, "--time-limit: 32400; give seconds below 32400"),
        ({"time_limit": 0}, "--time-limit: 0"),
        ({"time_limit": float("nan")}, "--time-limit: nan"),
    ],
)
def test_what_kaggle_does_not_have_is_refused(settings, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        Bundle("me/my-reward-model", tmp_path / "list.txt", **settings)


@pytest.mark.parametrize(
    ("base", "source", "folder"),
    [
        ("google/gemma-2/transformers/9b-it/2", "google/gemma-2/transformers/9b-it/2", "/kaggle/input/models/{}"),
        (
            "/kaggle/input/models/g/gemma-2/transformers/9b-it/2",
            "g/gemma-2/transformers/9b-it/2",
            "/kaggle/input/models/{}",
        ),
        ("me/gemma-2-9b", "me/gemma-2-9b", "/kaggle/input/datasets/{}"),
        ("/kaggle/input/datasets/me/gemma-2-9b/", "me/gemma-2-9b", "/kaggle/input/datasets/{}"),
        ("/kaggle/input/gemma-2-9b-it", None, "/kaggle/input/gemma-2-9b-it"),
        ("/a/b", None, "/a/b"),
        (None, None, ""),
    ],
)
def test_a_backbone_is_named_by_its_source_or_by_its_folder(base, source, folder, tmp_path):
    bundle = Bundle("me/my-reward-model", tmp_path / "list.txt", base=base)
    assert [(one.source, one.folder) for one in bundle.bases] == [(source, folder.format(source))] * bool(base)


def test_the_source_is_copied_whole_and_without_caches(tmp_path):
    copy_source(tmp_path)
    package, copy = Path(rewardmodel.__file__).parent, tmp_path / "rewardmodel"
    wanted, found = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for folder in (package, copy)
    )
    assert found == {name for name in wanted if "__pycache__" not in name}
    assert {"cli.py", "data/sample/train.csv", "evaluation/page.html.jinja"} <= found
    assert not list(copy.rglob("__pycache__"))


@pytest.mark.slow
def test_the_copied_source_runs(tmp_path):
    copy_source(tmp_path / "bundle")
    code = "import rewardmodel, sys; from rewardmodel.cli import main; print(rewardmodel.__file__); main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "bundle")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "bundle") in done.stdout
    assert "usage: rewardmodel" in done.stdout


@pytest.mark.slow
def test_the_notebook_runs_offline_in_a_clean_environment(
    run_folder, installed, clean_python, tmp_path, read_back_in_a_fork
):
    base = load_recipe(run_folder / "recipe.yaml").model.model_name_or_path
    asked = Bundle("me/my-reward-model", installed, base=base)
    export(run_folder, tmp_path / "bundle", "kaggle", bundle=asked)
    subprocess.run([clean_python, "-c", NOT_INSTALLED], cwd=tmp_path, env={}, check=True)

    test = tmp_path / "test.csv"
    if "REWARDMODEL_REAL_DATA" in os.environ:
        test = Path(os.environ["REWARDMODEL_REAL_DATA"]) / "kaggle" / "test.csv"
    else:
        write_csv(battle_frame(4, seed=7).drop(columns=list(OUTCOMES)), test)
    code = tmp_path / "cells.py"
    code.write_text(notebook_code(tmp_path / "bundle" / "inference.ipynb"))
    done = run_offline(clean_python, code, tmp_path / "bundle", test, tmp_path / "work")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = predicted(predict(run_folder, test))
    assert f"submission.csv: {len(expected)} battles, valid" in done.stdout
    with (tmp_path / "work" / "submission.csv").open() as file:
        rows = [[float(one) for one in row[1:]] for row in list(csv.reader(file))[1:]]
    assert abs(expected - rows).max() <= 1e-5


@pytest.mark.slow
def test_the_notebook_continues_a_killed_session_in_the_layout_of_today(
    run_folder, installed, tmp_path, read_back_in_a_fork
):
    base = Path(load_recipe(run_folder / "recipe.yaml").model.model_name_or_path)
    root, handle = tmp_path / "input", "me/tiny/transformers/llama/1"
    export(run_folder, tmp_path / "bundle", "kaggle", bundle=Bundle("me/my-reward-model", installed, base=handle))
    shutil.copytree(tmp_path / "bundle", root / "datasets" / "me" / "my-reward-model")
    shutil.copytree(base, root / "models" / handle)
    make_competition(root / "competitions" / SLUG, rows=0)
    test = root / "competitions" / SLUG / "test.csv"
    write_csv(battle_frame(4, seed=7).drop(columns=list(OUTCOMES)), test)

    def run(name):
        (tmp_path / name).mkdir()
        return subprocess.run(
            [sys.executable, tmp_path / "bundle" / "inference.py"],
            cwd=tmp_path / name,
            env={**os.environ, "INPUTS": str(root), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )

    whole = run("whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert f"bundle    {root / 'datasets' / 'me' / 'my-reward-model'}" in whole.stdout
    assert f"backbone  {root / 'models' / handle}" in whole.stdout
    assert "16 battles predicted, each in both orders" in whole.stderr

    # what was computed before the kill, with other values, by which it is seen that it is not computed again
    shards = root / "notebooks" / "me" / "my-reward-model" / "submission.csv.shards"
    predict(root / "datasets" / "me" / "my-reward-model" / "model", test, work=shards, time_limit=600)
    (first,) = shards.glob("*/first-*.npz")
    with np.load(first) as file:
        np.savez(first, rows=file["rows"], logits=np.broadcast_to(np.float32([4, 0, 0]), file["logits"].shape))
    continued = run("continued")
    assert continued.returncode == 0, continued.stderr[-3000:]
    assert "; predicting continues from them" in continued.stdout
    before, after = (pd.read_csv(tmp_path / name / "submission.csv") for name in ("whole", "continued"))
    assert (after["winner_model_a"] > before["winner_model_a"]).all()
    assert not (tmp_path / "continued" / "submission.csv.shards").exists()
