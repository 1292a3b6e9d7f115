import json

import pytest
import torch
from safetensors.torch import save_file

from rewardmodel.config.schema import ModelConfig
from rewardmodel.errors import InputError
from rewardmodel.model.backbone import saved_backbone_folder
from rewardmodel.model.saved_model import check_head, is_adapter, read_about
from rewardmodel.model.weights import fingerprint


def saved(folder, adapter: bool, digest: str):
    folder.mkdir()
    (folder / "backbone.json").write_text(json.dumps({"model_name_or_path": "base", "fingerprint": digest}))
    if adapter:
        (folder / "adapter_config.json").write_text("{}")
    return folder


def test_a_whole_model_stands_on_itself_and_an_adapter_on_its_backbone(backbone, tmp_path):
    config = ModelConfig(str(backbone("llama")))
    whole = saved(tmp_path / "whole", False, "of another")
    adapter = saved(tmp_path / "adapter", True, fingerprint(backbone("llama")))
    assert not is_adapter(whole)
    assert is_adapter(adapter)
    assert saved_backbone_folder(config, whole) == whole
    assert saved_backbone_folder(config, adapter) == backbone("llama")


def test_another_backbone_is_refused(backbone, tmp_path):
    with pytest.raises(InputError, match="trained on other weights of base"):
        saved_backbone_folder(ModelConfig(str(backbone("llama"))), saved(tmp_path / "adapter", True, "of another"))


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_without_a_model_is_refused(content, tmp_path):
    if content:
        (tmp_path / "backbone.json").write_text(content)
    with pytest.raises(InputError, match="no trained model there"):
        read_about(tmp_path)


def test_an_adapter_without_its_head_is_refused(tmp_path):
    save_file({"base_model.model.score.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    check_head(tmp_path, ["score"])
    with pytest.raises(InputError, match="no head 'classifier'"):
        check_head(tmp_path, ["score", "classifier"])
