import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fresh import FreshProcess, launch_fresh
from safetensors.torch import load_file

from rewardmodel import distributed as processes
from rewardmodel.config.loader import dump_recipe, load_recipe
from rewardmodel.config.schema import ObjectiveConfig
from rewardmodel.inference.predict import predict
from rewardmodel.predictions import predicted, read_predictions
from rewardmodel.run_folder import RunFolder
from rewardmodel.training.train import train

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"

SHARDED = """
import os
import sys
from accelerate import PartialState
from accelerate.utils import DistributedType
import rewardmodel.training.train as training
from rewardmodel.config.loader import load_recipe
from rewardmodel.inference.predict import predict_with
from rewardmodel.model.loading import load_model, load_predictor
from rewardmodel.predictions import write_predictions
from rewardmodel.distributed import is_main
from rewardmodel.run_folder import RunFolder

arguments = training.training_arguments

def sharded(*given):  # accelerate shards over GPUs only
    args = arguments(*given)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args

training.training_arguments = sharded
whole, *others = map(load_recipe, sys.argv[1:])
for recipe in others:
    training.train(recipe)
os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"  # as recipes/accelerate/fsdp2.yaml has it
folder, parts = training.train(whole)
table = predict_with(load_predictor(whole.model, RunFolder(folder).model), whole, parts.validation)
if is_main():
    write_predictions(table, RunFolder(folder).validation)
"""

APART = """
import os
import sys
from pathlib import Path

if os.environ["RANK"] == "1":
    os.environ["REWARDMODEL_CACHE"] += "/of another machine"
    Path(os.environ["REWARDMODEL_CACHE"]).mkdir(exist_ok=True)

from rewardmodel.cli import main

for file in sys.argv[1:]:
    main(["train", file])
"""


@pytest.fixture
def exact(recipe):
    """Return a recipe that draws nothing in training, in several micro-batches a step."""
    trainer = {**recipe.trainer, "micro_batch_tokens": 400, "num_train_epochs": 2}
    return replace(recipe, model=replace(recipe.model, lora_dropout=0.0), trainer=trainer)


def launch(config: str, *command: str) -> FreshProcess:
    return launch_fresh(CONFIGS / f"{config}.yaml", *command)


