import dataclasses
import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from builders import (
    SETTINGS,
    batch_of,
    config_of,
    logits,
    make_backbone,
    parametrize_some,
    reload_model,
    stored,
    train_a_little,
)
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from rewardmodel.config.schema import ModelConfig
from rewardmodel.errors import InputError
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.loading import build_model, save_model
from rewardmodel.model.precision import bits_and_bytes, quantization_name
from rewardmodel.objectives import JOINT_HEAD, SEPARATE_HEAD


def classes(model) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


@pytest.mark.parametrize("said", [True, False])
@parametrize_some("settings", SETTINGS, ("as is",))
def test_a_backbone_that_is_stored_quantised_stays_so_and_its_head_is_not(settings, said, backbone, tmp_path):
    bits = 8 if settings == "8 bits" else 4
    folder = stored(backbone("llama"), tmp_path, SETTINGS[settings])
    config = config_of(folder, **{f"load_in_{bits}bit": said})
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    kinds = classes(model)
    head = model.get_submodule("base_model.model.score")
    assert "bitsandbytes" not in {type(part).__module__.partition(".")[0] for part in head.modules()}
    assert {weight.dtype for weight in head.parameters()} == {torch.float32}
    assert kinds["base_model.model.model.layers.1.mlp.up_proj.base_layer"] == f"Linear{bits}bit".replace(
        "8bit", "8bitLt"
    )
    first = kinds["base_model.model.model.layers.0.mlp.up_proj.base_layer"]
    assert (first == "Linear") == (settings == "layers skipped")
    batch = batch_of(tokenizer)
    train_a_little(model, batch)
    before = logits(model, batch)
    assert before.std() > 1e-3
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    again, _ = reload_model(config, tmp_path / "model")
    assert torch.equal(logits(again, batch), before)


def test_a_stored_head_that_was_quantised_itself_gives_way_to_a_new_one_and_is_not_kept(tmp_path):
    whole = make_backbone("llama", tmp_path / "whole", num_labels=2, id2label={n: str(n) for n in range(64)})
    settings = {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]}
    folder = stored(whole, tmp_path, settings, AutoModelForSequenceClassification)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert "score.weight.absmax" in weights.keys()  # noqa: SIM118
    model, tokenizer = build_model(resolve_backbone(config_of(folder)), JOINT_HEAD, seed=0)
    assert (logits(model, batch_of(tokenizer)) == 0).all()
    with pytest.raises(InputError, match=r"^model\.keep_head: .* has 'score\.weight' of size"):
        build_model(resolve_backbone(config_of(folder, keep_head=True)), JOINT_HEAD, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_8bit": True}, r"^model\.load_in_8bit: the backbone .* is stored in 4 bits; leave it out"),
        ({"use_peft": False}, r"^model\.use_peft: a quantised backbone cannot train itself"),
    ],
)
def test_what_a_backbone_that_is_stored_in_4_bits_cannot_do_is_refused(changes, message, backbone, tmp_path):
    config = config_of(stored(backbone("llama"), tmp_path, SETTINGS["as is"]))
    with pytest.raises(InputError, match=message):
        resolve_backbone(dataclasses.replace(config, **changes), trainer={})


def test_a_backbone_that_is_stored_quantised_by_others_is_refused(tmp_path):
    folder = make_backbone("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match=r"^model\.model_name_or_path: the backbone is stored quantised by gptq; give"):
        build_model(resolve_backbone(config_of(folder)), SEPARATE_HEAD, seed=0)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, None),
        ({"load_in_8bit": True}, "8-bit int8"),
        ({"load_in_fp8": True}, "fp8 e4m3"),
        ({"load_in_4bit": True}, "4-bit nf4 with double quantisation"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": False}, "4-bit fp4"),
    ],
)
def test_quantisation_is_described_in_words(keys, said):
    assert quantization_name(ModelConfig(**keys)) == said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fsdp_is_given_four_bits_in_a_type_that_it_spreads(dtype, backbone, monkeypatch):
    config = config_of(backbone("llama"), load_in_4bit=True)
    alone = bits_and_bytes(config, dtype).bnb_4bit_quant_storage
    assert alone == torch.uint8
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bits_and_bytes(config, dtype).bnb_4bit_quant_storage == torch.uint8
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert bits_and_bytes(config, dtype).bnb_4bit_quant_storage == dtype
    model, _ = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    held = [module.weight for module in model.modules() if isinstance(module, Linear4bit)]
    assert held
    assert {weight.dtype for weight in held} == {torch.float32}  # this backbone computes in it
