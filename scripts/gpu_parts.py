"""The parts of `bench_gpu.py`: a bench and a job in, figures out. Each stops at its time limit with what it has."""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import bench_inference
import bench_training
import numpy as np
import torch
from bench_compare import Plan, figures_of, planned
from bench_doctor import resident
from bench_models import (
    SHAPES,
    Counter,
    draw_head,
    float8_matrix_rate,
    mark,
    matrix_rate,
    our_config,
    our_model,
    seconds_between,
    synchronise,
    timed,
)
from transformers import PrinterCallback, TrainerCallback

PRECISIONS = ("nf4", "bf16", "fp8")
"""How ours holds the frozen weights: `load_in_4bit`, not quantised, `load_in_fp8`."""

TOP = 15
"""Kernels to list."""


class SkippedError(Exception):
    """A part that cannot be measured here, and why; it is no failure."""


@dataclass
class Bench:
    """What all parts share.

    Attributes:
        options: the command line.
        folder: for battles and backbones.
        device: to measure.
        figures: of the jobs so far, by their names.
        plans: of the shapes so far.
        broken: why a model cannot be built, by shape and precision.
        held: the model of ours that was built last, in a list to empty: `[key, plan, model, tokenizer, trainer_of]`.
        predicted: mean probabilities (n, 3) of the battles that ours predicted, by shape and precision.
    """

    options: Any
    folder: Path
    device: torch.device
    figures: dict[str, dict] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    broken: dict[tuple, Exception] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)
    predicted: dict[tuple, np.ndarray] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def dtype(self, model_type: str = "llama") -> torch.dtype:
        """Return the precision that rewardmodel chooses to compute a family in, on this device."""
        from rewardmodel.config.schema import ModelConfig
        from rewardmodel.model.families import find_family
        from rewardmodel.model.precision import compute_dtype

        return compute_dtype(ModelConfig(), self.device, find_family(model_type))

    @cached_property
    def rate(self) -> float:
        """Operations a second of a large matrix product."""
        return matrix_rate(self.device, self.dtype())

    def plan(self, shape: str, precision: str) -> Plan:
        """Return the plan of a shape; its battles are drawn when it is asked for first."""
        if shape not in self.plans:
            options = self.options
            words = {
                "train": options.battles,
                "synthetic": options.battles is None,
                "shape": shape,
                "battles": options.count,
                "counted": "training_battles",
                "bits": None,
                "attention": None,
                "stock_attention": None,
                "max_length": options.max_length,
                "seed": 0,
                "warm": options.warm,
            }
            folder = self.folder / f"plan of {shape}"
            folder.mkdir()
            plan = Plan.read(str(planned(type(options)(**words), folder)))
            checkpointing = plan.checkpointing if options.checkpointing is None else options.checkpointing
            dtype = self.dtype((SHAPES[shape].config or {}).get("model_type", "llama"))
            self.plans[shape] = replace(
                plan,
                dtype=dtype,
                checkpointing=checkpointing,
                batch=min(plan.batch, options.step),
                step=options.step,
            )
        return replace(self.plans[shape], four_bits=precision == "nf4", fp8=precision == "fp8")

    def ours(self, job: "Job") -> tuple[Plan, Any, Any, Callable[[Any], Any]]:
        """Return the plan of a job, our model for it, its tokenizer, and what makes a trainer for rows.

        The model before it is let go.

        Raises:
            SkippedError: this release, or this device, has no such precision.
        """
        key = (job.shape, job.precision)
        if key in self.broken:
            raise self.broken[key]
        if not self.held or self.held[0] != key:
            self.release()
            try:
                self.held = [key, *self._build(job)]
            except SkippedError as error:
                self.broken[key] = SkippedError(str(error))
                raise
            except Exception as error:  # kept as words: its traceback would keep half a model in memory
                self.broken[key] = RuntimeError(f"no model: {first_line(error)}")
                raise
        return tuple(self.held[1:])

    def _build(self, job: "Job") -> tuple[Plan, Any, Any, Callable[[Any], Any]]:
        from rewardmodel.config.schema import ModelConfig
        from rewardmodel.errors import InputError

        if job.precision == "fp8" and "load_in_fp8" not in {one.name for one in dataclasses.fields(ModelConfig)}:
            raise SkippedError("this release has no model.load_in_fp8")
        plan = self.plan(job.shape, job.precision)
        try:
            with plan.weights():
                model, tokenizer = our_model(plan)
        except InputError as error:
            if job.precision != "fp8":
                raise
            raise SkippedError(str(error)) from error
        draw_head(model, plan.seed)
        return plan, model, tokenizer, bench_training.trainer_of_ours(plan, model, tokenizer)

    def release(self) -> None:
        """Let the model go that is held, and give its memory back."""
        self.held.clear()
        self.clear()

    def clear(self) -> None:
        """Give memory back that nothing uses, and count its peak from here."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """Return the peak of allocated memory since `clear`; on a CPU, that of the whole process since it started."""
        return round(torch.cuda.max_memory_allocated() / 2**30 if self.cuda else resident(), 2)


@dataclass(frozen=True)
class Job:
    """One part for one shape and precision, or for none.

    Attributes:
        part: its name in `bench_gpu.PARTS`.
        weight: its share of the time, relative to the others.
        measure: (bench, job, until) -> figures; `until` is a time of `time.monotonic`.
        shape: of the backbone.
        precision: one of `PRECISIONS`.
    """

    part: str
    weight: float
    measure: Callable[[Bench, "Job", float], dict]
    shape: str = ""
    precision: str = ""

    @property
    def name(self) -> str:
        """Name of its figures."""
        return " ".join(word for word in (self.part, self.shape, self.precision) if word)


def first_line(error: BaseException) -> str:
    """Return an error in a line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def matrix(bench: Bench, _: Job, __: float) -> dict:
    """Measure the rate of a large matrix product, in 16 bits and in float8."""
    found: dict[str, Any] = {
        "teraflops": round(bench.rate / 1e12, 3),
        "dtype": str(bench.dtype()).removeprefix("torch."),
    }
    try:
        found["float8_teraflops"] = round(float8_matrix_rate(bench.device) / 1e12, 3)
    except (RuntimeError, TypeError) as error:
        found["float8"] = first_line(error)
    return found


