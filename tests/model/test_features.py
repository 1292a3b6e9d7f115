import dataclasses

import numpy as np
import pytest
import torch
from builders import battle_frame

from rewardmodel.config.schema import ModelConfig, PromptConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.model import features as module
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.features import layer_logits, read_features, row_keys
from rewardmodel.model.forward import Predictor
from rewardmodel.model.loading import build_model, trained_layer
from rewardmodel.objectives import JOINT_HEAD, SEPARATE_HEAD
from rewardmodel.prompt.tokenization import tokenize

FLOAT = torch.float32


@pytest.fixture
def probed(backbone, tokenizer, tmp_path):
    """Return a predictor of a tiny classifier with a frozen backbone, and the rows of 16 battles."""
    config = ModelConfig(str(backbone("llama")), device="cpu", dtype="float32", freeze_backbone=True)
    model, _ = build_model(resolve_backbone(config), SEPARATE_HEAD, seed=0)
    prompt = PromptConfig("response", max_length=160)
    rows = tokenize(read_battles(battle_frame(4)), tokenizer, prompt, encoding="separate")
    return Predictor(model.eval(), tokenizer, FLOAT, 300, tmp_path / "features"), rows


@pytest.fixture
def computed(monkeypatch):
    """Return a list that gets the ids of the rows of each part that is computed."""
    ids, compute = [], Predictor.logits

    def counted(self, rows, **given):
        ids.append(rows["id"][:])
        return compute(self, rows, **given)

    monkeypatch.setattr(Predictor, "logits", counted)
    return ids


@pytest.mark.parametrize(("family", "pooling"), [("llama", "last"), ("gemma2", "responses"), ("roberta", "last")])
def test_the_last_layer_on_features_gives_the_models_logits(backbone, tokenizer, tmp_path, family, pooling):
    config = ModelConfig(str(backbone(family)), device="cpu", dtype="float32", freeze_backbone=True, pooling=pooling)
    model, own = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    layer = trained_layer(model.eval())
    torch.nn.init.normal_(layer.weight)
    rows = tokenize(read_battles(battle_frame(3)), own, PromptConfig(max_length=160), both_orders=True)
    predictor = Predictor(model, own, FLOAT, 500, tmp_path)
    found = read_features(predictor, rows)
    assert found.shape == (12, 2, layer.in_features)
    np.testing.assert_allclose(layer_logits(layer, found), predictor.logits(rows), rtol=1e-4, atol=1e-5)


def test_only_the_last_layer_trains(probed):
    model = probed[0].model
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    assert trained == {id(weight) for weight in trained_layer(model).parameters()}


def test_what_is_kept_is_not_computed_again(probed, computed, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_PER_FILE", 300)
    predictor, rows = probed
    some = read_features(predictor, rows.select(range(10)))
    assert len(computed) > 1
    computed.clear()
    again = read_features(predictor, rows.select(range(15, -1, -1)))
    assert sorted(name for part in computed for name in part) == sorted(rows["id"][10:])
    np.testing.assert_array_equal(again[::-1][:10], some)
    computed.clear()
    torch.nn.init.normal_(trained_layer(predictor.model).weight)  # another head reads the same
    np.testing.assert_array_equal(read_features(predictor, rows), again[::-1])
    assert computed == []


def test_a_killed_reading_goes_on_and_a_broken_file_is_read_again(probed, computed, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "TOKENS_PER_FILE", 300)
    predictor, rows = probed
    whole = read_features(predictor, rows)
    predictor = dataclasses.replace(predictor, feature_cache=tmp_path / "killed")
    write, written = module.write_arrays, []

    def stop(path, **arrays):
        write(path, **arrays)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_arrays", stop)
        with pytest.raises(KeyboardInterrupt):
            read_features(predictor, rows)
    one, _ = sorted((tmp_path / "killed").glob("*.npz"))
    one.write_bytes(one.read_bytes()[:100])
    computed.clear()
    found = read_features(predictor, rows)
    assert f"{one} cannot be read" in caplog.text
    assert 0 < sum(map(len, computed)) < 16
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)


def test_features_that_are_nan_are_refused(probed, tmp_path, monkeypatch):
    predictor, rows = probed
    monkeypatch.setattr(Predictor, "logits", lambda *_, **__: np.full((16, 2, 64), np.nan, np.float32))
    with pytest.raises(FloatingPointError, match="NaN or infinite features of 16 battles; the first ids: 00"):
        read_features(predictor, rows)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_predictor_without_a_cache_reads_no_features(probed):
    predictor, rows = probed
    with pytest.raises(ValueError, match="without a feature_cache reads no features"):
        read_features(dataclasses.replace(predictor, feature_cache=None), rows)


def test_a_row_is_known_by_its_tokens_segments_and_branches(probed):
    _, rows = probed
    row = rows[0]
    others = [
        {**row, "id": "x", "labels": [0, 0, 1]},
        {**row, "input_ids": [5, *row["input_ids"][1:]]},
        {**row, "segment_ids": [1, *row["segment_ids"][1:]]},
        {**row, "branches": [row["branches"][0] + 1, row["branches"][1] - 1, row["branches"][2]]},
    ]
    keys = row_keys(rows.from_list([row, *others], features=rows.features))
    assert keys[0] == keys[1]
    assert len({*keys}) == 4


@pytest.mark.parametrize("peft", [True, False])
def test_heads_of_encoders_that_begin_otherwise_do_not_share_features(peft, backbone, tmp_path):
    config = ModelConfig(str(backbone("roberta")), device="cpu", dtype="float32", use_peft=peft)
    found = []
    for seed in (0, 1, 0):
        model, own = build_model(resolve_backbone(config), JOINT_HEAD, seed=seed)
        rows = tokenize(read_battles(battle_frame(1)), own, PromptConfig(max_length=160))
        found.append(read_features(Predictor(model.eval(), own, FLOAT, 500, tmp_path), rows))
    assert np.abs(found[0] - found[1]).max() > 0.01
    np.testing.assert_array_equal(found[0], found[2])
