"""What only a GPU computes, beside the same in float32 on a CPU: `pytest -m gpu`.

Most of the time goes into compiling: flex_attention takes ten seconds a family, the blocks of a decoder minutes.
"""

import numpy as np
import pytest
import torch
from builders import attending, battle_frame, make_backbone
from torch._dynamo.utils import counters

from rewardmodel.config.schema import ModelConfig, PromptConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.model.attention import PACKED_PREFIX
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.batching import to_device
from rewardmodel.model.configuration import usable_attention
from rewardmodel.model.families import FAMILIES, LIGER_FAMILIES
from rewardmodel.model.forward import Predictor
from rewardmodel.model.fusion import fuse_projections
from rewardmodel.model.loading import build_model, compile_blocks
from rewardmodel.model.packing import packing_of
from rewardmodel.model.precision import autocast
from rewardmodel.objectives import JOINT_HEAD
from rewardmodel.prompt.tokenization import tokenize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # torch's own compiler and profiler warn of much on a GPU
    pytest.mark.filterwarnings("default"),
]

DECODERS = ("llama", "mistral", "gemma2", "gemma3_text", "qwen3", "phi3")

CASES = [(family, name) for family in DECODERS for name in FAMILIES[family].attention if name != "flash_attention_2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a classifier without dropout in which nothing is zero, and its tokenizer: made("llama", "cuda")."""
    folders = {}

    def build(family, device, **settings):
        if family not in folders:
            folders[family] = make_backbone(family, tmp_path_factory.mktemp(family))
        keys = {"lora_r": 4, "lora_dropout": 0.0, "pooling": "responses", "use_liger_kernel": False, **settings}
        config = ModelConfig(str(folders[family]), device=device, **keys)
        model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                drawn = torch.empty(weight.shape).normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
                weight.data.copy_(drawn)
        return model.eval(), tokenizer

    return build


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory):
    """Return rows of a tokenizer, of both orders, all longer than the windows of these backbones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARDMODEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield lambda tokenizer, times=1: tokenize(
            read_battles(battle_frame(times)), tokenizer, PromptConfig(max_length=160), both_orders=True
        )


def learnt(model, rows, dtype=torch.bfloat16):
    """Return logits, and the gradients of what trains by name, on the CPU in float32."""
    device = next(model.parameters()).device
    names, weights = zip(*((name, one) for name, one in model.named_parameters() if one.requires_grad), strict=True)
    with autocast(device, dtype):
        logits = model(**to_device(packing_of(model)(list(rows)), device)).logits.float()
    gradients = torch.autograd.grad(logits.log_softmax(-1)[:, 0].sum(), weights)
    return [logits.detach().cpu(), *(gradient.float().cpu() for gradient in gradients)], ["logits", *names]


def assert_as_near(found, plain, expected, names):
    """Compare distances of two computations in bfloat16, lists of tensors, from that in float32.

    Gradients of these small random weights depend much on rounding: accepted ones differ by up to a third, and what
    computes something else by 1 or more.
    """
    for name, one, other, exact in zip(names, found, plain, expected, strict=True):
        distance, accepted = ((values - exact).norm() / exact.norm() for values in (one, other))
        assert distance <= 3 * accepted + 0.05, name
        assert accepted < (0.25 if name == "logits" else 0.6), name


@pytest.mark.parametrize(("family", "name"), CASES)
def test_kernels_learn_what_float32_on_a_cpu_does_up_to_the_rounding_of_plain_attention(family, name, made, rows_of):
    if name not in usable_attention(FAMILIES[family], "bfloat16", torch.cuda.get_device_capability()):
        pytest.skip(f"{name} does not run on this GPU")
    cpu, tokenizer = made(family, "cpu", dtype="float32")
    rows = rows_of(tokenizer)
    expected, names = learnt(cpu, rows, torch.float32)
    model, _ = made(family, "cuda", dtype="bfloat16")
    with attending(model, PACKED_PREFIX + "eager"):
        plain, _ = learnt(model, rows)
    with attending(model, PACKED_PREFIX + name):
        found, _ = learnt(model, rows)
    assert_as_near(found, plain, expected, names)


@pytest.mark.parametrize("family", sorted(LIGER_FAMILIES))
def test_kernels_of_liger_learn_what_float32_on_a_cpu_does(family, made, rows_of):
    pytest.importorskip("liger_kernel")
    cpu, tokenizer = made(family, "cpu", dtype="float32")
    rows = rows_of(tokenizer)
    expected, names = learnt(cpu, rows, torch.float32)
    plain, _ = learnt(made(family, "cuda", dtype="bfloat16")[0], rows)
    found, _ = learnt(made(family, "cuda", dtype="bfloat16", use_liger_kernel=True)[0], rows)
    assert_as_near(found, plain, expected, names)


PRECISIONS = [{}, {"load_in_4bit": True}]


@pytest.mark.parametrize("settings", PRECISIONS, ids=["16 bits", "4 bits"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fused_projections_learn_what_layers_alone_do(family, settings, made, rows_of, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("rewardmodel.model.loading.fuse_projections", lambda model: None)
        cpu, tokenizer = made(family, "cpu", dtype="float32", **settings)
        model, _ = made(family, "cuda", dtype="bfloat16", **settings)
    rows = rows_of(tokenizer)
    expected, names = learnt(cpu, rows, torch.float32)
    plain, _ = learnt(model, rows)
    fuse_projections(model)
    found, _ = learnt(model, rows)
    assert_as_near(found, plain, expected, names)


@pytest.mark.slow  # minutes, in torch's compiler
@pytest.mark.parametrize("settings", PRECISIONS, ids=["16 bits", "4 bits"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled_blocks_learn_the_same_and_no_length_compiles_them_again(family, settings, made, rows_of):
    cpu, tokenizer = made(family, "cpu", dtype="float32", **settings)
    model, _ = made(family, "cuda", dtype="bfloat16", **settings)
    rows = list(rows_of(tokenizer, 3))
    known, parts = (rows[:4], rows), (rows[4:9], rows[9:20])
    plain = [learnt(model, part)[0] for part in parts]
    torch.compiler.reset()
    try:
        compile_blocks(model)
        for part in known:
            learnt(model, part)
        counters.clear()
        found = [learnt(model, part)[0] for part in parts]
        assert not counters["stats"]["unique_graphs"]
    finally:
        torch.compiler.reset()
    for part, one, other in zip(parts, found, plain, strict=True):
        expected, names = learnt(cpu, part, torch.float32)
        assert_as_near(one, other, expected, names)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_predictions_are_those_of_a_cpu_whatever_the_batches(family, made, rows_of):
    cpu, tokenizer = made(family, "cpu", dtype="float32")
    rows = rows_of(tokenizer)
    expected = Predictor(cpu, tokenizer, torch.float32, 4096).logits(rows)
    for dtype, bound in (("float32", 1e-4), ("float16", 5e-3), ("bfloat16", 5e-2)):
        if (family, dtype) == ("gemma2", "float16"):
            continue  # which rewardmodel refuses
        model, _ = made(family, "cuda", dtype=dtype)
        for budget in (None, 400):
            found = Predictor(model, tokenizer, getattr(torch, dtype), budget).logits(rows)
            assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected), (dtype, budget)


def test_a_batch_arrives_as_it_was_sent():
    batch = {"ids": torch.arange(7)[None], "more": [torch.tensor([0.5, 1.5]), ({"one": torch.tensor(3)}, "text")]}
    sent = to_device(batch, torch.device("cuda", 0))
    assert sent["more"][1][1] == "text"
    for here, there in ((batch["ids"], sent["ids"]), (batch["more"][0], sent["more"][0])):
        assert there.device.type == "cuda"
        assert torch.equal(there.cpu(), here)
