from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import battle_frame, pack
from datasets import Dataset

from rewardmodel.config.schema import ModelConfig, PromptConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.model import forward
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.batching import pad, padded_tokens, plan_packed, plan_padded
from rewardmodel.model.budget import CPU_TOKENS
from rewardmodel.model.forward import Batching, Predictor, choose_batching
from rewardmodel.model.loading import build_model
from rewardmodel.objectives import JOINT_HEAD, SEPARATE_HEAD
from rewardmodel.prompt.tokenization import MODEL_COLUMNS, TOKEN_ROW_FEATURES, tokenize

PAD = 0
FLOAT = torch.float32
ENCODINGS = {
    "joint": (JOINT_HEAD, "instruction", False),
    "both orders": (JOINT_HEAD, "instruction", True),
    "separate": (SEPARATE_HEAD, "response", False),
}

each_encoding = pytest.mark.parametrize("kind", ENCODINGS)
each_way = pytest.mark.parametrize("way", ["packed", "padded"])


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory, tokenizer):
    """Return the rows of eight battles of different lengths, by kind of encoding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARDMODEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        battles = read_battles(battle_frame(2))
        found = {}
        for kind, (head, template, both) in ENCODINGS.items():
            encoding = "separate" if head is SEPARATE_HEAD else "joint"
            prompt = PromptConfig(template, max_length=160)
            found[kind] = tokenize(battles, tokenizer, prompt, encoding=encoding, both_orders=both)
    assert len({row["length"] for row in found["joint"]}) > 4
    return found.__getitem__


@pytest.fixture(scope="module")
def model_of(backbone):
    """Return a classifier whose logits are far from even, by kind of encoding and way of its batches."""
    made = {}

    def model(kind, way="packed"):
        head, *_ = ENCODINGS[kind]
        if head not in made:
            config = ModelConfig(str(backbone("mistral")), device="cpu", dtype="float32", pooling="responses", lora_r=4)
            made[head], _ = build_model(resolve_backbone(config), head, seed=0)
            torch.manual_seed(1)
            for name, weight in made[head].named_parameters():
                if "lora_B" in name or "score" in name:
                    torch.nn.init.normal_(weight, std=0.1)
        made[head].config._attn_implementation = {"packed": "packed_sdpa", "padded": "sdpa"}[way]
        return made[head].eval()

    return model


def predictor_of(model, budget=None, dtype=FLOAT, pad_token_id=PAD):
    return Predictor(model, SimpleNamespace(pad_token_id=pad_token_id), dtype, budget)


def each_alone(model, rows):
    with torch.no_grad():
        return np.stack([model(**pack([row])).logits.numpy() for row in rows])


def assert_close(found, expected):
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5


@each_way
@each_encoding
@pytest.mark.parametrize("budget", [1, 400, 100_000])
def test_logits_are_those_of_each_row_alone_whatever_the_budget(budget, kind, way, model_of, rows_of):
    rows = rows_of(kind)
    expected = each_alone(model_of(kind), rows)
    assert expected.shape == (8, 1 if kind == "joint" else 2, 2 if kind == "separate" else 3)
    assert expected[..., 0].std() > 0.01
    assert_close(predictor_of(model_of(kind, way), budget).logits(rows), expected)


@each_way
def test_logits_follow_the_order_of_rows(way, model_of, rows_of):
    model, rows = model_of("both orders", way), rows_of("both orders")
    order = np.random.default_rng(0).permutation(len(rows))
    expected = predictor_of(model, 400).logits(rows)
    assert_close(predictor_of(model, 400).logits(rows.select(order)), expected[order])


def test_the_padding_id_does_not_matter(model_of, rows_of):
    model, rows = model_of("joint", "padded"), rows_of("joint")
    assert_close(*(predictor_of(model, 1000, pad_token_id=token).logits(rows) for token in (PAD, 5)))


@each_way
def test_batches_keep_the_budget_and_the_longest_rows_come_first(way, model_of, rows_of):
    model, rows = model_of("both orders", way), rows_of("both orders")
    budget, shapes = 900 if way == "padded" else 500, []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    predictor_of(model, budget).logits(rows)
    handle.remove()
    assert 1 < len(shapes) < len(rows)
    assert max(shape.numel() for shape in shapes) <= budget
    lengths = [length for _, length in shapes]
    assert lengths == sorted(lengths, reverse=True)
    if way == "packed":
        assert sum(lengths) == sum(rows["length"])


def test_a_packed_model_is_not_padded_and_another_is(model_of, rows_of):
    rows = list(rows_of("both orders"))[:2]
    how = choose_batching(model_of("both orders"), PAD)
    assert set(how.collate(rows)) == set(pack(rows))
    assert how.plan is plan_packed
    assert [how.tokens(row) for row in rows] == [row["length"] for row in rows]
    how = choose_batching(model_of("both orders", "padded"), 7)
    assert how.plan is plan_padded
    assert [how.tokens(row) for row in rows] == [padded_tokens(row) for row in rows]
    found, expected = how.collate(rows), pad(rows, 7)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (found["input_ids"] == 7).any()


@each_way
def test_nan_stays_nan_and_in_its_battle(way, model_of, rows_of):
    model, rows = model_of("separate", way), rows_of("separate")
    expected = predictor_of(model, 600).logits(rows)
    rows = Dataset.from_list(list(rows), features=TOKEN_ROW_FEATURES)
    marked = [dict(row) for row in rows]
    marked[1]["input_ids"] = [*rows[1]["input_ids"]]
    marked[1]["input_ids"][np.flatnonzero(rows[1]["segment_ids"])[-1]] = 255  # in response B alone
    assert not any(255 in row["input_ids"] for row in rows)
    embedding = model.get_input_embeddings().weight
    before = embedding[255].clone()
    with torch.no_grad():
        embedding[255] = torch.nan
        try:
            found = predictor_of(model, 600).logits(Dataset.from_list(marked, features=TOKEN_ROW_FEATURES))
        finally:
            embedding[255] = before
    assert np.argwhere(np.isnan(found[..., 0])).tolist() == [[1, 1]]
    known = ~np.isnan(found)
    assert np.abs(found[known] - expected[known]).max() <= 1e-5


@each_way
@pytest.mark.parametrize("processes", [2, 3, 11])
def test_processes_share_the_rows_and_compute_as_many_batches(processes, way, model_of, rows_of, monkeypatch):
    model, rows = model_of("both orders", way), rows_of("both orders")
    expected = predictor_of(model, 500).logits(rows)
    monkeypatch.setattr(forward, "reduce", lambda tensor, *_: tensor)  # what all have is their sum
    parts, batches = [], []
    handle = model.register_forward_pre_hook(lambda *_: batches.append(len(parts)))
    for number in range(processes):
        state = SimpleNamespace(num_processes=processes, process_index=number)
        monkeypatch.setattr(forward, "process_state", lambda state=state: state)
        # Another process has less room, so that all plan with its budget.
        monkeypatch.setattr(forward, "gather_object", lambda found: [*found, 500])
        parts.append(predictor_of(model, 500 + number).logits(rows))
    handle.remove()
    assert_close(np.sum(parts, axis=0), expected)
    filled = np.array([part.any(axis=(1, 2)) for part in parts])
    assert (filled.sum(axis=0) == 1).all()
    assert len(set(np.bincount(batches, minlength=processes))) == 1
    assert filled.any(axis=1).all() == (processes < len(rows))


def test_half_precision_is_computed_in_and_float32_is_what_comes_out(model_of, rows_of):
    model, rows = model_of("joint"), rows_of("joint")
    exact, found = (predictor_of(model, 500, dtype).logits(rows) for dtype in (FLOAT, torch.bfloat16))
    assert found.dtype == np.float32
    assert 1e-5 < np.abs(found - exact).max() < 0.1


def test_each_batch_is_reported_when_it_is_done(model_of, rows_of, capsys):
    model, rows = model_of("joint"), rows_of("joint")
    counts = []
    predictor_of(model, 500).logits(rows, on_batch=counts.append)
    assert len(counts) > 1
    assert sum(counts) == len(rows)
    assert capsys.readouterr().err == ""


PACKED = Batching(pack, lambda row: row["length"], plan_packed)


def test_the_longest_row_is_the_one_with_the_most_tokens(rows_of):
    rows = rows_of("joint")
    for order in (range(8), range(7, -1, -1), [4, 5, 6, 7, 0, 1, 2, 3]):
        longest = max(rows.select(order), key=lambda row: row["length"])
        expected = {name: longest[name] for name in MODEL_COLUMNS}
        np.testing.assert_equal(PACKED.longest_row(rows.select(order)), expected)  # NaN is NaN
    np.testing.assert_equal(PACKED.longest_row(rows.select([5])), {name: rows[5][name] for name in MODEL_COLUMNS})


@each_way
def test_the_budget_of_a_cpu_is_fixed(way, model_of, rows_of):
    assert predictor_of(model_of("joint", way)).find_budget(rows_of("joint")) == CPU_TOKENS


@each_way
def test_the_budget_is_measured_on_the_longest_rows_without_gradients(way, model_of, rows_of, monkeypatch):
    model, rows = model_of("both orders", way), rows_of("both orders").select(range(7, -1, -1))
    sizes = []

    def measure(memory, work, longest):
        work(1)
        work(2)
        return longest

    monkeypatch.setattr(forward, "find_budget", measure)
    handle = model.register_forward_hook(
        lambda _, args, kwargs, output: sizes.append((kwargs["input_ids"].numel(), output.logits.requires_grad)),
        with_kwargs=True,
    )
    found = predictor_of(model).find_budget(rows)
    handle.remove()
    longest = max(rows, key=lambda row: row["length"])
    tokens = longest["length"] if way == "packed" else padded_tokens(longest)
    assert found == tokens
    assert sizes == [(tokens, False), (2 * tokens, False)]


def test_the_longest_row_of_a_padded_model_is_the_one_that_pads_to_the_most():
    columns = {name: [[0], [0]] for name in ("id", "input_ids", "segment_ids", "labels", "teacher")}
    rows = Dataset.from_dict(
        {**columns, "branches": [[100, 1, 1], [0, 60, 60]], "length": [102, 120], "weight": [1, 2]}
    )
    padded = Batching(pack, padded_tokens, plan_padded)
    assert padded.longest_row(rows)["length"] == 102
    assert PACKED.longest_row(rows)["length"] == 120
