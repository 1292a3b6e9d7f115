import json
from dataclasses import replace

import pytest
import torch
from builders import FAMILIES, battle_frame, make_backbone, pack, parametrize_some
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rewardmodel.config.schema import PromptConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.exports.merge import merge_run
from rewardmodel.exports.weight_files import find_weight_files
from rewardmodel.model.backbone import resolve_backbone, saved_backbone_folder
from rewardmodel.model.batching import pad
from rewardmodel.model.fp8 import Fp8Linear
from rewardmodel.model.loading import load_classifier, load_model
from rewardmodel.objectives import JOINT_HEAD, SEPARATE_HEAD
from rewardmodel.prompt.tokenization import tokenize

VARIANTS = {
    "plain": {},
    "4bit": {"load_in_4bit": True},
    "4bit_single": {"load_in_4bit": True, "use_bnb_nested_quant": False},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "rslora": {"use_rslora": True, "load_in_4bit": True},
    "dora": {"use_dora": True, "load_in_4bit": True},
    "upper": {"lora_first_layer": 1},
    "full": {"use_peft": False},
}


def rows_of(tokenizer, head=JOINT_HEAD):
    prompt = PromptConfig(None if head is JOINT_HEAD else "response", 160)
    encoding = "joint" if head is JOINT_HEAD else "separate"
    return list(tokenize(read_battles(battle_frame(2)), tokenizer, prompt, encoding=encoding))


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits.float()


def plain_logits(folder, tokenizer, rows, **how):
    # eager, because transformers 5.16 gives Gemma 2 by default sdpa, which leaves out its soft-capping
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager", **how)
    padded = pad(rows, tokenizer.pad_token_id)
    return logits(model, {name: padded[name] for name in ("input_ids", "attention_mask")})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_model_is_the_trained_one_to_plain_transformers(random_run, variant, backbone, tmp_path):
    run, model, tokenizer = random_run(backbone("llama"), **VARIANTS[variant])
    rows = rows_of(tokenizer)
    before = logits(model, pack(rows))
    assert before.std() > 0.01
    merge_run(run, tmp_path / "merged", torch.float32)
    after = plain_logits(tmp_path / "merged", tokenizer, rows)
    assert (after.softmax(-1) - before.softmax(-1)).abs().max() <= 1e-5


@parametrize_some("family", FAMILIES, ("llama", "gemma2"))
@pytest.mark.parametrize("variant", ["4bit", "plain"])
def test_every_family_merges(random_run, family, variant, backbone, tmp_path):
    run, model, tokenizer = random_run(backbone(family), **VARIANTS[variant])
    rows = rows_of(tokenizer)
    merge_run(run, tmp_path / "merged", torch.float32)
    after = plain_logits(tmp_path / "merged", tokenizer, rows)
    assert (after.softmax(-1) - logits(model, pack(rows)).softmax(-1)).abs().max() <= 1e-5


def test_weights_are_those_of_peft_on_the_dequantised_backbone(random_run, backbone, tmp_path):
    run, *_ = random_run(backbone("llama"), load_in_4bit=True)
    merge_run(run, tmp_path / "merged", torch.float32)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_classifier(resolve_backbone(run.recipe.model), JOINT_HEAD)
    base.dequantize(torch.float32)
    whole = PeftModel.from_pretrained(base, run.model).merge_and_unload()
    expected = {name: weight for name, weight in whole.state_dict().items() if "lora_" not in name}
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert (weight - expected[name]).abs().max() <= 1e-6, name


def test_an_8_bit_run_merges_close_to_what_it_computes(random_run, backbone, tmp_path):
    """Not exactly: LLM.int8 rounds activations too, which no merged model does."""
    run, model, tokenizer = random_run(backbone("llama"), load_in_8bit=True)
    rows = rows_of(tokenizer)
    merge_run(run, tmp_path / "merged", torch.float32)
    after = plain_logits(tmp_path / "merged", tokenizer, rows)
    assert (after.softmax(-1) - logits(model, pack(rows)).softmax(-1)).abs().max() <= 0.02


