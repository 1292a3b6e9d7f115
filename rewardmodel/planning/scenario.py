"""A recipe on a device -> the peak memory of its batches, measured on fake models."""

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rewardmodel.config.schema import Recipe
from rewardmodel.config.trainer import BATTLES, TOKENS
from rewardmodel.distributed import Launch
from rewardmodel.model.batching import plan_packed
from rewardmodel.model.budget import CPU_TOKENS
from rewardmodel.model.configuration import default_attention
from rewardmodel.model.families import find_family
from rewardmodel.model.precision import dtype_name
from rewardmodel.objectives import find_objective
from rewardmodel.planning.gpus import Device
from rewardmodel.planning.memory import FakeModel, MemorySpec, ModelSize
from rewardmodel.planning.workload import Branches, Workload


@dataclass(frozen=True)
class Scenario:
    """A recipe on a device.

    Attributes:
        recipe: what would be run.
        backbone: its transformers configuration.
        device: that it would run on.
        dtype: precision of the forward pass there.
        launch: how it is spread over devices.
        workload: the battles.
        cache: results of `measure_peaks`, shared by all scenarios made from this one.
    """

    recipe: Recipe
    backbone: Any
    device: Device
    dtype: torch.dtype
    launch: Launch
    workload: Workload
    cache: dict[str, "ActivationPeaks"] = field(default_factory=dict)

    @property
    def attention(self) -> str:
        """The attention implementation, a key of `model.attention.KERNELS`."""
        family = find_family(self.backbone.model_type)
        default = default_attention(family, dtype_name(self.dtype), self.device.capability)
        return self.recipe.model.attn_implementation or default

    @property
    def checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(self.recipe.trainer.get(f"{kind}_checkpointing") for kind in ("gradient", "activation"))

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.kind == "cuda"

    @property
    def layers(self) -> int:
        """Number of the backbone's layers."""
        return self.backbone.get_text_config().num_hidden_layers

    @cached_property
    def training_rows(self) -> Branches:
        """Lengths of the sampled battles in training, cut to `prompt.max_length`."""
        return _limit_lengths(self.workload.branches, self.recipe.prompt.max_length)

    @property
    def evaluation_rows(self) -> Branches:
        """Lengths of the sampled battles in evaluations during training, which show A first, whatever training does."""
        if find_objective(self.recipe.objective).encoding == "separate":
            return self.training_rows
        return [[0, shared + first] for shared, first, *_ in self.training_rows]

    @cached_property
    def prediction_rows(self) -> Branches:
        """Lengths of the sampled battles in prediction, cut to `prompt.max_length`."""
        return _limit_lengths(self.workload.predicted, self.recipe.prompt.max_length)

    def with_changes(self, model: dict[str, Any], trainer: dict[str, Any], prompt: dict[str, Any]) -> "Scenario":
        """Return the scenario with other keys in these sections of the recipe."""
        recipe = self.recipe
        return replace(
            self,
            recipe=replace(
                recipe,
                model=replace(recipe.model, **model),
                trainer=recipe.trainer | trainer,
                prompt=replace(recipe.prompt, **prompt),
            ),
        )


