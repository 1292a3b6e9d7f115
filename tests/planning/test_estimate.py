import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from rewardmodel.config.schema import ModelConfig
from rewardmodel.distributed import Launch
from rewardmodel.objectives import JOINT_HEAD
from rewardmodel.planning import estimate
from rewardmodel.planning.estimate import (
    BACKWARD_OPERATIONS,
    CUDA_CONTEXT,
    FEATURE_COPIES,
    FORWARD_OPERATIONS,
    LAUNCH_SECONDS,
    PROCESS_BYTES,
    UTILISATION,
    estimate_hours,
    estimate_inference,
    estimate_training,
)
from rewardmodel.planning.gpus import DEVICES, Device
from rewardmodel.planning.memory import FakeModel, MemorySpec
from rewardmodel.planning.scenario import Scenario, measure_peaks
from rewardmodel.planning.workload import Workload

CPU = Device("a CPU", "cpu", 8 * 2**30, 1e12, 5e11)
ROWS = [[0, 40], [0, 80], [0, 120], [0, 160]]
BOTH = [[10, 30, 30], [10, 70, 70], [10, 110, 110], [10, 150, 150]]


@pytest.fixture(scope="module")
def caches():
    """Return the caches of `measure_peaks` that scenarios of this module share, so that the same is measured once."""
    return {}


@pytest.fixture
def scenario(recipe, backbone, caches):
    """Return a function that puts the tiny recipe on a device: scenario(DEVICES["T4"], launch=...)."""
    config = AutoConfig.from_pretrained(backbone("llama"))

    def made(device=CPU, launch=None, trainer=None, **model):
        changed = dataclasses.replace(
            recipe, model=dataclasses.replace(recipe.model, **model), trainer=recipe.trainer | (trainer or {})
        )
        workload = Workload(400, 100, ROWS, BOTH, "made for this test")
        launch = launch or Launch()
        batches = (trainer or {}).get("micro_batch_tokens"), changed.trainer["battles_per_step"], launch
        cache = caches.setdefault(device.kind if device.kind == "cuda" else batches, {})  # what the peaks depend on
        return Scenario(changed, config, device, torch.float32, launch, workload, cache)

    return made


def test_components_add_up(scenario):
    for device, own in ((CPU, PROCESS_BYTES), (DEVICES["L4"], CUDA_CONTEXT)):
        for needs in (estimate_training(scenario(device)), estimate_inference(scenario(device))):
            assert sum(needs.parts.values()) == needs.total
            assert own in needs.parts.values()
            assert needs.least <= needs.total <= device.memory
            assert needs.fits


def test_a_cpu_computes_the_micro_batches_that_it_would_draw(scenario):
    # Steps of eight battles out of four that there are: all of them, of 400 tokens, in one micro-batch or in several.
    assert estimate_training(scenario()).tokens == 400
    assert estimate_training(scenario(trainer={"micro_batch_tokens": 160})).tokens == 160
    assert estimate_inference(scenario()).tokens == sum(map(sum, BOTH))


def test_a_gpu_is_filled_to_its_share_but_not_beyond_a_step(scenario):
    small = dataclasses.replace(DEVICES["T4"], memory=CUDA_CONTEXT + 40 * 2**20)
    needs = estimate_training(scenario(small, trainer={"battles_per_step": 10_000}))
    assert needs.tokens == needs.tokens_that_fit > 160
    assert 0.5 * small.memory < needs.total < small.memory
    assert estimate_training(scenario(small, trainer={"micro_batch_tokens": 200})).tokens == 200
    large = estimate_training(scenario(DEVICES["H200"]))
    assert large.tokens < 10 * 160 < large.tokens_that_fit


def test_what_does_not_fit_is_reported(scenario):
    needs = estimate_training(scenario(dataclasses.replace(DEVICES["T4"], memory=CUDA_CONTEXT + 2**20)))
    assert not needs.fits
    assert needs.tokens_that_fit == 0