def launch_interpreters(config: str, *command: str) -> subprocess.Popen:
    """Start what `launch` does with accelerate's own workers: how it reports a killed one is theirs."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_cpu_threads_per_process", "1"]
    return subprocess.Popen(
        [*launcher, "--config_file", str(CONFIGS / f"{config}.yaml"), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def said_by(process: FreshProcess | subprocess.Popen) -> str:
    return "".join(process.communicate())


def with_folder(recipe, folder: Path, **trainer):
    return replace(recipe, trainer={**recipe.trainer, **trainer, "output_dir": str(folder)})


def written(recipe, file: Path) -> str:
    file.write_text(dump_recipe(recipe))
    return str(file)


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = (load_file(RunFolder(run).model / "adapter_model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    for name in first:
        assert (first[name] - second[name]).abs().max() <= 1e-5, name


@pytest.mark.slow  # starts a launcher and two processes
@pytest.mark.distributed
def test_two_processes_train_and_predict_as_one_does(exact, tmp_path):
    one, _ = train(with_folder(exact, tmp_path / "one"))
    two = with_folder(exact, tmp_path / "two", torch_compile=True, torch_compile_backend="eager")
    process = launch("cpu_ddp", "-m", "rewardmodel.cli", "run", written(two, tmp_path / "two.yaml"))
    said = said_by(process)
    assert process.returncode == 0, said
    assert_same_weights(one, two.run_folder)
    assert said.count("battles to train on") == said.count("held-out prompts") == 1  # one process talks
    assert json.loads((two.run_folder / "environment.json").read_text())["compute"]["processes"] == 2
    table = read_predictions(RunFolder(two.run_folder).validation)
    alone = predict(one, "validation", replace(load_recipe(one / "recipe.yaml"), inference=exact.inference))
    np.testing.assert_allclose(predicted(table), predicted(alone), atol=1e-6)


# One launch for all kinds, because starting it takes most of the time.
@pytest.mark.slow  # starts a launcher and two processes
@pytest.mark.distributed
def test_sharded_models_are_trained_saved_and_reloaded(exact, tmp_path):
    kinds = {
        "read by one process": exact,
        "four bits": replace(exact, model=replace(exact.model, load_in_4bit=True)),
        "a tie parameter that is fitted": replace(
            exact, objective=ObjectiveConfig("bradley_terry"), prompt=replace(exact.prompt, template="response")
        ),
    }
    sharded = {kind: with_folder(recipe, tmp_path / kind) for kind, recipe in kinds.items()}
    files = [written(recipe, tmp_path / f"{kind}.yaml") for kind, recipe in sharded.items()]
    (tmp_path / "sharded.py").write_text(SHARDED)
    process = launch("cpu_fsdp2", str(tmp_path / "sharded.py"), *files)
    said = said_by(process)
    assert process.returncode == 0, said
    for kind, recipe in kinds.items():
        one, _ = train(with_folder(recipe, tmp_path / f"{kind}, alone"))
        assert_same_weights(one, sharded[kind].run_folder)
        found, expected = (predicted(predict(run, "validation")) for run in (sharded[kind].run_folder, one))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    by_both = read_predictions(RunFolder(sharded["read by one process"].run_folder).validation)
    alone = predict(sharded["read by one process"].run_folder, "validation")
    np.testing.assert_allclose(predicted(by_both), predicted(alone), atol=1e-6)


# One launch for all kinds, because starting it takes most of the time.
@pytest.mark.slow  # starts a launcher and two processes
@pytest.mark.distributed
def test_processes_without_a_cache_in_common_train_from_the_same_features(exact, tmp_path):
    frozen = replace(exact, model=replace(exact.model, freeze_backbone=True))
    fitted = replace(exact, model=replace(exact.model, head_init="fitted"))
    in_fp8 = replace(exact, model=replace(exact.model, load_in_fp8=True))
    runs = [with_folder(recipe, tmp_path / f"two {number}") for number, recipe in enumerate((frozen, fitted, in_fp8))]
    files = [written(recipe, tmp_path / f"{number}.yaml") for number, recipe in enumerate(runs)]
    (tmp_path / "apart.py").write_text(APART)
    process = launch("cpu_ddp", str(tmp_path / "apart.py"), *files)
    said = said_by(process)
    assert process.returncode == 0, said
    assert "features of 36 of 36 battles" in said  # the second run has what the first has read
    for recipe, two in zip((frozen, fitted, in_fp8), runs, strict=True):
        one, parts = train(with_folder(recipe, tmp_path / "one" / two.run_folder.name))
        found, expected = (predicted(predict(run, parts.validation)) for run in (two.run_folder, one))
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow  # starts a launcher and two processes
@pytest.mark.distributed
def test_a_killed_process_ends_all_and_the_run_resumes(exact, tmp_path):
    keys = {"num_train_epochs": 12, "learning_rate": 1e-4, "load_best_model_at_end": False, "save_total_limit": None}
    whole, _ = train(with_folder(exact, tmp_path / "whole", **keys))
    killed = with_folder(exact, tmp_path / "killed", **keys)
    command = ["-m", "rewardmodel.cli", "train", written(killed, tmp_path / "killed.yaml")]
    process = launch_interpreters("cpu_ddp", *command)
    while not list(killed.run_folder.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, said_by(process)
        time.sleep(0.02)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    said = said_by(process)
    assert process.returncode != 0
    assert "SIGKILL" in said
    assert not RunFolder(killed.run_folder).model.exists()
    again = launch("cpu_ddp", *command, "--resume")
    said = said_by(again)
    assert again.returncode == 0, said
    assert_same_weights(whole, killed.run_folder)


def test_one_process_alone_is_the_main_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert processes.is_main()
    monkeypatch.setenv("RANK", "1")
    assert not processes.is_main()
