import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import (
    FAMILIES,
    assert_same,
    attending,
    battle_frame,
    make_backbone,
    pack,
    parametrize_some,
    plain_logits,
    sequences,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from rewardmodel.config.schema import ModelConfig, ObjectiveConfig, PromptConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.model import attention
from rewardmodel.model.attention import KERNELS, PACKED_PREFIX
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.configuration import default_attention
from rewardmodel.model.families import FAMILIES as FAMILY_TABLE
from rewardmodel.model.loading import build_model
from rewardmodel.model.packing import is_packed, packing_of
from rewardmodel.objectives import JOINT_HEAD, OBJECTIVES, SEPARATE_HEAD
from rewardmodel.prompt.encoder import EncodedSequence
from rewardmodel.prompt.tokenization import pack_sequences, tokenize

WINDOW = 32
"""Tokens that some layers of Mistral and Gemma see; fewer than any sequence of `rows_of` has."""

KINDS = {
    "one order": ("instruction", "joint", False),
    "both orders": ("instruction", "joint", True),
    "separate": ("response", "separate", False),
}
"""Rows without shared beginnings, and two kinds with: template, encoding and `both_orders`."""

HEADS = {"joint": (JOINT_HEAD, "responses"), "separate": (SEPARATE_HEAD, "last")}
"""Head and pooling by encoding; every token of a response is read, or the last one of a sequence."""

HERE = [(family, name) for family in FAMILIES for name in FAMILY_TABLE[family].attention if name in ("sdpa", "eager")]
"""Implementations that differentiate on a CPU."""

each_family = parametrize_some("family", FAMILIES, ("llama", "gemma2", "gemma3_text"))
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Return classifiers in which nothing is zero, adapters included: build("llama", "joint")."""
    folders, built = {}, {}

    def model(family, encoding="joint", use_peft=True):
        if family not in folders:
            layers = ["sliding_attention", "full_attention"]  # two kinds, of another rotary base each
            changes = {"layer_types": layers} if family == "gemma3_text" else {}
            folders[family] = make_backbone(family, tmp_path_factory.mktemp(family), **changes)
        if (family, encoding, use_peft) not in built:
            head, pooling = HEADS[encoding]
            config = ModelConfig(
                str(folders[family]), device="cpu", dtype="float32", pooling=pooling, lora_r=4, lora_dropout=0.0,
                use_peft=use_peft,
            )  # fmt: skip
            one, _ = build_model(resolve_backbone(config), head, seed=0)
            torch.manual_seed(1)
            for name, weight in one.named_parameters():
                if "lora_B" in name or "score" in name:
                    torch.nn.init.normal_(weight, std=0.1)
            built[family, encoding, use_peft] = one.eval()
        return built[family, encoding, use_peft]

    return model


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory, tokenizer):
    """Return two rows of a kind, all of whose sequences are longer than the window."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARDMODEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        battles = read_battles(battle_frame(1)).select([1, 3])
        found = {}
        for kind, (template, encoding, both) in KINDS.items():
            prompt = PromptConfig(template, max_length=160)
            found[kind] = list(tokenize(battles, tokenizer, prompt, encoding=encoding, both_orders=both))
    return found.__getitem__


def loss_of(logits, rows):
    """Return the mean loss over battles; a joint sequence in the other order has the other outcome."""
    labels = torch.tensor([row["labels"] for row in rows])
    if logits.shape[1] == 2:
        return OBJECTIVES["davidson"].loss(logits.view(len(rows), 2, 2), labels, ObjectiveConfig()).mean()
    orders = [labels, labels[:, [1, 0, 2]]][: len(logits) // len(rows)]
    return F.cross_entropy(logits, torch.stack(orders, dim=1).flatten(0, 1))


def learnt(model, logits, rows):
    """Return loss and gradients, by name, of logits."""
    loss = loss_of(logits, rows)
    names, weights = zip(*((name, one) for name, one in model.named_parameters() if one.requires_grad), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def by_plain(model, rows):
    """Return logits, loss and gradients by transformers' own attention to each sequence alone."""
    logits = plain_logits(model, rows)
    return logits.detach(), *learnt(model, logits, rows)


@pytest.fixture(scope="module")
def alone(build, rows_of):
    """Return model, rows and `by_plain` of a family and a kind of rows; that is computed once."""
    known = {}

    def found(family, kind):
        model, rows = build(family, KINDS[kind][1]), rows_of(kind)
        if (family, kind) not in known:
            known[family, kind] = by_plain(model, rows)
        return model, rows, known[family, kind]

    return found


def assert_learns_as_plain(name, model, rows, expected=None):
    """Compare logits, loss, and the gradients of all weights that train, none of which is zero."""
    with attending(model, PACKED_PREFIX + name):
        found = model(**packing_of(model)(rows)).logits
        loss, gradients = learnt(model, found, rows)
    plain, plain_loss, plain_gradients = expected or by_plain(model, rows)
    assert plain.std() > 0.01
    assert_same(found, plain)
    assert_same(loss, plain_loss)
    for weight, gradient in plain_gradients.items():
        assert gradient.any(), weight
        assert_same(gradients[weight], gradient)


def row_of(sequences):
    """Return the row of sequences, lists of tokens, that are in neither response, in A and in B by turns."""
    merged = pack_sequences(
        [
            EncodedSequence(np.array(ids), np.resize(np.int8([0, 1, 2]), len(ids)), (len(ids),), (len(ids),))
            for ids in sequences
        ]
    )
    return {
        "input_ids": merged.input_ids.tolist(),
        "segment_ids": merged.segment_ids.tolist(),
        "branches": merged.branches,
        "length": len(merged.input_ids),
        "labels": [0.2, 0.5, 0.3],
    }


def drawn(count, seed=0):
    return np.random.default_rng(seed).integers(3, 250, count).tolist()


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_known_to_transformers_next_to_its_plain_form(name):
    assert PACKED_PREFIX + name not in KERNELS
    assert AttentionInterface()[PACKED_PREFIX + name].func is attention._attention


@each_kind
def test_rows_of_this_file_are_longer_than_the_window_and_share_what_they_should(kind, rows_of):
    for row in rows_of(kind):
        shared, *branches = row["branches"]
        assert min(shared + branch for branch in branches) > WINDOW
        assert (shared > 0) == (len(branches) == 2) == (kind != "one order")


@each_kind
@pytest.mark.parametrize(("family", "name"), HERE)
def test_a_packed_row_learns_what_each_sequence_alone_would(family, name, kind, alone):
    assert_learns_as_plain(name, *alone(family, kind))


@each_family
def test_a_full_fine_tune_on_a_packed_row_learns_what_each_sequence_alone_would(family, build, rows_of):
    model = build(family, use_peft=False)
    assert all(weight.requires_grad for weight in model.parameters())
    assert_learns_as_plain(default_attention(FAMILY_TABLE[family], "float32", None), model, rows_of("both orders"))


@pytest.mark.parametrize(("family", "name"), HERE)
def test_sequences_about_as_long_as_the_window_are_attended_to_as_alone(family, name, build):
    rows = [row_of([drawn(length, length)]) for length in (3, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW)]
    assert_learns_as_plain(name, build(family), rows)
    shared = drawn(WINDOW - 3)
    shared_rows = [row_of([shared + drawn(3, 1), shared + drawn(4, 2)]), row_of([[*shared, 9], [*shared[:5], 7]])]
    assert [row["branches"] for row in shared_rows] == [[WINDOW - 3, 3, 4], [5, WINDOW - 7, 1]]
    assert_learns_as_plain(name, build(family), shared_rows)


@pytest.mark.parametrize(("family", "name"), HERE)
def test_a_branch_may_be_one_token(family, name, build):
    begin, end = drawn(40), drawn(9, 1)
    pairs = [(begin + end[:1], begin + end[1:2]), (begin, begin), (begin, begin + end), (begin[:1], [7, *end])]
    rows = [row_of([list(one), list(other)]) for one, other in pairs]
    assert [row["branches"] for row in rows] == [[40, 1, 1], [39, 1, 1], [39, 1, 10], [0, 1, 10]]
    assert_learns_as_plain(name, build(family, "separate"), rows)


def uncompiled():
    """Let flex_attention run as plain operations in the block, as it can on any device."""
    return torch.compiler.set_stance("force_eager")


def no_compiler(test):
    """Let flex_attention say that it is not compiled, and torch's compiler say what it does when it is imported."""
    for said in ("flex_attention called without torch.compile:UserWarning", "`torch.jit.script_method` is deprecated"):
        test = pytest.mark.filterwarnings(f"ignore:{said}")(test)
    return test


@no_compiler
@each_kind
@each_family
def test_flex_attention_states_what_each_sequence_alone_would(family, kind, alone):
    model, rows, (expected, *_) = alone(family, kind)
    with torch.no_grad(), uncompiled(), attending(model, PACKED_PREFIX + "flex_attention"):
        found = model(**packing_of(model)(rows)).logits
    assert_same(found, expected)


def attend_by_hand(query, key, value, query_ends, key_ends, scale, window, softcap=None):
    """Return what a variable-length kernel computes: queries (n_queries, heads, width), aligned with the last keys."""
    key, value = (state.repeat_interleave(query.shape[1] // state.shape[1], dim=1) for state in (key, value))
    outputs = []
    for (first, last), (begin, end) in zip(*map(itertools.pairwise, (query_ends, key_ends)), strict=True):
        q, k, v = query[first:last], key[begin:end], value[begin:end]
        scores = torch.einsum("qhw,khw->hqk", q, k) * scale
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        distance = torch.arange(end - begin - (last - first), end - begin)[:, None] - torch.arange(end - begin)
        seen = (distance >= 0) & (distance < (window or torch.inf))
        outputs.append(torch.einsum("hqk,khw->qhw", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), v))
    return torch.cat(outputs)


def flash_by_hand(calls):
    """Return what stands in for transformers' flash attention, and keeps its arguments in `calls`."""

    def forward(query, key, value, attention_mask, query_length, is_causal, dropout=0.0, softmax_scale=None,
                sliding_window=None, softcap=None, attn_implementation=None, **kwargs):  # fmt: skip
        calls.append({"window": sliding_window, "softcap": softcap, **kwargs})
        assert attention_mask is None
        assert is_causal
        assert dropout == 0
        assert attn_implementation == "flash_attention_2"
        assert query.shape[:2] == (1, query_length)
        ends = [kwargs[f"cu_seq_lens_{of}"].tolist() for of in "qk"]
        return attend_by_hand(query[0], key[0], value[0], *ends, softmax_scale, sliding_window, softcap)[None]

    return forward


def varlen_by_hand(calls):
    """Return what stands in for torch's `varlen_attn`, and keeps its arguments in `calls`."""

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=None):
        assert window_size[1] == 0
        window = None if window_size[0] < 0 else window_size[0] + 1
        told = "enable_gqa" in attention._PARAMETERS  # since torch 2.13
        assert enable_gqa == (query.shape[1] != key.shape[1] if told else None)
        calls.append({"window": window, "softcap": None, "cu_seq_lens_q": cu_seq_q, "cu_seq_lens_k": cu_seq_k,
                      "max_length_q": max_q, "max_length_k": max_k})  # fmt: skip
        return attend_by_hand(query, key, value, cu_seq_q.tolist(), cu_seq_k.tolist(), scale, window)

    return attend


VARIABLE = {"flash_attention_2": ("_flash_attention_forward", flash_by_hand), "varlen": ("varlen_attn", varlen_by_hand)}
"""Kernels that only GPUs have: the function that they call, and what stands in for it."""


@each_kind
@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in FAMILIES for name in VARIABLE if name in FAMILY_TABLE[family].attention],
)
def test_kernels_of_variable_length_are_called_once_a_layer_with_all_sequences(family, name, kind, alone, monkeypatch):
    calls, (function, by_hand) = [], VARIABLE[name]
    monkeypatch.setattr(attention, function, by_hand(calls))
    model, rows, expected = alone(family, kind)
    assert_learns_as_plain(name, model, rows, expected)
    windows = {
        "mistral": [WINDOW, WINDOW],
        "phi3": [WINDOW, WINDOW],
        "gemma2": [WINDOW, None],
        "gemma3_text": [WINDOW, None],
    }
    assert [call["window"] for call in calls] == windows.get(family, [None, None])
    assert [call["softcap"] for call in calls] == [50.0 if family == "gemma2" else None] * 2
    for of in "qk":
        assert calls[0][f"cu_seq_lens_{of}"] is calls[1][f"cu_seq_lens_{of}"]
        ends = calls[0][f"cu_seq_lens_{of}"]
        assert ends.dtype == torch.int32
        assert calls[0][f"max_length_{of}"] == ends.diff().max()
    assert calls[0]["cu_seq_lens_q"][-1] == sum(row["length"] for row in rows)  # no token is computed twice
    lengths = [len(ids) for row in rows for ids in sequences(row)]
    assert {*lengths} <= {*calls[0]["cu_seq_lens_k"].diff().tolist()}


@pytest.mark.parametrize("name", ["varlen", "flex_attention"])
@no_compiler
def test_kernels_get_one_dtype_under_autocast_where_all_weights_train_in_float32(name, build, rows_of, monkeypatch):
    dtypes = []

    def attend(query, key, value, *_, **__):
        dtypes.extend([query.dtype, key.dtype, value.dtype])
        return query.clone()

    monkeypatch.setattr(attention, "varlen_attn", attend)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: attend)
    model = build("llama", use_peft=False)
    with attending(model, PACKED_PREFIX + name), torch.autocast("cpu", torch.bfloat16):
        model(**packing_of(model)(rows_of("both orders")))
    assert dtypes == [torch.bfloat16] * 2 * 3


