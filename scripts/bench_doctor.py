"""How accurately `rewardmodel doctor` predicts the memory that training and prediction take on a CPU.

    python scripts/bench_doctor.py --json scripts/results/doctor.json

Every case trains a few optimiser steps, or predicts, in a separate process, on battles of the packaged sample that are
made as long as the recipe allows. The peak of the process's resident memory is compared with the doctor's estimate for
the same recipe, with the memory of the process itself (`planning.estimate.PROCESS_BYTES`) and without.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_battles import answer, measured, tell
from bench_models import processor

SMOLLM = {"model.model_name_or_path": "smollm2"}
MIDDLE = {"model.model_name_or_path": "llama-1024x12"}

CASES: dict[str, dict[str, Any]] = {
    "smollm2": SMOLLM,
    "smollm2, 1024 tokens": {**SMOLLM, "prompt.max_length": 1024},
    "smollm2, upper half": {**SMOLLM, "model.lora_first_layer": 15},
    "smollm2, checkpointing": {**SMOLLM, "trainer.gradient_checkpointing": True},
    "smollm2, 4 bits": {**SMOLLM, "model.load_in_4bit": True},
    "smollm2, 4 bits, upper half, no dropout": {
        **SMOLLM,
        "model.load_in_4bit": True,
        "model.lora_first_layer": 15,
        "model.lora_dropout": 0.0,
    },
    "smollm2, 4 bits, checkpointing, 1024 tokens": {
        **SMOLLM,
        "model.load_in_4bit": True,
        "trainer.gradient_checkpointing": True,
        "prompt.max_length": 1024,
    },
    "smollm2, eager": {**SMOLLM, "model.attn_implementation": "eager"},
    "smollm2, all weights": {**SMOLLM, "model.use_peft": False, "trainer.micro_batch_tokens": 1024},
    "llama-1024x12": MIDDLE,
    "llama-1024x12, float32": {**MIDDLE, "model.dtype": "float32", "trainer.micro_batch_tokens": 2048},
    "llama-1024x12, 4 bits, 2048 tokens": {**MIDDLE, "model.load_in_4bit": True, "trainer.micro_batch_tokens": 2048},
    "smollm2, prediction": {**SMOLLM, "predict": True},
    "smollm2, 4 bits, prediction": {**SMOLLM, "model.load_in_4bit": True, "predict": True},
    "llama-1024x12, prediction": {**MIDDLE, "predict": True},
}
"""Recipe keys of each case, over those of `recipe_of`."""


def recipe_of(name: str, folder: str) -> Any:
    """Return a case's recipe."""
    from rewardmodel.config.loader import load_recipe

    path = Path(folder) / "recipe.yaml"
    path.write_text("")
    keys = {
        "data.train": f"{folder}/battles.csv",
        "model.device": "cpu",
        "trainer.output_dir": f"{folder}/run",
        "trainer.max_steps": 2,
        "inference.batch_tokens": 4096,
        "trainer.battles_per_step": 8,
        "trainer.eval_strategy": "no",
        "trainer.save_strategy": "no",
        "trainer.disable_tqdm": True,
        "prompt.max_length": 512,
        **{key: value for key, value in CASES[name].items() if "." in key},
    }
    keys["model.model_name_or_path"] = f"{folder}/{keys['model.model_name_or_path']}"
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return load_recipe(path, [word.lower() if word in ("True", "False") else word for word in words])


