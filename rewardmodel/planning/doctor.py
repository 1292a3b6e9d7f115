"""A recipe in, what would happen on a device out, before anything is loaded: memory, precision, time, hindrances."""

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig

from rewardmodel.config.schema import ModelConfig, Recipe
from rewardmodel.distributed import Launch, current_launch
from rewardmodel.errors import InputError
from rewardmodel.model.compatibility import Configuration, check_ties, incompatibilities
from rewardmodel.model.families import check_length, find_family, lowest_layers, stored_bits
from rewardmodel.model.precision import compute_dtype, quantization_name
from rewardmodel.model.weights import fetch_backbone
from rewardmodel.planning.devices import DEVICES, GIB, Device, find_device
from rewardmodel.planning.estimate import (
    FITTING,
    LAUNCH,
    UTILISATION,
    Case,
    hours,
    inference_needs,
    peaks,
    training_needs,
    with_changes,
)
from rewardmodel.planning.workload import read_lengths


def doctor(recipe: Recipe, device: str | None = None, launched: Launch | None = None) -> dict[str, Any]:
    """Return what a recipe would take and do on a device, and what in it cannot work.

    Nothing but configuration, tokenizer and battles is read; memory comes out of `planning.memory`.

    Args:
        recipe: what would be done.
        device: a name out of `planning.devices.DEVICES`, or cpu; none: the machine at hand.
        launched: how it would be spread over processes; none: as this process is.

    Returns:
        device, launch, backbone, precision and attention with reasons, notes, problems (one line each with its mend);
        if there is no problem, also battles, training and inference (bytes by component, total, fits, tokens), hours,
        mend (what makes training fit, where it does not) and others (the same of all other GPUs, in short).

    Raises:
        InputError: no configuration of the backbone can be read, no such device, a template that is not to be used,
            more tokens than the backbone has positions for, or battles that cannot be dealt.
    """
    check_ties(recipe.model, recipe.objective)
    folder = fetch_backbone(recipe.model.model_name_or_path, recipe.model.model_revision, weights=False)
    backbone = lowest_layers(AutoConfig.from_pretrained(folder), recipe.model.num_hidden_layers)
    check_length(backbone, recipe.prompt.max_length)
    here, launched = find_device(device), launched or current_launch()
    dtype, problems = _precision(recipe.model, backbone, here)
    made_here, trainer = device in (None, "cpu"), recipe.trainer
    configuration = Configuration.of(
        recipe.model, backbone, here.kind, dtype, here.capability, trainer, launched, made_here
    )
    problems += incompatibilities(configuration)
    bits = stored_bits(backbone)
    held = f"stored in {bits} bits" if bits else quantization_name(recipe.model) or "not quantised"
    facts: dict[str, Any] = {
        "device": here, "launch": launched,
        "backbone": ", ".join([recipe.model.model_name_or_path, backbone.model_type, held]),
        "precision": f"{_name(dtype)}: {_why_precision(recipe.model, backbone, here, dtype)}",
        "attention": _why_attention(recipe.model, backbone),
        "notes": _notes(recipe, here), "problems": problems,
    }  # fmt: skip
    if problems:
        return facts
    if bits:
        recipe = replace(recipe, model=replace(recipe.model, load_in_4bit=bits == 4, load_in_8bit=bits == 8))
        del backbone.quantization_config
    case = Case(recipe, backbone, here, dtype, launched, read_lengths(recipe, folder))
    usage, layers = peaks(case).usage, backbone.get_text_config().num_hidden_layers
    facts["backbone"] += f", {usage.parameters:,} weights in {layers} layers"
    facts |= {"training": training_needs(case), "inference": inference_needs(case), "hours": hours(case)}
    facts |= {"battles": case.battles, "max_length": recipe.prompt.max_length}
    if not facts["training"]["fits"]:
        facts["mend"] = _mend(case)
        facts["problems"] = [_no_room(facts, "training"), *facts["problems"]]
    elif not facts["inference"]["fits"]:
        facts["problems"] = [_no_room(facts, "inference")]
    facts["others"] = [_elsewhere(case, other) for other in DEVICES.values() if other is not here]
    return facts


