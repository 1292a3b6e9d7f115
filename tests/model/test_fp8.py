import dataclasses
import logging

import pytest
import torch
from builders import (
    ENCODERS,
    FAMILIES,
    batch_of,
    config_of,
    logits,
    make_backbone,
    parametrize_some,
    reload_in_fresh_process,
    reload_model,
    rows_of,
    train_a_little,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel.errors import InputError
from rewardmodel.model import fp8
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.forward import choose_batching
from rewardmodel.model.fp8 import E4M3, Fp8Linear, dequantise_rows, layers_to_quantise, quantise_model, quantise_rows
from rewardmodel.model.loading import build_model, load_classifier, save_model
from rewardmodel.model.precision import autocast
from rewardmodel.objectives import JOINT_HEAD

CPU = torch.device("cpu")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(inputs, outputs, bias=False, seed=0):
    """Return a linear layer of random weights, and the same in fp8."""
    linear = torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    linear.weight.copy_(drawn(outputs, inputs, seed=seed))
    return linear, Fp8Linear(linear)


def error(found, expected):
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.fixture
def kernel(monkeypatch):
    """Compute as on a GPU, by torch's fp8 kernel for CPUs, its quantisation not compiled; skip where there is none."""
    monkeypatch.setattr(fp8, "has_fp8_units", lambda device: True)
    monkeypatch.setattr(fp8, "_fused_quantise", lambda: fp8._quantise_padded)
    try:
        fp8.multiply(torch.ones(2, 16), torch.ones(16, 16).to(E4M3), torch.float32)
    except (RuntimeError, NotImplementedError):
        pytest.skip("this torch multiplies no fp8 numbers with a scale per row on a CPU")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40))
def test_each_number_is_rounded_to_a_sixteenth_of_itself_or_of_the_least_step_of_its_row(values):
    row = torch.tensor([values], dtype=torch.float32)
    quantised, scales = quantise_rows(row)
    largest = row.abs().max()
    step = largest / 448 * 2**-9  # the distance of the numbers next to zero
    apart = (dequantise_rows(quantised, scales) - row).abs()
    assert (apart <= 1.0001 * torch.maximum(row.abs() / 16, step / 2) + 1e-30).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2**31), st.floats(-60, 60))
def test_a_row_times_a_power_of_two_keeps_its_bytes(seed, exponent):
    row, factor = drawn(1, 32, seed=seed), 2.0 ** round(exponent)
    one, other = quantise_rows(row), quantise_rows(factor * row)
    assert torch.equal(one[0].view(torch.uint8), other[0].view(torch.uint8))
    assert torch.equal(factor * one[1], other[1])


def test_the_largest_number_of_a_row_is_448_steps_and_rows_do_not_meet():
    rows = drawn(8, 64)
    quantised, scales = quantise_rows(rows)
    assert (quantised.float().abs().amax(dim=1) == 448).all()
    assert torch.allclose(448 * scales[:, 0], rows.abs().amax(dim=1), rtol=1e-6)
    alone = torch.cat([quantise_rows(row[None])[0].float() for row in rows])
    assert torch.equal(alone, quantised.float())