def test_fsdp_spreads_what_stays_and_gathers_two_layers(scenario):
    one, four = (
        estimate_training(scenario(DEVICES["L4"], Launch(n, "fsdp" if n > 1 else "", 2))).parts for n in (1, 4)
    )
    for name in ("weights", "adapters", "gradients", "optimiser"):
        assert four[name] == one[name] // 4
    assert 0 < four["gathered layers"] <= one["weights"]
    predicted = estimate_inference(scenario(DEVICES["L4"], Launch(4, "fsdp", 2))).parts
    assert predicted["weights"] == one["weights"]


def test_ddp_keeps_gradients_twice(scenario):
    alone, ddp = (estimate_training(scenario(DEVICES["L4"], launch)).parts for launch in (Launch(), Launch(2, "ddp")))
    assert ddp["buckets"] == ddp["gradients"] == alone["gradients"]
    assert ddp["weights"] == alone["weights"]


@pytest.mark.slow
def test_changes_that_take_less_take_less(scenario):
    whole = scenario(lora_dropout=0.1)
    least = estimate_training(whole).least
    for changes in (
        ({}, {"gradient_checkpointing": True}, {}),
        ({"lora_first_layer": 1}, {}, {}),
        ({}, {}, {"max_length": 80}),
    ):
        assert estimate_training(whole.with_changes(*changes)).least < least, changes


@pytest.mark.slow
def test_what_takes_the_same_is_worked_out_once(scenario):
    first = scenario(DEVICES["L4"])
    assert measure_peaks(first) is measure_peaks(dataclasses.replace(first, device=DEVICES["H100"]))
    assert measure_peaks(first) is not measure_peaks(first.with_changes({}, {"gradient_checkpointing": True}, {}))


@pytest.mark.slow
def test_hours_are_operations_by_the_rate(scenario):
    alone = estimate_hours(scenario())
    weights = measure_peaks(scenario()).size
    dense = 2 * (weights.parameters - weights.embedding) * 100
    attention = 2 * 2 * 4 * 16 * (40**2 + 80**2 + 120**2 + 160**2) / 4
    rate = 5e11 * UTILISATION["cpu"] * 3600
    assert alone.evaluation == pytest.approx(100 * (dense + attention) / rate)
    assert alone.training == pytest.approx(400 * (2 * dense + 3 * attention) / rate)
    more = estimate_hours(scenario(trainer={"num_train_epochs": 3, "gradient_checkpointing": True}))
    assert more.training == pytest.approx(3 * 400 * (3 * dense + 4 * attention) / rate)
    assert more.evaluation == pytest.approx(3 * alone.evaluation)
    assert estimate_hours(scenario(launch=Launch(2, "ddp"))).training == pytest.approx(alone.training / 2)
    upper = estimate_hours(scenario(lora_first_layer=1)).training
    assert upper == pytest.approx(400 * (1.5 * dense + 2 * attention) / rate)


def test_evaluations_are_of_one_order_where_training_is_of_both(scenario):
    one_order = scenario()
    single = estimate_hours(one_order)
    swapped = Workload(400, 100, [[0, length, length] for _, length in ROWS], BOTH, "made for this test")
    both = estimate_hours(dataclasses.replace(one_order, workload=swapped))
    assert both.evaluation == pytest.approx(single.evaluation)
    assert both.training == pytest.approx(2 * single.training)


@pytest.mark.slow
def test_fp8_layers_are_faster_on_a_gpu_and_attention_is_not(scenario, monkeypatch):
    monkeypatch.setattr(estimate, "LAUNCH_SECONDS", 0.0)  # the tiny model waits for nothing else
    plain, fp8 = (estimate_hours(scenario(DEVICES["H100"], load_in_fp8=on)).evaluation for on in (False, True))
    assert 1 < plain / fp8 < estimate.FP8_SPEED
    plain, fp8 = (estimate_hours(scenario(load_in_fp8=on)).evaluation for on in (False, True))
    assert plain == fp8  # of a CPU


