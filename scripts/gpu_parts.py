"""The parts of `bench_gpu.py` that explain speed, check what is told, or train really: a bench and a job -> figures."""

import time
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_training
import numpy as np
import torch
from bench_models import our_config, synchronise
from gpu_models import Bench, Job, SkippedError
from gpu_speed import Steps, measure_training, run_trainer, some_steps
from transformers import PrinterCallback, TrainerCallback

TOP = 15
"""Kernels to list."""


class Waits(TrainerCallback):
    """Collects where the processor waits for the GPU within steps.

    Attributes:
        places: number of times by place, like `{"objectives.py:123": 4}`.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._step = ExitStack()
        self._warnings: list[Any] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Let torch warn of it."""
        self._warnings = self._step.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Leave out what belongs to no step."""
        torch.cuda.set_sync_debug_mode("default")
        self._step.close()
        synchronising = [one for one in self._warnings if "called a synchronizing" in str(one.message)]
        self.places.update(f"{Path(one.filename).name}:{one.lineno}" for one in synchronising)


def waiting(bench: Bench, job: Job, until: float) -> dict:
    """Train four steps and tell where the processor waits for the GPU within them; on a CPU, only train."""
    plan, _, _, trainer_of = bench.ours(job)
    run_trainer(trainer_of(plan.rows()[0]), Steps(bench.device, until))  # finds the size of micro-batches
    waits, made = Waits(), trainer_of(some_steps(plan, 4))
    run_trainer(made, Steps(bench.device, until), *([waits] if bench.cuda else []))
    found = "not checked: only on CUDA"
    if bench.cuda:
        places = ", ".join(f"{place} ({count} times)" for place, count in waits.places.items())
        found = f"the processor waits for the GPU at {places}" if places else "the processor never waits for the GPU"
    return {"optimiser_steps": made.state.global_step, "found": found}


class Profiled(TrainerCallback):
    """Runs torch's profiler from the end of the first step to the end of the last, or of the first after its time."""

    def __init__(self, bench: Bench) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.device = bench.device
        self.seen = profile(activities=[ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU])
        self.steps = 0
        self.running = False

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Start after the first step."""
        if self.running:
            self.steps += 1
        else:
            synchronise(self.device)
            self.seen.start()
            self.running = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        if self.running:
            synchronise(self.device)
            self.seen.stop()


def profile(bench: Bench, job: Job, until: float) -> dict:
    """Train three steps and return which kernels take the time of the last two, and how long none runs.

    On a CPU, torch's operations stand in for kernels, those within others counted in both.
    """
    plan, _, _, trainer_of = bench.ours(job)
    profiled = Profiled(bench)
    run_trainer(trainer_of(some_steps(plan, 3)), Steps(bench.device, until), profiled)
    if not profiled.steps:
        raise SkippedError("no time for a second step")
    kind = torch.autograd.DeviceType.CUDA if bench.cuda else torch.autograd.DeviceType.CPU
    events = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiled.seen.events()
        if event.device_type == kind and (bench.cuda or event.name.startswith("aten::"))
        # what a program names for the profiler spans kernels and gaps alike
        if not getattr(event, "is_user_annotation", False) and not event.name.startswith(("Optimizer.", "ProfilerStep"))
    ]
    if not events:
        raise SkippedError("the profiler saw no kernels")
    intervals = [(start, end) for _, start, end in events]
    busy = busy_time(intervals)
    span = max(end for _, end in intervals) - min(start for start, _ in intervals)
    return {
        "optimiser_steps": profiled.steps,
        "seconds": round(span / 1e6, 3),
        "gap_share": round(1 - busy / span, 4),
        "launches": len(events),
        "kernels": top_kernels(events),
    }


def busy_time(intervals: Iterable[tuple[float, float]]) -> float:
    """Return how long at least one of these intervals (start, end) lasts: the length of their union."""
    total, reached = 0.0, -np.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def top_kernels(events: list[tuple[str, float, float]]) -> list[dict]:
    """Return the names that take longest, of events (name, start, end) in µs, with time, share of all, and number."""
    took: dict[str, list[float]] = {}
    for name, start, end in events:
        took.setdefault(name, []).append(end - start)
    everything = sum(map(sum, took.values())) or 1.0
    ranked = sorted(took.items(), key=lambda item: -sum(item[1]))[:TOP]
    return [
        {"name": name, "ms": round(sum(each) / 1e3, 3), "share": round(sum(each) / everything, 4), "calls": len(each)}
        for name, each in ranked
    ]


def doctor(bench: Bench, job: Job, _: float) -> dict:
    """Let `rewardmodel doctor` predict memory and speed of the measured settings, and compare.

    The memory compared is what torch allocates: without the context of CUDA. Without battles to read, doctor assumes
    lengths as in the competition, to which the drawn ones are fitted too.
    """
    from rewardmodel.config.schema import DataConfig, PromptConfig, Recipe
    from rewardmodel.errors import InputError
    from rewardmodel.planning.doctor import doctor as diagnose

    plan = bench.plan(job.shape, job.precision)
    if job.precision == "fp8":
        bench.ours(job)  # skipped where there is no such precision
    recipe = Recipe(
        data=DataConfig(train=str(bench.options.battles or bench.folder / "none.csv")),
        prompt=PromptConfig(max_length=plan.max_length),
        model=our_config(plan),
        trainer={
            "battles_per_step": plan.step,
            "gradient_checkpointing": plan.checkpointing,
            "num_train_epochs": 1,
            "eval_strategy": "no",
            **plan.keys_of("trainer"),
        },
    )
    start = time.perf_counter()
    found = diagnose(recipe, None if bench.cuda else "cpu", others=False)
    if found.estimate is None:
        raise InputError("; ".join(found.problems))
    estimate, seconds = found.estimate, time.perf_counter() - start
    hours = {"training": estimate.hours.training, "inference": estimate.hours.prediction}
    battles = {"training": estimate.workload.training, "inference": estimate.workload.validation}
    told: dict[str, Any] = {"seconds": round(seconds, 2), "problems": found.problems}
    for part, needs in (("training", estimate.training), ("inference", estimate.inference)):
        measured = bench.figures.get(f"{part} {job.shape} {job.precision}", {})
        told[part] = {
            "told_gib": round((needs.total - needs.parts.get("CUDA", 0)) / 2**30, 2),
            "peak_gib": measured.get("peak_gib"),
            "told_battles_a_second": round(battles[part] / (3600 * hours[part]), 2),
            "battles_a_second": measured.get("battles_a_second"),
            "told_tokens": needs.tokens,
            "micro_batch_tokens": measured.get("micro_batch_tokens"),
        }
    return told


def smollm2(bench: Bench, _: Job, until: float) -> dict:
    """Train LoRA on SmolLM2-135M with real battles; return speed, and log loss on held-out ones before and after."""
    from rewardmodel.battles import AUGMENTATIONS
    from rewardmodel.config.schema import DataConfig, ModelConfig, PromptConfig, Recipe
    from rewardmodel.data.splits import load_battles, split
    from rewardmodel.model.backbone import resolve_backbone
    from rewardmodel.model.loading import build_model
    from rewardmodel.objectives import find_objective
    from rewardmodel.prompt.tokenization import tokenize
    from rewardmodel.training.arguments import training_arguments
    from rewardmodel.training.trainer import PreferenceTrainer

    bench.release()
    options, name = bench.options, "smollm2-135m-instruct"
    recipe = Recipe(
        data=DataConfig(train=str(options.battles or "sample")),
        prompt=PromptConfig(max_length=min(bench.plan(name, "bf16").max_length, 1024)),
        model=ModelConfig(
            name, device=bench.device.type, pooling="responses", num_hidden_layers=None if bench.cuda else 2
        ),
        trainer={**bench_training.settings(bench.plan(name, "bf16")), "learning_rate": 5e-4, "battles_per_step": 16},
    )
    parts = split(load_battles(recipe.data), recipe.data.fold)
    backbone = resolve_backbone(recipe.model, trainer=recipe.trainer, max_length=recipe.prompt.max_length)
    model, tokenizer = build_model(backbone, find_objective(recipe.objective).head, 0)
    rows, validation = (
        tokenize(few(battles, count), tokenizer, recipe.prompt)
        for battles, count in (
            (AUGMENTATIONS["random"](parts.training, 0), options.real),
            (parts.validation, options.real // 4),
        )
    )
    args = training_arguments(recipe, backbone.dtype, backbone.device)
    made = PreferenceTrainer(model, args, rows, validation, tokenizer, recipe.objective, backbone.dtype)
    made.remove_callback(PrinterCallback)
    start = time.monotonic()
    before = made.evaluate()["eval_log_loss"]
    reserve = 1.5 * (time.monotonic() - start)  # for the evaluation at the end
    plan = replace(
        bench.plan(name, "bf16"),
        folder=backbone.folder,
        dtype=backbone.dtype,
        first_layer=0,
        layers=recipe.model.num_hidden_layers,
    )
    figures = measure_training(bench, plan, model, made, until - reserve, 1)
    after = made.evaluate()["eval_log_loss"]
    counts = {"training_battles": len(rows), "validation_battles": len(validation)}
    return {**figures, **counts, "log_loss_before": round(before, 4), "log_loss_after": round(after, 4)}


def few(battles: Any, count: int) -> Any:
    """Return at most so many battles, drawn by a fixed seed."""
    return battles.shuffle(seed=0).select(range(min(count, len(battles)))).flatten_indices()
