import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import FAMILIES, assert_same, attending, battle_frame, make_backbone, plain_logits, sequences
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from rewardmodel.config.schema import ModelConfig, ObjectiveConfig, PromptConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.model import attention
from rewardmodel.model.attention import KERNELS, Packing, packed_name
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.batching import pack
from rewardmodel.model.families import FAMILIES as FAMILY_TABLE
from rewardmodel.model.loading import build_model
from rewardmodel.model.packing import is_packed
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

each_family = pytest.mark.parametrize("family", FAMILIES)
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
    with attending(model, packed_name(name)):
        found = model(**pack(rows)).logits
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


layouts = st.lists(
    st.tuples(st.integers(0, 4), st.lists(st.integers(1, 4), min_size=1, max_size=3)).map(
        lambda drawn: [drawn[0], *drawn[1]]
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=50)
@given(layouts)
def test_a_row_is_made_of_its_sequences_again(layout):
    packing = Packing(layout)
    total = sum(map(sum, layout))
    states = torch.arange(total * 6.0).view(total, 2, 3).transpose(0, 1)[None]  # (1, heads, T, width)
    found = packing.split(states)
    assert [one.shape[2] for one in found] == packing.lengths
    assert torch.equal(packing.join([one.transpose(1, 2) for one in found]), states.transpose(1, 2))


@settings(deadline=None, max_examples=50)
@given(layouts)
def test_a_sequence_is_the_shared_beginning_and_its_branch(layout):
    begin, expected = 0, []
    for shared, *branches in layout:
        places = list(range(begin, begin + sum(branches) + shared))
        rest = places[shared:]
        for branch in branches:
            expected.append([*places[:shared], *rest[:branch]])
            rest = rest[branch:]
        begin += len(places)
    states = torch.arange(float(begin)).view(1, 1, begin, 1)
    assert [one.flatten().tolist() for one in Packing(layout).split(states)] == expected


def test_the_outputs_of_a_shared_beginning_are_those_of_the_first_sequence():
    first, second = torch.full((1, 3, 1, 1), 1.0), torch.full((1, 4, 1, 1), 2.0)
    assert Packing([[2, 1, 2]]).join([first, second]).flatten().tolist() == [1, 1, 1, 2, 2]


def test_a_mask_is_made_once_for_its_key():
    packing, made = Packing([[0, 3]]), []
    for key in ("narrow", "wide", "narrow", None, "wide", None):
        assert packing.mask(key, lambda key=key: made.append(key) or f"mask {key}") == f"mask {key}"
    assert made == ["narrow", "wide", None]


def test_every_kernel_is_known_to_transformers_beside_its_plain_form():
    names = [packed_name(name) for name in KERNELS]
    assert len({*names, *KERNELS}) == 2 * len(KERNELS)
    for name in names:
        assert AttentionInterface()[name].func is attention._attention


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
    assert_learns_as_plain(FAMILY_TABLE[family].attention[0], model, rows_of("both orders"))


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
    with torch.no_grad(), uncompiled(), attending(model, packed_name("flex_attention")):
        found = model(**pack(rows)).logits
    assert_same(found, expected)


def flash_by_hand(calls):
    """Return what stands in for flash attention: the same formula by torch, and the arguments kept in `calls`."""

    def forward(
        query, key, value, attention_mask, query_length, is_causal, dropout=0.0, softmax_scale=None,
        sliding_window=None, softcap=None, cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None,
        max_length_k=None, attn_implementation=None, **_,
    ):  # fmt: skip
        calls.append({"window": sliding_window, "softcap": softcap, "ends": cu_seq_lens_q})
        ends = cu_seq_lens_q.tolist()
        lengths = [end - begin for begin, end in itertools.pairwise(ends)]
        assert attention_mask is None
        assert is_causal
        assert dropout == 0
        assert attn_implementation == "flash_attention_2"
        assert cu_seq_lens_q is cu_seq_lens_k
        assert cu_seq_lens_q.dtype == torch.int32
        assert [ends[0], ends[-1]] == [0, query_length]
        assert query.shape[:2] == key.shape[:2] == value.shape[:2] == (1, query_length)
        assert [max_length_q, max_length_k] == [max(lengths)] * 2
        heads, width = query.shape[2:]
        key, value = (state.repeat_interleave(heads // state.shape[2], dim=2) for state in (key, value))
        outputs = []
        for begin, end in itertools.pairwise(ends):
            q, k, v = (state[0, begin:end].transpose(0, 1) for state in (query, key, value))
            scores = q @ k.transpose(1, 2) * (width**-0.5 if softmax_scale is None else softmax_scale)
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            seen = torch.ones(end - begin, end - begin).tril()
            if sliding_window is not None:
                seen = seen.triu(1 - sliding_window)
            outputs.append((scores.masked_fill(seen == 0, -torch.inf).softmax(dim=-1) @ v).transpose(0, 1))
        return torch.cat(outputs)[None]

    return forward


@each_kind
@each_family
def test_flash_attention_is_called_with_the_sequences_of_a_row(family, kind, alone, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "_flash_attention_forward", flash_by_hand(calls))
    model, rows, expected = alone(family, kind)
    assert_learns_as_plain("flash_attention_2", model, rows, expected)
    windows = {
        "mistral": [WINDOW, WINDOW],
        "phi3": [WINDOW, WINDOW],
        "gemma2": [WINDOW, None],
        "gemma3_text": [WINDOW, None],
    }
    assert [call["window"] for call in calls] == windows.get(family, [None, None])
    assert [call["softcap"] for call in calls] == [50.0 if family == "gemma2" else None] * 2
    assert calls[0]["ends"] is calls[1]["ends"]
    lengths = [len(ids) for row in rows for ids in sequences(row)]
    assert calls[0]["ends"].tolist() == [0, *itertools.accumulate(lengths)]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")
@each_family
def test_gradient_checkpointing_changes_no_gradient(family, build, rows_of, monkeypatch):
    model, rows, calls = build(family), rows_of("both orders"), []
    assert is_packed(model)
    _, expected = learnt(model, model(**pack(rows)).logits, rows)
    whole = Packing.split
    monkeypatch.setattr(Packing, "split", lambda self, states: calls.append(self) or whole(self, states))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    try:
        _, found = learnt(model, model(**pack(rows)).logits, rows)
    finally:
        model.eval()
        model.gradient_checkpointing_disable()
    assert len(calls) == 2 * 2 * 3  # forward and again backward, in two layers: queries, keys and values
    assert len(set(calls)) == 1
    for name, gradient in expected.items():
        assert_same(found[name], gradient)


@no_compiler
@pytest.mark.parametrize(
    ("family", "name", "masks"),
    [
        ("llama", "sdpa", 0),
        ("llama", "eager", 1),
        ("llama", "flex_attention", 1),
        ("mistral", "sdpa", 1),
        ("mistral", "eager", 1),
        ("mistral", "flex_attention", 1),
        ("phi3", "sdpa", 1),
        ("phi3", "eager", 1),
        ("gemma2", "eager", 2),
        ("gemma3_text", "sdpa", 1),
        ("gemma3_text", "eager", 2),
    ],
)
def test_masks_are_made_once_a_row_for_all_layers(family, name, masks, build, rows_of, monkeypatch):
    made = []
    for function in ("_causal_mask", "create_block_mask"):
        original = getattr(attention, function)
        monkeypatch.setattr(
            attention, function, lambda *args, make=original, **kwargs: made.append(args) or make(*args, **kwargs)
        )
    model, batch = build(family), pack(rows_of("both orders")[1:])
    with torch.no_grad(), uncompiled(), attending(model, packed_name(name)):
        model(**batch)
        assert len(made) == masks
        model(**batch)
        assert len(made) == 2 * masks


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
        return model(**pack(changed)).logits

    with torch.no_grad(), uncompiled(), attending(model, packed_name(name)):
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
