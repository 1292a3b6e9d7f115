"""Encoders through the whole line: full fine-tunes and LoRA, quantised or not, of tiny random backbones."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from builders import (
    ENCODERS,
    battle_frame,
    config_of,
    logits,
    make_backbone,
    make_encoder_tokenizer,
    parametrize_some,
    rows_of,
    train_a_little,
    write_csv,
)
from fresh import run_fresh
from safetensors.torch import load_file

from rewardmodel.battles import swap
from rewardmodel.config.schema import DataConfig, ModelConfig, ObjectiveConfig, PromptConfig, Recipe
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.inference.predict import predict
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.batching import pad
from rewardmodel.model.families import find_family
from rewardmodel.model.forward import choose_batching
from rewardmodel.model.loading import build_model, load_model, save_model
from rewardmodel.model.packing import is_packed
from rewardmodel.model.precision import autocast
from rewardmodel.objectives import JOINT_HEAD, OBJECTIVES, SEPARATE_HEAD
from rewardmodel.predictions import predicted
from rewardmodel.prompt.encoder import PromptEncoder
from rewardmodel.run_folder import RunFolder
from rewardmodel.training.train import train

VARIANTS = {
    "full": {"use_peft": False},
    "lora": {},
    "4bit": {"load_in_4bit": True},
    "8bit": {"load_in_8bit": True},
}

HEADS = {
    "deberta-v2": {"pooler", "classifier"},
    "bert": {"pooler", "classifier"},
    "roberta": {"classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "modernbert": {"head", "classifier"},
}

SHAPES = {"joint": JOINT_HEAD, "separate": SEPARATE_HEAD}

each_family = parametrize_some("name", ENCODERS, ("deberta-v2", "distilbert"))
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_encoding = pytest.mark.parametrize("encoding", SHAPES)


def batch_of(tokenizer, encoding="joint"):
    return pad(rows_of(tokenizer, 8, encoding), tokenizer.pad_token_id)


def trained(backbone, name, encoding="joint", **changes):
    """Return a model that has trained a little, the configuration, the tokenizer and a batch."""
    config = config_of(backbone(name), **changes)
    model, tokenizer = build_model(resolve_backbone(config), SHAPES[encoding], seed=0)
    batch = batch_of(tokenizer, encoding)
    train_a_little(model, batch)
    return model, config, tokenizer, batch


def heads(model):
    """Return the modules of a head by name, those that train where PEFT keeps two."""
    found = {name: part for name, part in model.named_modules() if HEADS[model.config.model_type] & {*name.split(".")}}
    trained = {name: part for name, part in found.items() if "modules_to_save.default" in name}
    return trained or found


@each_variant
@each_family
def test_heads_are_float32_and_never_quantised_nor_adapted(name, variant, backbone):
    model, _ = build_model(resolve_backbone(config_of(backbone(name), **VARIANTS[variant])), JOINT_HEAD, seed=0)
    parts = heads(model)
    assert {part for key in parts for part in key.split(".")} >= HEADS[name]
    for part_name, part in parts.items():
        assert "bitsandbytes" not in type(part).__module__, part_name
        assert "lora" not in part_name
        assert {weight.dtype for weight in part.parameters()} <= {torch.float32}
        assert all(weight.requires_grad for weight in part.parameters())
    quantised = any("bitsandbytes" in type(module).__module__ for module in model.modules())
    assert quantised == ("bit" in variant)


@each_family
def test_lora_is_on_every_linear_layer_of_the_encoder(name, backbone):
    model, _ = build_model(resolve_backbone(config_of(backbone(name))), JOINT_HEAD, seed=0)
    adapted = {key.split(".lora_A")[0] for key, _ in model.named_parameters() if "lora_A" in key}
    linear = {
        key.removesuffix(".base_layer")
        for key, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and "lora_" not in key
    }
    linear = {key for key in linear if not HEADS[name] & {*key.split(".")}}
    assert adapted == linear
    assert {key.rpartition(".")[2] for key in adapted} == {*find_family(name).lora_targets}


@pytest.mark.parametrize("variant", ["lora", "4bit"])
@each_family
def test_lora_only_from_a_layer_up(name, variant, backbone):
    config = config_of(backbone(name), lora_first_layer=1, **VARIANTS[variant])
    model, _ = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    adapted = [key for key, _ in model.named_parameters() if "lora_A" in key]
    assert adapted
    assert all(".1." in key for key in adapted)


@each_encoding
@each_family
def test_a_new_head_starts_even_handed_and_its_other_layers_by_seed(name, encoding, backbone):
    config = config_of(backbone(name))
    states = []
    for seed in (0, 0, 1):
        model, tokenizer = build_model(resolve_backbone(config), SHAPES[encoding], seed)
        assert (logits(model, batch_of(tokenizer, encoding)) == 0).all()
        states.append({key: part for key, part in model.state_dict().items() if HEADS[name] & {*key.split(".")}})
    one, same, other = states
    assert all(torch.equal(one[key], same[key]) for key in one)
    pretrained = name == "modernbert"  # its head has the layers of the language model's, all but the last
    assert any(not torch.equal(one[key], other[key]) for key in one) == (not pretrained)


@parametrize_some(
    ("name", "variant"),
    itertools.product(ENCODERS, VARIANTS),
    quick=[("deberta-v2", "4bit"), ("roberta", "lora"), ("distilbert", "8bit"), ("modernbert", "full")],
)
def test_a_saved_encoder_predicts_the_same(name, variant, backbone, tmp_path):
    model, config, tokenizer, batch = trained(backbone, name, **VARIANTS[variant])
    before = logits(model, batch)
    assert before.dtype == torch.float32
    assert before.std() > 1e-3
    save_model(model, tokenizer, resolve_backbone(config), tmp_path / "model")
    again, _ = load_model(config, tmp_path / "model")
    assert torch.equal(logits(again, batch), before)


PLAIN = """
import json, sys, torch
from pathlib import Path
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification
from rewardmodel.config.schema import ModelConfig
from rewardmodel.model.loading import load_model