def format_doctor(facts: dict[str, Any]) -> str:
    """Return what `doctor` found as text for a terminal; problems are left out."""
    device: Device = facts["device"]
    speed = "measured" if device.measured else "listed"
    processes = f", {facts['launch'].processes} of them" if facts["launch"].processes > 1 else ""
    lines = [
        f"backbone   {facts['backbone']}",
        f"device     {device.name}{processes}: {device.memory / GIB:.1f} GiB, {device.half / 1e12:,.1f} teraflops in "
        f"16 bits, {device.single / 1e12:,.1f} in 32 ({speed})",
        f"precision  {facts['precision']}",
        f"attention  {facts['attention']}",
        *(f"note       {note}" for note in facts["notes"]),
    ]
    if "training" not in facts:
        return "\n".join(lines)
    return "\n".join([*lines, "", *_memory_table(facts), "", *_time_lines(facts), "", *_others_table(facts)])


def _precision(config: ModelConfig, backbone: Any, device: Device) -> tuple[torch.dtype, list[str]]:
    """Return the precision on a device, and what hinders it."""
    problems = []
    if config.device not in ("auto", device.kind):
        problems.append(f"model.device: {config.device} is asked for, but {device.name} is none; set auto")
    try:
        rules, kind = find_family(backbone.model_type), torch.device(device.kind)
        return compute_dtype(config, kind, rules, device.capability), problems
    except InputError as error:
        return torch.float32, [*problems, str(error)]


def _why_precision(config: ModelConfig, backbone: Any, device: Device, dtype: torch.dtype) -> str:
    if config.dtype != "auto":
        return "model.dtype says so"
    if dtype == torch.bfloat16:
        return "the processor computes in it" if device.kind == "cpu" else "compute capability 8.0 and later has it"
    if dtype == torch.float16:
        return "no bfloat16 below compute capability 8.0, and the family's activations stay within float16's range"
    if device.kind == "cpu":
        return "the processor has no bfloat16 arithmetic"
    return (
        f"no bfloat16 below compute capability 8.0, and {backbone.model_type}'s activations leave float16's range; "
        f"{device.half / device.single:.0f} times slower than 16 bits would be"
    )


def _why_attention(config: ModelConfig, backbone: Any) -> str:
    allowed = find_family(backbone.model_type).attention
    used = config.attn_implementation or allowed[0]
    why = "model.attn_implementation says so" if config.attn_implementation else f"{backbone.model_type}'s default"
    cost = "keeps length² numbers for every head" if used == "eager" else "keeps nothing that grows with length²"
    others = ", ".join(name for name in allowed if name != used)
    return f"{used}: {why}; {cost} (allowed too: {others})"


def _notes(recipe: Recipe, device: Device) -> list[str]:
    """Return what works and is worth knowing."""
    said = []
    if device.kind == "cpu" and "paged" in str(recipe.trainer.get("optim")):
        said.append("trainer.optim: on a CPU bitsandbytes pages nothing, and keeps the states in memory")
    if device.kind == "cpu" and recipe.model.load_in_8bit:
        said.append("model.load_in_8bit: bitsandbytes' 8-bit products are slow on a CPU")
    return said


def _no_room(facts: dict[str, Any], what: str) -> str:
    """Return the line that says that something does not fit, and what would make it."""
    needs, device = facts[what], facts["device"]
    mend = facts.get("mend") or "take a larger GPU, or a smaller backbone"
    return (
        f"{what} needs {needs['least'] / GIB:.1f} GiB at least, for one battle at a time, and {device.name} has "
        f"{device.memory / GIB:.1f}; {mend}"
    )


