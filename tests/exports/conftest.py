"""Runs to export: one that is trained once, and quick ones of random weights."""

import json
from dataclasses import replace

import pytest
import torch
from builders import battle_frame, write_csv

from rewardmodel.config.loader import dump_recipe
from rewardmodel.config.schema import DataConfig, ModelConfig, ObjectiveConfig, PromptConfig, Recipe
from rewardmodel.exports import parity
from rewardmodel.exports.checks import TrainedRun
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.loading import build_model, save_model
from rewardmodel.objectives import JOINT_HEAD, find_objective
from rewardmodel.pipeline import run as run_recipe


@pytest.fixture(scope="session")
def recipe_of(backbone, tmp_path_factory):
    """Return a function that makes a recipe of 280 battles, changed."""

    def make(name: str, objective: str = "cross_entropy", template: str | None = None, **model):
        folder = tmp_path_factory.mktemp(name)
        config = ModelConfig(model_name_or_path=str(backbone("llama")), device="cpu", dtype="float32", lora_r=4)
        return Recipe(
            data=DataConfig(train=str(write_csv(battle_frame(70), folder / "train.csv")), folds=4),
            prompt=PromptConfig(max_length=120, template=template),
            model=replace(config, **model),
            objective=ObjectiveConfig(name=objective),
            trainer={
                "output_dir": str(folder / name),
                "disable_tqdm": True,
                "learning_rate": 1e-2,
                "max_steps": 8,
                "load_best_model_at_end": False,
            },
        )

    return make


@pytest.fixture(scope="session")
def run_folder(recipe_of):
    """Return the folder of a whole run in 4 bits, with metrics; tests leave it as it is."""
    return run_recipe(recipe_of("run", load_in_4bit=True))[0]


def write_random_model(config: ModelConfig, folder, head=JOINT_HEAD, scale=0.05, seed=0):
    """Write a model whose adapter and head are random and large enough to matter, and return it and its tokenizer."""
    backbone = resolve_backbone(config)
    model, tokenizer = build_model(backbone, head, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, weight in model.named_parameters():
        if weight.requires_grad and "magnitude" not in name and ("lora_" in name or "score" in name):
            weight.data = weight.data + scale * torch.randn(weight.shape, generator=generator)
    save_model(model, tokenizer, backbone, folder)
    return model, tokenizer


@pytest.fixture
def random_run(tmp_path):
    """Return a function that writes a run of random weights: random_run(backbone, **model) -> run, model, tokenizer."""

    def make(backbone, head=JOINT_HEAD, dtype="float32", folder=tmp_path, seed=0, **changes):
        config = ModelConfig(str(backbone), device="cpu", dtype="float32", **{"lora_r": 4, **changes})
        model, tokenizer = write_random_model(config, folder / "model", head, seed=seed)
        (folder / "environment.json").write_text("{}")
        return TrainedRun(folder, Recipe(model=config), dtype), model, tokenizer

    return make


@pytest.fixture(scope="session")
def untrained_run(recipe_of):
    """Return a function that writes, once, the run folder of a recipe whose weights are random."""
    made = {}

    def make(name: str, *args, **model):
        key = (name, *args, *sorted(model.items()))
        if key in made:
            return made[key]
        recipe = recipe_of(name, *args, **model)
        folder = made[key] = recipe.run_folder
        write_random_model(recipe.model, folder / "model", find_objective(recipe.objective).head)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        (folder / "environment.json").write_text(json.dumps({"compute": {"dtype": "float32"}}))
        return folder

    return make


def load_plain(job):
    from transformers import AutoModelForSequenceClassification

    dtype, own_code = getattr(torch, job["precision"]), "segment_ids" in torch.load(job["batch"])
    return AutoModelForSequenceClassification.from_pretrained(
        job["folder"], dtype=dtype, trust_remote_code=own_code
    ).eval()


@pytest.fixture
def in_this_process(monkeypatch, tmp_path_factory):
    """Read exports back in this process, which imports nothing again; `.load_plain` may be replaced."""

    class Here:
        load_plain = staticmethod(load_plain)

    def run_job(job, work):
        if job["batch"]:
            batch = torch.load(job["batch"])
            model = Here.load_plain(job)
            with torch.no_grad():
                torch.save(model(**batch).logits.float(), job["logits"])
        parity.predict_export(job)

    monkeypatch.setattr(parity, "_run_in_fresh_process", run_job)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    return Here
