"""What `doctor` finds of a recipe on a device, as types and as text for a terminal."""

from dataclasses import dataclass
from typing import NamedTuple

from rewardmodel.distributed import Launch
from rewardmodel.planning.estimate import LAUNCH_SECONDS, Hours, MemoryNeeds, utilisation
from rewardmodel.planning.gpus import GIB, Device
from rewardmodel.planning.workload import Workload


@dataclass(frozen=True)
class OtherGpu:
    """The same recipe on another GPU.

    Attributes:
        device: the GPU.
        precision: of the forward pass there, like `float16`.
        problem: the first incompatible setting there; None: there is none, and the other fields are set.
        training: memory of training.
        hours: estimated time.
    """

    device: Device
    precision: str
    problem: str | None = None
    training: MemoryNeeds | None = None
    hours: Hours | None = None


class Faster(NamedTuple):
    """A key of `trainer` by which training would be faster.

    Attributes:
        setting: key and value, like `gradient_checkpointing false`.
        reason: why it would be faster.
        hours: of training with it.
        tokens: of a micro-batch with it.
    """

    setting: str
    reason: str
    hours: float
    tokens: int


@dataclass(frozen=True)
class Estimate:
    """What a recipe takes on a device.

    Attributes:
        workload: the battles.
        training: memory of training.
        inference: memory of prediction.
        hours: estimated time.
        fix: settings that make training fit, if it does not; else None.
        faster: settings of which each would save a tenth of training's hours or more.
        others: the same on every other GPU of `planning.gpus.DEVICES`.
    """

    workload: Workload
    training: MemoryNeeds
    inference: MemoryNeeds
    hours: Hours
    fix: str | None
    faster: list[Faster]
    others: list[OtherGpu]


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` finds of a recipe on a device.

    Attributes:
        device: that it was estimated for.
        launch: how it is spread over processes.
        backbone: name, family, quantisation and size as text.
        precision: of the forward pass, with the reason.
        attention: the implementation, with the reason.
        notes: what works and is worth knowing, a line each.
        problems: what does not work, a line each with its fix: incompatible settings, or memory that does not suffice.
        estimate: memory and time; None if settings are incompatible.
    """

    device: Device
    launch: Launch
    backbone: str
    precision: str
    attention: str
    notes: list[str]
    problems: list[str]
    estimate: Estimate | None


def format_doctor(found: Diagnosis) -> str:
    """Return a diagnosis as text for a terminal, without its problems."""
    device = found.device
    speed = "measured" if device.measured else "listed"
    processes = f", {found.launch.processes} of them" if found.launch.processes > 1 else ""
    lines = [
        f"backbone   {found.backbone}",
        f"device     {device.name}{processes}: {device.memory / GIB:.1f} GiB, {device.half / 1e12:.3g} teraflops in "
        f"16 bits, {device.single / 1e12:.3g} in 32 ({speed})",
        f"precision  {found.precision}",
        f"attention  {found.attention}",
        *(f"note       {note}" for note in found.notes),
    ]
    if found.estimate is None:
        return "\n".join(lines)
    tables = [_memory_table(device, found.estimate), _time_lines(device, found.estimate), _others_table(found.estimate)]
    return "\n".join([*lines, *(line for table in tables for line in ("", *table))])


def _memory_table(device: Device, estimate: Estimate) -> list[str]:
    columns = [estimate.training, estimate.inference]
    names = list(dict.fromkeys(name for needs in columns for name in needs.parts))
    lines = ["memory, GiB           training  inference"]
    for name in names:
        sizes = [f"{needs.parts[name] / GIB:.2f}" if name in needs.parts else "" for needs in columns]
        lines.append(f"  {name:<18}" + "".join(f"{size:>11}" for size in sizes))
    lines.append(f"  {'total at the peak':<18}" + "".join(f"{needs.total / GIB:>11.2f}" for needs in columns))
    lines.append(f"  {'with one battle':<18}" + "".join(f"{needs.least / GIB:>11.2f}" for needs in columns))
    room = f"of {device.memory / GIB:.1f}"
    lines.append(f"  {room:<18}" + "".join(f"{'fits' if needs.fits else 'too large':>11}" for needs in columns))
    lines.append(f"  {'tokens per batch':<18}" + "".join(f"{needs.tokens:>11,}" for needs in columns))
    if device.kind == "cuda":
        lines.append(f"  {'tokens that fit':<18}" + "".join(f"{needs.tokens_that_fit:>11,}" for needs in columns))
    return lines


def _time_lines(device: Device, estimate: Estimate) -> list[str]:
    workload, hours = estimate.workload, estimate.hours
    launch = f", and {1e6 * LAUNCH_SECONDS:.0f} µs or more per operation" if device.kind == "cuda" else ""
    fit = "" if hours.head_fit is None else f"fitting the head {format_duration(hours.head_fit)}, "
    return [
        f"battles    {workload.training:,} to train on, {workload.validation:,} for validation; {workload.source}",
        f"time       {fit}training {format_duration(hours.training)}, its evaluations "
        f"{format_duration(hours.evaluation)}, prediction of the validation battles "
        f"{format_duration(hours.prediction)}; assuming {utilisation(device):.0%} of the device's speed{launch}",
        *(
            f"faster     trainer.{one.setting}: training {format_duration(one.hours)} by this estimate, with up to "
            f"{one.tokens:,} tokens a batch: {one.reason}"
            for one in estimate.faster
        ),
    ]


def _others_table(estimate: Estimate) -> list[str]:
    lines = ["other GPUs     precision   training at least   tokens that fit      total"]
    for other in estimate.others:
        if other.training is None or other.hours is None:
            lines.append(f"  {other.device.name:<13}{other.problem}")
            continue
        least = f"{other.training.least / GIB:.1f} of {other.device.memory / GIB:.1f} GiB"
        tokens = f"{other.training.tokens_that_fit:,}" if other.training.fits else "too large"
        time = format_duration(other.hours.total) if other.training.fits else ""
        lines.append(f"  {other.device.name:<13}{other.precision:<10}{least:>19}{tokens:>18}{time:>11}")
    return lines


def format_duration(hours: float) -> str:
    """Return hours as text in a fitting unit, like `43 min`."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.1f} h"
