"""What a micro-batch of training costs in Python, beyond the operations of the model.

    python scripts/bench_overhead.py --json scripts/results/overhead.json

On a GPU the processor only launches operations, and whatever else it does in a step delays the launches that follow.
The model has as many modules as one of 8 billion weights, and narrow ones. Measured in turns, on one thread, in
milliseconds:

collate   token rows to the tensors of a packed micro-batch, attention's included
step      `PreferenceTrainer.training_step`, from rows to gradients, with a forward pass that computes nothing
loop      an optimiser step of `PreferenceTrainer.train` with it: data loader, optimiser and callbacks, too
together  forward and backward pass of one short battle, and the operations that they dispatch, views aside
apart     the same with every linear layer computing alone (see `rewardmodel/model/fusion.py`)
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from bench_models import apart, processor, text_tokenizer, unlettered_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

BACKBONE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 50000,
    "max_position_embeddings": 8192,
}

SHORT = 96
"""Tokens of a sequence at most where operations are counted: so few that starting them takes the time."""


class Steps(TrainerCallback):
    """Takes the time of each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Note when a step begins; the time since the last one began is that of the last one."""
        now = time.perf_counter()
        if self.last:
            self.seconds.append(now - self.last)
        self.last = now


def backbone_folder(folder: Path) -> Path:
    """Write a random backbone, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**BACKBONE)).save_pretrained(folder)
    (text_tokenizer() or unlettered_tokenizer()).save_pretrained(folder)
    return folder


def token_rows(battles: int, longest: int) -> Any:
    """Return random token rows in both orders, of log-normal lengths as battles of the arena have."""
    from datasets import Dataset

    from rewardmodel.prompt.tokenization import TOKEN_ROW_FEATURES

    random, rows = np.random.default_rng(0), []
    for number in range(battles):
        shared, *answers = np.minimum(random.lognormal(5, 0.9, 3).astype(int) + 1, longest // 3).tolist()
        branches = [shared, sum(answers), sum(answers)]
        length = sum(branches)
        segments = np.repeat(np.array([0, 1, 2, 2, 1], np.int8), [shared, *answers, *reversed(answers)])
        rows.append(
            {
                "id": str(number),
                "input_ids": random.integers(3, BACKBONE["vocab_size"], length),
                "segment_ids": segments,
                "branches": branches,
                "length": length,
                "full": [shared, *answers],
                "kept": [shared, *answers],
                "labels": np.eye(3)[number % 3],
                "teacher": [np.nan] * 3,
                "weight": 1.0,
            }
        )
    return Dataset.from_list(rows, features=TOKEN_ROW_FEATURES)


def trainer_of(folder: Path, rows: Any, battles: int, steps: int) -> Any:
    """Return a trainer whose steps are one micro-batch of `battles` battles."""
    from rewardmodel.config.schema import ModelConfig, ObjectiveConfig, Recipe
    from rewardmodel.model.backbone import resolve_backbone
    from rewardmodel.model.loading import build_model
    from rewardmodel.objectives import find_objective
    from rewardmodel.training.arguments import training_arguments
    from rewardmodel.training.trainer import PreferenceTrainer

    objective, cpu = ObjectiveConfig("cross_entropy"), torch.device("cpu")
    config = ModelConfig(str(backbone_folder(folder / "backbone")), device="cpu", dtype="float32")
    model, tokenizer = build_model(resolve_backbone(config), find_objective(objective).head, 0)
    keys = {"battles_per_step": battles, "max_steps": steps, "eval_strategy": "no", "save_strategy": "no"}
    keys |= {"output_dir": str(folder / "run"), "disable_tqdm": True, "logging_steps": 10}
    args = training_arguments(Recipe(trainer=keys), torch.float32, cpu)
    return PreferenceTrainer(model, args, rows, None, tokenizer, objective, torch.float32, (10**9, None))


class Operations(TorchDispatchMode):
    """Counts operations, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def measure_layers(trainer: Any, row: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Return time and operations of a forward and backward pass with linear layers computing together, and apart."""
    batch, model = trainer._make_batch([row])["model"], trainer.model
    ways: dict[str, Callable[[], Any]] = {"together": nullcontext, "apart": lambda: apart(model)}

    def learn() -> None:
        model(**batch).logits.sum().backward()

    times: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, Any] = {}
    for _ in range(repeats):
        for way, chosen in ways.items():
            with chosen():
                times[way].append(median_milliseconds(learn, 1))
    for way, chosen in ways.items():
        with chosen(), Operations() as operations:
            learn()
        found |= {f"{way}_ms": statistics.median(times[way]), f"{way}_operations": operations.count}
    return found


def median_milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the median time of calls, in milliseconds, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:])


def measure(battles: int, longest: int, repeats: int) -> dict[str, Any]:
    """Return the figures of micro-batches of `battles` battles."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(Path(folder), token_rows(battles, longest), battles, repeats + 2)
        chosen = list(trainer.train_dataset)
        trainer.model.train()
        layers = measure_layers(trainer, token_rows(1, SHORT)[0], repeats)
        weight = next(one for name, one in trainer.model.named_parameters() if "score" in name and one.requires_grad)
        trainer.model.forward = lambda **_: SimpleNamespace(logits=weight.new_zeros(2 * battles, 3) * weight.sum())
        clock = Steps()
        trainer.add_callback(clock)
        trainer.train()
        step = partial(trainer.training_step, trainer.model, chosen, float(battles))
        collate = partial(trainer._make_batch, chosen)
        rounds = [[median_milliseconds(work, 3) for work in (collate, step)] for _ in range(repeats)]
    collated, stepped = (statistics.median(times) for times in zip(*rounds, strict=True))
    figures = {"collate_ms": collated, "step_ms": stepped, "loop_ms": 1000 * statistics.median(clock.seconds)}
    modules = sum(1 for _ in trainer.model.modules())
    rounded = {name: round(value, 2) for name, value in (figures | layers).items()}
    return {"modules": modules, "battles": battles, "tokens": sum(row["length"] for row in chosen), **rounded}


def main() -> None:
    """Parse, measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--battles", type=int, default=16, help="of a micro-batch, in both orders")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a sequence at most")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of measurements")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    figures = {"processor": processor(), **measure(options.battles, options.longest, options.repeats)}
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
