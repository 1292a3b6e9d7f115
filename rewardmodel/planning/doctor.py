"""A recipe and a device -> memory, precision, time and incompatible settings, before anything is loaded."""

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig

from rewardmodel.config.loader import RecipeLike, as_recipe
from rewardmodel.config.schema import ModelConfig, Recipe
from rewardmodel.distributed import Launch, current_launch
from rewardmodel.errors import InputError, plural
from rewardmodel.model.compatibility import check_head, incompatibilities
from rewardmodel.model.configuration import Configuration, usable_attention
from rewardmodel.model.families import check_length, find_family, lowest_layers, stored_bits
from rewardmodel.model.precision import compute_dtype, dtype_name, quantization_name
from rewardmodel.model.weights import fetch_backbone
from rewardmodel.planning.devices import find_device
from rewardmodel.planning.diagnosis import Diagnosis, Estimate, Faster, OtherGpu
from rewardmodel.planning.estimate import (
    MemoryNeeds,
    estimate_hours,
    estimate_inference,
    estimate_training,
)
from rewardmodel.planning.gpus import DEVICES, GIB, Device
from rewardmodel.planning.scenario import Scenario, measure_peaks
from rewardmodel.planning.workload import read_workload
from rewardmodel.training.arguments import training_arguments


def doctor(
    recipe: RecipeLike, device: str | None = None, launched: Launch | None = None, *, others: bool = True
) -> Diagnosis:
    """Estimate memory, precision and time of a recipe on a device, and list incompatible settings.

    Configuration and tokenizer of the backbone and the battles are read; no weights are.

    Args:
        recipe: what would be run, or the path or sections of a recipe.
        device: a name from `planning.gpus.DEVICES`, or `cpu`; default: the GPU of this machine, or else its CPU.
        launched: how it would be spread over processes; default: as this process is.
        others: whether to estimate for every other GPU, too.

    Raises:
        InputError: the backbone's configuration cannot be read, no such device, a template that cannot be used, more
            tokens than the backbone has positions for, or folds that the battles cannot be split into.
    """
    # the backbone's configuration, its precision on the device, and incompatible settings
    recipe = as_recipe(recipe)
    check_head(recipe.model, recipe.objective)
    folder = fetch_backbone(recipe.model.model_name_or_path, recipe.model.model_revision, weights=False)
    backbone = lowest_layers(AutoConfig.from_pretrained(folder), recipe.model.num_hidden_layers)
    check_length(backbone, recipe.prompt.max_length)
    target, launch = find_device(device), launched or current_launch()
    dtype, problems, configuration = _choose_precision(recipe, backbone, target, launch, device in (None, "cpu"))
    bits = stored_bits(backbone)
    form = f"stored in {bits} bits" if bits else quantization_name(recipe.model) or "not quantised"
    diagnosis = Diagnosis(
        target,
        launch,
        ", ".join([recipe.model.model_name_or_path, backbone.model_type, form]),
        f"{dtype_name(dtype)}: {_explain_precision(recipe.model, backbone, target, dtype)}",
        _explain_attention(recipe.model, backbone.model_type, dtype, target),
        _list_notes(recipe, configuration, target),
        problems,
        None,
    )
    try:
        training_arguments(recipe, torch.float32, torch.device("cpu"))  # what transformers and TRL refuse anywhere
    except InputError as error:
        key = str(error).partition(":")[0]
        problems += [str(error)] * (not any(problem.startswith(f"{key}:") for problem in problems))
    if problems:
        return diagnosis

    # fake models are quantised by the recipe, so it must have the bits that the backbone's files are stored in
    if bits:
        recipe = replace(recipe, model=replace(recipe.model, load_in_4bit=bits == 4, load_in_8bit=bits == 8))
        del backbone.quantization_config

    # memory and time on this device and on the other GPUs
    scenario = Scenario(recipe, backbone, target, dtype, launch, read_workload(recipe, folder))
    training, inference = estimate_training(scenario), estimate_inference(scenario)
    fix = None if training.fits else _find_fix(scenario)
    elsewhere = [_estimate_on(scenario, other) for other in DEVICES.values() if others and other is not target]
    if not training.fits:
        problems = [_describe_shortage("training", training, target, fix)]
    elif not inference.fits:
        problems = [_describe_shortage("inference", inference, target, fix)]
    size = f"{measure_peaks(scenario).size.parameters:,} weights in {plural(scenario.layers, 'layer')}"
    return replace(
        diagnosis,
        backbone=f"{diagnosis.backbone}, {size}",
        problems=problems,
        estimate=Estimate(
            scenario.workload,
            training,
            inference,
            estimate_hours(scenario),
            fix,
            _list_faster(scenario, configuration.liger),
            elsewhere,
        ),
    )


