"""What this project relies on, or works around, in the libraries below it: a failure here names what changed."""

import inspect
import json
import runpy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AutoModelForSequenceClassification, BitsAndBytesConfig, Trainer
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_layers import GenericForSequenceClassification
from trl import RewardConfig, RewardTrainer

from rewardmodel.data.formats import read_battles
from rewardmodel.model import attention
from rewardmodel.prompt.tokenization import tokenize
from rewardmodel.training.train import train

LORA = {"task_type": "SEQ_CLS", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def plain_classifier(folder, **options):
    options = {"num_labels": 3, "dtype": torch.float32, **options}
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def four_bits(**options) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)


def trl_trainer(model, tokenizer, recipe, **options) -> RewardTrainer:
    rows = tokenize(read_battles(recipe.data.train), tokenizer, recipe.prompt)
    rows = rows.rename_column("input_ids", "chosen_ids").add_column("rejected_ids", rows["input_ids"][:])
    args = RewardConfig(
        output_dir=recipe.trainer["output_dir"], use_cpu=True, bf16=False, report_to="none", max_length=1000,
        **CHECKPOINTING_OFF, **options,
    )  # fmt: skip
    return RewardTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


NEW_NAMES = {"activation_checkpointing"} & set(RewardConfig.__dataclass_fields__)
CHECKPOINTING_OFF = dict.fromkeys(NEW_NAMES or {"gradient_checkpointing"}, False)


def test_trl_lets_in_one_label_only(backbone, tokenizer, recipe):
    with pytest.raises(ValueError, match="num_labels"):
        trl_trainer(plain_classifier(backbone("llama")), tokenizer, recipe)


def test_trl_casts_trainable_weights_to_bfloat16_on_a_quantised_backbone(backbone, tokenizer, recipe):
    model = plain_classifier(backbone("llama"), num_labels=1, quantization_config=four_bits())
    model = get_peft_model(model, LoraConfig(**LORA, modules_to_save=["score"]))
    trl_trainer(model, tokenizer, recipe)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.bfloat16}


def test_trl_drops_rows_beyond_max_length(backbone, tokenizer, recipe):
    trainer = trl_trainer(plain_classifier(backbone("llama"), num_labels=1), tokenizer, recipe)
    trainer.args.max_length = 10
    assert len(trainer._prepare_dataset(trainer.train_dataset, tokenizer, trainer.args, "eval")) == 0


def test_trl_switches_dropout_off_unless_told():
    assert RewardConfig.__dataclass_fields__["disable_dropout"].default is True


@pytest.mark.parametrize(
    ("owner", "method", "parameters"),
    [
        (RewardTrainer, "_prepare_dataset", ["dataset", "processing_class", "args", "dataset_name"]),
        (RewardTrainer, "compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]),
        (RewardTrainer, "create_model_card", ["model_name", "dataset_name", "tags"]),
        (Trainer, "_get_num_items_in_batch", ["batch_samples", "device"]),
        (Trainer, "training_step", ["model", "inputs", "num_items_in_batch"]),
        (Trainer, "get_train_dataloader", []),
        (Trainer, "evaluate", ["eval_dataset", "ignore_keys", "metric_key_prefix"]),
    ],
)
def test_the_methods_that_are_overridden_are_there(owner, method, parameters):
    assert list(inspect.signature(getattr(owner, method)).parameters)[1:] == parameters


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (BlockMask.from_kv_blocks, ["kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"]),
        (BlockMask.from_kv_blocks, ["BLOCK_SIZE", "mask_mod", "seq_lengths"]),
        (flex_attention, ["score_mod", "block_mask", "scale", "enable_gqa"]),
        (sdpa_attention_forward, ["module", "query", "key", "value", "attention_mask"]),
        (get_target_dtype, ["query", "module"]),
        (_flash_attention_forward, ["query_states", "key_states", "value_states", "attention_mask"]),
        (_flash_attention_forward, ["query_length", "is_causal", "softmax_scale", "sliding_window"]),
        (_flash_attention_forward, ["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"]),
        (_flash_attention_forward, ["target_dtype", "attn_implementation"]),
    ],
)
def test_the_parameters_of_attention_are_there_and_in_this_order(function, parameters):
    taken = list(inspect.signature(function).parameters)
    assert [name for name in taken if name in parameters] == parameters


def varlen_of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """Has torch 2.10's signature, which knows neither a scale nor a window."""


def varlen_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """Has torch 2.11's signature, which does not ask whether there are fewer heads of keys; returns the keys."""
    return key