def test_a_row_of_zeros_is_zero_and_one_that_is_not_finite_is_nan():
    _, layer = made(16, 32)
    inputs = torch.stack([torch.zeros(16), torch.ones(16), torch.full((16,), torch.inf), torch.full((16,), torch.nan)])
    output = layer(inputs)
    assert (output[0] == 0).all()
    assert output[1].isfinite().all()
    assert output[2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_normal_numbers_is_wrong_by_less_than_5_percent(dtype):
    linear, layer = made(256, 128, bias=True)
    inputs = drawn(100, 256, seed=1).to(dtype)
    output = layer(inputs)
    assert output.dtype == dtype
    assert 0.02 < error(output.float(), linear(inputs.float())) < 0.05


def test_an_outlier_costs_its_own_token_and_no_other():
    linear, layer = made(64, 32)
    inputs = drawn(10, 64)
    before = layer(inputs)
    inputs[3, 5] = 1e6
    after = layer(inputs)
    others = [row for row in range(10) if row != 3]
    assert torch.equal(after[others], before[others])
    assert error(after[3], linear(inputs)[3]) < 0.05


def test_the_gradient_of_inputs_is_that_of_the_dequantised_weight():
    _, layer = made(64, 128)
    inputs, slope = drawn(50, 64).requires_grad_(), drawn(50, 128, seed=2)
    layer(inputs).backward(slope)
    weight = layer.dequantise().weight
    assert error(inputs.grad, slope @ weight) < 0.05
    scaled, scales = quantise_rows(slope * layer.scales)  # exactly: the weight's scales are in the gradient
    assert torch.allclose(inputs.grad, dequantise_rows(scaled, scales) @ layer.weight.view(E4M3).float(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_inputs_get_a_gradient_and_in_their_type(dtype):
    _, layer = made(16, 32, bias=True)
    inputs = drawn(2, 3, 16).to(dtype).requires_grad_()
    with autocast(CPU, torch.bfloat16):
        output = layer(inputs)
    assert (output.shape, output.dtype) == ((2, 3, 32), torch.bfloat16)
    output.sum().backward()
    assert (inputs.grad.shape, inputs.grad.dtype) == ((2, 3, 16), dtype)
    assert [weight.requires_grad for weight in layer.parameters()] == [False] * 3
    assert all(weight.grad is None for weight in layer.parameters())


@pytest.mark.parametrize("autocasting", [False, True])
def test_nothing_is_kept_for_the_backward_pass_but_the_layer(autocasting):
    _, layer = made(32, 64)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one),
        torch.autocast("cpu", torch.bfloat16, enabled=autocasting),
    ):
        layer(drawn(10, 32).requires_grad_())
    assert {one.data_ptr() for one in kept} == {layer.weight.data_ptr(), layer.scales.data_ptr()}


@pytest.mark.parametrize("rows", [1, 7, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_kernel_computes_what_is_emulated(rows, dtype, kernel, monkeypatch):
    _, layer = made(48, 64, bias=True)
    inputs = drawn(rows, 48).to(dtype).requires_grad_()
    slope = drawn(64, rows, seed=3).to(dtype).t()  # not contiguous
    by_kernel = layer(inputs)
    by_kernel.backward(slope)
    gradient, inputs.grad = inputs.grad, None
    monkeypatch.setattr(fp8, "has_fp8_units", lambda device: False)
    emulated = layer(inputs)
    emulated.backward(slope)
    assert (by_kernel.dtype, gradient.dtype) == (dtype, dtype)
    assert error(by_kernel.float(), emulated.float()) < 0.005  # the kernel returns bfloat16
    assert error(gradient.float(), inputs.grad.float()) < 0.005


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch's compiler
def test_the_fused_quantisation_gives_the_same_numbers_and_is_not_compiled_for_each_length(monkeypatch):
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    fused = torch.compile(fp8._quantise_padded, dynamic=True, backend=counter)
    for length, width in [(33, 64), (16, 64), (5, 128), (300, 32), (64, 64)]:
        rows, columns = drawn(length, width), drawn(width, seed=1).abs()
        for scales in (None, columns):
            found, expected = fused(rows, scales), fp8._quantise_padded(rows, scales)
            assert found[0].shape == (-(-length // 16) * 16, width)
            assert error(dequantise_rows(*found), dequantise_rows(*expected)) < 1e-3  # a tie may round the other way
    assert counter.frame_count <= 4  # with and without factors; inductor tells some sizes apart; torch stops at 8


def test_a_kernel_that_does_not_run_is_refused_with_the_reason(kernel, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED\nwhen calling")

    monkeypatch.setattr(torch, "_scaled_mm", fail)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with pytest.raises(
        InputError, match=r"^model\.load_in_fp8: torch .* for a GPU \(CUDA .* when calling\); set model"
    ):
        quantise_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), CPU)


def test_layers_that_cannot_be_in_fp8_stay_as_they_are_and_the_log_says_so(caplog):
    parts = {"wide": torch.nn.Linear(16, 32), "odd": torch.nn.Linear(32, 24), "score": torch.nn.Linear(32, 16)}
    model = torch.nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    assert layers_to_quantise(model) == ["wide"]
    with caplog.at_level(logging.INFO):
        quantise_model(model, CPU)
    assert [type(part).__name__ for part in model] == ["Fp8Linear", "Linear", "Linear"]
    assert "1 linear layers are not in fp8, as their widths are no multiples of 16: odd" in caplog.text
    assert model.score is parts["score"]
    with pytest.raises(
        InputError, match=r"^model\.load_in_fp8: Sequential has no linear layer .*; set model\.load_in_4"
    ):
        quantise_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), CPU)


def test_a_cast_of_the_model_leaves_its_weights_alone():
    _, layer = made(16, 32)
    before = layer(torch.ones(1, 16))
    model = torch.nn.Sequential(layer).to(torch.bfloat16).float()
    assert model[0].weight.dtype == torch.uint8
    assert torch.allclose(model(torch.ones(1, 16)), before, rtol=0.01, atol=0.1)


def test_the_backbone_is_in_fp8_and_norms_embeddings_adapters_and_head_are_not(backbone):
    config = dataclasses.replace(config_of(backbone("llama"), load_in_fp8=True), dtype="bfloat16")
    model, _ = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    kinds = {name: type(part).__name__ for name, part in model.named_modules()}
    layers = {name for name, kind in kinds.items() if kind == "Fp8Linear"}
    assert len(layers) == 2 * 3
    assert all(".mlp." in name and name.endswith(".base_layer") for name in layers)
    types = {name.removeprefix("base_model.model."): weight.dtype for name, weight in model.named_parameters()}
    assert types["model.embed_tokens.weight"] == types["model.norm.weight"] == torch.bfloat16
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    plain, _ = build_model(resolve_backbone(config_of(backbone("llama"))), JOINT_HEAD, seed=0)  # of float32
    trained, expected = (dict(one.named_parameters()) for one in (model, plain))
    new = [name for name, weight in expected.items() if weight.requires_grad and ".mlp." in name]
    assert len(new) == 2 * 2 * 3
    assert all(torch.equal(trained[name], expected[name]) for name in new)


def test_head_and_adapters_train_and_the_backbone_does_not(backbone):
    model, tokenizer = build_model(resolve_backbone(config_of(backbone("llama"), load_in_fp8=True)), JOINT_HEAD, seed=0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    train_a_little(model, batch_of(tokenizer))
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_gradients_are_close_to_those_of_the_unquantised_backbone(backbone):
    found = {}
    for quantised in (True, False):
        config = config_of(backbone("llama"), load_in_fp8=quantised, lora_dropout=0.0)
        model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        output = model(**batch_of(tokenizer)).logits
        output.log_softmax(-1)[:, 0].sum().backward()
        gradients = [weight.grad.flatten() for weight in model.parameters() if weight.requires_grad]
        found[quantised] = torch.cat(gradients)
    cosine = torch.nn.functional.cosine_similarity(found[True], found[False], dim=0)
    assert cosine > 0.85  # a network of random weights doubles errors in every layer


@parametrize_some(
    ("family", "dtype"),
    [(family, dtype) for family in (*FAMILIES, *ENCODERS) for dtype in ("float32", "bfloat16")],
    quick=[("llama", "float32"), ("gemma2", "bfloat16")],
)
def test_a_saved_model_predicts_the_same(family, dtype, backbone, tmp_path):
    config = dataclasses.replace(config_of(backbone(family), load_in_fp8=True), dtype=dtype)
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    assert any(isinstance(part, Fp8Linear) for part in model.modules())
    batch = choose_batching(model, tokenizer.pad_token_id).collate(rows_of(tokenizer))
    with autocast(CPU, getattr(torch, dtype)):
        train_a_little(model, batch)
    with autocast(CPU, getattr(torch, dtype)):  # another block: one keeps the casts of weights that have moved since
        before = logits(model, batch)
    assert before.std() > 1e-3
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    again, _ = reload_model(config, tmp_path / "model")
    with autocast(CPU, getattr(torch, dtype)):
        assert torch.equal(logits(again, batch), before)


@pytest.mark.slow  # starts a fresh process
def test_a_fresh_process_predicts_the_same(backbone, tmp_path):
    cases, expected = {}, {}
    for family in ("llama", "gemma2"):
        config = config_of(backbone(family), load_in_fp8=True)
        model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
        batch = batch_of(tokenizer)
        train_a_little(model, batch)
        save_model(model, tokenizer, resolve_backbone(config), tmp_path / family / "model")
        cases[family], expected[family] = (config, tmp_path / family / "model", batch), logits(model, batch)
    for name, fresh in reload_in_fresh_process(cases, tmp_path / "fresh").items():
        assert torch.equal(fresh, expected[name]), name


def test_a_backbone_of_other_widths_is_refused(tmp_path):
    odd = make_backbone("llama", tmp_path, hidden_size=40, intermediate_size=40, head_dim=10)
    with pytest.raises(InputError, match=r"^model\.load_in_fp8: LlamaForSequenceClassification has no linear layer"):
        load_classifier(resolve_backbone(config_of(odd, load_in_fp8=True)), JOINT_HEAD)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 16, 333])
def test_a_gpu_computes_what_is_emulated_and_quantises_to_the_same_bytes(rows):
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("needs compute capability 8.9")
    linear, layer = made(256, 512)
    there = Fp8Linear(linear, device)
    assert torch.equal(there.weight.cpu(), layer.weight)
    assert torch.equal(there.scales.cpu(), layer.scales)
    inputs, slope = drawn(rows, 256), drawn(rows, 512, seed=1)
    here, moved = inputs.clone().requires_grad_(), inputs.to(device).requires_grad_()
    layer(here).backward(slope)
    output = there(moved)
    output.backward(slope.to(device))
    assert error(output.cpu(), layer(inputs)) < 0.01
    assert error(moved.grad.cpu(), here.grad) < 0.01
