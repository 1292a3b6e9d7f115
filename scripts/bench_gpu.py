"""What this package does with one GPU, in one process and eight minutes: speed, memory, and where the time goes.

    python scripts/bench_gpu.py                                     # the shapes of Llama-3-8B, Gemma-2-9B, Qwen3-4B
    python scripts/bench_gpu.py --battles train.csv --shapes llama-3-8b --precisions nf4 bf16
    python scripts/bench_gpu.py --json cpu.json                     # without a GPU: tiny shapes, every branch

Backbones are random, made on the device, as in `bench_models.py`; battles have the lengths of the competition's, or are
read from a file. Every part has a share of the time that is left: training stops before a step that would exceed it,
prediction before such a round, and anything else is ended by an exception some seconds later. A part that fails is
recorded and the next one runs; the exit code is then 1. The JSON file is written after every part, with one entry for
each device.

prepare    drawing or reading battles, and converting SmolLM2's weights where that was not done before
matrix     a large matrix product: the rate that shares are relative to
load       building our model of random weights
inference  ours, both orders, adapters not merged
training   ours, LoRA on all linear layers
kept       the same with all activations kept: smaller micro-batches, no layer computed twice
apart      training with every linear layer computing alone
waiting    whether the processor waits for the GPU within a step of ours
profile    ours: the kernels that take longest, and the share of time in which none runs
doctor     what `rewardmodel doctor` tells of the same settings, beside what was measured
compiled   as kept, with compiled blocks, and the seconds that they take to warm up
trainer, trl, separate, stock, sorted   the competitors of `bench_training.py` and `bench_inference.py`
smollm2    a real training: LoRA on SmolLM2-135M, log loss of held-out battles before and after
"""

import argparse
import gc
import importlib.metadata
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil
import torch
import yaml
from bench_compare import VERSIONS
from bench_models import SHAPES, processor
from gpu_models import PRECISIONS, Bench, Job, SkippedError, first_line
from gpu_parts import doctor, profile, smollm2, waiting
from gpu_speed import (
    inference,
    load,
    matrix,
    prepare,
    stock_inference,
    stock_training,
    training,
    training_apart,
    training_compiled,
    training_kept,
)

GRACE = 20.0
"""Seconds after which a part is ended that did not stop by itself when its time was over."""


SLACK = 0.9
"""Share of its time after which a part is asked to stop: what it does then takes time too."""


class Part(NamedTuple):
    """A part of the measurement.

    Attributes:
        weight: its share of the time, relative to the others: about the seconds that it takes on a fast GPU.
        measure: (bench, job, until) -> figures.
        each: measured once (``), for each `shape`, for the first precision of each shape (`first`), or for all.
    """

    weight: float
    measure: Callable[[Bench, Job, float], dict]
    each: str = "precision"


PARTS = {
    "prepare": Part(30, prepare, ""),
    "matrix": Part(3, matrix, ""),
    "load": Part(8, load),
    "inference": Part(10, inference),
    "training": Part(16, training),
    "kept": Part(16, training_kept),
    "apart": Part(12, training_apart, "first"),
    "waiting": Part(5, waiting, "first"),
    "profile": Part(8, profile),
    "doctor": Part(8, doctor),
    "compiled": Part(30, training_compiled, "first"),
    "trainer": Part(14, stock_training, "shape"),
    "separate": Part(14, stock_training, "shape"),
    "trl": Part(14, stock_training, "shape"),
    "stock": Part(10, stock_inference, "shape"),
    "sorted": Part(10, stock_inference, "shape"),
    "smollm2": Part(40, smollm2, ""),
}
"""All parts, in the order in which those of one shape and precision run."""

SAME_ANYWHERE = ("apart", "waiting", "profile", "doctor")
"""Parts in which one kind of attention is like another."""

SPEEDS = (
    "training",
    "kept",
    "apart",
    "compiled",
    "trainer",
    "separate",
    "trl",
    "inference",
    "stock",
    "sorted",
    "smollm2",
)
"""Parts with a line in the table of speeds."""