def test_a_kernel_is_told_of_grouped_queries_only_if_it_takes_the_argument(alone, monkeypatch):
    def attend(query, key, value, *args, scale, window_size):
        assert query.shape[1] == 2 * key.shape[1] == 2 * value.shape[1]
        return varlen_by_hand([])(query, key, value, *args, scale=scale, window_size=window_size)

    monkeypatch.setattr(attention, "varlen_attn", attend)
    monkeypatch.setattr(attention, "_PARAMETERS", {})
    assert_learns_as_plain("varlen", *alone("llama", "both orders"))


def rows_of_lengths(lengths):
    """Return rows of pairs of sequences that share a third of the shorter one."""
    return [
        row_of([drawn(length // 3) + drawn(length, 1), drawn(length // 3) + drawn(length + 5, 2)]) for length in lengths
    ]


class Operations(TorchDispatchMode):
    """Counts dispatched operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@no_compiler
@pytest.mark.parametrize(("family", "name"), [("llama", "varlen"), ("mistral", "varlen"), ("llama", "sdpa"),
    ("gemma3_text", "sdpa"), ("gemma2", "eager"), ("gemma2", "flex_attention")])  # fmt: skip
def test_more_sequences_and_lengths_take_no_more_operations(family, name, build, monkeypatch):
    def attend(query, *_, **__):
        return query.clone()

    monkeypatch.setattr(attention, "varlen_attn", attend)
    monkeypatch.setattr(attention, "flex_attention", lambda query, *_, **__: query.clone())
    monkeypatch.setattr(attention, "_compiled_flex", lambda: attention.flex_attention)
    model, counts = build(family), []
    for rows in (rows_of_lengths([12, 20, 30, 41]), rows_of_lengths(range(10, 42, 2))):
        with attending(model, PACKED_PREFIX + name):
            batch = packing_of(model)(rows)
            with Operations() as operations:
                model(**batch).logits.sum().backward()
        counts.append(operations.count)
        model.zero_grad()
    assert counts[1] <= 1.1 * counts[0]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")
@each_family
def test_gradient_checkpointing_changes_no_gradient(family, build, rows_of, monkeypatch):
    model, rows, calls = build(family), rows_of("both orders"), []
    assert is_packed(model)
    _, expected = learnt(model, model(**pack(rows)).logits, rows)
    attend = attention._padded
    monkeypatch.setattr(attention, "_padded", lambda *args: calls.append(args) or attend(*args))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    try:
        _, found = learnt(model, model(**pack(rows)).logits, rows)
    finally:
        model.eval()
        model.gradient_checkpointing_disable()
    assert len(calls) == 2 * 2  # forward and again backward, in two layers
    for name, gradient in expected.items():
        assert_same(found[name], gradient)


EVERYWHERE = [*HERE, ("llama", "flex_attention"), ("gemma2", "flex_attention")]


@no_compiler
@pytest.mark.parametrize(("family", "name"), EVERYWHERE)
def test_tokens_of_other_battles_and_branches_change_nothing(family, name, build, rows_of):
    model, rows = build(family), rows_of("both orders")
    shared, first, _ = rows[0]["branches"]

    def logits(row=0, place=0, token=None):
        changed = [dict(one) for one in rows]
        if token is not None:
            changed[row]["input_ids"] = [*rows[row]["input_ids"]]
            assert changed[row]["input_ids"][place] != token
            changed[row]["input_ids"][place] = token
        return model(**packing_of(model)(changed)).logits

    with torch.no_grad(), uncompiled(), attending(model, PACKED_PREFIX + name):
        before = logits()
        same = {
            "shared": logits(0, shared - 1, 2) == before,
            "first branch": logits(0, shared + 20, 2) == before,
            "second branch": logits(0, shared + first + 20, 2) == before,
            "the other battle": logits(1, 0, 2) == before,
        }
    assert {name: one.all(dim=1).tolist() for name, one in same.items()} == {
        "shared": [False, False, True, True],
        "first branch": [False, True, True, True],
        "second branch": [True, False, True, True],
        "the other battle": [True, True, False, False],
    }
