import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from builders import (
    FAMILIES,
    SETTINGS,
    SMALL,
    batch_of,
    config_of,
    logits,
    make_backbone,
    make_tokenizer,
    pack,
    parametrize_some,
    reload_in_fresh_process,
    reload_model,
    rows_of,
    stored,
    train_a_little,
)
from safetensors.torch import load_file, save_file

from rewardmodel.config.schema import ModelConfig, PromptConfig
from rewardmodel.errors import InputError
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.batching import pad
from rewardmodel.model.families import HEADS, Family
from rewardmodel.model.forward import choose_batching
from rewardmodel.model.loading import build_model, load_classifier, load_model, load_tokenizer, save_model
from rewardmodel.model.packing import is_packed
from rewardmodel.model.precision import autocast, compute_dtype
from rewardmodel.objectives import JOINT_HEAD, OBJECTIVES, SEPARATE_HEAD
from rewardmodel.prompt.encoder import PromptEncoder

VARIANTS = {
    "plain": {},
    "4bit": {"load_in_4bit": True},
    "8bit": {"load_in_8bit": True},
    "responses": {"pooling": "responses", "load_in_4bit": True},
}


@pytest.mark.slow  # loads every family in every precision
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_predicts_the_same(family, variant, backbone, tmp_path):
    config = config_of(backbone(family), **VARIANTS[variant])
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    batch = batch_of(tokenizer)
    train_a_little(model, batch)
    before = logits(model, batch)
    assert before.std() > 1e-3  # training moved it away from the even start
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    again, _ = reload_model(config, tmp_path / "model")
    assert torch.equal(logits(again, batch), before)


@pytest.mark.slow  # starts a fresh process, one for all cases
def test_a_fresh_process_predicts_the_same_in_4_bits(backbone, tmp_path):
    configs = {family: config_of(backbone(family), load_in_4bit=True) for family in FAMILIES}
    configs["stored in 4 bits"] = config_of(stored(backbone("llama"), tmp_path, SETTINGS["as is"]))
    cases, expected = {}, {}
    for name, config in configs.items():
        model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
        batch = batch_of(tokenizer)
        train_a_little(model, batch)
        save_model(model, tokenizer, resolve_backbone(config), tmp_path / name / "model")
        cases[name], expected[name] = (config, tmp_path / name / "model", batch), logits(model, batch)
    for name, fresh in reload_in_fresh_process(cases, tmp_path / "fresh").items():
        assert (fresh.softmax(-1) - expected[name].softmax(-1)).abs().max() <= 1e-5, name


@pytest.mark.parametrize("variant", VARIANTS)
@parametrize_some("family", FAMILIES, ("llama", "gemma2"))
def test_head_and_adapters_are_float32_and_the_backbone_is_quantised(family, variant, backbone):
    model, _ = build_model(resolve_backbone(config_of(backbone(family), **VARIANTS[variant])), JOINT_HEAD, seed=0)
    for name, module in model.named_modules():
        if any(head in name.split(".") for head in HEADS):
            assert "bitsandbytes" not in type(module).__module__, name
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    quantised = sum("bitsandbytes" in type(module).__module__ for module in model.modules())
    assert bool(quantised) == (variant != "plain")


def test_a_true_last_token_that_is_the_padding_id_counts(backbone):
    model, _ = build_model(resolve_backbone(config_of(backbone("llama"))), JOINT_HEAD, seed=0)
    torch.nn.init.normal_(model.get_submodule("base_model.model.score").modules_to_save["default"].weight)
    whole, shorter = (
        pack([{"input_ids": ids, "segment_ids": [0] * len(ids), "branches": [0, len(ids)], "length": len(ids)}])
        for ids in ([5, 6, 7, 0], [5, 6, 7])
    )
    assert not torch.allclose(logits(model, whole), logits(model, shorter))


