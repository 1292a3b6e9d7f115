import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from rewardmodel.config.schema import ModelConfig
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.loading import build_model
from rewardmodel.model.packing import packing_of
from rewardmodel.model.precision import autocast
from rewardmodel.objectives import OBJECTIVES
from rewardmodel.planning.memory import (
    FakeModel,
    MemorySpec,
    PeakMemory,
    _make_row,
    count_optimiser_bytes,
    enable_checkpointing,
)

JOINT = OBJECTIVES["cross_entropy"].head

LINEAR = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64)
"""Weights of the linear layers of conftest's two-layer Llama: q and o, k and v, the three of the MLP."""

BACKBONE = LINEAR + 400 * 64 + (2 * 2 + 1) * 64
"""All of its weights: also the token embeddings and the norms."""

ADAPTERS = 2 * 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 64) * 3)
"""Weights of LoRA of rank 4 on all of them."""

HEAD = 3 * 64


@pytest.fixture(scope="module")
def fake_model(backbone):
    """Return a function that makes a fake model of the tiny backbone of a family: fake_model("llama", lora_r=4)."""

    def made(name="llama", dtype=torch.float32, attention="sdpa", gpu=False, layers=None, **changes):
        folder = backbone(name)
        more = {key: changes.pop(key) for key in ("optimiser", "checkpointing", "head") if key in changes}
        backbone_config = AutoConfig.from_pretrained(folder)
        backbone_config.num_hidden_layers = layers or backbone_config.num_hidden_layers
        config = ModelConfig(model_name_or_path=str(folder), **{"lora_r": 4, "lora_dropout": 0.0, **changes})
        spec = MemorySpec(config, backbone_config, JOINT, dtype, attention, gpu)
        return FakeModel(dataclasses.replace(spec, **more))

    return made


def test_what_stays_is_known_by_hand(fake_model):
    size = fake_model().size
    assert (size.parameters, size.embedding) == (BACKBONE, 400 * 64)
    assert size.adapters == size.gradients == 4 * (ADAPTERS + HEAD)
    assert size.optimiser == 8 * (ADAPTERS + HEAD)
    rest = size.weights - 4 * BACKBONE
    assert 4 * HEAD <= rest <= 4 * HEAD + 1024  # PEFT's other copy of the head, and the angles of rotary positions


def test_half_precision_halves_the_backbone_and_nothing_else(fake_model):
    whole, half = fake_model().size, fake_model(dtype=torch.bfloat16).size
    assert whole.weights - half.weights == 2 * BACKBONE
    assert (half.adapters, half.optimiser) == (whole.adapters, whole.optimiser)


@pytest.mark.parametrize(("keys", "bits"), [({"load_in_4bit": True}, 4), ({"load_in_8bit": True}, 8)])
def test_a_quantised_backbone_is_as_large_as_its_bits(fake_model, keys, bits):
    size, plain = fake_model(dtype=torch.bfloat16, **keys).size, fake_model(dtype=torch.bfloat16).size
    saved = plain.weights - size.weights
    assert LINEAR * (2 - bits / 8) * 0.93 <= saved <= LINEAR * (2 - bits / 8)
    assert (size.parameters, size.adapters) == (plain.parameters, plain.adapters)


def test_of_fp8_the_mlps_take_a_byte_a_weight_and_four_a_row(fake_model):
    size, plain = fake_model(dtype=torch.bfloat16, load_in_fp8=True).size, fake_model(dtype=torch.bfloat16).size
    assert plain.weights - size.weights == 2 * 3 * (64 * 64 - 4 * 64)
    assert (size.parameters, size.adapters) == (plain.parameters, plain.adapters)


def test_all_weights_train_in_float32(fake_model):
    size = fake_model(dtype=torch.bfloat16, use_peft=False).size
    assert size.adapters == size.gradients == 4 * (BACKBONE + HEAD)
    assert size.optimiser == 2 * size.adapters
    assert size.weights <= 1024


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw_torch_fused", 8 * 10_000),
        ("paged_adamw_32bit", 8 * 10_000),
        ("paged_adamw_8bit", 8 * 1000 + 2 * (9000 + 4 * 36)),  # small tensors keep float32 states
        ("lion_32bit", 4 * 10_000),
        ("sgd", 0),
        ("adafactor", 0),
    ],
)
def test_states_of_optimisers(name, expected):
    assert count_optimiser_bytes(name, [1000, 9000]) == expected