def _mend(case: Case) -> str:
    """Return what makes training fit, the cheapest changes first, one upon the other."""
    config, layers = case.recipe.model, case.backbone.get_text_config().num_hidden_layers
    steps: list[tuple[str, dict, dict, dict]] = []
    if not case.checkpointing and not config.freeze_backbone:
        steps.append(("trainer.gradient_checkpointing true", {}, {"gradient_checkpointing": True}, {}))
    if not config.load_in_4bit and config.use_peft:
        changes = {"load_in_4bit": True, "load_in_8bit": False}
        steps.append(("model.load_in_4bit true", changes, {}, {}))
    if config.use_peft and not config.freeze_backbone and config.lora_first_layer < layers // 2:
        steps.append((f"model.lora_first_layer {layers // 2}", {"lora_first_layer": layers // 2}, {}, {}))
    half = case.recipe.prompt.max_length // 2
    steps.append((f"prompt.max_length {half}", {}, {}, {"max_length": half}))
    said = []
    for words, model, trainer, prompt in steps:
        case = with_changes(case, model, trainer, prompt)
        said.append(words)
        needs = training_needs(case)
        if needs["fits"]:
            return f"set {', '.join(said)}: {needs['least'] / GIB:.1f} GiB"
    return "take a larger GPU, or a smaller backbone"


def _elsewhere(case: Case, device: Device) -> dict[str, Any]:
    """Return what the recipe would do on another GPU: precision, memory, tokens and hours, or what hinders it."""
    dtype, problems = _precision(case.recipe.model, case.backbone, device)
    config, trainer = case.recipe.model, case.recipe.trainer
    configuration = Configuration.of(
        config, case.backbone, device.kind, dtype, device.capability, trainer, case.launch, here=False
    )
    problems += incompatibilities(configuration)
    if problems:
        return {"name": device.name, "problem": problems[0]}
    case = replace(case, device=device, dtype=dtype)
    training, inference = training_needs(case), inference_needs(case)
    return {
        "name": device.name, "precision": _name(dtype), "memory": device.memory, "hours": sum(hours(case).values()),
        "training": training, "inference": inference,
    }  # fmt: skip


def _memory_table(facts: dict[str, Any]) -> list[str]:
    columns = [facts["training"], facts["inference"]]
    names = list(dict.fromkeys(name for needs in columns for name in needs["parts"]))
    lines = ["memory, GiB           training  inference"]
    for name in names:
        sizes = [f"{needs['parts'][name] / GIB:.2f}" if name in needs["parts"] else "" for needs in columns]
        lines.append(f"  {name:<18}" + "".join(f"{size:>11}" for size in sizes))
    for name, key in (("all at the peak", "total"), ("one battle alone", "least")):
        lines.append(f"  {name:<18}" + "".join(f"{needs[key] / GIB:>11.2f}" for needs in columns))
    said = ("fits" if needs["fits"] else "no room" for needs in columns)
    room = f"of {facts['device'].memory / GIB:.1f}"
    lines.append(f"  {room:<18}" + "".join(f"{one:>11}" for one in said))
    keys = [("tokens a batch", "tokens"), ("tokens that fit", "tokens that fit")]
    for name, key in keys if facts["device"].kind == "cuda" else keys[:1]:
        lines.append(f"  {name:<18}" + "".join(f"{needs[key]:>11,}" for needs in columns))
    return lines


def _time_lines(facts: dict[str, Any]) -> list[str]:
    battles, times = facts["battles"], facts["hours"]
    share, gpu = UTILISATION[facts["device"].kind], facts["device"].kind == "cuda"
    first = f"fitting the head {_duration(times[FITTING])}, " if FITTING in times else ""
    return [
        f"battles    {battles.training:,} to train on, {battles.validation:,} for validation; {battles.source}",
        f"time       {first}training {_duration(times['training'])}, its evaluations {_duration(times['evaluation'])}, "
        f"prediction of the validation battles {_duration(times['prediction'])}; if {share:.0%} of the device's speed "
        f"are reached{f', and an operation takes {1e6 * LAUNCH:.0f} µs at least' if gpu else ''}",
    ]


def _others_table(facts: dict[str, Any]) -> list[str]:
    lines = ["other GPUs   precision   training at least   tokens that fit        all"]
    for other in facts["others"]:
        if "problem" in other:
            lines.append(f"  {other['name']:<11}{other['problem']}")
            continue
        least = f"{other['training']['least'] / GIB:.1f} of {other['memory'] / GIB:.1f} GiB"
        tokens = f"{other['training']['tokens that fit']:,}" if other["training"]["fits"] else "no room"
        time = _duration(other["hours"]) if other["training"]["fits"] else ""
        lines.append(f"  {other['name']:<11}{other['precision']:<10}{least:>19}{tokens:>18}{time:>11}")
    return lines


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.1f} h"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