@pytest.mark.parametrize("pooling", ["last", "responses"])
def test_a_reward_head_carries_its_tie_parameter_through_saving(pooling, backbone, tmp_path):
    config = config_of(backbone("llama"), pooling=pooling, load_in_4bit=True)
    model, tokenizer = build_model(resolve_backbone(config), SEPARATE_HEAD, seed=0)
    batch = pack(rows_of(tokenizer, 8, "separate", "response"))
    train_a_little(model, batch)
    before = logits(model, batch)
    assert before.shape == (2 * 8, 2)
    assert before[0, 1] != 0
    assert (before[:, 1] == before[0, 1]).all()
    assert before[:, 0].std() > 1e-3
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    again, _ = reload_model(config, tmp_path / "model")
    assert torch.equal(logits(again, batch), before)
    assert again.config.id2label == {0: "reward"}


def test_peft_alone_gives_the_rewards_of_a_scalar_model(backbone, tmp_path):
    from peft import AutoPeftModelForSequenceClassification

    config = config_of(backbone("qwen3"))
    model, tokenizer = build_model(resolve_backbone(config), SEPARATE_HEAD, seed=0)
    rows = rows_of(tokenizer, 8, "separate", "response")
    train_a_little(model, pack(rows))
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1).eval()
    padded = pad(rows, tokenizer.pad_token_id)
    with torch.no_grad():
        theirs = plain(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    assert (theirs[:, 0] - logits(model, pack(rows))[:, 0]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_head_has_the_shape_that_its_objective_asks_for(name, backbone):
    model, _ = build_model(resolve_backbone(config_of(backbone("llama"))), OBJECTIVES[name].head, seed=0)
    head = model.get_submodule("base_model.model.score").modules_to_save["default"]
    assert head.out_features == OBJECTIVES[name].head.num_labels
    assert hasattr(head, "tie") == OBJECTIVES[name].head.tie


def test_lora_only_from_a_layer_up(backbone):
    model, _ = build_model(resolve_backbone(config_of(backbone("llama"), lora_first_layer=1)), JOINT_HEAD, seed=0)
    adapted = {name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" in name}
    assert adapted
    assert all(".layers.1." in name for name in adapted)


def test_lora_is_on_every_linear_layer_but_the_head(backbone):
    model, _ = build_model(resolve_backbone(config_of(backbone("qwen3"))), JOINT_HEAD, seed=0)
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_all_linear_is_another_name_for_the_default(backbone):
    made = {}
    for targets in (None, "all-linear"):
        config = config_of(backbone("llama"), lora_target_modules=targets)
        model, _ = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
        made[targets] = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert made["all-linear"] == made[None] != set()


@pytest.mark.parametrize("key", ["use_rslora", "use_dora"])
def test_lora_variants_are_saved_and_reloaded(key, backbone, tmp_path):
    config = config_of(backbone("llama"), **{key: True}, load_in_4bit=True)
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    assert getattr(model.peft_config["default"], key)
    batch = batch_of(tokenizer)
    train_a_little(model, batch)
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    again, _ = reload_model(config, tmp_path / "model")
    assert (logits(again, batch) - logits(model, batch)).abs().max() <= 1e-5


def test_peft_alone_loads_the_adapter(backbone, tmp_path):
    from peft import AutoPeftModelForSequenceClassification

    config = config_of(backbone("llama"))
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    rows = rows_of(tokenizer)
    train_a_little(model, pack(rows))
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3).eval()
    padded = pad(rows, tokenizer.pad_token_id)
    with torch.no_grad():
        theirs = plain(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    assert (theirs - logits(model, pack(rows))).abs().max() <= 1e-5


def test_a_full_fine_tune_is_saved_and_reloaded(backbone, tmp_path):
    config = config_of(backbone("llama"), use_peft=False)
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    batch = batch_of(tokenizer)
    train_a_little(model, batch)
    assert all(weight.requires_grad for weight in model.parameters())
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    again, _ = reload_model(config, tmp_path / "model")
    assert torch.equal(logits(again, batch), logits(model, batch))


def saved_model(config: ModelConfig, folder) -> None:
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    save_model(model, tokenizer, resolve_backbone(config), folder)


def test_a_model_saved_without_its_head_is_refused(backbone, tmp_path):
    config = config_of(backbone("llama"))
    saved_model(config, tmp_path / "model")
    file = tmp_path / "model" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if ".score." not in key}, file)
    with pytest.raises(InputError, match="the saved adapter has no head 'score'"):
        load_model(config, tmp_path / "model")


def test_another_backbone_is_refused(backbone, tmp_path):
    config = config_of(backbone("llama"))
    saved_model(config, tmp_path / "model")
    another = make_backbone("llama", tmp_path / "another", initializer_range=0.1)
    other = dataclasses.replace(config, model_name_or_path=str(another))
    with pytest.raises(InputError, match="trained on other weights"):
        load_model(other, tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"use_peft": False, "load_in_4bit": True}, "cannot train itself"),
        ({"lora_first_layer": 2}, "layers 0 to 1"),
        ({"attn_implementation": "nonsense"}, "computes something else|use one of"),
        ({"device": "cuda"}, "torch sees no CUDA device"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(changes, message, backbone):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    config = dataclasses.replace(config_of(backbone("llama")), **changes)
    with pytest.raises(InputError, match=message):
        resolve_backbone(config, trainer={})


def test_gemma2_is_not_run_with_attention_that_drops_its_cap(backbone):
    with pytest.raises(InputError, match="gemma2"):
        resolve_backbone(config_of(backbone("gemma2"), attn_implementation="sdpa"))


def test_precision_follows_the_hardware(monkeypatch):
    auto, cpu, cuda = ModelConfig(), torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert compute_dtype(auto, cpu, Family()) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert compute_dtype(auto, cpu, Family()) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert compute_dtype(auto, cuda, Family()) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert compute_dtype(auto, cuda, Family()) == torch.float16
    assert compute_dtype(auto, cuda, Family(float16=False)) == torch.float32
    with pytest.raises(InputError, match="float16 does not train on a CPU"):
        compute_dtype(ModelConfig(dtype="float16"), cpu, Family())


def test_the_head_computes_in_float32_under_autocast(backbone):
    config = dataclasses.replace(config_of(backbone("llama")), dtype="bfloat16")
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert logits(model, batch_of(tokenizer)).dtype == torch.float32


def test_a_new_head_starts_even_handed(backbone):
    model, tokenizer = build_model(resolve_backbone(config_of(backbone("gemma2"))), JOINT_HEAD, seed=0)
    assert np.allclose(logits(model, batch_of(tokenizer)).softmax(-1).numpy(), 1 / 3)


GENERIC = {
    "olmo2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "stablelm": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},  # not torch's linear layers, but the same transposed
    "electra": {"query", "key", "value", "dense"},
}
"""The linear layers of families that are not in the table."""


@pytest.mark.parametrize("variant", ["plain", "4bit"])
@parametrize_some("family", GENERIC, [*GENERIC][:1])
def test_a_family_that_is_not_in_the_table_trains_and_reloads(family, variant, tmp_path, caplog):
    config = config_of(make_backbone(family, tmp_path / "backbone"), **VARIANTS[variant])
    with caplog.at_level("INFO"):
        model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    assert f"{family} is not in the table of families: generic rules apply" in caplog.text
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert {name.rpartition(".")[2] for name in adapted} == GENERIC[family]
    assert not [name for name in adapted if {*name.split(".")} & {*HEADS}]
    batch = choose_batching(model, tokenizer.pad_token_id).collate(rows_of(tokenizer))
    train_a_little(model, batch)
    before = logits(model, batch)
    assert before.std() > 1e-3
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    again, _ = reload_model(config, tmp_path / "model")
    assert torch.equal(logits(again, batch), before)


def test_a_gemma3_that_sees_is_adapted_where_it_reads(tmp_path):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    eyes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shared = {"mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302}
    settings = Gemma3Config(
        text_config={**SMALL, "sliding_window": 32, "initializer_range": 0.2},
        vision_config={**eyes, "image_size": 28, "patch_size": 7},
        **shared,
    )
    Gemma3ForConditionalGeneration(settings).save_pretrained(tmp_path / "backbone")
    make_tokenizer().save_pretrained(tmp_path / "backbone")
    config = config_of(tmp_path / "backbone")
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 2 * 7
    assert all(".language_model.layers." in name for name in adapted)
    rows = rows_of(tokenizer)
    assert is_packed(model)
    train_a_little(model, pack(rows))
    before = logits(model, pack(rows))
    assert before.std() > 1e-3
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    again, _ = reload_model(config, tmp_path / "model")
    assert torch.equal(logits(again, pack(rows)), before)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3).eval()
    padded = pad(rows, tokenizer.pad_token_id)
    with torch.no_grad():
        theirs = plain(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    assert (theirs - before).abs().max() <= 1e-5


@pytest.fixture
def published(tmp_path):
    """Return the folder of a published Llama reward model: one label, a head of its own."""
    return make_backbone("llama", tmp_path / "published", num_labels=1)


def published_head(folder) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["score.weight"]


@pytest.mark.parametrize("variant", ["plain", "4bit"])
def test_the_head_of_a_published_reward_model_is_kept_and_goes_on_learning(variant, published, tmp_path):
    config = config_of(published, keep_head=True, **VARIANTS[variant])
    model, tokenizer = build_model(resolve_backbone(config), SEPARATE_HEAD, seed=0)
    head = model.get_submodule("base_model.model.score").modules_to_save["default"]
    assert torch.equal(head.weight, published_head(published))
    assert head.tie == 0
    batch = pack(rows_of(tokenizer, 8, "separate", "response"))
    train_a_little(model, batch)
    assert not torch.equal(head.weight, published_head(published))
    before = logits(model, batch)
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    again, _ = reload_model(config, tmp_path / "model")
    assert torch.equal(logits(again, batch), before)


def test_a_head_that_is_kept_stays_float32_over_a_bfloat16_backbone(published):
    config = dataclasses.replace(config_of(published, keep_head=True), dtype="bfloat16")
    model, _ = build_model(resolve_backbone(config), SEPARATE_HEAD, seed=0)
    head = model.get_submodule("base_model.model.score").modules_to_save["default"]
    assert torch.equal(head.weight, published_head(published))


def test_older_weight_files_of_a_published_reward_model_are_read_too(published):
    weights = load_file(published / "model.safetensors")
    torch.save(weights, published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()
    model, _ = build_model(resolve_backbone(config_of(published, keep_head=True)), SEPARATE_HEAD, seed=0)
    head = model.get_submodule("base_model.model.score").modules_to_save["default"]
    assert torch.equal(head.weight, weights["score.weight"])


@pytest.mark.parametrize("shape", [SEPARATE_HEAD, JOINT_HEAD])
def test_the_head_of_a_published_reward_model_is_left_unless_it_is_to_be_kept(shape, published):
    model, _ = build_model(resolve_backbone(config_of(published)), shape, seed=0)
    head = model.get_submodule("base_model.model.score").modules_to_save["default"]
    assert head.weight.shape == (shape.num_labels, 64)
    assert (head.weight == 0).all()


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        (
            {},
            JOINT_HEAD,
            r"has 'score\.weight' of size \(1, 64\), and objective\.name needs \(3, 64\); set it to false",
        ),
        ({"pooling": "responses"}, JOINT_HEAD, r"of size \(1, 64\), and objective\.name needs \(3, 128\)"),
    ],
)
def test_a_published_head_of_another_width_is_not_kept(changes, shape, message, published):
    with pytest.raises(InputError, match=r"^model\.keep_head: .*" + message):
        build_model(resolve_backbone(config_of(published, keep_head=True, **changes)), shape, seed=0)


def test_a_backbone_without_a_head_has_none_to_keep(backbone):
    with pytest.raises(InputError, match=r"^model\.keep_head: .* has no 'score\.weight'"):
        build_model(resolve_backbone(config_of(backbone("llama"), keep_head=True)), SEPARATE_HEAD, seed=0)


def test_a_full_fine_tune_goes_on_from_one_of_ours(backbone, tmp_path):
    config = config_of(backbone("llama"), use_peft=False)
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    batch = batch_of(tokenizer)
    train_a_little(model, batch)
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    further, _ = build_model(resolve_backbone(config_of(tmp_path / "model", keep_head=True)), JOINT_HEAD, seed=0)
    assert torch.equal(logits(further, batch), logits(model, batch))


def test_a_pooler_that_the_backbone_lacks_is_new_and_saved_with_the_head(tmp_path, caplog):
    config = config_of(make_backbone("bert", tmp_path / "backbone"))
    assert not [key for key in load_file(tmp_path / "backbone" / "model.safetensors") if "pooler" in key]
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert {key for key in saved if "lora" not in key} == {
        f"base_model.model.{layer}.{kind}"
        for layer in ("classifier", "bert.pooler.dense")
        for kind in ("weight", "bias")
    }


def test_a_backbone_with_weights_missing_is_refused(tmp_path):
    folder = make_backbone("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {key: one for key, one in weights.items() if "layers.1.mlp" not in key},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(InputError, match=r"its weight files lack model\.layers\.1\.mlp\.down_proj\.weight, "):
        build_model(resolve_backbone(config_of(folder)), JOINT_HEAD, seed=0)


def test_weights_of_other_sizes_than_the_configuration_says_are_refused(tmp_path):
    folder = make_backbone("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(InputError, match=r"weights of other sizes than its config\.json says: .*mlp"):
        build_model(resolve_backbone(config_of(folder)), JOINT_HEAD, seed=0)


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
def test_the_tokenizer_of_deberta_v3_is_read_from_its_sentencepiece_file(tmp_path):
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"PROMPT RESPONSE word {chr(97 + n % 26)}{n}" for n in range(400)))
    pieces = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]"}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spm"), vocab_size=100, minloglevel=2,
        **pieces, eos_piece="[SEP]", unk_piece="[UNK]",
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    encoder = PromptEncoder(load_tokenizer(tmp_path), PromptConfig(max_length=160))
    (one,) = encoder([["word"]], [["a1"]], [["b2"]])
    tokens = encoder.tokenizer.convert_ids_to_tokens(one.input_ids)
    assert [tokens[0], tokens[-1], tokens.count("[SEP]")] == ["[CLS]", "[SEP]", 3]
    assert "[UNK]" not in [token for token in tokens if token in ("word", "a1", "b2")]