def jobs(parts: list[str], shapes: list[str], precisions: list[str]) -> list[Job]:
    """Return all parts for all shapes and precisions, in the order in which they run.

    The competitors of `transformers` and TRL hold weights in 4 bits, or in 16 where ours is not measured in 4. Tiny
    shapes show only whether a part runs, so the second one, whose attention is another, runs in the first precision
    alone, and without `SAME_ANYWHERE`.
    """
    stock = "nf4" if "nf4" in precisions else "bf16"
    plan: list[tuple[str, str, str]] = [("prepare", "", ""), ("matrix", "", "")]
    for shape in shapes:
        for precision in precisions[:1] if shape == "tiny-gemma2" else precisions:
            names = [name for name, part in PARTS.items() if part.each in {"precision", "first"}]
            names = [name for name in names if shape != "tiny-gemma2" or name not in SAME_ANYWHERE]
            first = precision == precisions[0]
            plan += [(name, shape, precision) for name in names if first or PARTS[name].each == "precision"]
        plan += [(name, shape, stock) for name, part in PARTS.items() if part.each == "shape"]
    plan.append(("smollm2", "", ""))
    return [Job(name, PARTS[name].weight, PARTS[name].measure, *others) for name, *others in plan if name in parts]


def share_of(weight: float, weights: float, seconds: float) -> float:
    """Return the seconds of a part: its share of those left, as its weight is of those left, its own included."""
    return max(0.0, seconds) * weight / weights


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds, unless what is within ends before."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"not done {seconds:.0f} s after it began")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(bench: Bench, job: Job, seconds: float, left: float) -> dict:
    """Return the figures of a part that has so many seconds, or `skipped` or `failed` with the reason."""
    if left <= 0:
        return {"skipped": "no time left"}
    try:
        with alarm(min(seconds + GRACE, max(left, 1.0))):
            return job.measure(bench, job, time.monotonic() + seconds)
    except SkippedError as reason:
        return {"skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": first_line(error)}


def run_all(bench: Bench, todo: list[Job], end: float, write: Callable[[], None]) -> None:
    """Run parts, each within its share of the time until `end` (of `time.monotonic`); write after each."""
    weights = sum(job.weight for job in todo)
    for job in todo:
        start = time.monotonic()
        seconds = SLACK * share_of(job.weight, weights, end - start)
        print(f"== {job.name}, at most {seconds:.0f} s", flush=True)
        found = run(bench, job, seconds, end - start)
        if bench.cuda:
            torch.cuda.set_sync_debug_mode("default")  # a part that failed may have left it
        bench.clear()
        bench.figures[job.name] = {**found, "wall_seconds": round(time.monotonic() - start, 1)}
        weights -= job.weight
        write()
        said = next((f"{key}: {found[key]}" for key in ("failed", "skipped") if key in found), "done")
        print(f"   {said} after {bench.figures[job.name]['wall_seconds']} s", flush=True)


def writer(bench: Bench, path: Path) -> Callable[[], None]:
    """Return what writes the figures, whole or not at all, into a file of them, in the place of this device's."""
    import json

    from rewardmodel.files import write_json

    name = torch.cuda.get_device_name() if bench.cuda else processor()
    about = {
        "versions": {package: _version(package) for package in VERSIONS},
        "arguments": {key: getattr(value, "name", value) for key, value in vars(bench.options).items()},
    }

    def write() -> None:
        known = json.loads(path.read_text()) if path.is_file() else {}
        write_json(path, {**known, name: {**about, "figures": bench.figures}})

    return write


