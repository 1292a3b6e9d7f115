"""A recipe, a device and how long battles are in; bytes by component, tokens that fit, and hours out."""

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from rewardmodel.config.schema import Recipe
from rewardmodel.config.trainer import BATTLES, TOKENS
from rewardmodel.distributed import Launch
from rewardmodel.model.batching import plan_packed
from rewardmodel.model.budget import CPU_TOKENS, extrapolate_tokens
from rewardmodel.model.families import find_family
from rewardmodel.model.heads import WIDTHS
from rewardmodel.objectives import find_objective
from rewardmodel.planning.devices import GIB, Device, battle_flops
from rewardmodel.planning.memory import Plan, Planned, Usage
from rewardmodel.planning.workload import Battles, Branches

FEATURES = 5
"""Copies of the features that a head is fitted to which are in memory at once: as read, scaled, parts of folds, and
what is made while that is done."""

FITTING = "extrapolate_tokens the head"
"""What `hours` calls it."""

LAUNCH = 10e-6
"""Seconds from the start of one operation on a GPU to the next one's at best, as Python and PyTorch hand them over: an
assumption, said with every time. Small models wait for it: their operations are done sooner."""

FORWARD, BACKWARD = 95, 155
"""Operations of a layer for each micro-batch, counted on a Llama's with LoRA on all linear layers and dropout."""

STEPS = 500
"""Steps that are drawn to learn how large their micro-batches are."""

CONTEXT = int(0.5 * GIB)
"""What CUDA takes for itself, and cuBLAS for its products: an estimate."""

PROCESS = int(1.07 * GIB)
"""What Python, the libraries (0.57) and their kernels take in the host's memory: by scripts/bench_doctor.py."""

GAPS = 0.28
"""What glibc's allocator leaves unused on a CPU, as a share of activations without checkpointing, which saves none of
it: by scripts/bench_doctor.py. With MALLOC_MMAP_THRESHOLD_ at 1 MiB there is none, but training is slower."""

PLAIN = {"gradient_checkpointing": False, "activation_checkpointing": False}

KEPT = 0.95
"""Share of a GPU's memory that its allocator can use before gaps in it count: an estimate."""

UTILISATION = {"cuda": 0.35, "cpu": 0.5}
"""Share of a device's rate of products that training reaches: an assumption, said with every time."""


@dataclass(frozen=True)
class Case:
    """A recipe on a device.

    Attributes:
        recipe: what would be done.
        backbone: its transformers configuration.
        device: where.
        dtype: that it computes in there.
        launch: how it is spread over devices.
        battles: what is to be learnt from.
        found: peaks of cases that take the same, which they share.
    """

    recipe: Recipe
    backbone: Any
    device: Device
    dtype: torch.dtype
    launch: Launch
    battles: Battles
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def attention(self) -> str:
        """The implementation of attention."""
        return self.recipe.model.attn_implementation or find_family(self.backbone.model_type).attention[0]

    @property
    def checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(self.recipe.trainer.get(f"{kind}_checkpointing") for kind in ("gradient", "activation"))

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.kind == "cuda"


@dataclass(frozen=True)
class Peaks:
    """What a case takes beyond what stays, in bytes, of one and of two of the longest rows, or of one micro-batch.

    `plain` is what the same training would take without checkpointing, where that matters: on a CPU.
    """

    usage: Usage
    training: tuple[int, ...]
    inference: tuple[int, ...]
    tokens: tuple[int, int]
    plain: int