def make_backbone(folder: Path) -> None:
    """Write a random Llama of 12 layers, 1,024 wide."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from rewardmodel.model.loading import load_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=49152,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(folder.with_name("smollm2")).save_pretrained(folder)


def make_battles(path: Path) -> None:
    """Write battles whose every sequence reaches max_length."""
    from rewardmodel.config.schema import DataConfig
    from rewardmodel.data.splits import load_battles

    battles = load_battles(DataConfig()).to_pandas().iloc[::16].copy()
    for name in ("prompt", "response_a", "response_b"):
        battles[name] = [json.dumps([" ".join(list(turns) * 40)]) for turns in battles[name]]
    columns = ["id", "prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"]
    battles[columns].to_csv(path, index=False)


def resident() -> float:
    """Return the most memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def take(name: str, folder: str) -> dict:
    """Train or predict, and return the peak memory of the process, before that and after."""
    import rewardmodel.pipeline  # noqa: F401
    from rewardmodel.data.splits import load_battles
    from rewardmodel.model.backbone import resolve_backbone
    from rewardmodel.model.forward import Predictor
    from rewardmodel.model.loading import build_model
    from rewardmodel.objectives import find_objective
    from rewardmodel.prompt.tokenization import tokenize
    from rewardmodel.training.train import train

    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")  # as the command line does
    recipe, before = recipe_of(name, folder), resident()
    if not CASES[name].get("predict"):
        train(recipe)
    else:
        backbone = resolve_backbone(recipe.model)
        model, tokenizer = build_model(backbone, find_objective(recipe.objective).head, 0)
        rows = tokenize(load_battles(recipe.data).select(range(12)), tokenizer, recipe.prompt, both_orders=True)
        Predictor(model.eval(), tokenizer, backbone.dtype, 4096).logits(rows)
    return {"before_gib": round(before, 3), "peak_gib": round(resident(), 3)}


def estimate(name: str, folder: str) -> dict:
    """Return the doctor's estimate for a case."""
    from rewardmodel.distributed import Launch
    from rewardmodel.model.backbone import resolve_backbone
    from rewardmodel.planning.devices import find_device
    from rewardmodel.planning.estimate import estimate_inference, estimate_training
    from rewardmodel.planning.scenario import Scenario
    from rewardmodel.planning.workload import read_workload

    recipe = recipe_of(name, folder)
    backbone = resolve_backbone(recipe.model)
    workload = read_workload(recipe, backbone.folder)
    scenario = Scenario(recipe, backbone.config, find_device("cpu"), backbone.dtype, Launch(), workload)
    needs = estimate_inference(scenario) if CASES[name].get("predict") else estimate_training(scenario)
    parts = {part: round(size / 2**30, 3) for part, size in needs.parts.items()}
    return {"told_gib": round(needs.total / 2**30, 3), "parts": parts, "tokens": needs.tokens}


MEASUREMENTS = {"take": take, "estimate": estimate}


def main() -> None:
    """Parse, measure, write JSON."""
    if answer(MEASUREMENTS):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of: {'; '.join(CASES)}; default: all")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    from rewardmodel.model.weights import fetch_backbone

    smollm2 = fetch_backbone("smollm2-135m-instruct")
    figures: dict[str, Any] = {"machine": processor(), "cases": {}}
    for name in options.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            make_battles(Path(folder) / "battles.csv")
            (Path(folder) / "smollm2").symlink_to(smollm2)
            if CASES[name]["model.model_name_or_path"] == "llama-1024x12":
                make_backbone(Path(folder) / "llama-1024x12")
            estimated, took = (measured(__file__, what, name, folder) for what in ("estimate", "take"))
        error = estimated["told_gib"] / took["peak_gib"] - 1
        own = (estimated["told_gib"] - estimated["parts"]["process"]) / (took["peak_gib"] - took["before_gib"]) - 1
        figures["cases"][name] = {
            **{key: estimated[key] for key in ("told_gib", "parts", "tokens")},
            **{key: took[key] for key in ("before_gib", "peak_gib")},
            "error_percent": round(100 * error, 1),
            "error_percent_without_process": round(100 * own, 1),
        }
        print(f"{name}: {100 * error:+.1f} %, without the process {100 * own:+.1f} %", file=sys.stderr, flush=True)
        if options.json:
            tell(figures, options.json)


if __name__ == "__main__":
    main()