def load(bench: Bench, job: Job, _: float) -> dict:
    """Build our model of random weights and measure its memory."""
    bench.release()
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    start = time.perf_counter()
    plan, *_ = bench.ours(job)
    synchronise(bench.device)
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 2), "peak_gib": bench.peak_gib()}
    if bench.cuda:
        found["allocated_gib"] = round((torch.cuda.memory_allocated() - before) / 2**30, 2)
    lengths = plan.rows()[1]["length"][:]
    spread = {"mean": np.mean(lengths), "median": np.median(lengths), "most": max(lengths)}
    return {**found, "tokens_a_battle": {name: round(float(value), 1) for name, value in spread.items()}}


class Steps(TrainerCallback):
    """Takes the time of every optimiser step, and lets training stop after the one in which its time is over.

    Attributes:
        marks: (point in time, tokens, batches) computed by the beginning and by the end of each step.
        stopped: whether time was over before training was.
    """

    def __init__(self, device: torch.device, until: float, counter: Any = None) -> None:
        self.device, self.until, self.counter = device, until, counter
        self.marks: list[tuple[Any, int, int]] = []
        self.stopped = False

    def _mark(self) -> None:
        counted = (self.counter.tokens, self.counter.batches) if self.counter else (0, 0)
        self.marks.append((mark(self.device), *counted))

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self._mark()

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        """Take the time, and stop if it is over."""
        self._mark()
        if time.monotonic() >= self.until and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True