def peaks(case: Case) -> Peaks:
    """Return what a case takes; it is worked out once for all devices of a kind and precision."""
    recipe = case.recipe
    key = f"{recipe.model} {case.checkpointing} {case.dtype.itemsize} {case.device.kind} {recipe.prompt.max_length}"
    if key not in case.found:
        plan = Plan(
            case.recipe.model, case.backbone, find_objective(case.recipe.objective).head, case.dtype, case.attention,
            case.gpu, str(case.recipe.trainer.get("optim", "adamw_torch_fused")), case.checkpointing,
        )  # fmt: skip
        if case.gpu:
            rows = [max(_cut(case, some), key=sum) for some in (case.battles.branches, case.battles.predicted)]
            training, inference = [[rows[0]], [rows[0]] * 2], [[rows[1]], [rows[1]] * 2]
        else:
            training, inference = ([_micro_batch(case, one)] for one in (True, False))
        planned, at = _shorter(plan)
        found = [
            [one.training_peak(rows) for rows in training] + [one.forward_peak(rows) for rows in inference]
            for one in planned
        ]
        whole = [round(few + at * (more - few)) for few, more in zip(found[0], found[-1], strict=True)]
        tokens = (sum(map(sum, training[0])), sum(map(sum, inference[0])))
        usage = Planned(plan).usage if at else planned[0].usage
        plain = 0
        if case.checkpointing and not case.gpu:
            plain = peaks(with_changes(case, {}, PLAIN, {})).training[0]
        case.found[key] = Peaks(usage, tuple(whole[: len(training)]), tuple(whole[len(training) :]), tokens, plain)
    return case.found[key]


