import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
from builders import battle_frame, write_csv
from kaggle_trees import SLUG

from rewardmodel.battles import OUTCOMES
from rewardmodel.cli import main
from rewardmodel.config.loader import load_recipe
from rewardmodel.exports import kaggle, kaggle_training
from rewardmodel.exports.kaggle_checks import launcher
from rewardmodel.exports.kaggle_inputs import link_backbones
from rewardmodel.exports.kaggle_notebook import COMPETITION
from rewardmodel.exports.kaggle_training import continue_run, find_attached, open_session, remove_rejected, run_command
from rewardmodel.inference.predict import predict
from rewardmodel.predictions import predicted

NOTEBOOKS = Path(__file__).parents[2] / "recipes" / "notebooks"
CELLS = json.loads((NOTEBOOKS / "kaggle_train.ipynb").read_text())["cells"]
HANDLE = "me/tiny/transformers/llama/1"

LAYOUTS = {
    "old": {"wheels": "rewardmodel-wheels", "competition": SLUG, "backbone": "tiny", "output": "train-reward-model"},
    "new": {
        "wheels": "datasets/me/rewardmodel-wheels",
        "competition": f"competitions/{SLUG}",
        "backbone": f"models/{HANDLE}",
        "output": "notebooks/me/train-reward-model",
    },
}

RECIPE = """\
data: {folds: 4}
prompt: {max_length: 120}
model: {model_name_or_path: owner/tiny, device: cpu, dtype: float32, lora_r: 4}
trainer: {max_steps: 6, save_strategy: steps, save_steps: 3, eval_strategy: steps, eval_steps: 3, disable_tqdm: true}
"""


FROZEN = """\
data: {folds: 4}
prompt: {max_length: 120, template: response}
model: {model_name_or_path: owner/tiny, device: cpu, dtype: float32, freeze_backbone: true, num_hidden_layers: 1,
  pooling: last_and_responses, pair_ties: true}
objective: {name: davidson}
trainer: {disable_tqdm: true}
inference: {blend: true}
"""
"""What arena_small_cpu.yaml does: a frozen backbone, a fitted head, and a blend."""


@pytest.fixture
def mounted(backbone, tmp_path, monkeypatch):
    """Return a function that mounts a recipe, a wheel, a competition and a backbone in a layout."""
    monkeypatch.setattr(kaggle_training, "LINKS", tmp_path / "links")

    def mount(layout: str, recipe: str = RECIPE) -> Path:
        root, places = tmp_path / layout, LAYOUTS[layout]
        for name in ("wheels", "competition"):
            (root / places[name]).mkdir(parents=True)
        (root / places["wheels"] / "tiny.yaml").write_text(recipe)
        (root / places["wheels"] / "rewardmodel-0.1.0-py3-none-any.whl").touch()
        write_csv(battle_frame(70), root / places["competition"] / "train.csv")
        write_csv(battle_frame(3, seed=5).drop(columns=list(OUTCOMES)), root / places["competition"] / "test.csv")
        shutil.copytree(backbone("llama"), root / places["backbone"])
        return root

    return mount


def run_notebook(root: Path, work: Path, monkeypatch, commands=("doctor", "run", "export"), pip=0) -> list[str]:
    """Run the notebook's cells; pip does nothing, and commands run in this process; return the commands."""
    ran, installed = [], [f"{one.name}=={one.version}" for one in metadata.distributions() if one.name != "rewardmodel"]

    started = subprocess.run

    def run(command, **settings):
        if command[:3] != [sys.executable, "-m", "pip"]:
            return started(command, **settings)
        code = pip if "install" in command else 0
        return subprocess.CompletedProcess(command, code, stdout="\n".join(installed))

    def here(words, gpus=0, seconds=None):
        ran.append(words[0])
        assert words[0] not in commands or main(list(map(str, words))) == 0
        return words[0] in commands

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(kaggle_training, "run_command", here)
    monkeypatch.setattr(kaggle_training, "remove_rejected", lambda: None)
    monkeypatch.setattr(kaggle_training, "read_gpus", list)
    monkeypatch.setattr("rewardmodel.evaluation.report.report", lambda *_, **__: None)  # charts take seconds
    monkeypatch.setattr("rewardmodel.commands.exporting._print_kaggle_time", lambda *_: None)
    work.mkdir()
    names: dict = {}
    with chdir(work):
        for cell in CELLS:
            if cell["cell_type"] == "code":
                exec(compile(cell["source"], "cell", "exec"), names)
                if "RECIPE =" in cell["source"]:
                    names |= {"INPUTS": root, "RECIPE": "tiny.yaml"}
    return ran


