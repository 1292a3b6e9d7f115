import pytest
import torch
from safetensors.torch import load_file

from rewardmodel.config.schema import ModelConfig
from rewardmodel.errors import InputError
from rewardmodel.exports.weight_files import find_weight_files, match_parameters, write_shards
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.loading import load_classifier
from rewardmodel.objectives import JOINT_HEAD


def test_tensors_are_named_as_transformers_loads_them(backbone):
    config = ModelConfig(str(backbone("llama")), device="cpu", dtype="float32")
    model = load_classifier(resolve_backbone(config), JOINT_HEAD)
    names = match_parameters(model, ["lm_head.weight", "norm.weight", "model.embed_tokens.weight"])
    assert names == {"norm.weight": "model.norm.weight", "model.embed_tokens.weight": "model.embed_tokens.weight"}


def test_one_shard_needs_no_index(tmp_path):
    write_shards([("a", torch.zeros(3)), ("b", torch.ones(2))], tmp_path, 10**9)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == {"a", "b"}


def test_several_shards_are_found_by_their_index(tmp_path):
    tensors = {name: torch.full((10,), float(number)) for number, name in enumerate("abcde")}
    write_shards(tensors.items(), tmp_path, 80)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == names
    found = find_weight_files(tmp_path)
    assert list(found) == list("abcde")
    for name, file in found.items():
        assert torch.equal(load_file(file)[name], tensors[name])


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    write_shards([("a", torch.zeros(2)), ("b", torch.zeros(100)), ("c", torch.zeros(2))], tmp_path, 40)
    assert [len(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == [1, 1, 1]


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        find_weight_files(tmp_path)
