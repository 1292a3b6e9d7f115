import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from builders import assert_same, config_of, logits, rows_of
from transformers.models.llama import modeling_llama

from rewardmodel.config.schema import ModelConfig
from rewardmodel.distributed import Launch
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.configuration import Configuration
from rewardmodel.model.liger import use_liger
from rewardmodel.model.loading import load_classifier
from rewardmodel.model.packing import packing_of
from rewardmodel.objectives import JOINT_HEAD


@pytest.fixture
def liger(monkeypatch):
    """Install what stands in for liger-kernel, which needs a GPU; return the decoders that it was given."""
    given = []

    def apply(model, cross_entropy=False, fused_linear_cross_entropy=True):
        assert not cross_entropy
        assert not fused_linear_cross_entropy  # would replace the forward pass
        given.append(model)
        modeling_llama.apply_rotary_pos_emb = lambda q, k, *_: ("fused", k)
        modeling_llama.LlamaRMSNorm = "replaced for all models"
        model.norm.forward = torch.zeros_like

    package = ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    return given


def test_only_this_decoder_and_rotations_on_gpus_change(backbone, tokenizer, liger):
    plain, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm
    one, other = (load_classifier(resolve_backbone(config_of(backbone("llama"))), JOINT_HEAD) for _ in range(2))
    for model in (one, other):
        torch.nn.init.ones_(model.score.weight)
    batch = packing_of(one)(rows_of(tokenizer, 2))
    before = logits(other, batch)
    for _ in range(2):
        use_liger(one)
    assert liger == [one.model, one.model]
    assert modeling_llama.LlamaRMSNorm is norm
    assert modeling_llama.apply_rotary_pos_emb(SimpleNamespace(is_cuda=True), "key") == ("fused", "key")
    assert modeling_llama.apply_rotary_pos_emb.without_liger is plain
    assert_same(logits(other, batch), before)
    assert not logits(one, batch).any()
    load_classifier(resolve_backbone(config_of(backbone("llama"))), JOINT_HEAD)
    assert modeling_llama.apply_rotary_pos_emb is plain


def configured(monkeypatch, installed=True, **changes):
    """Return a configuration of an H100 with these changes."""
    monkeypatch.setattr(Configuration, "lacks", lambda self, *packages: not installed)
    monkeypatch.setattr(Configuration, "lacks_compiler", False)
    settings = {"model": ModelConfig(), "model_type": "llama", "layers": 2, "device": "cuda", "dtype": "bfloat16",
                "capability": (9, 0), "trainer": None, **changes}  # fmt: skip
    return Configuration(**settings)


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, True),
        ({"trainer": {}}, True),
        ({"capability": (8, 0)}, True),
        ({"capability": (7, 5)}, False),
        ({"capability": None, "device": "cpu"}, False),
        ({"installed": False}, False),
        ({"model_type": "olmo2"}, False),
        ({"activation": "relu"}, False),
        ({"model_type": "gemma2", "activation": "gelu_pytorch_tanh"}, True),
        ({"trainer": {"torch_compile": True}}, False),
        ({"launch": Launch(2, "fsdp", 2)}, False),
        ({"model": ModelConfig(use_peft=False)}, False),
        ({"model": ModelConfig(use_liger_kernel=False)}, False),
        ({"model": ModelConfig(use_liger_kernel=True), "capability": (7, 5)}, True),
    ],
)
def test_liger_is_used_where_it_can_be_and_nothing_else_generates_kernels(changes, used, monkeypatch):
    assert bool(configured(monkeypatch, **changes).liger) == used


def test_a_missing_package_is_told_apart_from_what_it_could_not_compute(monkeypatch):
    assert configured(monkeypatch, installed=False).misses_liger
    assert not configured(monkeypatch).misses_liger
    assert not configured(monkeypatch, installed=False, capability=(7, 5)).misses_liger
    assert not configured(monkeypatch, installed=False, model=ModelConfig(use_liger_kernel=False)).misses_liger
