"""The parts of `bench_gpu.py` that measure speed: a bench and a job in, figures out, by its time limit."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bench_inference
import bench_training
import numpy as np
import torch
from bench_compare import Plan, figures_of
from bench_models import (
    Counter,
    apart,
    draw_head,
    float8_matrix_rate,
    mark,
    our_model,
    seconds_between,
    synchronise,
    timed,
)
from gpu_models import Bench, Job, SkippedError, first_line
from transformers import PrinterCallback, TrainerCallback


def matrix(bench: Bench, _: Job, __: float) -> dict:
    """Measure the rate of a large matrix product, in 16 bits and in float8."""
    found: dict[str, Any] = {
        "teraflops": round(bench.rate / 1e12, 3),
        "dtype": str(bench.dtype()).removeprefix("torch."),
    }
    try:
        found["float8_teraflops"] = round(float8_matrix_rate(bench.device) / 1e12, 3)
    except (RuntimeError, TypeError, ValueError) as error:
        found["float8"] = first_line(error)
    return found


def prepare(bench: Bench, _: Job, __: float) -> dict:
    """Draw or read the battles of all shapes, and return their lengths in tokens; SmolLM2 is converted if it is new."""
    found = {}
    for shape in bench.options.shapes:
        lengths = bench.plan(shape, "bf16").rows()[1]["length"][:]
        spread = {"mean": np.mean(lengths), "median": np.median(lengths), "most": max(lengths)}
        found[shape] = {name: round(float(value), 1) for name, value in spread.items()}
    return {"tokens_a_battle": found}


def load(bench: Bench, job: Job, _: float) -> dict:
    """Build our model of random weights and measure its memory."""
    bench.release()
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    start = time.perf_counter()
    bench.ours(job)
    synchronise(bench.device)
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 2), "peak_gib": bench.peak_gib()}
    if bench.cuda:
        found["allocated_gib"] = round((torch.cuda.memory_allocated() - before) / 2**30, 2)
    return found


class Steps(TrainerCallback):
    """Takes the time of every optimiser step, and lets training stop before one that would not end in time.

    Attributes:
        marks: (point in time, tokens, batches) computed by the beginning and by the end of each step.
        stopped: whether time was over before training was.
    """

    def __init__(self, device: torch.device, until: float, counter: Any = None) -> None:
        self.device, self.until, self.counter = device, until, counter
        self.reached = time.monotonic()
        self.marks: list[tuple[Any, int, int]] = []
        self.stopped = False

    def _mark(self) -> None:
        counted = (self.counter.tokens, self.counter.batches) if self.counter else (0, 0)
        self.marks.append((mark(self.device), *counted))

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.reached = time.monotonic()
        self._mark()

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        """Take the time, and stop if another step like this one would exceed it."""
        self._mark()
        now, before = time.monotonic(), self.reached
        self.reached = now
        if now + (now - before) >= self.until and state.global_step < state.max_steps:
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


def training_apart(bench: Bench, job: Job, until: float) -> dict:
    """Train ours with every linear layer computing alone: what `model.fusion` saves."""
    plan, model, _, trainer_of = bench.ours(job)
    with apart(model):
        return warmed_training(bench, plan, model, trainer_of, until)


def training_kept(bench: Bench, job: Job, until: float) -> dict:
    """Train ours with all activations kept for the backward pass: smaller batches, no layer computed twice."""
    if not bench.plan(job.shape, job.precision).checkpointing:
        raise SkippedError("`training` keeps them already")
    plan, model, tokenizer, _ = bench.ours(job)
    model.gradient_checkpointing_disable()  # a trainer with checkpointing enables it again
    plan = replace(plan, checkpointing=False)
    trainer_of = bench_training.trainer_of_ours(plan, model, tokenizer)
    return warmed_training(bench, plan, model, trainer_of, until)


def training_compiled(bench: Bench, job: Job, until: float) -> dict:
    """Train as `training_kept` with compiled blocks, and tell how long compiling took; on a CPU they are only traced.

    liger's kernels are left out: the compiler generates others for the same operations.
    """
    from rewardmodel.model.loading import compile_blocks

    bench.release()
    plan = bench.plan(job.shape, job.precision)
    plan = replace(plan, checkpointing=False, keys={**plan.keys, "model.use_liger_kernel": False})
    with plan.weights():
        model, tokenizer = our_model(plan)
    draw_head(model, plan.seed)
    torch.compiler.reset()
    compile_blocks(model, **({} if bench.cuda else {"backend": "eager"}))
    trainer_of, (warm, rows) = bench_training.trainer_of_ours(plan, model, tokenizer), plan.rows()
    try:
        took = timed(bench.device, lambda: run_trainer(trainer_of(warm), Steps(bench.device, until)))
        found = measure_training(bench, plan, model, trainer_of(rows), until, 1)
    finally:
        torch.compiler.reset()
    return {**found, "seconds_to_warm_up": round(took, 1)}


def as_shipped(model: Any) -> None:
    """Let torch and transformers compute as they are shipped: models of ours exclude cuDNN, and rotate by liger."""
    from rewardmodel.model.liger import plain_rotation
    from rewardmodel.model.loading import unwrap

    torch.backends.cuda.enable_cudnn_sdp(True)
    plain_rotation(unwrap(model))


def stock_training(bench: Bench, job: Job, until: float) -> dict:
    """Train a competitor of `bench_training` by the name of the part."""
    bench.release()
    plan = bench.plan(job.shape, job.precision)
    if job.part == "trl" and plan.four_bits and plan.dtype == torch.float32:
        plan = replace(plan, dtype=torch.bfloat16)  # TRL casts adapters of a quantised backbone to it
    with plan.weights():
        model, trainer_of = bench_training.COMPETITORS[job.part](plan)
    own = job.part == "separate"
    if not own:
        as_shipped(model)
    draw_head(model, plan.seed)
    return warmed_training(bench, plan, model, trainer_of, until, own)


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
    as_shipped(model)
    draw_head(model, plan.seed)
    figures, mean = measure_inference(bench, plan, model, predict, until)
    ours = bench.predicted.get((job.shape, job.precision))
    if ours is not None:
        count = min(len(ours), len(mean))
        figures["largest_difference_from_ours"] = round(float(np.abs(mean[:count] - ours[:count]).max()), 5)
    return figures


def some_steps(plan: Plan, count: int) -> Any:
    """Return the measured rows that so many optimiser steps take, or all if they are fewer."""
    rows = plan.rows()[1]
    return rows.select(range(min(len(rows), count * plan.step)))