@pytest.mark.slow  # trains twice, and exports
def test_a_run_continues_in_the_next_session_whose_inputs_are_mounted_elsewhere(
    mounted, tmp_path, monkeypatch, in_this_process, capsys
):
    old, new = mounted("old"), mounted("new")
    assert run_notebook(old, tmp_path / "first", monkeypatch, ("run",)) == ["doctor", "run", "export"]
    whole = pd.read_csv(tmp_path / "first" / "submission.csv")
    assert list(whole.columns) == ["id", *OUTCOMES]
    assert list(whole["id"]) == list(pd.read_csv(old / SLUG / "test.csv")["id"])
    assert "no earlier session to continue" in capsys.readouterr().out

    # what is left of a session that was stopped after its first checkpoint
    run = new / LAYOUTS["new"]["output"] / "runs" / "tiny"
    shutil.copytree(tmp_path / "first" / "runs" / "tiny", run)
    for path in run.iterdir():
        if path.name not in ("recipe.yaml", "environment.json", "training_keys.npy", "checkpoint-3"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run_notebook(new, tmp_path / "second", monkeypatch) == ["doctor", "run", "export"]
    printed = capsys.readouterr().out
    assert f"runs/tiny continues from step 3, as it is in {run}" in printed
    assert "limit      fits: about " in printed
    continued = pd.read_csv(tmp_path / "second" / "submission.csv")
    pd.testing.assert_frame_equal(continued, whole)
    kernel = json.loads((tmp_path / "second" / "bundle" / "kernel-metadata.json").read_text())
    assert kernel["model_sources"] == []  # what is mounted in a test is not below /kaggle/input
    wanted = json.loads((tmp_path / "second" / "bundle" / "bundle.json").read_text())
    assert wanted["backbones"]["backbone"]["path"] == str(new / LAYOUTS["new"]["backbone"])


@pytest.mark.slow  # trains and exports
def test_a_fitted_head_that_blends_leaves_as_a_bundle_that_predicts_the_same(
    mounted, tmp_path, monkeypatch, in_this_process
):
    monkeypatch.setattr(kaggle, "LINKS", str(tmp_path / "backbones"))
    root, work = mounted("new", FROZEN), tmp_path / "work"
    assert run_notebook(root, work, monkeypatch, ("run", "export")) == ["doctor", "run", "export"]
    assert (work / "runs" / "tiny" / "blend_baseline.npz").is_file()
    wanted = json.loads((work / "bundle" / "bundle.json").read_text())
    link_backbones(wanted, {"backbone": root / LAYOUTS["new"]["backbone"]})
    table = predict(work / "bundle" / "model", root / LAYOUTS["new"]["competition"] / "test.csv")
    submission = pd.read_csv(work / "submission.csv")[list(OUTCOMES)]
    assert abs(predicted(table) - submission.to_numpy()).max() <= 1e-6
    assert {"scikit-learn"} <= wanted["requires"].keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_named_by_links_that_do_not_depend_on_the_layout(layout, mounted, tmp_path, monkeypatch, capsys):
    root, places = mounted(layout), LAYOUTS[layout]
    monkeypatch.setattr(kaggle_training, "read_gpus", lambda: ["T4", "T4"])
    with chdir(tmp_path):
        session = open_session(root, "tiny.yaml", ["--data.limit", "9"])
    links = tmp_path / "links"
    assert session.recipe == [
        str(root / places["wheels"] / "tiny.yaml"),
        *["--data.train", str(links / "train.csv"), "--data.test", str(links / "test.csv")],
        *["--model.model_name_or_path", str(links / "tiny"), "--data.limit", "9"],
    ]
    assert (links / "train.csv").resolve() == (root / places["competition"] / "train.csv").resolve()
    assert (links / "tiny").resolve() == (root / places["backbone"]).resolve()
    assert session[1:] == (Path("runs/tiny"), ["--base", str(root / places["backbone"])], 2)
    assert "no earlier session to continue" in capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("part", "sentences"),
    [
        ("wheels", ["recipe is not among the inputs (no file is called tiny.yaml): attach it with Add Input > Data"]),
        (
            "competition",
            ["data.train is not among the inputs (no .csv ", "data.test is not among the inputs (no .csv "],
        ),
    ],
)
def test_what_is_missing_is_named_with_the_tree(layout, part, sentences, mounted, capsys):
    root = mounted(layout)
    shutil.rmtree(root / LAYOUTS[layout][part])
    with pytest.raises(SystemExit) as stopped:
        open_session(root, "tiny.yaml")
    for line, sentence in zip(str(stopped.value).splitlines(), sentences, strict=True):
        assert line.startswith(sentence)
    assert f"searched:\n{root}" in capsys.readouterr().out