folder = Path(sys.argv[1])
for case in json.loads((folder / "cases.json").read_text()):
    here = folder / case["key"]
    kind = AutoModelForSequenceClassification
    if (here / "model" / "adapter_config.json").is_file():
        kind = AutoPeftModelForSequenceClassification
    plain = kind.from_pretrained(here / "model", num_labels=case["labels"]).eval()
    ours, _ = load_model(ModelConfig(**case["config"]), here / "model")
    batch = torch.load(here / "batch.pt")
    with torch.no_grad():
        theirs = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.save([theirs, ours(**batch).logits], here / "fresh.pt")
"""


@pytest.fixture(scope="module")
def fresh(backbone, tmp_path_factory):
    """Return logits of saved encoders: as saved, by transformers and PEFT alone, and by us, in one fresh process."""
    folder = tmp_path_factory.mktemp("fresh")
    cases, before = [], {}
    for name in ENCODERS:
        for encoding, shape in SHAPES.items():
            for variant in ("full", "lora"):
                key = f"{name} {encoding} {variant}"
                model, config, tokenizer, batch = trained(backbone, name, encoding, **VARIANTS[variant])
                save_model(model, tokenizer, resolve_backbone(config), folder / key / "model")
                torch.save(batch, folder / key / "batch.pt")
                before[key] = logits(model, batch)
                config = dataclasses.asdict(config)
                cases.append({"key": key, "labels": shape.num_labels, "config": config})
    (folder / "cases.json").write_text(json.dumps(cases))
    run_fresh(PLAIN, folder)
    return {key: [saved, *torch.load(folder / key / "fresh.pt")] for key, saved in before.items()}


@pytest.mark.slow  # starts a fresh process, one for all cases
@pytest.mark.parametrize("variant", ["full", "lora"])
@each_encoding
@each_family
def test_transformers_and_peft_alone_give_the_same_logits_in_a_fresh_process(name, encoding, variant, fresh):
    saved, theirs, ours = fresh[f"{name} {encoding} {variant}"]
    assert torch.equal(ours, saved)
    assert saved[:, 0].std() > 1e-3
    width = SHAPES[encoding].num_labels
    assert theirs.shape == (len(saved), width)
    assert (theirs - saved[:, :width]).abs().max() <= 1e-5
    if encoding == "separate":
        assert saved.shape[1] == 2
        assert saved[0, 1] != 0
        assert (saved[:, 1] == saved[0, 1]).all()


@each_family
def test_padding_changes_nothing(name, backbone):
    model, _, tokenizer, _ = trained(backbone, name)
    rows = rows_of(tokenizer, 8)
    assert not is_packed(model)
    how = choose_batching(model, tokenizer.pad_token_id)
    together = logits(model, how.collate(rows))
    alone = torch.cat([logits(model, how.collate([row])) for row in rows])
    assert len({row["length"] for row in rows}) > 2
    assert (together - alone).abs().max() <= 1e-5


@parametrize_some(
    ("name", "variant"),
    itertools.product(ENCODERS, VARIANTS),
    quick=[("deberta-v2", "lora"), ("deberta-v2", "8bit"), ("roberta", "full"), ("distilbert", "4bit")],
)
def test_heads_compute_in_float32_under_autocast_and_master_weights_are_float32(name, variant, backbone):
    config = dataclasses.replace(config_of(backbone(name), **VARIANTS[variant]), dtype="bfloat16")
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=0)
    frozen = {weight.dtype for weight in model.parameters() if not weight.requires_grad and weight.is_floating_point()}
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    if variant != "full":  # frozen ones may be bfloat16, but DeBERTa's and PEFT's copy of a head
        assert (torch.bfloat16 in frozen) == (name != "deberta-v2")
    seen = []
    for part_name, part in heads(model).items():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda _, __, output, of=part_name: seen.append((of, output.dtype)))
    batch = batch_of(tokenizer)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert logits(model, batch).dtype == torch.float32
        assert len(seen) == 2
        train_a_little(model, batch)
    # BERT's pooler is a part of the backbone in transformers: its weights are float32, its products those of autocast
    others = {dtype for of, dtype in seen if not (name == "bert" and "pooler" in of)}
    assert others == {torch.float32}


@pytest.fixture
def recipe_of(backbone, tmp_path):
    def made(name, objective="cross_entropy", max_length=160, trainer=(), **model):
        return Recipe(
            data=DataConfig(train=str(write_csv(battle_frame(8), tmp_path / "train.csv")), folds=4),
            prompt=PromptConfig(max_length=max_length),
            model=ModelConfig(
                **{"model_name_or_path": str(backbone(name)), "device": "cpu", "dtype": "float32", "lora_r": 4, **model}
            ),
            objective=ObjectiveConfig(objective),
            trainer={"output_dir": str(tmp_path / "run"), "disable_tqdm": True, "seed": 3, **dict(trainer)},
        )

    return made


@parametrize_some(
    ("name", "variant"),
    itertools.product(ENCODERS, ("full", "4bit")),
    quick=[("deberta-v2", "full"), ("roberta", "4bit"), ("distilbert", "full"), ("modernbert", "4bit")],
)
def test_train_and_predict_take_an_encoder(name, variant, recipe_of, frame):
    trainer = {"learning_rate": 1e-3 if variant == "full" else 1e-2, "num_train_epochs": 2, "save_total_limit": 9}
    recipe = recipe_of(name, trainer=trainer, **VARIANTS[variant])
    run, _ = train(recipe)
    states = sorted(run.glob("checkpoint-*/trainer_state.json"))
    history = json.loads(states[-1].read_text())["log_history"]
    losses = {entry["step"]: entry["eval_log_loss"] for entry in history if "eval_log_loss" in entry}
    file = "model.safetensors" if variant == "full" else "adapter_model.safetensors"
    best = load_file(run / f"checkpoint-{min(losses, key=losses.get)}" / file)
    saved = load_file(RunFolder(run).model / file)
    assert len(losses) == 2
    assert all(torch.equal(saved[key], best[key]) for key in best)
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    battles = read_battles(frame)
    table, swapped = predict(run, battles), predict(run, swap(battles))
    assert table["id"].tolist() == battles["id"][:]
    assert predicted(table).std(axis=0).min() > 1e-4
    assert np.abs(predicted(swapped)[:, [1, 0, 2]] - predicted(table)).max() <= 1e-6


def test_master_weights_of_deberta_stay_float32_under_bfloat16(recipe_of):
    recipe = recipe_of("deberta-v2", use_peft=False, dtype="bfloat16", trainer={"learning_rate": 1e-4})
    run, _ = train(recipe)
    start = load_file(f"{recipe.model.model_name_or_path}/model.safetensors")
    for folder in (RunFolder(run).model, *run.glob("checkpoint-*")):
        saved = load_file(folder / "model.safetensors")
        assert {weight.dtype for weight in saved.values()} == {torch.float32}
        moved = {key: saved[key] - start[key] for key in start if key in saved}
        assert moved
        small = torch.cat([step.flatten() for step in moved.values()]).abs()
        assert 0 < small[small > 0].median() < 2**-9 * 0.2  # steps that bfloat16 weights of this size would not take


@parametrize_some(
    ("name", "objective"),
    itertools.product(ENCODERS, ("bradley_terry", "rao_kupper", "davidson")),
    quick=[
        ("deberta-v2", "rao_kupper"),
        ("roberta", "davidson"),
        ("distilbert", "bradley_terry"),
        ("modernbert", "davidson"),
    ],
)
def test_encoders_learn_rewards_of_single_responses(name, objective, recipe_of):
    keys = {"eval_strategy": "no", "save_strategy": "no"}  # quicker
    keys |= {"num_train_epochs": 3} if name == "bert" else {}  # its random pooler lets little through at first
    run, _ = train(recipe_of(name, objective, trainer={"learning_rate": 1e-2, **keys}))
    battles = read_battles(battle_frame(4))
    table, swapped = predict(run, battles), predict(run, swap(battles))
    assert predicted(table)[:, 0].std() > 1e-3
    assert np.abs(predicted(swapped)[:, [1, 0, 2]] - predicted(table)).max() <= 1e-6
    tie = next(
        weight for key, weight in load_file(RunFolder(run).model / "adapter_model.safetensors").items() if "tie" in key
    )
    assert tie != 0


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_a_sequence_that_is_longer_than_the_positions_is_refused_before_anything_is_written(name, recipe_of):
    recipe = recipe_of(name, max_length=513)
    message = rf"^prompt\.max_length: 513, but .*'{name}' has positions for 512 tokens; set at most that$"
    with pytest.raises(InputError, match=message):
        train(recipe)
    assert not recipe.run_folder.exists()


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_a_sequence_of_all_positions_is_read(name, backbone):
    model, _ = build_model(resolve_backbone(config_of(backbone(name))), JOINT_HEAD, seed=0)
    ids = torch.full((1, 512), 7)
    assert logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape == (1, 3)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("joint", "<bos>PROMPT: p <end_of_turn> RESPONSE A: a <end_of_turn> RESPONSE B: b<end_of_turn>"),
        ("separate", "<bos>PROMPT: p <end_of_turn> RESPONSE: a<end_of_turn>"),
    ],
)
def test_the_template_of_encoders_is_the_seeds_with_the_tokenizers_own_frame(encoding, text):
    tokenizer = make_encoder_tokenizer()
    encoder = PromptEncoder(tokenizer, PromptConfig(max_length=160), encoding)
    (one,) = encoder([["p"]], *[[[response]] for response in ("a", "b")[: len(encoder.responses)]])
    assert tokenizer.decode(one.input_ids) == text
    assert one.input_ids[0] == tokenizer.cls_token_id
    assert one.input_ids[-1] == tokenizer.sep_token_id


def test_an_encoder_has_no_other_pooling(backbone):
    with pytest.raises(InputError, match=r"^model\.pooling: 'responses' is for decoders"):
        build_model(resolve_backbone(config_of(backbone("roberta"), pooling="responses")), JOINT_HEAD, seed=0)


@each_family
def test_a_published_head_is_kept_whole_or_its_last_layer_is_new(name, tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder = make_backbone(name, tmp_path / "published", num_labels=1)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    config = config_of(folder, keep_head=True)
    model, tokenizer = build_model(resolve_backbone(config), SEPARATE_HEAD, seed=0)
    batch = batch_of(tokenizer, "separate")
    with torch.no_grad():
        theirs = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert theirs.std() > 1e-3
    assert (logits(model, batch)[:, :1] - theirs).abs().max() <= 1e-5
    new, _ = build_model(resolve_backbone(dataclasses.replace(config, keep_head=False)), SEPARATE_HEAD, seed=0)
    assert (logits(new, batch) == 0).all()
    wider, _ = build_model(resolve_backbone(dataclasses.replace(config, keep_head=False)), JOINT_HEAD, seed=0)
    assert logits(wider, batch).shape[1] == 3
    with pytest.raises(InputError, match=r"^model\.keep_head: .* and objective\.name needs \(3, 64\)"):
        build_model(resolve_backbone(config), JOINT_HEAD, seed=0)


@pytest.mark.parametrize("name", ["deberta-v2", "distilbert"])
def test_a_language_model_has_no_head_to_keep(name, backbone):
    with pytest.raises(InputError, match=r"^model\.keep_head: .* has no '(pooler|pre_classifier)"):
        build_model(
            resolve_backbone(config_of(backbone(name), keep_head=True)), OBJECTIVES["cross_entropy"].head, seed=0
        )
