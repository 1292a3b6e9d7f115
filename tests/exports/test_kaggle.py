import ast
import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
from builders import battle_frame, write_csv

import rewardmodel
from rewardmodel import export
from rewardmodel.battles import OUTCOMES
from rewardmodel.cli import main
from rewardmodel.config.loader import load_recipe
from rewardmodel.errors import InputError
from rewardmodel.exports.kaggle import Bundle, build_notebook, copy_source, render_script
from rewardmodel.exports.wheels import BLENDING, TRAINING_ONLY
from rewardmodel.inference.predict import predict
from rewardmodel.predictions import predicted

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
    allowed = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0
    return ["unshare", "-rn"] if allowed else []


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
    files = {"inference.py", "inference.ipynb", "dataset-metadata.json", "parity.json"}
    assert names == {"model", "rewardmodel", "wheels"} | files
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert [path.name for path in (tmp_path / "bundle" / "wheels" / version).iterdir()] == ["requirements.txt"]
    assert load_recipe(tmp_path / "bundle" / "model" / "recipe.yaml").model.model_name_or_path == f"{base}/."
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
def test_the_notebook_runs_offline_in_a_clean_environment(run_folder, installed, clean_python, tmp_path):
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


def test_the_script_is_the_notebook(tmp_path):
    text = render_script(Bundle("me/my-reward-model", tmp_path / "list", base="/kaggle/input/gemma"))
    made = build_notebook(text)
    code = "\n".join(cell["source"] for cell in made["cells"] if cell["cell_type"] == "code")
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(text))
    assert made["nbformat"] == 4
    assert [cell["cell_type"] for cell in made["cells"]] == ["markdown", *["code"] * 5]
    assert all(set(cell) >= {"id", "metadata", "source"} for cell in made["cells"])
    assert "mounted at `/kaggle/input/gemma`" in made["cells"][0]["source"]
    assert len(text.splitlines()) < 70


def test_two_gpus_get_a_process_each(tmp_path, monkeypatch):
    script = render_script(Bundle("me/my-reward-model", tmp_path / "list"))
    commands = []

    def run(command, **_):
        if command[0] == "nvidia-smi":
            return subprocess.CompletedProcess(command, 0, "GPU 0: Tesla T4\nGPU 1: Tesla T4\n")
        commands.append((" ".join(map(str, command)), os.environ["PYTHONPATH"]))
        return subprocess.CompletedProcess(command, 0)

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for python in (version, "3.10"):
        (tmp_path / "wheels" / python).mkdir(parents=True)
        (tmp_path / "wheels" / python / "one.whl").touch()
    monkeypatch.setattr(os, "environ", {"BUNDLE": str(tmp_path), "PYTHONPATH": "/mine"})
    monkeypatch.setattr(subprocess, "run", run)
    exec(script.rpartition("# %%")[0], {})
    (install, _), (predict_all, path) = commands
    assert install.endswith(f"--no-index --no-deps {tmp_path}/wheels/{version}/one.whl")
    assert "--multi_gpu --num_machines 1 --num_processes 2 " in predict_all
    test = "/kaggle/input/llm-classification-finetuning/test.csv"
    assert f"-m rewardmodel.cli predict {tmp_path}/model {test}" in predict_all
    assert path == f"{tmp_path}:/mine"


def test_a_python_that_the_bundle_has_no_wheels_for_is_refused(tmp_path, monkeypatch):
    cells = render_script(Bundle("me/my-reward-model", tmp_path / "list")).split("# %%\n")
    monkeypatch.setattr(os, "environ", {"BUNDLE": str(tmp_path)})
    with pytest.raises(AssertionError, match="export with --python"):
        exec(cells[1] + cells[2], {})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("id,winner_model_a,winner_model_b,winner_tie\nb,0.2,0.3,0.5\na,0.2,0.3,0.5\n", "ids or their order"),
        ("id,winner_model_a,winner_model_b,winner_tie\na,0.2,0.3,0.5\nb,0.9,0.3,0.5\n", r"\('b', "),
        ("id,winner_model_a,winner_model_b,winner_tie\na,0.2,0.3,0.5\nb,nan,0.3,0.5\n", r"\('b', "),
        ("id,a,b,tie\na,0.2,0.3,0.5\nb,0.2,0.3,0.5\n", "'tie'"),
    ],
)
def test_the_notebook_checks_the_submission(broken, message, tmp_path, monkeypatch):
    (tmp_path / "test.csv").write_text('id,prompt\na,"[""x""]"\nb,"[""y""]"\n')
    (tmp_path / "submission.csv").write_text(broken)
    cells = render_script(Bundle("me/my-reward-model", tmp_path / "list")).split("# %%\n")
    files = {"BATTLES": tmp_path / "test.csv", "SUBMISSION": tmp_path / "submission.csv"}
    monkeypatch.setattr(os, "environ", {name: str(path) for name, path in files.items()})
    with pytest.raises(AssertionError, match=message):
        exec(cells[1] + cells[-1], {})