def test_a_backbone_that_is_not_attached_is_left_to_the_hub(mounted, tmp_path, capsys):
    root = mounted("new")
    shutil.rmtree(root / LAYOUTS["new"]["backbone"])
    with chdir(tmp_path):
        session = open_session(root, "tiny.yaml")
    assert "--model.model_name_or_path" not in session.recipe
    assert session.bundled == ["--contents", "merged"]
    assert "no backbone is attached: owner/tiny is fetched from the hub" in capsys.readouterr().out


def test_a_backbone_of_a_package_is_not_looked_for(mounted, tmp_path):
    root = mounted("new", "model: {model_name_or_path: smollm2-135m-instruct}\n")
    with chdir(tmp_path):
        session = open_session(root, "tiny.yaml", ["--data.train=mine.csv"])
    assert [word for word in session.recipe if word.startswith("--")] == ["--data.test", "--data.train=mine.csv"]
    assert session.bundled == ["--contents", "merged"]


def test_a_recipe_that_cannot_be_used_is_one_sentence(mounted):
    root = mounted("old", "model: {lora_rank: 4}\n")
    with pytest.raises(SystemExit, match=r"^error: .*tiny\.yaml: .*lora_rank"):
        open_session(root, "tiny.yaml")


def test_of_several_backbones_the_one_of_the_recipes_name_is_taken(tmp_path):
    files = []
    for name in ("a/Gemma-2-2b-it/1", "b/other", "c/runs/x/model"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors", *(["backbone.json"] if "runs" in name else [])):
            files.append(tmp_path / name / file)
            files[-1].touch()
    assert find_attached(files, "google/gemma-2-2b-it").path == tmp_path / "a/Gemma-2-2b-it/1"
    with pytest.raises(SystemExit, match=r"several backbones, give one by --model\.model_name_or_path: .*other"):
        find_attached(files, "owner/third")
    assert find_attached([], "owner/third").path is None


def earlier(root: Path, steps: tuple[int, ...], trained: bool = False) -> Path:
    """Write the run of an earlier session, called `mine`, with a checkpoint of each number of steps."""
    run = root / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    for step in steps:
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    if trained:
        (run / "model").mkdir()
    return run


def test_the_most_advanced_earlier_run_is_continued(tmp_path):
    runs = [earlier(tmp_path / "a", (10, 90)), earlier(tmp_path / "b", (100,)), earlier(tmp_path / "c", ())]
    files = [run / "recipe.yaml" for run in runs] + [tmp_path / "d" / "runs" / "other" / "recipe.yaml"]
    here = tmp_path / "work" / "runs" / "mine"
    assert continue_run(files, here) == f"{here} continues from step 100, as it is in {runs[1]}"
    assert (here / "checkpoint-100").is_dir()
    assert continue_run(files, here) == f"{here} continues"
    files.append(earlier(tmp_path / "e", (), trained=True) / "recipe.yaml")
    other = tmp_path / "again" / "mine"
    assert continue_run(files, other) == f"{other} has finished training, as it is in {files[-1].parent}"


def test_a_full_disk_leaves_nothing_of_an_earlier_run(tmp_path, monkeypatch):
    run = earlier(tmp_path / "a", (10,))

    def fill(source, target, **_):
        Path(target).mkdir(parents=True)
        (Path(target) / "recipe.yaml").write_text("ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", fill)
    with pytest.raises(SystemExit, match=r"No space left on device.*: make room there$"):
        continue_run([run / "recipe.yaml"], tmp_path / "work" / "mine")
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("program", "seconds", "ended"),
    [("pass", None, True), ("import time; time.sleep(600)", 0.5, False)],
)
def test_a_command_ends_or_is_stopped_with_all_that_it_started(program, seconds, ended, tmp_path, monkeypatch):
    module = tmp_path / "rewardmodel" / "cli.py"
    module.parent.mkdir()
    (module.parent / "__init__.py").touch()
    module.write_text(f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{program}\n")
    monkeypatch.chdir(tmp_path)
    assert run_command(["run", "recipe.yaml"], 1, seconds) == ended
    if (tmp_path / "pid").exists():  # else it was stopped before it began
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_command_that_fails_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "rewardmodel").mkdir()
    (tmp_path / "rewardmodel" / "__init__.py").touch()
    (tmp_path / "rewardmodel" / "cli.py").write_text("import sys; sys.exit(2)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^rewardmodel doctor ended with exit code 2: the reason is printed above$"):
        run_command(["doctor", "recipe.yaml"])


