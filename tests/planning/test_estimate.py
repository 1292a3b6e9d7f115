import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from rewardmodel.config.schema import ModelConfig
from rewardmodel.distributed import Launch
from rewardmodel.objectives import JOINT_HEAD
from rewardmodel.planning.devices import DEVICES, Device
from rewardmodel.planning.estimate import (
    BACKWARD,
    CONTEXT,
    FEATURES,
    FITTING,
    FORWARD,
    LAUNCH,
    PROCESS,
    UTILISATION,
    Case,
    hours,
    inference_needs,
    peaks,
    training_needs,
    with_changes,
)
from rewardmodel.planning.memory import Plan, Planned
from rewardmodel.planning.workload import Battles

CPU = Device("a CPU", "cpu", 8 * 2**30, 1e12, 5e11)
ROWS = [[0, 40], [0, 80], [0, 120], [0, 160]]
BOTH = [[10, 30, 30], [10, 70, 70], [10, 110, 110], [10, 150, 150]]


@pytest.fixture
def case(recipe, backbone):
    """Return a function that puts the tiny recipe on a device: case(CPU), case(DEVICES["T4"], launch=...)."""
    config = AutoConfig.from_pretrained(backbone("llama"))

    def made(device=CPU, launch=None, trainer=None, **model):
        changed = dataclasses.replace(
            recipe, model=dataclasses.replace(recipe.model, **model), trainer=recipe.trainer | (trainer or {})
        )
        battles = Battles(400, 100, ROWS, BOTH, "drawn up here")
        return Case(changed, config, device, torch.float32, launch or Launch(), battles)

    return made


def test_components_add_up(case):
    for device, own in ((CPU, PROCESS), (DEVICES["L4"], CONTEXT)):
        for needs in (training_needs(case(device)), inference_needs(case(device))):
            assert sum(needs["parts"].values()) == needs["total"]
            assert own in needs["parts"].values()
            assert needs["least"] <= needs["total"] <= device.memory
            assert needs["fits"]


def test_a_cpu_computes_the_micro_batches_that_it_would_draw(case):
    # Steps of eight battles out of four that there are: all of them, of 400 tokens, in one micro-batch or in several.
    assert training_needs(case())["tokens"] == 400
    assert training_needs(case(trainer={"micro_batch_tokens": 160}))["tokens"] == 160
    assert inference_needs(case())["tokens"] == sum(map(sum, BOTH))


def test_a_gpu_is_filled_to_its_share_but_not_beyond_a_step(case):
    small = dataclasses.replace(DEVICES["T4"], memory=CONTEXT + 40 * 2**20)
    needs = training_needs(case(small, trainer={"battles_per_step": 10_000}))
    assert needs["tokens"] == needs["tokens that fit"] > 160
    assert 0.5 * small.memory < needs["total"] < small.memory
    assert training_needs(case(small, trainer={"micro_batch_tokens": 200}))["tokens"] == 200
    large = training_needs(case(DEVICES["H200"]))
    assert large["tokens"] < 10 * 160 < large["tokens that fit"]


def test_what_has_no_room_is_told(case):
    needs = training_needs(case(dataclasses.replace(DEVICES["T4"], memory=CONTEXT + 2**20)))
    assert not needs["fits"]
    assert needs["tokens that fit"] == 0


def test_fsdp_spreads_what_stays_and_gathers_two_layers(case):
    one, four = (training_needs(case(DEVICES["L4"], Launch(n, "fsdp" if n > 1 else "", 2)))["parts"] for n in (1, 4))
    for name in ("weights", "adapters", "gradients", "optimiser"):
        assert four[name] == one[name] // 4
    assert 0 < four["gathered layers"] <= one["weights"]
    predicted = inference_needs(case(DEVICES["L4"], Launch(4, "fsdp", 2)))["parts"]
    assert predicted["weights"] == one["weights"]