@pytest.fixture
def launched(monkeypatch):
    """Return a function that sets the variables of a launch of two processes: launched("FSDP")."""

    def started(strategy: str) -> None:
        for name, value in {"WORLD_SIZE": "2", f"ACCELERATE_USE_{strategy}": "true", "FSDP_VERSION": "2"}.items():
            monkeypatch.setenv(name, value)

    return started


@pytest.mark.parametrize(
    ("strategy", "keys", "waits"),
    [("FSDP", {}, True), ("FSDP", {"load_in_4bit": True}, False), ("DDP", {}, False)],
)
def test_what_fsdp_will_shard_waits_in_the_hosts_memory(strategy, keys, waits, backbone, launched, monkeypatch):
    launched(strategy)
    resolved = resolve_backbone(config_of(backbone("llama"), **keys))
    elsewhere = dataclasses.replace(resolved, device=torch.device("meta"))  # in the place of a GPU
    asked = []

    def load(backbone, head, on_host):
        asked.append(on_host)
        plain = dataclasses.replace(backbone.model, load_in_4bit=False)
        return load_classifier(dataclasses.replace(backbone, model=plain), head, on_host=on_host)

    monkeypatch.setattr("rewardmodel.model.loading.load_classifier", load)
    model, _ = build_model(elsewhere, JOINT_HEAD, seed=0)
    assert asked == [waits]
    assert {weight.device.type for weight in model.parameters()} == {"cpu" if waits else "meta"}


def test_every_process_reads_a_saved_model_whole_and_the_launchers_wish_is_restored(backbone, tmp_path, monkeypatch):
    name, seen = "FSDP_CPU_RAM_EFFICIENT_LOADING", []
    config = config_of(backbone("llama"))
    saved_model(config, tmp_path / "model")
    loaded = load_classifier

    def load(*given, **keys):
        seen.append(os.environ.get(name))
        return loaded(*given, **keys)

    monkeypatch.setattr("rewardmodel.model.loading.load_classifier", load)
    for wish, there in (("true", "false"), ("false", "false"), (None, None)):
        monkeypatch.delenv(name, raising=False) if wish is None else monkeypatch.setenv(name, wish)
        load_model(config, tmp_path / "model")
        assert (seen.pop(), os.environ.get(name)) == (there, wish)
    monkeypatch.setenv(name, "true")
    with pytest.raises(InputError, match="trained on other weights"):
        load_model(config_of(backbone("qwen2")), tmp_path / "model")
    assert os.environ[name] == "true"
