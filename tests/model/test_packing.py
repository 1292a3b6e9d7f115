import pytest
import torch
from builders import assert_same, battle_frame, make_backbone, pack, plain_logits
from transformers import AttentionInterface

from rewardmodel.config.schema import ModelConfig, PromptConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.model.attention import PACKED_PREFIX
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.families import FAMILIES
from rewardmodel.model.loading import load_classifier
from rewardmodel.model.packing import is_packed, may_pack, pack_attention
from rewardmodel.objectives import JOINT_HEAD
from rewardmodel.prompt.tokenization import tokenize


@pytest.fixture
def rows(tokenizer):
    """Return two rows of two sequences that share their beginning."""
    prompt = PromptConfig("instruction", max_length=160)
    return list(tokenize(read_battles(battle_frame(1)).select([1, 3]), tokenizer, prompt, both_orders=True))


@pytest.fixture
def stranger(tmp_path):
    """Return a function that loads a classifier of a family that is not in the table."""
    folder = make_backbone("olmo2", tmp_path)
    assert "olmo2" not in FAMILIES
    config = ModelConfig(str(folder), device="cpu", dtype="float32")
    return lambda: load_classifier(resolve_backbone(config), JOINT_HEAD).eval()


def test_a_family_that_is_not_in_the_table_packs_if_it_is_seen_to(stranger, rows, caplog):
    model = stranger()
    assert is_packed(model)
    assert "padded" not in caplog.text
    torch.nn.init.normal_(model.score.weight)
    with torch.no_grad():
        assert_same(model(**pack(rows)).logits, plain_logits(model, rows))


def without_packing(forward):
    def swallow(self, input_ids, position_ids=None, use_cache=None, **_):
        return forward(self, input_ids, position_ids=position_ids, use_cache=use_cache)

    return swallow


def with_neighbours(forward):
    def mix(self, input_ids, **kwargs):
        output = forward(self, input_ids, **kwargs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.roll(1, dims=1)
        return output

    return mix


@pytest.mark.parametrize("wrap", [without_packing, with_neighbours])
def test_a_decoder_that_cannot_pack_is_padded_with_a_warning(wrap, stranger, caplog, monkeypatch):
    from transformers import Olmo2Model

    monkeypatch.setattr(Olmo2Model, "forward", wrap(Olmo2Model.forward))
    model = stranger()
    assert not is_packed(model)
    assert model.config._attn_implementation == "eager"
    assert [record.levelname for record in caplog.records if "padded" in record.message] == ["WARNING"]
    assert "olmo2 cannot compute packed rows: its batches are padded" in caplog.text


def test_an_attention_that_sees_the_whole_row_is_padded_with_a_warning(stranger, caplog, monkeypatch):
    from transformers.models.olmo2.modeling_olmo2 import eager_attention_forward

    def whole_row(module, query, key, value, attention_mask, *, packing, **kwargs):
        hidden = torch.full((query.shape[2],) * 2, -1e9).triu(1)
        return eager_attention_forward(module, query, key, value, hidden, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED_PREFIX + "eager", whole_row)
    assert not is_packed(stranger())
    assert "its batches are padded" in caplog.text


@pytest.mark.parametrize(
    ("name", "layers", "packs"),
    [
        ("sdpa", ["sliding_attention", "full_attention"], True),
        ("sdpa", ["full_attention", "chunked_attention"], False),
        ("sdpa", ["linear_attention", "full_attention"], False),
        ("flash_attention_3", ["full_attention", "full_attention"], False),
    ],
)
def test_layers_and_attention_that_are_not_known_to_pack_are_padded(name, layers, packs, backbone):
    config = ModelConfig(str(backbone("llama")), device="cpu", dtype="float32")
    model = load_classifier(resolve_backbone(config), JOINT_HEAD)
    model.config._attn_implementation, model.config.layer_types = name, layers
    pack_attention(model, name)
    assert is_packed(model) == packs
    assert model.config._attn_implementation == (PACKED_PREFIX + name if packs else name)


def test_encoders_and_decoders_that_see_ahead_may_not_pack(backbone):
    decoder, encoder = (
        load_classifier(resolve_backbone(ModelConfig(str(backbone(name)), device="cpu", dtype="float32")), JOINT_HEAD)
        for name in ("llama", "roberta")
    )
    decoder.config._attn_implementation = "sdpa"
    assert may_pack(decoder)
    assert not may_pack(encoder)
    decoder.config.is_causal = False
    assert not may_pack(decoder)
    decoder.config.is_causal, decoder.config.use_bidirectional_attention = True, True
    assert not may_pack(decoder)