def test_varlen_attention_is_not_used_where_torch_is_2_10_and_gets_the_keys_as_they_are_where_it_is_2_11(monkeypatch):
    monkeypatch.setattr(AttentionInterface, "register", lambda *_: None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of_torch_2_10)
    assert runpy.run_path(attention.__file__)["HAS_VARLEN"] is False
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of_torch_2_11)
    module = runpy.run_path(attention.__file__)
    assert module["HAS_VARLEN"] is True
    queries, keys = torch.rand(3, 4, 8), torch.rand(3, 2, 8)  # (T, heads, head_dim)
    packing = module["Varlen"](*[None] * len(module["Varlen"]._fields))
    found = module["_varlen"](queries, keys, keys, packing, None)
    assert found is keys


def test_a_trl_trainer_says_whether_its_loss_is_scaled():
    assert RewardTrainer.loss_is_scaled_for_ga is False  # ours is; test_trainer shows that it is then left alone


def test_trainer_state_is_the_last_file_of_a_checkpoint(recipe):
    run, _ = train(recipe)
    for folder in run.glob("checkpoint-*"):
        written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert max(written, key=written.get) == "trainer_state.json"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text"])
def test_decoder_classifiers_are_generic_and_keep_their_head_as_score(family, backbone):
    model = plain_classifier(backbone(family))
    assert isinstance(model, GenericForSequenceClassification)
    assert isinstance(model.score, torch.nn.Linear)
    assert model.base_model_prefix == "model"


def test_transformers_pools_before_a_true_end_that_shares_the_padding_id(backbone):
    model = plain_classifier(backbone("llama")).eval()
    model.config.pad_token_id = 0
    ids = torch.tensor([[5, 6, 7, 0]])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, model(input_ids=ids[:, :3]).logits, atol=1e-6)


def test_a_skip_list_without_the_head_quantises_it(backbone):
    model = plain_classifier(backbone("llama"), quantization_config=four_bits(llm_int8_skip_modules=["lm_head"]))
    assert "bitsandbytes" in type(model.score).__module__


def test_peft_saves_and_loads_the_head_of_a_sequence_classifier(backbone, tmp_path):
    model = get_peft_model(plain_classifier(backbone("llama")), LoraConfig(**LORA, modules_to_save=["score"]))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as weights:
        assert any(key.endswith("score.weight") for key in weights.keys())  # noqa: SIM118
    again = PeftModel.from_pretrained(plain_classifier(backbone("llama")), tmp_path)
    head, loaded = (m.base_model.model.score.modules_to_save["default"].weight for m in (model, again))
    assert torch.equal(head, loaded)


def test_peft_keeps_adapters_in_float32_on_a_bfloat16_backbone(backbone):
    model = get_peft_model(plain_classifier(backbone("llama"), dtype=torch.bfloat16), LoraConfig(**LORA))
    assert {w.dtype for name, w in model.named_parameters() if "lora_" in name} == {torch.float32}


def test_pefts_own_pissa_conversion_loses_the_head(backbone, tmp_path):
    model = plain_classifier(backbone("llama"))
    model = get_peft_model(model, LoraConfig(**LORA, modules_to_save=["score"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    try:
        model.save_pretrained(tmp_path / "saved", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    except ValueError:
        return  # it does not get as far as that
    with safe_open(tmp_path / "saved" / "adapter_model.safetensors", "pt") as weights:
        assert not any("score" in key for key in weights.keys())  # noqa: SIM118


def test_layers_to_transform_wants_names_of_layers():
    with pytest.raises(ValueError, match="layers_to_transform"):
        LoraConfig(target_modules="all-linear", layers_to_transform=[1])


def test_split_special_tokens_makes_them_text(tokenizer):
    assert tokenizer("<eos>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]
    split = tokenizer(["<eos>"], add_special_tokens=False, split_special_tokens=True)["input_ids"][0]
    assert tokenizer.eos_token_id not in split


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text"])
def test_a_registered_attention_is_handed_what_the_decoder_is_given_and_no_mask(family, backbone):
    asked = []

    def attention(module, query, key, value, attention_mask, note, **kwargs):
        asked.append((attention_mask, note))
        return query.transpose(1, 2), None

    AttentionInterface.register("of_this_test", attention)
    model = plain_classifier(backbone(family))
    model.config._attn_implementation = "of_this_test"
    model.model(torch.arange(5)[None], note="seen")
    assert asked == [(None, "seen")] * 2


def test_torch_tells_whether_the_cpu_has_bfloat16():
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)


def test_an_adapters_layout_is_pefts_own(recipe):
    run, _ = train(recipe)
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "score" in config["modules_to_save"]
    assert config["base_model_name_or_path"] == recipe.model.model_name_or_path