def _choose_precision(
    recipe: Recipe, backbone: Any, device: Device, launch: Launch, here: bool
) -> tuple[torch.dtype, list[str], Configuration]:
    """Return the precision of the forward pass on a device, the incompatible settings there, and all settings."""
    model, problems, dtype = recipe.model, [], torch.float32
    if model.device not in ("auto", device.kind):
        problems.append(f"model.device: {model.device} is requested, but {device.name} is {device.kind}; set auto")
    try:
        family = find_family(backbone.model_type)
        dtype = compute_dtype(model, torch.device(device.kind), family, device.capability)
    except InputError as error:
        problems.append(str(error))
    configuration = Configuration.of(
        model, backbone, device.kind, dtype, device.capability, recipe.trainer, launch, here
    )
    return dtype, problems + incompatibilities(configuration), configuration


def _explain_precision(model: ModelConfig, backbone: Any, device: Device, dtype: torch.dtype) -> str:
    if model.dtype != "auto":
        return "set by model.dtype"
    if dtype == torch.bfloat16:
        if device.kind == "cpu":
            return "this processor has bfloat16 arithmetic"
        return "GPUs of compute capability 8.0 and later have bfloat16 arithmetic"
    if dtype == torch.float16:
        return "no bfloat16 below compute capability 8.0, and the family's activations stay within float16's range"
    if device.kind == "cpu":
        return "this processor has no bfloat16 arithmetic"
    return (
        f"no bfloat16 below compute capability 8.0, and {backbone.model_type}'s activations leave float16's range; "
        f"{device.half / device.single:.0f} times slower than 16 bits would be"
    )


def _explain_attention(model: ModelConfig, model_type: str, dtype: torch.dtype, device: Device) -> str:
    usable = usable_attention(find_family(model_type), dtype_name(dtype), device.capability)
    used = model.attn_implementation or usable[0]
    why = "set by model.attn_implementation" if model.attn_implementation else f"{model_type}'s default on this device"
    cost = "keeps length² values per head" if used == "eager" else "keeps nothing that grows with length²"
    others = [name for name in usable if name != used]
    return f"{used}: {why}; {cost}" + (f" (also supported: {', '.join(others)})" if others else "")


def _list_notes(recipe: Recipe, configuration: Configuration, device: Device) -> list[str]:
    """Return what works and is worth knowing."""
    notes = []
    if configuration.misses_liger:
        notes.append(
            "model.use_liger_kernel: pip install 'rewardmodel[gpu]' for fewer and faster operations; Llama-3-8B trains "
            "and predicts 1.2 times as fast with them on an H200"
        )
    if device.kind == "cpu" and "paged" in str(recipe.trainer.get("optim")):
        notes.append("trainer.optim: on a CPU bitsandbytes does not page optimiser states, and keeps them in memory")
    if device.kind == "cpu" and recipe.model.load_in_8bit:
        notes.append("model.load_in_8bit: bitsandbytes' 8-bit matrix products are slow on a CPU")
    if device.kind == "cpu" and recipe.model.load_in_fp8:
        notes.append("model.load_in_fp8: a CPU has no fp8 units; products are computed in float32, slower than without")
    return notes


