import dataclasses
import json
import shutil

import pytest
import torch
from builders import SETTINGS, make_backbone, stored
from transformers import AutoConfig

from rewardmodel.config.schema import ModelConfig
from rewardmodel.distributed import Launch
from rewardmodel.errors import InputError
from rewardmodel.files import cache_folder
from rewardmodel.model.backbone import CACHE_FORMAT, FEATURE_SETTINGS, resolve_backbone, resolve_saved_backbone
from rewardmodel.model.families import FAMILIES, GENERIC, lowest_layers
from rewardmodel.model.weights import fingerprint

CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture
def cuda(monkeypatch):
    """Let torch see a CUDA device of a capability: cuda((8, 0))."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def see(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return see


def test_a_backbone_is_resolved_to_folder_configuration_device_and_precision(backbone):
    found = resolve_backbone(ModelConfig(str(backbone("llama")), **CPU))
    assert found.folder == backbone("llama")
    assert found.config.model_type == "llama"
    assert found.config.num_hidden_layers == found.stored_layers == 2
    assert found.family is FAMILIES["llama"]
    assert (found.device, found.dtype, found.bits) == (torch.device("cpu"), torch.float32, None)
    assert found.attention == "sdpa"
    assert found.launch == Launch()
    assert found.fingerprint == fingerprint(backbone("llama"))


def test_the_attention_that_the_recipe_names_is_taken(backbone):
    assert (
        resolve_backbone(ModelConfig(str(backbone("llama")), attn_implementation="eager", **CPU)).attention == "eager"
    )


def test_another_family_gets_generic_rules(tmp_path):
    found = resolve_backbone(ModelConfig(str(make_backbone("olmo2", tmp_path)), **CPU))
    assert found.family is GENERIC
    assert found.attention == "eager"


def test_the_lowest_layers_are_cut_out_of_a_copy_of_the_configuration(tmp_path):
    folder = make_backbone("gemma3_text", tmp_path, layer_types=["sliding_attention", "full_attention"])
    found = resolve_backbone(ModelConfig(str(folder), num_hidden_layers=1, **CPU))
    assert (found.config.num_hidden_layers, found.stored_layers) == (1, 2)
    assert found.config.layer_types == ["sliding_attention"]
    whole = AutoConfig.from_pretrained(folder)
    before = whole.to_dict()
    assert lowest_layers(whole, 1).num_hidden_layers == 1
    assert lowest_layers(whole, None) is not whole
    assert whole.to_dict() == before


@pytest.mark.parametrize("layers", [0, 3])
def test_more_layers_than_there_are_are_refused(layers, backbone):
    with pytest.raises(InputError, match=rf"^model\.num_hidden_layers: {layers}, but the backbone has 2; set at most"):
        resolve_backbone(ModelConfig(str(backbone("llama")), num_hidden_layers=layers, **CPU))


@pytest.mark.parametrize(
    ("family", "capability", "expected"),
    [
        ("llama", (8, 0), torch.bfloat16),
        ("llama", (7, 5), torch.float16),
        ("gemma2", (7, 5), torch.float32),
    ],
)
def test_device_and_precision_follow_the_gpu(family, capability, expected, cuda, backbone):
    cuda(capability)
    found = resolve_backbone(ModelConfig(str(backbone(family))))
    assert (found.device, found.dtype) == (torch.device("cuda", 0), expected)


def test_a_gpu_refuses_what_it_cannot_compute(cuda, backbone):
    cuda((7, 5))
    with pytest.raises(InputError, match=r"^model\.dtype: bfloat16 is emulated"):
        resolve_backbone(ModelConfig(str(backbone("llama")), dtype="bfloat16"))
    with pytest.raises(InputError, match=r"^model\.attn_implementation: flash_attention_2 needs a GPU of compute"):
        resolve_backbone(ModelConfig(str(backbone("llama")), attn_implementation="flash_attention_2"))


def test_what_only_training_needs_is_asked_with_a_trainer_section_only(backbone):
    config = ModelConfig(str(backbone("llama")), lora_r=0, **CPU)
    assert resolve_backbone(config).folder == backbone("llama")
    with pytest.raises(InputError, match=r"^model\.lora_r: 0; the rank is at least 1"):
        resolve_backbone(config, trainer={})
    with pytest.raises(InputError, match=r"^trainer\.optim: "):
        resolve_backbone(ModelConfig(str(backbone("llama")), **CPU), trainer={"optim": "lomo"})


def test_fewer_positions_than_the_longest_sequence_are_refused(backbone):
    config = ModelConfig(str(backbone("roberta")), **CPU)
    assert resolve_backbone(config, max_length=512).folder == backbone("roberta")
    with pytest.raises(InputError, match=r"^prompt\.max_length: 513, but .*'roberta' has positions for 512 tokens"):
        resolve_backbone(config, max_length=513)


@pytest.mark.parametrize(("settings", "bits"), [("as is", 4), ("8 bits", 8)])
def test_bits_are_those_of_the_recipe_or_of_the_weight_files(settings, bits, backbone, tmp_path):
    folder = stored(backbone("llama"), tmp_path, SETTINGS[settings])
    assert resolve_backbone(ModelConfig(str(folder), **CPU)).bits == bits
    assert resolve_backbone(ModelConfig(str(backbone("llama")), **{f"load_in_{bits}bit": True}, **CPU)).bits == bits
    other = {f"load_in_{12 - bits}bit": True}
    with pytest.raises(InputError, match=rf"is stored in {bits} bits; leave it out, or give an unquantised backbone"):
        resolve_backbone(ModelConfig(str(folder), **other, **CPU))


def test_the_launch_is_read_from_the_environment(backbone, monkeypatch):
    config = ModelConfig(str(backbone("llama")), load_in_8bit=True, **CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve_backbone(config).launch == Launch(2, "ddp")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match=r"^model\.load_in_8bit: FSDP"):
        resolve_backbone(config, trainer={})


def test_the_feature_cache_depends_on_what_features_depend_on(backbone, tmp_path):
    config = ModelConfig(str(backbone("llama")), **CPU)
    others = [
        dataclasses.replace(config, **{key: value})
        for key, value in (
            ("num_hidden_layers", 1),
            ("pooling", "responses"),
            ("load_in_4bit", True),
            ("load_in_fp8", True),
        )
    ]
    others.append(dataclasses.replace(config, dtype="bfloat16"))
    others.append(dataclasses.replace(config, attn_implementation="eager"))
    other_weights = make_backbone("llama", tmp_path / "other", initializer_range=0.1)
    others.append(dataclasses.replace(config, model_name_or_path=str(other_weights)))
    folders = [resolve_backbone(one).feature_cache for one in (config, *others)]
    assert len({*folders}) == 8
    assert {folder.parent for folder in folders} == {cache_folder() / "features"}
    moved = shutil.copytree(backbone("llama"), tmp_path / "moved")
    same = dataclasses.replace(config, lora_r=3, keep_head=True, model_name_or_path=str(moved))
    assert resolve_backbone(same).feature_cache == folders[0]


def test_the_feature_cache_has_the_format_in_its_key(backbone, monkeypatch):
    resolved = resolve_backbone(ModelConfig(str(backbone("llama")), **CPU))
    before = resolved.feature_cache
    assert dataclasses.replace(resolved).feature_cache == before
    monkeypatch.setattr("rewardmodel.model.backbone.CACHE_FORMAT", CACHE_FORMAT + 1)
    assert dataclasses.replace(resolved).feature_cache != before
    assert {*FEATURE_SETTINGS} <= {field.name for field in dataclasses.fields(ModelConfig)}


def saved(folder, adapter: bool, digest: str):
    """Write what a saved model says of itself."""
    if adapter:
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    (folder / "backbone.json").write_text(json.dumps({"model_name_or_path": "base", "fingerprint": digest}))
    return folder


def test_a_saved_adapter_stands_on_its_backbone_and_a_whole_model_on_itself_with_its_head(backbone, tmp_path):
    config = ModelConfig(str(backbone("llama")), **CPU)
    adapter = saved(tmp_path / "adapter", True, fingerprint(backbone("llama")))
    found = resolve_saved_backbone(config, adapter)
    assert (found.folder, found.model.keep_head) == (backbone("llama"), False)
    whole = saved(make_backbone("qwen2", tmp_path / "whole"), False, "any")
    found = resolve_saved_backbone(config, whole)
    assert (found.folder, found.model.keep_head, found.config.model_type) == (whole, True, "qwen2")


def test_a_backbone_that_is_not_where_it_was_is_asked_for_by_key(tmp_path):
    adapter = saved(tmp_path / "adapter", True, "any")
    config = ModelConfig(str(tmp_path / "gone"), **CPU)
    with pytest.raises(
        InputError, match=r"no backbone '.*gone'.*adapter was trained on it: if it is elsewhere now, say"
    ):
        resolve_saved_backbone(config, adapter)


def test_weights_are_fetched_when_they_are_asked_for(backbone, monkeypatch):
    asked = []

    def fetch(name, revision, weights=True):
        asked.append(weights)
        return backbone(name)

    monkeypatch.setattr("rewardmodel.model.backbone.fetch_backbone", fetch)
    light = resolve_backbone(ModelConfig("llama", **CPU), weights=False)
    assert light.with_weights() == light
    assert asked == [False, True]