@pytest.mark.parametrize(
    ("family", "attention", "checkpointing"),
    [
        ("llama", "sdpa", False),
        pytest.param("llama", "eager", True, marks=pytest.mark.slow),
        pytest.param("gemma3_text", "sdpa", True, marks=pytest.mark.slow),
        pytest.param("llama", "eager", False, marks=pytest.mark.slow),
        pytest.param("llama", "sdpa", True, marks=pytest.mark.slow),
        pytest.param("gemma2", "eager", False, marks=pytest.mark.slow),  # it caps attention logits, which sdpa does not
        pytest.param("gemma2", "eager", True, marks=pytest.mark.slow),
        pytest.param("gemma3_text", "eager", False, marks=pytest.mark.slow),
        pytest.param("gemma3_text", "eager", True, marks=pytest.mark.slow),
        pytest.param("gemma3_text", "sdpa", False, marks=pytest.mark.slow),
    ],
)
def test_tensors_without_content_take_what_real_ones_do(fake_model, backbone, family, attention, checkpointing):
    config = ModelConfig(str(backbone(family)), device="cpu", dtype="bfloat16", attn_implementation=attention, lora_r=4)
    model, _ = build_model(resolve_backbone(config), JOINT, seed=0)
    if checkpointing:
        enable_checkpointing(model)
    model.train()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    lengths = [[10, 30, 20], [0, 40]]
    batch = packing_of(model)([_make_row(branches) for branches in lengths])
    memory = PeakMemory([*model.parameters(), *model.buffers(), *tree_leaves(batch)])
    with memory:
        with autocast(torch.device("cpu"), torch.bfloat16):
            logits = model(**batch).logits
        logits.sum().backward()
    fake = fake_model(family, torch.bfloat16, attention, lora_dropout=0.05, checkpointing=checkpointing)
    assert fake.training_peak(lengths) == pytest.approx(memory.peak, rel=0.03)


def check_growth(model, tokens, more, attention):
    few, many = [[0, tokens]], [[0, tokens + more]]
    training, forward = ([peak(few), peak(many)] for peak in (model.training_peak, model.forward_peak))
    assert training[0] < training[1]
    assert forward[0] < forward[1]
    assert forward[1] < training[1]
    growth = training[1] / training[0] / ((tokens + more) / tokens)
    assert growth > 1 if attention == "eager" else growth == pytest.approx(1, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_more_tokens_take_more(attention, fake_once):
    check_growth(fake_once(attention), 64, 1024, attention)


@pytest.mark.slow
@settings(deadline=None, max_examples=8)
@given(tokens=st.integers(64, 1024), more=st.integers(64, 1024))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_more_tokens_take_more(tokens, more, attention, fake_once):
    check_growth(fake_once(attention), tokens, more, attention)


@pytest.fixture(scope="module")
def fake_once(fake_model):
    """Return a function that makes a fake model once for all examples of a test."""
    made = {}
    return lambda attention: made.setdefault(attention, fake_model(attention=attention, layers=1))


@pytest.mark.slow
def test_checkpointing_upper_layers_and_no_dropout_take_less(fake_model):
    lengths = [[0, 2000]]
    whole = fake_model(lora_dropout=0.1).training_peak(lengths)
    for changes in ({"checkpointing": True}, {"lora_first_layer": 1}, {"lora_dropout": 0.0}):
        assert fake_model(**{"lora_dropout": 0.1, **changes}).training_peak(lengths) < 0.95 * whole, changes


@pytest.mark.slow
def test_a_gpu_keeps_less_of_dropout(fake_model):
    lengths = [[0, 1000]]
    cpu, gpu = (fake_model(lora_dropout=0.1, gpu=gpu).training_peak(lengths) for gpu in (False, True))
    assert gpu < cpu


def test_one_after_another_no_memory_is_counted_twice(fake_model):
    model = fake_model()
    assert model.training_peak([[0, 300]]) == model.training_peak([[0, 300]])
    before = model.forward_peak([[0, 300]])
    model.training_peak([[0, 300]])
    assert model.forward_peak([[0, 300]]) == before