def _describe_shortage(what: str, needs: MemoryNeeds, device: Device, fix: str | None) -> str:
    """Return the problem that something does not fit into a device's memory."""
    return (
        f"{what} needs at least {needs.least / GIB:.1f} GiB, for one battle at a time, and {device.name} has "
        f"{device.memory / GIB:.1f}; {fix or 'use a larger GPU, or a smaller backbone'}"
    )


def _find_fix(scenario: Scenario) -> str | None:
    """Return settings that make training fit, the ones that cost least first, each added to those before; or None."""
    model, layers = scenario.recipe.model, scenario.layers
    half = scenario.recipe.prompt.max_length // 2
    # text, then keys of model, trainer and prompt: ("prompt.max_length 512", {}, {}, {"max_length": 512})
    steps: list[tuple[str, dict, dict, dict]] = []
    if not scenario.checkpointing and not model.freeze_backbone:
        steps.append(("trainer.gradient_checkpointing true", {}, {"gradient_checkpointing": True}, {}))
    if not model.load_in_4bit and model.use_peft:
        quantised = {"load_in_4bit": True, "load_in_8bit": False, "load_in_fp8": False}
        steps.append(("model.load_in_4bit true", quantised, {}, {}))
    if model.use_peft and not model.freeze_backbone and model.lora_first_layer < layers // 2:
        steps.append((f"model.lora_first_layer {layers // 2}", {"lora_first_layer": layers // 2}, {}, {}))
    steps.append((f"prompt.max_length {half}", {}, {}, {"max_length": half}))
    settings = []
    for words, *keys in steps:
        scenario = scenario.with_changes(*keys)
        settings.append(words)
        needs = estimate_training(scenario)
        if needs.fits:
            return f"set {', '.join(settings)}: {needs.least / GIB:.1f} GiB"
    return None


LEAST_TOKENS = 4096
"""Tokens of a micro-batch below which matrix products are slow on a GPU: an assumption."""


def _list_faster(scenario: Scenario, liger: bool) -> list[Faster]:
    """Return settings that can be changed, fit, and would save a tenth of training's hours or more.

    Args:
        scenario: on a GPU; on a CPU nothing is listed.
        liger: whether liger's kernels are used, in whose place compiled blocks would be.
    """
    trainer, current = scenario.recipe.trainer, estimate_training(scenario)
    kept = "activation_checkpointing" if trainer.get("activation_checkpointing") else "gradient_checkpointing"
    # whether there is something to change, key of `trainer`, value, why training is faster with it
    changes = (
        (scenario.checkpointing, kept, False, "no layer is computed twice"),
        (
            not trainer.get("torch_compile") and not liger,
            "torch_compile",
            True,
            "operations take longer to start than to compute here, and compiled layers have fewer (not measured)",
        ),
    )
    found, hours = [], estimate_hours(scenario).training
    for possible, key, value, reason in changes:
        if not (possible and scenario.gpu and measure_peaks(scenario).packed):
            continue
        changed = scenario.with_changes({}, {key: value}, {})
        if _choose_precision(changed.recipe, changed.backbone, changed.device, changed.launch, here=False)[1]:
            continue
        needs, faster = estimate_training(changed), estimate_hours(changed).training
        if needs.fits and needs.tokens >= min(LEAST_TOKENS, current.tokens) and faster <= 0.9 * hours:
            found.append(Faster(f"{key} {str(value).lower()}", reason, faster, needs.tokens))
    return found


def _estimate_on(scenario: Scenario, device: Device) -> OtherGpu:
    """Return memory and time of a scenario on another GPU, or the first setting that is incompatible there."""
    dtype, problems, _ = _choose_precision(scenario.recipe, scenario.backbone, device, scenario.launch, here=False)
    if problems:
        return OtherGpu(device, dtype_name(dtype), problems[0])
    scenario = replace(scenario, device=device, dtype=dtype)
    return OtherGpu(device, dtype_name(dtype), None, estimate_training(scenario), estimate_hours(scenario))