def test_a_run_in_fp8_merges_to_the_weights_that_it_computes_with(random_run, backbone, tmp_path):
    run, model, _ = random_run(backbone("llama"), load_in_fp8=True)
    merge_run(run, tmp_path / "merged", torch.float32)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            base = layer.base_layer
            weight = base.dequantise().weight if isinstance(base, Fp8Linear) else base.weight
            weight = weight + layer.get_delta_weight("default")
            assert (found[f"{name.removeprefix('base_model.model.')}.weight"] - weight).abs().max() <= 1e-6, name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_run_in_fp8_merges_close_to_what_it_predicts(family, random_run, backbone, tmp_path):
    """Not exactly: activations are rounded too, which no merged model does."""
    run, model, tokenizer = random_run(backbone(family), load_in_fp8=True)
    rows = rows_of(tokenizer)
    merge_run(run, tmp_path / "merged", torch.float32)
    after = plain_logits(tmp_path / "merged", tokenizer, rows)
    apart = (after.softmax(-1) - logits(model, pack(rows)).softmax(-1)).abs().max()
    assert 1e-5 < apart <= 0.1


def test_16_bit_weights_are_rounded_as_loading_rounded_them(random_run, tmp_path):
    folder = make_backbone("llama", tmp_path / "base")  # float32
    run, *_ = random_run(folder, dtype="bfloat16")
    merge_run(run, tmp_path / "merged", torch.float32)
    found, base = (load_file(one / "model.safetensors") for one in (tmp_path / "merged", folder))
    name = "model.embed_tokens.weight"
    assert torch.equal(found[name], base[name].bfloat16().float())
    assert not torch.equal(found[name], base[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_stays_float32_in_the_file_and_in_rewardmodel(random_run, dtype, backbone, tmp_path):
    run, model, tokenizer = random_run(backbone("llama"))
    merge_run(run, tmp_path / "merged", dtype)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    head = model.get_submodule("base_model.model.score").modules_to_save["default"].weight
    assert torch.equal(found["score.weight"], head)
    assert {value.dtype for name, value in found.items() if name != "score.weight"} == {dtype}
    again, _ = load_model(run.recipe.model, tmp_path / "merged", dtype)
    assert torch.equal(again.score.weight, head)
    assert {weight.dtype for name, weight in again.named_parameters() if "score" not in name} == {dtype}
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert plain.score.weight.dtype == dtype  # transformers casts it, and the card says so
    exact = plain_logits(tmp_path / "merged", tokenizer, rows_of(tokenizer), dtype=torch.float32)
    assert (exact.softmax(-1) - logits(model, pack(rows_of(tokenizer))).softmax(-1)).abs().max() <= 0.02


def test_the_configuration_names_outcomes_padding_and_class(random_run, backbone, tmp_path):
    run, _, tokenizer = random_run(backbone("qwen3"))
    merge_run(run, tmp_path / "merged", torch.bfloat16)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "winner_model_a", "1": "winner_model_b", "2": "winner_tie"}
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_a_reward_model_is_a_plain_one_with_its_tie_parameter_beside(random_run, backbone, tmp_path):
    run, model, tokenizer = random_run(backbone("llama"), SEPARATE_HEAD, load_in_4bit=True)
    rows = rows_of(tokenizer, SEPARATE_HEAD)
    before = logits(model, pack(rows))
    merge_run(run, tmp_path / "merged", torch.float32)
    assert "score.tie" not in load_file(tmp_path / "merged" / "model.safetensors")
    after = plain_logits(tmp_path / "merged", tokenizer, rows)
    assert after.shape == (len(before), 1)
    assert (after[:, 0] - before[:, 0]).abs().max() <= 1e-5
    whole = replace(run.recipe.model, load_in_4bit=False)
    again, _ = load_model(whole, tmp_path / "merged")
    assert before[0, 1] != 0
    assert torch.equal(logits(again, pack(rows))[:, 1], before[:, 1])


def test_a_merge_to_4_bits_leaves_the_head_out(random_run, backbone, tmp_path):
    run, _, tokenizer = random_run(backbone("llama"))
    config = replace(run.recipe.model, load_in_4bit=True)
    merge_run(run, tmp_path / "merged", torch.float32, to_4_bits=True)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert found["score.weight"].dtype == torch.float32
    rows = rows_of(tokenizer)
    after = plain_logits(tmp_path / "merged", tokenizer, rows)
    again, _ = load_model(config, tmp_path / "merged")
    assert (after.softmax(-1) - logits(again, pack(rows)).softmax(-1)).abs().max() <= 0.02
    # As transformers itself quantises the merged model when it loads it:
    merge_run(run, tmp_path / "float32", torch.float32)
    asked = load_classifier(resolve_backbone(replace(config, keep_head=True), folder=tmp_path / "float32"), JOINT_HEAD)
    ours = dict(again.named_parameters())
    for name, weight in asked.named_parameters():
        assert torch.equal(weight.data, ours[name].data), name


def test_shards_hold_at_most_their_limit_and_load(random_run, backbone, tmp_path):
    run, model, tokenizer = random_run(backbone("llama"))
    merge_run(run, tmp_path / "merged", torch.float32, shard_bytes=90_000)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) >= 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        with safe_open(file, "pt") as content:
            keys = list(content.keys())
        assert len(keys) == 1 or file.stat().st_size <= 100_000
    assert len(find_weight_files(tmp_path / "merged")) == 21
    after = plain_logits(tmp_path / "merged", tokenizer, rows_of(tokenizer))
    assert (after - logits(model, pack(rows_of(tokenizer)))).abs().max() <= 1e-4


