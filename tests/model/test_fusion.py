import pytest
import torch
from builders import ENCODERS, FAMILIES, assert_same, config_of, make_backbone, parametrize_some, rows_of
from torch.utils._python_dispatch import TorchDispatchMode

from rewardmodel.model import loading
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.forward import choose_batching
from rewardmodel.model.fusion import fuse_projections, join_layers, separate_projections
from rewardmodel.model.loading import build_model
from rewardmodel.model.precision import autocast
from rewardmodel.objectives import JOINT_HEAD

SETTINGS = {
    "plain": {},
    "4 bits": {"load_in_4bit": True, "use_bnb_nested_quant": False},
    "nested 4 bits": {"load_in_4bit": True},
    "8 bits": {"load_in_8bit": True},
    "fp8": {"load_in_fp8": True},
    "some layers": {"lora_first_layer": 1, "lora_target_modules": ["q_proj", "v_proj", "down_proj"]},
    "head only": {"freeze_backbone": True},
}


class Operations(TorchDispatchMode):
    """Counts operations that compute or move something: all but views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.fixture
def apart(backbone, monkeypatch):
    """Return a model whose layers compute one by one, in which nothing is zero, and a batch: apart("llama", ...)."""
    monkeypatch.setattr(loading, "fuse_projections", lambda model: None)

    def build(family, **settings):
        config = config_of(backbone(family), **{"lora_dropout": 0.0, **settings})
        model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        return model.eval(), choose_batching(model, tokenizer.pad_token_id).collate(rows_of(tokenizer, 2))

    return build


@pytest.mark.slow  # seconds in torch's compiler
@pytest.mark.filterwarnings("ignore")  # of it about itself
def test_two_graphs_serve_all_compiled_blocks_and_learn_the_same(tmp_path):
    config = config_of(make_backbone("llama", tmp_path, num_hidden_layers=5), lora_dropout=0.0)
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(weight.numel()))
    batch = choose_batching(model, tokenizer.pad_token_id).collate(rows_of(tokenizer, 2))
    names, weights = zip(*((name, one) for name, one in model.named_parameters() if one.requires_grad), strict=True)

    def learn():  # not `learnt`: torch compiles nothing while operations are counted
        logits = model(**batch).logits
        return logits.detach(), torch.autograd.grad(logits.log_softmax(-1)[:, 0].sum(), weights)

    separate_projections(model)
    logits, gradients = learn()
    fuse_projections(model)
    graphs = []
    torch.compiler.reset()
    try:
        loading.compile_blocks(model, backend=lambda graph, _: graphs.append(graph) or graph)
        found, compiled = learn()
    finally:
        torch.compiler.reset()
    assert len(graphs) == 2  # the first block's input needs no gradient
    assert_same(found, logits)
    for name, gradient, other in zip(names, gradients, compiled, strict=True):
        assert gradient.any(), name
        assert_same(other, gradient)


def learnt(model, batch, dtype=torch.float32):
    """Return logits, gradients by name, and the number of operations."""
    names, weights = zip(*((name, one) for name, one in model.named_parameters() if one.requires_grad), strict=True)
    with Operations() as operations:
        with autocast(torch.device("cpu"), dtype):
            logits = model(**batch).logits.float()
        gradients = torch.autograd.grad(logits.log_softmax(-1)[:, 0].sum(), weights)
    return logits.detach(), dict(zip(names, gradients, strict=True)), operations.count


@parametrize_some(
    ("family", "kind"),
    [(family, "plain") for family in (*FAMILIES, *ENCODERS)]
    + [("llama", kind) for kind in SETTINGS if kind != "plain"],
    quick=[("llama", "plain"), ("qwen2", "plain"), ("llama", "nested 4 bits"), ("llama", "some layers")],
)
def test_layers_learn_together_what_they_learn_apart(family, kind, apart):
    model, batch = apart(family, **SETTINGS[kind])
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    logits, gradients, count = learnt(model, batch)
    fuse_projections(model)
    found, found_gradients, fewer = learnt(model, batch)
    tolerance = 0.01 if kind == "fp8" else 1e-5  # where inputs differ by a rounding, one is rounded to another number
    assert (found - logits).abs().max() <= tolerance * logits.abs().max()
    for name, gradient in gradients.items():
        assert (found_gradients[name] - gradient).abs().max() <= 10 * tolerance * gradient.abs().max(), name
    assert fewer < count if family in FAMILIES else fewer == count
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_layer_takes_fewer_operations(apart):
    model, batch = apart("llama", lora_dropout=0.05)
    counts = []
    for _ in range(2):
        counts.append(learnt(model.train(), batch, torch.bfloat16)[2])
        fuse_projections(model)
    assert counts[1] <= 0.75 * counts[0]


def test_layers_keep_nothing_after_a_pass_and_no_memory_of_their_own(apart):
    model, batch = apart("llama")
    fuse_projections(model)
    learnt(model, batch)
    attention = model.get_base_model().model.layers[0].self_attn
    group = attention.q_proj.forward.func.__self__
    assert group.inputs is None
    assert group.outputs == [None] * 3
    storages = {one.base_layer.weight.untyped_storage().data_ptr() for one in group.layers}
    assert storages == {group.joined.weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize("off", ["disabled", "merged", "dropped"])
def test_adapters_that_are_off_change_nothing(off, apart):
    model, _ = apart("llama", lora_dropout=1 - 1e-7 if off == "dropped" else 0.0)
    attention = model.get_base_model().model.layers[0].self_attn
    layers, inputs = [attention.q_proj, attention.k_proj, attention.v_proj], torch.randn(1, 5, 64)
    plain = [layer.base_layer(inputs) for layer in layers]
    fuse_projections(model)
    if off == "disabled":
        model.base_model.disable_adapter_layers()
    elif off == "merged":
        for layer in layers:
            layer.merge()
        plain = [layer.base_layer(inputs) for layer in layers]
    model.train(off == "dropped")
    for layer, expected in zip(layers, plain, strict=True):
        assert_same(layer(inputs), expected)


def test_layers_with_other_adapters_than_lora_stay_as_they_are(apart):
    model, _ = apart("llama", use_dora=True)
    fuse_projections(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "layers",
    [
        [torch.nn.Linear(4, 4), torch.nn.Linear(4, 2, bias=False)],
        [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).bfloat16()],
        [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, device="meta")],
        [torch.nn.Bilinear(4, 4, 4)] * 2,
    ],
)
def test_layers_that_are_unlike_are_not_joined(layers):
    assert join_layers(layers) is None
