"""How time and memory grow with the number of battles, and with their length.

    python scripts/bench_growth.py train.csv --json scripts/results/growth.json

Battles: the labelled file is repeated up to so many rows, and a random Llama of one layer trains on all but a fold of
them, at most 128 tokens each, 64 a step, and predicts that fold in both orders: `rewardmodel run`, but for the report.
Lengths: one of four layers trains on, and predicts, battles of drawn ids, all of one length. Micro-batches have 8,192
tokens. Every measurement runs in a separate process; memory is the peak of its anonymous pages.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_battles import answer, measured, repeated, tell
from bench_models import backbone_folder, processor

MAX_LENGTH = 128
"""Most tokens of a battle where their number grows."""

TOKENS = 8192
"""Tokens of a micro-batch where their length grows."""

ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
"""The backbone where the number of battles grows."""

A_LENGTH = 16
"""Battles of each length, in two optimiser steps."""


def tiny(folder: Path, **smaller: int) -> str:
    """Return the folder of a tiny random Llama, in some respects made smaller."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = backbone_folder("tiny", folder)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **smaller)).save_pretrained(path)
    return str(path)


def recipe_of(backbone: str, output: str, trainer: dict[str, Any], **data: Any) -> Any:
    """Return a recipe for the tiny Llama."""
    from rewardmodel.config.schema import DataConfig, ModelConfig, PromptConfig, Recipe

    keys = {"output_dir": output, "save_strategy": "no", "eval_strategy": "no", "logging_steps": 10**9}
    keys |= {"disable_tqdm": True, "micro_batch_tokens": TOKENS, **trainer}
    return Recipe(
        data=DataConfig(**data),
        prompt=PromptConfig(max_length=MAX_LENGTH),
        model=ModelConfig(model_name_or_path=backbone, device="cpu", dtype="float32", lora_dropout=0.0),
        trainer=keys,
    )


def battles(path: str, count: str, backbone: str) -> dict:
    """Train on a file and predict its validation fold; return the seconds of each."""
    from rewardmodel.inference.predict import predict_with
    from rewardmodel.model.loading import load_predictor
    from rewardmodel.run_folder import RunFolder
    from rewardmodel.training.train import train

    recipe = recipe_of(backbone, str(Path(path).with_suffix("")), {"battles_per_step": 64}, train=path)
    start = time.perf_counter()
    run, parts = train(recipe)
    trained = time.perf_counter()
    table = predict_with(load_predictor(recipe.model, RunFolder(run).model), recipe, parts.validation)
    predicted = time.perf_counter()
    return {
        "battles": int(count),
        "training_seconds": round(trained - start, 1),
        "training_ms_a_battle": round(1000 * (trained - start) / len(parts.training), 2),
        "prediction_ms_a_battle": round(1000 * (predicted - trained) / len(table), 2),
    }


def length(backbone: str, tokens: str) -> dict:
    """Train on, and predict, battles of one length; return the seconds of each."""
    import torch
    from datasets import Dataset

    from rewardmodel.model.backbone import resolve_backbone
    from rewardmodel.model.forward import Predictor
    from rewardmodel.model.loading import build_model
    from rewardmodel.objectives import JOINT_HEAD
    from rewardmodel.prompt.tokenization import TOKEN_ROW_FEATURES
    from rewardmodel.training.arguments import training_arguments
    from rewardmodel.training.trainer import PreferenceTrainer

    size, random = int(tokens), np.random.default_rng(0)
    segments = np.repeat([0, 1, 2], [size - 2 * (size // 3), size // 3, size // 3]).astype(np.int8)
    row = {"segment_ids": segments, "branches": [0, size], "length": size, "full": [], "kept": [], "weight": 1.0}
    row["teacher"] = [np.nan] * 3
    rows = [
        row | {"id": str(number), "input_ids": random.integers(1000, 40_000, size), "labels": np.eye(3)[number % 3]}
        for number in range(A_LENGTH)
    ]
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(backbone, folder, {})
        model, tokenizer = build_model(resolve_backbone(recipe.model), JOINT_HEAD, seed=0)
        args = training_arguments(recipe, torch.float32, torch.device("cpu"))
        data, given = (
            Dataset.from_list(rows, features=TOKEN_ROW_FEATURES),
            (recipe.objective, torch.float32, (TOKENS, TOKENS)),
        )
        PreferenceTrainer(model, args, data.select(range(8)), None, tokenizer, *given).train()
        trainer = PreferenceTrainer(model, args, data, None, tokenizer, *given)
        start = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
        Predictor(model.eval(), tokenizer, torch.float32, TOKENS).logits(data)
    predicted = time.perf_counter()
    total = size * A_LENGTH
    return {
        "tokens": size,
        "training_tokens_a_second": round(total / (trained - start)),
        "prediction_tokens_a_second": round(total / (predicted - trained)),
    }


MEASUREMENTS = {"battles": battles, "length": length}


def main() -> None:
    """Parse, measure, write JSON."""
    if answer(MEASUREMENTS):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="a labelled file of the competition")
    parser.add_argument("--battles", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"device": processor(), "battles": [], "lengths": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiniest = tiny(folder / "one", **ONE_LAYER)
        backbone = tiny(folder / "four")
        for count in options.battles:
            repeated(options.train, count, folder / f"{count}.csv")
            found["battles"].append(measured(__file__, "battles", str(folder / f"{count}.csv"), str(count), tiniest))
        for tokens in options.lengths:
            found["lengths"].append(measured(__file__, "length", backbone, str(tokens)))
    tell(found, options.json)


if __name__ == "__main__":
    main()