def _limit_lengths(rows: Branches, max_length: int) -> Branches:
    """Return battles whose sequences are at most `max_length` tokens long, the longer ones shortened in proportion."""

    def limit(row: list[int]) -> list[int]:  # [10, 30, 80]: two sequences of 40 and 90 tokens that share 10
        longest = row[0] + max(row[1:])
        if longest <= max_length:
            return row
        return [max(1, count * max_length // longest) if count else 0 for count in row]

    return [limit(row) for row in rows]


@dataclass(frozen=True)
class ActivationPeaks:
    """Peak bytes of a scenario beyond what stays in memory.

    Attributes:
        size: what stays in memory.
        training: on a GPU (one longest row, two longest rows); on a CPU (the largest micro-batch,).
        inference: the same in prediction.
        tokens: number of tokens in the first batch of `training`, and of `inference`.
        packed: whether batches are packed rows.
        without_checkpointing: of the same training without checkpointing on a CPU, where the allocator's gaps depend on
            it; else 0.
    """

    size: ModelSize
    training: tuple[int, ...]
    inference: tuple[int, ...]
    tokens: tuple[int, int]
    packed: bool
    without_checkpointing: int


def measure_peaks(scenario: Scenario) -> ActivationPeaks:
    """Return the peaks of a scenario; they are measured once for all devices of a kind and precision."""
    recipe = scenario.recipe
    kind = f"{scenario.dtype.itemsize} {scenario.device.kind}"
    key = f"{recipe.model} {scenario.checkpointing} {kind} {recipe.prompt.max_length}"
    if key in scenario.cache:
        return scenario.cache[key]

    # the batches: memory is linear in rows of one length, so a GPU needs two points; a CPU has a fixed budget
    if scenario.gpu:
        longest, longest_predicted = (max(rows, key=sum) for rows in (scenario.training_rows, scenario.prediction_rows))
        training, inference = [[longest], [longest] * 2], [[longest_predicted], [longest_predicted] * 2]
    else:
        training, inference = ([_largest_batch(scenario, learns)] for learns in (True, False))

    # peaks of the whole model, or extrapolated from two models of fewer layers
    spec = MemorySpec(
        recipe.model,
        scenario.backbone,
        find_objective(recipe.objective).head,
        scenario.dtype,
        scenario.attention,
        scenario.gpu,
        str(recipe.trainer.get("optim", "adamw_torch_fused")),
        scenario.checkpointing,
    )
    models, position = _shallow_models(spec)
    measured = [
        [model.training_peak(rows) for rows in training] + [model.forward_peak(rows) for rows in inference]
        for model in models
    ]
    whole = [round(few + position * (more - few)) for few, more in zip(measured[0], measured[-1], strict=True)]
    size = FakeModel(spec).size if position else models[0].size

    without = 0
    if scenario.checkpointing and not scenario.gpu:
        plain = scenario.with_changes({}, {"gradient_checkpointing": False, "activation_checkpointing": False}, {})
        without = measure_peaks(plain).training[0]
    tokens = (sum(map(sum, training[0])), sum(map(sum, inference[0])))
    count = len(training)
    scenario.cache[key] = ActivationPeaks(
        size, tuple(whole[:count]), tuple(whole[count:]), tokens, models[0].packs, without
    )
    return scenario.cache[key]


def _shallow_models(spec: MemorySpec) -> tuple[list[FakeModel], float]:
    """Return models of fewer layers, and where the whole model lies on the line through their peaks.

    Every further period of layers (of `layer_types`, for instance sliding, full, sliding, full) takes as much as the
    one before. Returned are models of two and of four periods that train, at 0 and 1 on the line; or the whole model
    alone, at 0, if it is not deeper.
    """
    text = spec.backbone.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [0] * text.num_hidden_layers)
    first = spec.model.lora_first_layer if spec.model.use_peft else 0
    period = next(n for n in range(1, len(kinds) + 1) if kinds[:-n] == kinds[n:])
    below, above = period if first else 0, len(kinds) - first  # layers that do not train: one period is enough
    if above <= 4 * period or first % period or text is not spec.backbone:
        return [FakeModel(spec)], 0.0
    models = []
    for layers in (2 * period, 4 * period):
        backbone = copy.deepcopy(spec.backbone)
        backbone.num_hidden_layers = below + layers
        if hasattr(backbone, "layer_types"):
            backbone.layer_types = kinds[: below + layers]
        model = replace(spec.model, lora_first_layer=below)
        models.append(FakeModel(replace(spec, backbone=backbone, model=model)))
    return models, (above - 2 * period) / (2 * period)


def _largest_batch(scenario: Scenario, training: bool) -> Branches:
    """Return the largest micro-batch of simulated training steps, or the largest batch of a prediction, on a CPU."""
    trainer = scenario.recipe.trainer
    learns = training and not scenario.recipe.model.freeze_backbone
    rows = scenario.training_rows if training else scenario.prediction_rows
    costs = [sum(row) for row in rows]

    # row numbers of each step, like [[4, 0, 2], [1, 4, 3]]; prediction is one step of all rows
    steps = [list(range(len(rows)))]
    if learns:
        random, size = np.random.default_rng(0), min(trainer[BATTLES], len(rows))
        count = min(500, -(-scenario.workload.training // trainer[BATTLES]))  # enough to see a large step
        steps = [random.choice(len(rows), size, replace=False).tolist() for _ in range(count)]

    budget = (trainer[TOKENS] if learns else scenario.recipe.inference.batch_tokens) or CPU_TOKENS
    batches = [
        [step[row] for row in batch]
        for step in steps
        for batch in plan_packed([costs[row] for row in step], budget, scenario.launch.processes)[0]
    ]
    largest = [rows[row] for row in max(batches, key=lambda batch: sum(costs[row] for row in batch))]

    # without length² terms, two rows of half the tokens each take as much and are measured faster
    if scenario.attention == "eager" or len(largest) < 3:
        return largest
    half = [max(1, sum(pieces) // 2) if any(pieces) else 0 for pieces in zip(*largest, strict=True)]
    return [half, half]
