"""What the parts of `bench_gpu.py` share: plans, figures, and one model of ours at a time on the device."""

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import bench_training
import numpy as np
import torch
from bench_compare import Plan, planned
from bench_doctor import resident
from bench_models import SHAPES, draw_head, matrix_rate, our_model

PRECISIONS = ("nf4", "bf16", "fp8")
"""How ours holds the frozen weights: `load_in_4bit`, not quantised, `load_in_fp8`."""


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
                keys=options.ours,
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