def test_a_head_that_is_fitted_first_costs_a_forward_pass_and_room_for_what_it_reads(scenario):
    fitted, plain = scenario(head_init="fitted"), scenario()
    hours = estimate_hours(plain)
    assert hours.head_fit is None
    assert estimate_hours(fitted) == dataclasses.replace(hours, head_fit=pytest.approx(4 * hours.evaluation))
    assert estimate_training(fitted).parts.keys() == estimate_training(plain).parts.keys()  # training needs more
    many = dataclasses.replace(fitted, workload=dataclasses.replace(fitted.workload, training=10**7), cache={})
    later = ("gradients", "optimiser", "activations")
    parts, width = estimate_training(many).parts, fitted.backbone.hidden_size
    assert parts["features"] + sum(parts[name] for name in later) == FEATURE_COPIES * 10**7 * 1 * width * 4


@pytest.mark.parametrize(
    ("keys", "times"),
    [
        ({"eval_strategy": "no"}, 0),
        ({"eval_strategy": "steps", "eval_steps": 0.2}, 5),
        ({"eval_strategy": "steps", "eval_steps": 20}, 2),
        ({"max_steps": 25}, 0.5),
    ],
)
def test_evaluations_are_counted(scenario, keys, times):
    hours, changed = estimate_hours(scenario()), estimate_hours(scenario(trainer=keys))
    assert changed.evaluation == pytest.approx(times * hours.evaluation)


@pytest.mark.slow
def test_on_a_gpu_a_small_model_waits_for_its_operations_to_start(scenario):
    layers, steps, every = 2, 50, LAUNCH_SECONDS / 3600
    forward, both = FORWARD_OPERATIONS, FORWARD_OPERATIONS + BACKWARD_OPERATIONS
    slow = dataclasses.replace(DEVICES["T4"], single=1e6)
    for keys, launched, operations, batches in (
        ({}, None, both, 1),
        ({"gradient_checkpointing": True}, None, forward + both, 1),
        ({"micro_batch_tokens": 200}, None, both, 4),  # a step of 8 battles of 100 tokens
        ({"micro_batch_tokens": 200}, Launch(2, "ddp"), both, 2),
    ):
        found = estimate_hours(scenario(DEVICES["T4"], launched, keys))
        assert found.training == pytest.approx(steps * batches * layers * operations * every)
        assert found.evaluation == found.prediction == pytest.approx(layers * forward * every)
        by_rate, on_cpu = (estimate_hours(scenario(device, launched, keys)) for device in (slow, CPU))
        ratio = CPU.single * UTILISATION["cpu"] / slow.single / UTILISATION["cuda"]
        for what in ("training", "evaluation", "prediction"):
            assert getattr(by_rate, what) == pytest.approx(getattr(on_cpu, what) * ratio)


class Operations(TorchDispatchMode):
    """Counts the operations that a GPU would be given: no views, and nothing that only makes room."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.overloadpacket.__name__ in ("device", "detach", "_unsafe_view"))
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4])
def test_the_operations_of_a_layer_are_as_many_as_are_assumed(bits, backbone):
    found = []
    for layers in (1, 2):
        config = AutoConfig.from_pretrained(backbone("llama"))
        config.num_hidden_layers = layers
        model = ModelConfig(str(backbone("llama")), lora_dropout=0.1, load_in_4bit=bits == 4)
        fake = FakeModel(MemorySpec(model, config, JOINT_HEAD, torch.float16, "varlen", gpu=True))
        forward, both = Operations(), Operations()
        with forward:
            fake.forward_peak([[0, 60]])
        with both:
            fake.training_peak([[0, 60]])
        found.append((forward.count, both.count))
    forward, both = (more - few for few, more in zip(*found, strict=True))
    assert forward == pytest.approx(FORWARD_OPERATIONS, rel=0.1)
    assert both == pytest.approx(FORWARD_OPERATIONS + BACKWARD_OPERATIONS, rel=0.1)