def test_a_sharded_backbone_is_read(random_run, backbone, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(backbone("llama"), num_labels=3)
    model.model.save_pretrained(tmp_path / "sharded", max_shard_size="150KB")  # and without the prefix 'model.'
    for file in backbone("llama").glob("tokenizer*"):
        (tmp_path / "sharded" / file.name).write_bytes(file.read_bytes())
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    run, trained_model, tokenizer = random_run(tmp_path / "sharded")
    merge_run(run, tmp_path / "merged", torch.float32)
    after = plain_logits(tmp_path / "merged", tokenizer, rows_of(tokenizer))
    assert (after - logits(trained_model, pack(rows_of(tokenizer)))).abs().max() <= 1e-4


def test_an_adapter_that_is_not_merged_to_the_last_layer_is_refused(random_run, backbone, tmp_path):
    run, *_ = random_run(backbone("llama"))
    file = run.model / "adapter_model.safetensors"
    weights = load_file(file)
    for part in ("A", "B"):
        name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"
        weights[name.replace("q_proj", "z_proj")] = weights.pop(name)
    save_file(weights, file)
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.z_proj has no weight"):
        merge_run(run, tmp_path / "merged", torch.float32)


def test_a_weight_that_is_nan_is_refused(random_run, backbone, tmp_path):
    run, *_ = random_run(backbone("llama"))
    file = run.model / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = torch.nan
    save_file(weights, file)
    with pytest.raises(FloatingPointError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        merge_run(run, tmp_path / "merged", torch.float32)


def test_a_backbone_without_safetensors_or_without_a_weight_is_refused(random_run, backbone, tmp_path):
    folder = make_backbone("llama", tmp_path / "base")
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        find_weight_files(tmp_path)
    run, *_ = random_run(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    about = json.loads((run.model / "backbone.json").read_text())
    from rewardmodel.model.weights import fingerprint

    (run.model / "backbone.json").write_text(json.dumps({**about, "fingerprint": fingerprint(folder)}))
    with pytest.raises(InputError, match=r"no weights of model\.norm\.weight"):
        merge_run(run, tmp_path / "merged", torch.float32)


def test_a_backbone_that_is_quantised_in_its_files_is_refused(random_run, backbone, tmp_path):
    run, *_ = random_run(backbone("llama"), folder=tmp_path / "first")
    merge_run(run, tmp_path / "quantised", torch.float32, to_4_bits=True)
    second, *_ = random_run(tmp_path / "quantised", folder=tmp_path / "second", load_in_4bit=True)
    assert saved_backbone_folder(second.recipe.model, second.model) == tmp_path / "quantised"
    with pytest.raises(InputError, match="stored quantised"):
        merge_run(second, tmp_path / "merged", torch.float32)