class Seen:
    """A collator that keeps the lengths of the sequences of each batch: `[[[412], [1044]], ...]` by batch and battle.

    A battle whose sequences share their beginning has it in each.
    """

    def __init__(self, collate: Callable[[list], Any]) -> None:
        self.collate = collate
        self.batches: list[list[list[int]]] = []

    def __call__(self, rows: list[dict]) -> Any:
        """Return the batch."""
        self.batches.append([self.lengths(row) for row in rows])
        return self.collate(rows)

    @staticmethod
    def lengths(row: dict) -> list[int]:
        """Return the tokens of the sequences of a battle: of ours, of TRL's pairs, or of plain transformers."""
        if "branches" in row:
            shared, *others = row["branches"]
            return [shared + other for other in others]
        return [len(row[name]) for name in ("chosen_ids", "rejected_ids", "input_ids") if name in row]


def measure_training(
    bench: Bench, plan: Plan, model: Any, made: Any, until: float, batches_a_step: int
) -> dict[str, Any]:
    """Train with a trainer until its rows or its time are over, and return its figures.

    The first step is left out, if there are others: it may find the size of micro-batches, and choose kernels.
    """
    counter, seen = Counter(model), Seen(made.data_collator)
    steps = Steps(bench.device, until, counter)
    made.data_collator = seen
    bench.clear()
    loss = run_trainer(made, steps).training_loss
    counter.hook.remove()
    synchronise(bench.device)

    # what was computed between two marks; a batch that was fetched ahead was not
    first, last = (1 if len(steps.marks) > 2 else 0), len(steps.marks) - 1
    battles = [battle for batch in seen.batches[first * batches_a_step : last * batches_a_step] for battle in batch]
    lengths = [length for battle in battles for length in battle]
    (start, tokens, batches), (end, all_tokens, all_batches) = steps.marks[first], steps.marks[last]
    seconds = seconds_between(start, end)
    figures = figures_of(plan, lengths, len(battles), seconds, all_tokens - tokens, training=True, rate=bench.rate)
    return {
        **figures,
        "optimiser_steps": last - first,
        "batches": all_batches - batches,
        "micro_batch_tokens": getattr(made, "tokens", None),
        "loss": round(loss, 4),
        "peak_gib": bench.peak_gib(),
        "stopped": steps.stopped,
        "attention": model.config._attn_implementation,
    }


def run_trainer(made: Any, *callbacks: Any) -> Any:
    """Train with these callbacks and without a line of figures, and return what the trainer returns."""
    made.remove_callback(PrinterCallback)
    for callback in callbacks:
        made.add_callback(callback)
    return made.train()