def _shorter(plan: Plan) -> tuple[list[Planned], float]:
    """Return backbones of a few layers, and how far beyond them the whole lies, as every further layer takes as much.

    A model of four periods of layers and one of two are as far apart as 1; a model that is no longer is alone, at 0.
    """
    text = plan.backbone.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [0] * text.num_hidden_layers)
    first = plan.model.lora_first_layer if plan.model.use_peft else 0
    period = next(n for n in range(1, len(kinds) + 1) if kinds[:-n] == kinds[n:])
    below, above = -(-first // period) * period and period, len(kinds) - first
    if above <= 4 * period or first % period or text is not plan.backbone:
        return [Planned(plan)], 0.0
    made = []
    for layers in (2 * period, 4 * period):
        backbone = copy.deepcopy(plan.backbone)
        backbone.num_hidden_layers = below + layers
        if hasattr(backbone, "layer_types"):
            backbone.layer_types = kinds[: below + layers]
        model = replace(plan.model, lora_first_layer=below)
        made.append(Planned(replace(plan, backbone=backbone, model=model)))
    return made, (above - 2 * period) / (2 * period)


def _cut(case: Case, branches: Branches) -> Branches:
    """Return battles as long as the recipe lets them be."""
    most = case.recipe.prompt.max_length
    sequences = [(shared + max(others), [shared, *others]) for shared, *others in branches]
    return [[max(1, n * most // one) if n else 0 for n in row] if one > most else row for one, row in sequences]


def _micro_batch(case: Case, training: bool) -> Branches:
    """Return the largest micro-batch of drawn steps, or the largest batch of a prediction, on a CPU."""
    trainer = case.recipe.trainer
    rows = _cut(case, case.battles.branches if training else case.battles.predicted)
    costs = [sum(row) for row in rows]
    steps = [range(len(rows))]
    if training and not case.recipe.model.freeze_backbone:
        random, size = np.random.default_rng(0), min(trainer[BATTLES], len(rows))
        count = min(STEPS, -(-case.battles.training // trainer[BATTLES]))
        steps = [random.choice(len(rows), size, replace=False).tolist() for _ in range(count)]
    learns = training and not case.recipe.model.freeze_backbone
    budget = (trainer[TOKENS] if learns else case.recipe.inference.batch_tokens) or CPU_TOKENS
    drawn = [
        [step[row] for row in micro]
        for step in steps
        for micro in plan_packed([costs[row] for row in step], budget, case.launch.processes)[0]
    ]
    largest = [rows[row] for row in max(drawn, key=lambda micro: sum(costs[row] for row in micro))]
    if case.attention == "eager" or len(largest) < 3:
        return largest
    half = [max(1, sum(pieces) // 2) if any(pieces) else 0 for pieces in zip(*largest, strict=True)]
    return [half, half]


def training_needs(case: Case) -> dict[str, Any]:
    """Return what training takes on each device: bytes by component, their total, whether it fits, and tokens."""
    found, shards = peaks(case), case.launch.processes
    usage, (one, two), longest = found.usage, found.training * (1 if case.gpu else 2), found.tokens[0]
    parts = {
        "weights": usage.weights, "adapters": usage.adapters, "gradients": usage.gradients,
        "optimiser": usage.optimiser,
    }  # fmt: skip
    if case.recipe.model.freeze_backbone:
        parts["features"] = _features(case)
    if case.launch.strategy == "fsdp":
        parts = {name: size // shards for name, size in parts.items()}
        parts["gathered layers"] = 2 * usage.largest_layer  # one computes, the next is on its way
    elif case.launch.strategy == "ddp":
        parts["buckets"] = usage.gradients
    own = CONTEXT if case.gpu else PROCESS
    least = sum(parts.values()) + own + _activations(case, one, found.plain)
    tokens = longest
    if case.gpu:
        free = case.device.memory - CONTEXT - parts["weights"] - parts["adapters"]
        fits = extrapolate_tokens(free, parts["gradients"] + one, parts["gradients"] + two, longest)
        tokens = max(longest, min(case.recipe.trainer[TOKENS] or fits, _step_tokens(case)))
        if case.recipe.model.freeze_backbone:
            tokens = max(longest, case.recipe.inference.batch_tokens or fits)
        one += int((two - one) * (tokens / longest - 1))
    else:
        fits = tokens
    parts["CUDA" if case.gpu else "process"] = own
    parts["activations"] = _activations(case, one, found.plain)
    if case.recipe.model.head_init == "fitted":  # before training, which then needs that memory for other things
        later = parts["gradients"] + parts["optimiser"] + parts["activations"]
        beyond = max(0, _features(case) - later)
        parts |= {"features": beyond} if beyond else {}
        least += beyond
    return _told(case, parts, least, tokens, fits)


def _features(case: Case) -> int:
    """Return what a head is fitted to takes while that is done, in bytes."""
    head = find_objective(case.recipe.objective).head
    width = WIDTHS[case.recipe.model.pooling](head.responses) * case.backbone.get_text_config().hidden_size
    sequences = len(case.battles.branches[0]) - 1
    return FEATURES * case.battles.training * sequences * width * 4


def inference_needs(case: Case) -> dict[str, Any]:
    """Return the same of prediction; every device holds all weights."""
    found = peaks(case)
    usage, (one, two), longest = found.usage, found.inference * (1 if case.gpu else 2), found.tokens[1]
    parts = {"weights": usage.weights, "adapters": usage.adapters}
    own = CONTEXT if case.gpu else PROCESS
    least = sum(parts.values()) + own + _activations(case, one)
    tokens = fits = longest
    if case.gpu:
        fits = extrapolate_tokens(case.device.memory - CONTEXT - sum(parts.values()), one, two, longest)
        tokens = max(longest, case.recipe.inference.batch_tokens or fits)
        one += int((two - one) * (tokens / longest - 1))
    parts["CUDA" if case.gpu else "process"] = own
    parts["activations"] = _activations(case, one)
    return _told(case, parts, least, tokens, fits)


def _activations(case: Case, alive: int, plain: int = 0) -> int:
    """Return what tensors take of which so many bytes are alive at once, and the gaps that the allocator leaves."""
    return alive if case.gpu else int(alive + GAPS * max(alive, plain))


def _told(case: Case, parts: dict[str, int], least: int, tokens: int, fits: int) -> dict[str, Any]:
    room = int(case.device.memory * (KEPT if case.gpu else 1))
    return {"parts": parts, "total": sum(parts.values()), "least": least, "fits": least <= room,
            "tokens": tokens, "tokens that fit": fits if least <= room else 0}  # fmt: skip


def _step_tokens(case: Case) -> int:
    """Return the tokens of a process's share of a large step."""
    costs = np.sort([sum(row) for row in _cut(case, case.battles.branches)])
    mean = float(costs[len(costs) // 2 :].mean())  # of the longer half
    return int(mean * case.recipe.trainer[BATTLES] / case.launch.processes)


def hours(case: Case) -> dict[str, float]:
    """Return the hours that training, its evaluations and the prediction of the validation battles take.

    Operations, by `planning.devices.battle_flops`, at a share of the device's rate, `UTILISATION`; on a GPU at least
    what starting them takes, `LAUNCH` for each.
    """
    recipe, battles, usage = case.recipe, case.battles, peaks(case).usage
    trainer, layers = recipe.trainer, case.backbone.get_text_config().num_hidden_layers
    back = 1 - recipe.model.lora_first_layer / layers if recipe.model.use_peft else 2.0
    back = 0.0 if recipe.model.freeze_backbone else back
    again = min(back, 1) if case.checkpointing else 0.0
    epochs, evaluations = _rounds(case)

    def flops(branches: Branches, backward: float) -> float:
        rows = _cut(case, branches)
        length = float(np.mean([sum(row) for row in rows]))
        square = float(np.mean([sum((shared + one) ** 2 for one in others) for shared, *others in rows]))
        return battle_flops(case.backbone, usage.parameters - usage.embedding, length, square, backward)

    rate = case.device.rate(case.dtype) * UTILISATION[case.device.kind] * case.launch.processes
    start = layers * LAUNCH if case.gpu else 0.0  # of an operation in each layer
    a_step = _batches(case, battles.branches, trainer[BATTLES], training_needs(case)["tokens"])
    judged, predicted = (
        _batches(case, branches, battles.validation, inference_needs(case)["tokens"])
        for branches in (battles.branches, battles.predicted)
    )
    forward, trained = flops(battles.branches, 0.0), epochs * battles.training
    operations = FORWARD * (1 + again) + BACKWARD * min(back, 1)
    steps = trained / trainer[BATTLES] * a_step
    if recipe.model.freeze_backbone:
        steps = _batches(case, battles.branches, battles.training, training_needs(case)["tokens"])
    reads = _batches(case, battles.branches, battles.training, inference_needs(case)["tokens"])
    seconds = {
        "training": (
            trained * (flops(battles.branches, back) + again * forward) / rate,
            steps * operations * start,
        ),
        "evaluation": (evaluations * battles.validation * forward / rate, evaluations * judged * FORWARD * start),
        FITTING: (battles.training * forward / rate, reads * FORWARD * start),
        "prediction": (battles.validation * flops(battles.predicted, 0.0) / rate, predicted * FORWARD * start),
    }  # fmt: skip
    if recipe.model.head_init != "fitted":
        del seconds[FITTING]
    return {what: max(both) / 3600 for what, both in seconds.items()}


def _rounds(case: Case) -> tuple[float, float]:
    """Return how often the training battles are gone through, and how often the validation battles are judged."""
    trainer, battles = case.recipe.trainer, case.battles.training
    if case.recipe.model.freeze_backbone:
        return 1.0, 0.0
    steps = trainer.get("max_steps", -1)
    epochs = steps * trainer[BATTLES] / battles if steps > 0 else trainer["num_train_epochs"]
    evaluations = {"no": 0, "epoch": epochs}.get(str(trainer["eval_strategy"]))
    if evaluations is None:
        every, all_steps = trainer.get("eval_steps") or 500, epochs * battles / trainer[BATTLES]
        evaluations = 1 / every if every < 1 else all_steps // every
    return epochs, evaluations


def _batches(case: Case, branches: Branches, battles: int, tokens: int) -> int:
    """Return the batches of at most so many tokens that each process computes of so many battles."""
    mean = float(np.mean([sum(row) for row in _cut(case, branches)]))
    return math.ceil(mean * battles / case.launch.processes / tokens)


def with_changes(case: Case, model: dict[str, Any], trainer: dict[str, Any], prompt: dict[str, Any]) -> Case:
    """Return a case whose recipe has other keys."""
    recipe = case.recipe
    changed = replace(recipe, model=replace(recipe.model, **model), trainer=recipe.trainer | trainer)
    return replace(case, recipe=replace(changed, prompt=replace(recipe.prompt, **prompt)))
