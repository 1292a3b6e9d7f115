"""A scenario -> bytes of memory by component, tokens of a batch that fit, and hours."""

import math
from dataclasses import dataclass

import numpy as np

from rewardmodel.config.trainer import BATTLES, TOKENS
from rewardmodel.model.budget import extrapolate_tokens
from rewardmodel.model.heads import WIDTHS
from rewardmodel.objectives import find_objective
from rewardmodel.planning.devices import count_flops
from rewardmodel.planning.gpus import GIB, Device
from rewardmodel.planning.scenario import Scenario, measure_peaks
from rewardmodel.planning.workload import Branches

CUDA_CONTEXT = int(0.5 * GIB)
"""Bytes that CUDA and cuBLAS take for themselves: an estimate."""

PROCESS_BYTES = int(1.07 * GIB)
"""Bytes of host memory that Python, the libraries (0.57 GiB) and their kernels take: by scripts/bench_doctor.py."""

ALLOCATOR_GAPS = 0.28
"""Memory that glibc's allocator leaves unused on a CPU, as a share of activations without checkpointing (checkpointing
does not reduce it): by scripts/bench_doctor.py. MALLOC_MMAP_THRESHOLD_ at 1 MiB avoids it, but slows training down."""

USABLE_SHARE = 0.95
"""Share of a GPU's memory that can be filled before fragmentation matters: an estimate."""

FEATURE_COPIES = 5
"""Copies of the features in memory while a head is fitted to them: as read, scaled, by fold, and temporary ones."""

UTILISATION = {"cuda": 0.35, "cpu": 0.5}
"""Share of a device's matrix product speed that training reaches: an assumption, printed with every time."""

MEASURED_UTILISATION = 0.45
"""The same of a GPU of this machine, relative to its measured speed, which is less than a data sheet's. Llama-3-8B
reached .47 with activations kept and .58 in prediction on an H200, and .59 and .72 with liger's kernels
(scripts/results/gpu_without_liger.json, gpu.json)."""

FP8_SPEED = 1.15
"""Speed of a backbone with MLPs in fp8, quantisation of activations included, relative to bfloat16: an estimate. By the
times of single layers on an H100, that of Llama-3-8B is 1.22 at 5,632 tokens a batch, and 1.42 at 16,384."""

LAUNCH_SECONDS = 10e-6
"""Seconds between the starts of two operations on a GPU at best, as Python and PyTorch launch them: an assumption,
printed with every time. It bounds small models, whose operations take less."""

FORWARD_OPERATIONS, BACKWARD_OPERATIONS = 66, 146
"""Operations of a layer for each micro-batch, counted on a Llama with LoRA on all linear layers and dropout."""

COMPILED_FORWARD, COMPILED_BACKWARD = 45, 62
"""The same of a compiled layer: calls in the code that torch's compiler (2.13) writes for a CPU, 60 of them products
and attention, and 47 fused from all that is between those."""

OPERATIONS = {False: (FORWARD_OPERATIONS, BACKWARD_OPERATIONS), True: (COMPILED_FORWARD, COMPILED_BACKWARD)}
"""Those of forward and backward pass by whether `trainer.torch_compile` is on."""

COMPILE_SECONDS = 120.0
"""Seconds that compiling one layer for training and for evaluation takes: an assumption."""


def utilisation(device: Device) -> float:
    """Return the share of a device's matrix product speed that training is assumed to reach."""
    return MEASURED_UTILISATION if device.kind == "cuda" and device.measured else UTILISATION[device.kind]


@dataclass(frozen=True)
class MemoryNeeds:
    """Memory of training or of prediction on each device.

    Attributes:
        parts: bytes by component at the peak, like `{"weights": 2_000_000_000, "activations": 900_000_000}`.
        least: bytes at the peak with one battle at a time.
        fits: whether `least` bytes fit into the device's memory.
        tokens: of the batches that `parts` is for.
        tokens_that_fit: largest number of tokens in a batch; 0 if not even one battle fits.
    """

    parts: dict[str, int]
    least: int
    fits: bool
    tokens: int
    tokens_that_fit: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