def warmed_training(bench: Bench, plan: Plan, model: Any, trainer_of: Any, until: float, own: bool = True) -> dict:
    """Train a few battles to warm up, then as `measure_training`."""
    warm, rows = plan.rows()
    run_trainer(trainer_of(warm), Steps(bench.device, until))
    return measure_training(bench, plan, model, trainer_of(rows), until, 1 if own else max(1, plan.step // plan.batch))


def training(bench: Bench, job: Job, until: float) -> dict:
    """Train ours."""
    plan, model, _, trainer_of = bench.ours(job)
    return warmed_training(bench, plan, model, trainer_of, until)


def stock_training(bench: Bench, job: Job, until: float) -> dict:
    """Train a competitor of `bench_training` by the name of the part."""
    bench.release()
    plan = bench.plan(job.shape, job.precision)
    if job.part == "trl" and plan.four_bits and plan.dtype == torch.float32:
        plan = replace(plan, dtype=torch.bfloat16)  # TRL casts adapters of a quantised backbone to it
    with plan.weights():
        model, trainer_of = bench_training.COMPETITORS[job.part](plan)
    draw_head(model, plan.seed)
    return warmed_training(bench, plan, model, trainer_of, until, own=job.part == "separate")


def measure_inference(
    bench: Bench, plan: Plan, model: Any, predict: Callable[[dict], list[np.ndarray]], until: float
) -> tuple[dict, np.ndarray]:
    """Predict battles in both orders, as many as time allows, and return figures and mean probabilities (n, 3).

    Every round has twice as many battles as the one before. One that would not end in time is not started.
    """
    rows = {order: plan.rows(order) for order in ("given", "swapped", "both")}
    took = timed(bench.device, lambda: predict({order: warm for order, (warm, _) in rows.items()}))
    counter, done, size, seconds = Counter(model), 0, plan.warm, 0.0
    found: list[np.ndarray] = []
    bench.clear()
    everything = len(rows["both"][1])
    while done < everything and (not done or time.monotonic() + 2 * took < until):
        chosen = range(done, min(everything, done + size))
        few = {order: measured.select(chosen) for order, (_, measured) in rows.items()}
        took = timed(bench.device, lambda few=few: found.append(np.mean(predict(few), axis=0)))
        done, size, seconds = chosen.stop, 2 * size, seconds + took
    counter.hook.remove()
    lengths = [length for order in ("given", "swapped") for length in rows[order][1]["length"][:done]]
    figures = figures_of(plan, lengths, done, seconds, counter.tokens, training=False, rate=bench.rate)
    own = {"batches": counter.batches, "peak_gib": bench.peak_gib(), "stopped": done < everything}
    return {**figures, **own, "attention": model.config._attn_implementation}, np.concatenate(found)


def inference(bench: Bench, job: Job, until: float) -> dict:
    """Predict with ours in both orders."""
    plan, model, tokenizer, _ = bench.ours(job)
    predict = bench_inference.predict_with_ours(plan, model, tokenizer)
    figures, bench.predicted[job.shape, job.precision] = measure_inference(bench, plan, model, predict, until)
    return figures


def stock_inference(bench: Bench, job: Job, until: float) -> dict:
    """Predict with a competitor of `bench_inference` by the name of the part, and compare with what ours predicted."""
    bench.release()
    plan = bench.plan(job.shape, job.precision)
    with plan.weights():
        model, predict = bench_inference.COMPETITORS[job.part](plan)
    draw_head(model, plan.seed)
    figures, mean = measure_inference(bench, plan, model, predict, until)
    ours = bench.predicted.get((job.shape, job.precision))
    if ours is not None:
        count = min(len(ours), len(mean))
        figures["largest_difference_from_ours"] = round(float(np.abs(mean[:count] - ours[:count]).max()), 5)
    return figures


def waiting(bench: Bench, job: Job, until: float) -> dict:
    """Train four steps in which waiting for the GPU is an error; on a CPU, four plain ones."""
    plan, _, _, trainer_of = bench.ours(job)
    run_trainer(trainer_of(plan.rows()[0]), Steps(bench.device, until))  # finds the size of micro-batches
    made = trainer_of(some_steps(plan, 4))
    run_trainer(made, Steps(bench.device, until), *([bench_training.NoWaiting()] if bench.cuda else []))
    found = "the processor never waits for the GPU" if bench.cuda else "not checked: only on CUDA"
    return {"optimiser_steps": made.state.global_step, "found": found}


def some_steps(plan: Plan, count: int) -> Any:
    """Return the measured rows that so many optimiser steps take, or all if they are fewer."""
    rows = plan.rows()[1]
    return rows.select(range(min(len(rows), count * plan.step)))


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


@contextmanager
def no_other_gpus() -> Iterator[None]:
    """Let `doctor` estimate for the device at hand alone."""
    from rewardmodel.planning import doctor as planning

    others, planning.DEVICES = planning.DEVICES, {}
    try:
        yield
    finally:
        planning.DEVICES = others


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
        },
    )
    start = time.perf_counter()
    with no_other_gpus():
        found = diagnose(recipe, None if bench.cuda else "cpu")
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