def test_ddp_keeps_gradients_twice_and_zero_spreads_them(case):
    alone, ddp, zero = (
        training_needs(case(DEVICES["L4"], launch))["parts"]
        for launch in (Launch(), Launch(2, "ddp"), Launch(2, "deepspeed", 2))
    )
    assert ddp["buckets"] == ddp["gradients"] == alone["gradients"]
    assert (zero["gradients"], zero["optimiser"]) == (alone["gradients"] // 2, alone["optimiser"] // 2)
    assert zero["weights"] == alone["weights"]


def test_changes_that_take_less_take_less(case):
    whole = case(lora_dropout=0.1)
    least = training_needs(whole)["least"]
    for changes in (
        ({}, {"gradient_checkpointing": True}, {}),
        ({"lora_first_layer": 1}, {}, {}),
        ({}, {}, {"max_length": 80}),
    ):
        assert training_needs(with_changes(whole, *changes))["least"] < least, changes


def test_what_takes_the_same_is_worked_out_once(case):
    first = case(DEVICES["L4"])
    assert peaks(first) is peaks(dataclasses.replace(first, device=DEVICES["H100"]))
    assert peaks(first) is not peaks(with_changes(first, {}, {"gradient_checkpointing": True}, {}))


def test_hours_are_operations_by_the_rate(case):
    alone = hours(case())
    weights = peaks(case()).usage
    dense = 2 * (weights.parameters - weights.embedding) * 100
    attention = 2 * 2 * 4 * 16 * (40**2 + 80**2 + 120**2 + 160**2) / 4
    rate = 5e11 * UTILISATION["cpu"] * 3600
    assert alone["evaluation"] == pytest.approx(100 * (dense + attention) / rate)
    assert alone["training"] == pytest.approx(400 * (2 * dense + 3 * attention) / rate)
    more = hours(case(trainer={"num_train_epochs": 3, "gradient_checkpointing": True}))
    assert more["training"] == pytest.approx(3 * 400 * (3 * dense + 4 * attention) / rate)
    assert more["evaluation"] == pytest.approx(3 * alone["evaluation"])
    assert hours(case(launch=Launch(2, "ddp")))["training"] == pytest.approx(alone["training"] / 2)
    upper = hours(case(lora_first_layer=1))["training"]
    assert upper == pytest.approx(400 * (1.5 * dense + 2 * attention) / rate)


def test_a_head_that_is_fitted_first_costs_a_forward_pass_and_room_for_what_it_reads(case):
    fitted, plain = case(head_init="fitted"), case()
    assert hours(fitted) == hours(plain) | {FITTING: pytest.approx(4 * hours(plain)["evaluation"])}
    assert training_needs(fitted)["parts"].keys() == training_needs(plain)["parts"].keys()  # training needs more
    many = dataclasses.replace(fitted, battles=dataclasses.replace(fitted.battles, training=10**7), found={})
    later = ("gradients", "optimiser", "activations")
    parts, width = training_needs(many)["parts"], fitted.backbone.hidden_size
    assert parts["features"] + sum(parts[name] for name in later) == FEATURES * 10**7 * 1 * width * 4


@pytest.mark.parametrize(
    ("keys", "times"),
    [
        ({"eval_strategy": "no"}, 0),
        ({"eval_strategy": "steps", "eval_steps": 0.2}, 5),
        ({"eval_strategy": "steps", "eval_steps": 20}, 2),
        ({"max_steps": 25}, 0.5),
    ],
)
def test_evaluations_are_counted(case, keys, times):
    assert hours(case(trainer=keys))["evaluation"] == pytest.approx(times * hours(case())["evaluation"])


def test_on_a_gpu_a_small_model_waits_for_its_operations_to_start(case):
    layers, steps, every = 2, 50, LAUNCH / 3600
    slow = dataclasses.replace(DEVICES["T4"], single=1e6)
    for keys, launched, operations, batches in (
        ({}, None, FORWARD + BACKWARD, 1),
        ({"gradient_checkpointing": True}, None, 2 * FORWARD + BACKWARD, 1),
        ({"micro_batch_tokens": 200}, None, FORWARD + BACKWARD, 4),  # a step of 8 battles of 100 tokens
        ({"micro_batch_tokens": 200}, Launch(2, "ddp"), FORWARD + BACKWARD, 2),
    ):
        told = hours(case(DEVICES["T4"], launched, keys))
        assert told["training"] == pytest.approx(steps * batches * layers * operations * every)
        assert told["evaluation"] == told["prediction"] == pytest.approx(layers * FORWARD * every)
        by_rate, on_cpu = (hours(case(device, launched, keys)) for device in (slow, CPU))
        for what, whole in on_cpu.items():
            ratio = CPU.single * UTILISATION["cpu"] / slow.single / UTILISATION["cuda"]
            assert by_rate[what] == pytest.approx(whole * ratio)


class Operations(TorchDispatchMode):
    """Counts the operations that a GPU would be given: no views, and nothing that only makes room."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.overloadpacket.__name__ in ("device", "detach", "_unsafe_view"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [None, 4])
def test_the_operations_of_a_layer_are_as_many_as_are_reckoned_with(bits, backbone):
    found = []
    for layers in (2, 4):
        config = AutoConfig.from_pretrained(backbone("llama"))
        config.num_hidden_layers = layers
        model = ModelConfig(str(backbone("llama")), lora_dropout=0.1, load_in_4bit=bits == 4)
        planned = Planned(Plan(model, config, JOINT_HEAD, torch.float16, "sdpa", gpu=True))
        forward, both = Operations(), Operations()
        with forward:
            planned.forward_peak([[0, 60]])
        with both:
            planned.training_peak([[0, 60]])
        found.append((forward.count, both.count))
    forward, both = ((more - few) / 2 for few, more in zip(*found, strict=True))
    assert forward == pytest.approx(FORWARD, rel=0.1)
    assert both == pytest.approx(FORWARD + BACKWARD, rel=0.1)