def test_two_gpus_get_a_process_each(monkeypatch):
    assert launcher(0) == launcher(1) == []
    assert "--multi_gpu --num_machines 1 --num_processes 2 " in " ".join(launcher(2))
    commands = []

    class Process:
        def __init__(self, command, **settings):
            commands.append((command, settings["env"]["NCCL_P2P_DISABLE"]))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait(self, seconds):
            return 0

        def poll(self):
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert run_command(["run", "recipe.yaml", "--resume"], 2)
    [(command, peers)] = commands
    assert command == [sys.executable, *launcher(2), "-m", "rewardmodel.cli", "run", "recipe.yaml", "--resume"]
    assert peers == "1"


def test_a_torchao_that_peft_rejects_is_uninstalled(monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(kaggle_training, "find_rejected", lambda wheels: {})
    remove_rejected()
    monkeypatch.setattr(kaggle_training, "find_rejected", lambda wheels: {"torchao": "0.10.0"})
    remove_rejected()
    [command] = commands
    assert command[-3:] == ["uninstall", "--yes", "torchao"]


def test_without_a_wheel_or_what_it_needs_the_notebook_says_what_to_attach(mounted, tmp_path, monkeypatch):
    root = mounted("new")
    with pytest.raises(SystemExit, match="attach the wheels that are missing, or choose Settings > Internet on"):
        run_notebook(root, tmp_path / "a", monkeypatch, pip=1)
    shutil.rmtree(root / LAYOUTS["new"]["wheels"])
    with pytest.raises(SystemExit, match="attach the data set that has it"):
        run_notebook(root, tmp_path / "b", monkeypatch)


def test_the_notebook_is_pushed_with_what_its_recipe_needs():
    kernel = json.loads((NOTEBOOKS / "kernel-metadata.json").read_text())
    assert (NOTEBOOKS / kernel["code_file"]).is_file()
    assert kernel["competition_sources"] == [COMPETITION]
    source = "\n".join(cell["source"] for cell in CELLS)
    name = source.partition('RECIPE = "')[2].partition('"')[0]
    recipe = load_recipe(NOTEBOOKS.parent / name)
    assert recipe.model.load_in_4bit
    assert "1.7b" in kernel["model_sources"][0]
    assert "1.7B" in recipe.model.model_name_or_path
