import ast
import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from builders import battle_frame, write_csv

from rewardmodel import export
from rewardmodel.battles import OUTCOMES
from rewardmodel.config.loader import load_recipe
from rewardmodel.errors import InputError
from rewardmodel.exports.kaggle import Bundle, notebook, script
from rewardmodel.inference.predict import predict
from rewardmodel.predictions import predicted
from rewardmodel.training.train import train

UNPLUGGED = """
import socket

def refuse(*_, **__):
    raise OSError("this machine has no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""
"""What stands in for a machine without a network, where the kernel lends no network namespace."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a list of what is installed here, without rewardmodel."""
    path = tmp_path_factory.mktemp("list") / "installed.txt"
    lines = {f"{one.name}=={one.version}" for one in metadata.distributions() if one.name != "rewardmodel"}
    path.write_text("\n".join(sorted(lines)))
    return path


@pytest.fixture
def clean_python(tmp_path):
    """Return the Python of a virtual environment with the packages of this one, but without rewardmodel."""
    venv.create(tmp_path / "venv", with_pip=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    for path in site.glob("setuptools*"):  # older than that of this environment, which stands behind it
        shutil.rmtree(path)
    (site / "others.pth").write_text(f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n")
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
        cwd=work, env={**keep, **given}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_notebook_runs_offline_in_a_clean_environment(recipe, installed, clean_python, tmp_path):
    """Slow by what it claims: pip, a fresh interpreter and all imports, without a network."""
    folder, _ = train(replace(recipe, trainer={**recipe.trainer, "max_steps": 2, "load_best_model_at_end": False}))
    base = recipe.model.model_name_or_path
    asked = Bundle("me/my-reward-model", installed, base=base)
    export(folder, tmp_path / "bundle", "kaggle", bundle=asked)
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {
        "model", "wheels", "inference.py", "inference.ipynb", "dataset-metadata.json", "parity.json",
    }  # fmt: skip
    assert [path.name.split("-")[0] for path in (tmp_path / "bundle" / "wheels").iterdir()] == ["rewardmodel"]
    code = "import importlib.util; assert importlib.util.find_spec('rewardmodel') is None"
    subprocess.run([clean_python, "-c", code], cwd=tmp_path, env={}, check=True)

    test = tmp_path / "test.csv"
    if "REWARDMODEL_REAL_DATA" in os.environ:
        test = Path(os.environ["REWARDMODEL_REAL_DATA"]) / "kaggle" / "test.csv"
    else:
        write_csv(battle_frame(4, seed=7).drop(columns=list(OUTCOMES)), test)
    code = tmp_path / "cells.py"
    code.write_text(notebook_code(tmp_path / "bundle" / "inference.ipynb"))
    done = run_offline(clean_python, code, tmp_path / "bundle", test, tmp_path / "work")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = predicted(predict(folder, test))
    assert f"submission.csv: {len(expected)} battles, valid" in done.stdout
    with (tmp_path / "work" / "submission.csv").open() as file:
        rows = [[float(one) for one in row[1:]] for row in list(csv.reader(file))[1:]]
    assert abs(expected - rows).max() <= 1e-5


def test_the_script_is_the_notebook(tmp_path):
    text = script(Bundle("me/my-reward-model", tmp_path / "list", base="/kaggle/input/gemma"))
    made = notebook(text)
    code = "\n".join(cell["source"] for cell in made["cells"] if cell["cell_type"] == "code")
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(text))
    assert made["nbformat"] == 4
    assert [cell["cell_type"] for cell in made["cells"]] == ["markdown", *["code"] * 5]
    assert all(set(cell) >= {"id", "metadata", "source"} for cell in made["cells"])
    assert "mounted at `/kaggle/input/gemma`" in made["cells"][0]["source"]
    assert len(text.splitlines()) < 70


def test_two_gpus_get_a_process_each(tmp_path):
    text = script(Bundle("me/my-reward-model", tmp_path / "list"))
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: Tesla T4'\necho 'GPU 1: Tesla T4'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    heard = tmp_path / "heard"
    recording = (
        "import subprocess, sys\nreal = subprocess.run\n"
        "def run(command, **how):\n"
        "    if command[0] == 'nvidia-smi':\n        return real(command, **how)\n"
        f"    open({str(heard)!r}, 'a').write(' '.join(map(str, command)) + '\\n')\n"
        "subprocess.run = run\n"
    )
    until_check = text.rpartition("# %%")[0]
    (tmp_path / "cells.py").write_text(recording + until_check)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "one.whl").touch()
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BUNDLE": str(tmp_path)}
    subprocess.run([sys.executable, tmp_path / "cells.py"], env=given, check=True)
    install, predict_all = heard.read_text().splitlines()
    assert f"--no-index --no-deps {tmp_path}/wheels/one.whl" in install
    assert "--multi_gpu --num_machines 1 --num_processes 2 " in predict_all
    assert (
        f"-m rewardmodel.cli predict {tmp_path}/model /kaggle/input/llm-classification-finetuning/test.csv"
        in predict_all
    )


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("id,winner_model_a,winner_model_b,winner_tie\nb,0.2,0.3,0.5\na,0.2,0.3,0.5\n", "ids or their order"),
        ("id,winner_model_a,winner_model_b,winner_tie\na,0.2,0.3,0.5\nb,0.9,0.3,0.5\n", "('b', "),
        ("id,winner_model_a,winner_model_b,winner_tie\na,0.2,0.3,0.5\nb,nan,0.3,0.5\n", "('b', "),
        ("id,a,b,tie\na,0.2,0.3,0.5\nb,0.2,0.3,0.5\n", "'tie'"),
    ],
)
def test_the_notebook_checks_the_submission(broken, said, tmp_path):
    (tmp_path / "test.csv").write_text('id,prompt\na,"[""x""]"\nb,"[""y""]"\n')
    (tmp_path / "submission.csv").write_text(broken)
    cells = script(Bundle("me/my-reward-model", tmp_path / "list")).split("# %%\n")
    (tmp_path / "check.py").write_text(cells[1] + cells[-1])
    given = {"BATTLES": "test.csv"}
    check = [sys.executable, "check.py"]
    done = subprocess.run(check, cwd=tmp_path, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert said in done.stderr


def test_an_adapter_needs_to_know_where_its_backbone_is(recipe, installed, tmp_path):
    folder, _ = train(replace(recipe, trainer={**recipe.trainer, "max_steps": 1, "load_best_model_at_end": False}))
    with pytest.raises(InputError, match="--base"):
        export(folder, tmp_path / "bundle", "kaggle", bundle=Bundle("me/my-reward-model", installed))
    assert not (tmp_path / "bundle").exists()


def test_a_merged_model_can_be_bundled(recipe, installed, tmp_path):
    folder, _ = train(replace(recipe, trainer={**recipe.trainer, "max_steps": 1, "load_best_model_at_end": False}))
    asked = Bundle("me/my-reward-model", installed, contents="merged")
    facts = export(folder, tmp_path / "bundle", "kaggle", dtype="float32", bundle=asked)
    assert facts["max_abs_dp"] <= 1e-4
    assert json.loads((tmp_path / "bundle" / "dataset-metadata.json").read_text()) == {
        "title": "my reward model", "id": "me/my-reward-model", "licenses": [{"name": "other"}],
    }  # fmt: skip
    assert load_recipe(tmp_path / "bundle" / "model" / "recipe.yaml").model.model_name_or_path