def _version(package: str) -> str | None:
    """Return the version of a package; None: it was not installed the usual way, or not at all."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(figures: dict[str, dict]) -> str:
    """Return all figures as text, at most 110 columns wide."""
    blocks = [_speeds(figures), _told(figures), *_profiles(figures), _others(figures)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _speeds(figures: dict[str, dict]) -> list[str]:
    line = "{:31}{:>10}{:>11}{:>8}{:>9}{:>10}{:>13}{:>8}{:>9}"
    heading = ("", "battles/s", "tokens/s", "share", "padding", "peak GiB", "micro-batch", "steps", "stopped")
    lines = []
    for name, one in figures.items():
        if name.split()[0] in SPEEDS and "tokens_a_second" in one:
            columns = (
                name,
                f"{one['battles_a_second']:.2f}",
                f"{one['tokens_a_second']:,.0f}",
                f"{100 * one['flops_utilisation']:.1f} %",
                f"{100 * one['padding_share']:.0f} %",
                f"{one['peak_gib']:.2f}",
                _count(one.get("micro_batch_tokens")),
                one.get("optimiser_steps", one["batches"]),
                "yes" if one["stopped"] else "",
            )
            lines.append(line.format(*columns))
    return [line.format(*heading), *lines] if lines else []


def _told(figures: dict[str, dict]) -> list[str]:
    line = "{:35}{:>10}{:>10}{:>17}{:>12}{:>13}{:>13}"
    heading = ("doctor: told, measured", "GiB", "GiB", "battles/s", "battles/s", "micro-batch", "micro-batch")
    lines = []
    for name, one in figures.items():
        for part in ("training", "inference"):
            if name.startswith("doctor ") and part in one:
                keys = ("told_gib", "peak_gib", "told_battles_a_second", "battles_a_second")
                told = [f"{one[part][key]:.2f}" if one[part][key] is not None else "" for key in keys]
                tokens = [_count(one[part][key]) for key in ("told_tokens", "micro_batch_tokens")]
                lines.append(line.format(f"{part} {name.removeprefix('doctor ')}", *told, *tokens))
    return [line.format(*heading), *lines] if lines else []


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _profiles(figures: dict[str, dict]) -> list[list[str]]:
    blocks = []
    for name, one in figures.items():
        if "kernels" in one:
            kernels = one["kernels"]
            heading = f"{name}: nothing runs {100 * one['gap_share']:.1f} % of {one['seconds']:.3f} s; of the rest:"
            rows = [f"{100 * k['share']:6.1f} %{k['calls']:8,} x  {k['name'][:88]}" for k in kernels]
            blocks.append([heading, *rows])
    return blocks


def _others(figures: dict[str, dict]) -> list[str]:
    lines = []
    for name, one in figures.items():
        said = next((f"{key}: {one[key]}" for key in ("failed", "skipped", "found") if key in one), None)
        if name == "matrix" and "teraflops" in one:
            said = f"{one['teraflops']} teraflops in {one['dtype']}, {one.get('float8_teraflops', 'none')} in float8"
        if "log_loss_after" in one:
            said = (
                f"log loss {one['log_loss_before']} -> {one['log_loss_after']} on {one['validation_battles']} battles"
            )
        if said:
            lines.append(f"{name:31}{said}"[:110])
    return lines


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    cuda = torch.cuda.is_available()
    shapes = ["llama-3-8b", "gemma-2-9b", "qwen3-4b"] if cuda else ["tiny", "tiny-gemma2"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="in all, start-up included")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of ours")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--battles", type=Path, help="a labelled file; battles of drawn ids by default")
    parser.add_argument("--count", type=int, default=512 if cuda else 12, help="battles of a measurement at most")
    parser.add_argument("--real", type=int, default=2000 if cuda else 32, help="battles of the real training at most")
    parser.add_argument("--step", type=int, default=32 if cuda else 4, help="battles of an optimiser step")
    parser.add_argument("--warm", type=int, default=32 if cuda else 4, help="battles to warm up with")
    length = None if cuda else 96
    parser.add_argument("--max-length", type=int, default=length, help="tokens of a sequence; on a GPU, of the shape")
    parser.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="recompute layers; of the shape by default"
    )
    parser.add_argument(
        "--ours",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="keys of model and trainer in ours' recipe, like model.lora_dropout=0 trainer.micro_batch_tokens=16384",
    )
    results = Path(__file__).parent / "results" / "gpu.json"
    parser.add_argument("--json", type=Path, default=results, help="file to write figures to, by device")
    return parser


def main() -> None:
    """Parse, measure, write JSON, print the table."""
    from datasets import disable_progress_bars

    options = arguments().parse_args()
    options.ours = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in options.ours)}
    end = time.monotonic() + options.seconds - (time.time() - psutil.Process().create_time())
    disable_progress_bars()
    gc.collect()
    gc.freeze()  # what was imported stays: each collection between parts would go through it
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        write = writer(bench, options.json)
        run_all(bench, jobs(options.parts, options.shapes, options.precisions), end, write)
    print(f"\n{table(bench.figures)}\n\n{options.json}")
    sys.exit(any("failed" in one for one in bench.figures.values()))


if __name__ == "__main__":
    main()
