import pytest
from builders import ENCODERS, FAMILIES, make_backbone
from transformers import CONFIG_MAPPING, AutoConfig

from rewardmodel.errors import InputError
from rewardmodel.model import families
from rewardmodel.model.attention import LOADED_AS
from rewardmodel.model.families import GENERIC, check_length, find_family


def test_every_family_of_the_table_has_a_tiny_backbone_in_these_tests():
    assert {*FAMILIES, *ENCODERS, "gemma3"} == {*families.FAMILIES}


def test_any_other_family_has_generic_rules():
    assert find_family("olmo2") is GENERIC


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_attention_of_a_family_is_one_that_transformers_has_for_it(name):
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    kind = MODEL_MAPPING[CONFIG_MAPPING[name]]
    known = {"eager"}
    known |= {"sdpa"} if kind._supports_sdpa else set()
    known |= {"flash_attention_2"} if kind._supports_flash_attn else set()
    known |= {"flex_attention"} if kind._supports_flex_attn else set()
    assert {LOADED_AS.get(attention, attention) for attention in find_family(name).attention} <= known


@pytest.mark.parametrize(
    ("name", "changes", "most"),
    [
        ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("xlm-roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("distilbert", {}, 512),
        ("bert", {}, 512),
        ("gpt2", {}, 1024),
        ("opt", {}, 2048),
    ],
)
def test_more_tokens_than_there_are_positions_are_refused(name, changes, most):
    config = CONFIG_MAPPING[name](**changes)
    check_length(config, most)
    with pytest.raises(
        InputError, match=rf"^prompt\.max_length: {most + 1:,}, but .*'{name}' has positions for {most:,} tokens"
    ):
        check_length(config, most + 1)


@pytest.mark.parametrize("name", [*FAMILIES, "modernbert"])
def test_rotary_positions_go_on_with_a_warning(name, tmp_path, caplog):
    config = AutoConfig.from_pretrained(make_backbone(name, tmp_path, max_position_embeddings=256))
    caplog.clear()  # transformers 5.16 warns of Gemma 3's rope_parameters as it reads them
    check_length(config, 256)
    assert not caplog.records
    check_length(config, 257)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "prompt.max_length: 257 tokens; the backbone was trained on at most 256" in caplog.text


def test_relative_positions_have_no_end(tmp_path, caplog):
    check_length(AutoConfig.from_pretrained(make_backbone("deberta-v2", tmp_path)), 100_000)
    assert not caplog.records