def estimate_training(scenario: Scenario) -> MemoryNeeds:
    """Return the memory that training takes on each device."""
    peaks, processes, recipe = measure_peaks(scenario), scenario.launch.processes, scenario.recipe
    size, longest = peaks.size, peaks.tokens[0]

    # what stays in memory
    parts = {
        "weights": size.weights,
        "adapters": size.adapters,
        "gradients": size.gradients,
        "optimiser": size.optimiser,
    }
    if recipe.model.freeze_backbone:
        parts["features"] = _feature_bytes(scenario)
    if scenario.launch.strategy == "fsdp":
        parts = {name: share // processes for name, share in parts.items()}
        parts["gathered layers"] = 2 * size.largest_layer  # one computes while the next is gathered
    elif scenario.launch.strategy == "ddp":
        parts["buckets"] = size.gradients
    own = CUDA_CONTEXT if scenario.gpu else PROCESS_BYTES

    # the smallest micro-batch: one battle of the longest; a CPU has a fixed budget of tokens
    one, two = peaks.training[0], peaks.training[-1]
    without = peaks.without_checkpointing
    least = sum(parts.values()) + own + _activation_bytes(scenario, one, without)

    # the micro-batches that would be used
    tokens = most = longest
    if scenario.gpu:
        free = scenario.device.memory - CUDA_CONTEXT - parts["weights"] - parts["adapters"]
        most = extrapolate_tokens(free, parts["gradients"] + one, parts["gradients"] + two, longest)
        tokens = max(longest, min(recipe.trainer[TOKENS] or most, _step_tokens(scenario)))
        if recipe.model.freeze_backbone:
            tokens = max(longest, recipe.inference.batch_tokens or most)
        one += int((two - one) * (tokens / longest - 1))
    parts["CUDA" if scenario.gpu else "process"] = own
    parts["activations"] = _activation_bytes(scenario, one, without)

    # a head is fitted before training starts: its features take memory that training uses later, and may need more
    if recipe.model.head_init != "zero":
        later = parts["gradients"] + parts["optimiser"] + parts["activations"]
        beyond = max(0, _feature_bytes(scenario) - later)
        parts |= {"features": beyond} if beyond else {}
        least += beyond
    return _check_fit(scenario, parts, least, tokens, most)


def estimate_inference(scenario: Scenario) -> MemoryNeeds:
    """Return the memory that prediction takes on each device; every device holds all weights."""
    peaks = measure_peaks(scenario)
    one, two, longest = peaks.inference[0], peaks.inference[-1], peaks.tokens[1]
    parts = {"weights": peaks.size.weights, "adapters": peaks.size.adapters}
    own = CUDA_CONTEXT if scenario.gpu else PROCESS_BYTES
    least = sum(parts.values()) + own + _activation_bytes(scenario, one)
    tokens = most = longest
    if scenario.gpu:
        most = extrapolate_tokens(scenario.device.memory - CUDA_CONTEXT - sum(parts.values()), one, two, longest)
        tokens = max(longest, scenario.recipe.inference.batch_tokens or most)
        one += int((two - one) * (tokens / longest - 1))
    parts["CUDA" if scenario.gpu else "process"] = own
    parts["activations"] = _activation_bytes(scenario, one)
    return _check_fit(scenario, parts, least, tokens, most)


def _check_fit(scenario: Scenario, parts: dict[str, int], least: int, tokens: int, tokens_that_fit: int) -> MemoryNeeds:
    fits = least <= int(scenario.device.memory * (USABLE_SHARE if scenario.gpu else 1))
    return MemoryNeeds(parts, least, fits, tokens, tokens_that_fit if fits else 0)


def _feature_bytes(scenario: Scenario) -> int:
    """Return the bytes of the training battles' features, and of copies, while a head is fitted to them."""
    model, workload = scenario.recipe.model, scenario.workload
    head = find_objective(scenario.recipe.objective).head
    width = WIDTHS[model.pooling](head.responses) * scenario.backbone.get_text_config().hidden_size
    sequences = len(workload.branches[0]) - 1
    return FEATURE_COPIES * workload.training * sequences * width * 4  # float32


def _activation_bytes(scenario: Scenario, peak: int, without_checkpointing: int = 0) -> int:
    """Return the peak bytes of activations, on a CPU with the gaps that the allocator leaves."""
    return peak if scenario.gpu else int(peak + ALLOCATOR_GAPS * max(peak, without_checkpointing))


def _step_tokens(scenario: Scenario) -> int:
    """Return the tokens of one process's share of a large optimiser step, all of whose battles are above the median."""
    costs = np.sort([sum(row) for row in scenario.training_rows])
    mean = float(costs[len(costs) // 2 :].mean())
    return int(mean * scenario.recipe.trainer[BATTLES] / scenario.launch.processes)


@dataclass(frozen=True)
class Hours:
    """Estimated hours.

    Attributes:
        training: all epochs, without evaluations.
        evaluation: all evaluations of the validation battles during training.
        prediction: of the validation battles, once.
        head_fit: of a head that is fitted before training; None: none is.
    """

    training: float
    evaluation: float
    prediction: float
    head_fit: float | None = None

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.training + self.evaluation + self.prediction + (self.head_fit or 0.0)


def estimate_hours(scenario: Scenario) -> Hours:
    """Return the hours of training, its evaluations, and the prediction of the validation battles.

    Floating-point operations (`planning.devices.count_flops`) by the share `utilisation` of the device's speed; on a
    GPU at least `LAUNCH_SECONDS` per operation.
    """
    recipe, workload, size = scenario.recipe, scenario.workload, measure_peaks(scenario).size
    step_battles, layers = recipe.trainer[BATTLES], scenario.layers
    training_rows, prediction_rows = scenario.training_rows, scenario.prediction_rows
    evaluation_rows = scenario.evaluation_rows
    epochs, evaluations = _count_rounds(scenario)
    battles = epochs * workload.training

    # how much of the model the backward pass goes through, and how much of it is computed again
    backward = 1 - recipe.model.lora_first_layer / layers if recipe.model.use_peft else 2.0
    backward = 0.0 if recipe.model.freeze_backbone else backward
    again = min(backward, 1) if scenario.checkpointing else 0.0

    # seconds of computing one battle
    rate = scenario.device.rate(scenario.dtype) * utilisation(scenario.device) * scenario.launch.processes
    weights = size.parameters - size.embedding
    if recipe.model.load_in_fp8 and scenario.gpu:
        weights = round(weights / FP8_SPEED)  # operations that take as long in 16 bits

    def compute_seconds(rows: Branches, share: float) -> float:
        length = float(np.mean([sum(row) for row in rows]))
        square = float(np.mean([sum((shared + own) ** 2 for own in others) for shared, *others in rows]))
        return count_flops(scenario.backbone, weights, length, square, share) / rate

    forward, predicted = compute_seconds(training_rows, 0.0), compute_seconds(prediction_rows, 0.0)
    evaluated = compute_seconds(evaluation_rows, 0.0)
    trained = compute_seconds(training_rows, backward) + again * forward

    # seconds of launching the operations of one batch, and the number of batches
    launch = layers * LAUNCH_SECONDS if scenario.gpu else 0.0
    forward_launch = FORWARD_OPERATIONS * launch
    compiled = bool(recipe.trainer.get("torch_compile"))
    ahead, back = OPERATIONS[compiled]
    training_launch = (ahead * (1 + again) + back * min(backward, 1)) * launch
    training_tokens, inference_tokens = estimate_training(scenario).tokens, estimate_inference(scenario).tokens
    training_batches = battles / step_battles * _count_batches(scenario, training_rows, step_battles, training_tokens)
    if recipe.model.freeze_backbone:
        training_batches = _count_batches(scenario, training_rows, workload.training, training_tokens)
    evaluation_batches = _count_batches(scenario, evaluation_rows, workload.validation, inference_tokens)
    prediction_batches = _count_batches(scenario, prediction_rows, workload.validation, inference_tokens)
    fit_batches = _count_batches(scenario, training_rows, workload.training, inference_tokens)

    # whichever takes longer: computing or launching
    head_fit = max(workload.training * forward, fit_batches * forward_launch) / 3600
    return Hours(
        training=(max(battles * trained, training_batches * training_launch) + COMPILE_SECONDS * compiled) / 3600,
        evaluation=evaluations * max(workload.validation * evaluated, evaluation_batches * forward_launch) / 3600,
        prediction=max(workload.validation * predicted, prediction_batches * forward_launch) / 3600,
        head_fit=head_fit if recipe.model.head_init == "fitted" else None,
    )


def _count_rounds(scenario: Scenario) -> tuple[float, float]:
    """Return how many times training goes through its battles, and how many times the validation battles are judged."""
    trainer, battles = scenario.recipe.trainer, scenario.workload.training
    if scenario.recipe.model.freeze_backbone:
        return 1.0, 0.0
    steps = trainer.get("max_steps", -1)
    epochs = steps * trainer[BATTLES] / battles if steps > 0 else trainer["num_train_epochs"]
    evaluations = {"no": 0, "epoch": epochs}.get(str(trainer["eval_strategy"]))
    if evaluations is None:
        every, all_steps = trainer.get("eval_steps") or 500, epochs * battles / trainer[BATTLES]
        evaluations = 1 / every if every < 1 else all_steps // every
    return epochs, evaluations


def _count_batches(scenario: Scenario, rows: Branches, battles: int, tokens: int) -> int:
    """Return how many batches of at most `tokens` tokens each process computes of so many battles."""
    mean = float(np.mean([sum(row) for row in rows]))
    return math.ceil(mean * battles / scenario.launch.processes / tokens)
