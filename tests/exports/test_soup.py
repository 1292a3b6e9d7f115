from dataclasses import replace

import pytest
import torch
from builders import battle_frame
from peft import LoraConfig
from safetensors.torch import load_file

from rewardmodel.config.schema import ModelConfig, ObjectiveConfig, PromptConfig, Recipe
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.exports.merge import Trained, merge
from rewardmodel.exports.soup import soup
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.batching import pack
from rewardmodel.model.loading import build_model, load_model, save_model
from rewardmodel.objectives import JOINT_HEAD
from rewardmodel.prompt.tokenization import tokenize


def random_run(folder, backbone, seed, **changes) -> Trained:
    config = ModelConfig(str(backbone), device="cpu", dtype="float32", **{"lora_r": 4, **changes})
    model, tokenizer = build_model(resolve_backbone(config), JOINT_HEAD, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.requires_grad and ("lora_" in name or "score" in name):
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    save_model(model, tokenizer, resolve_backbone(config), folder / "model")
    (folder / "environment.json").write_text("{}")
    return Trained(folder, Recipe(model=config), torch.float32)


def deltas(run: Trained) -> dict[str, torch.Tensor]:
    """Return the update of each layer, and the head, of a run's adapter, by plain arithmetic."""
    lora = LoraConfig.from_pretrained(run.model)
    scale = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
    weights = {name: value.double() for name, value in load_file(run.model / "adapter_model.safetensors").items()}
    found = {}
    for name, value in weights.items():
        if ".lora_B." in name:
            found[name] = scale * value @ weights[name.replace(".lora_B.", ".lora_A.")]
        elif ".lora_" not in name:
            found[name] = value
    return found


@pytest.mark.parametrize("ranks", [(4, 4), (4, 2, 3)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_updates_and_heads_are_averaged_exactly(ranks, use_rslora, backbone, tmp_path):
    runs = [
        random_run(tmp_path / str(seed), backbone("llama"), seed, lora_r=rank, use_rslora=use_rslora)
        for seed, rank in enumerate(ranks)
    ]
    mean = deltas(soup(runs, tmp_path / "soup"))
    parts = [deltas(run) for run in runs]
    assert mean.keys() == parts[0].keys()
    for name, value in mean.items():
        assert (value - sum(part[name] for part in parts) / len(parts)).abs().max() <= 1e-7, name


def test_the_mean_is_not_that_of_the_factors(backbone, tmp_path):
    runs = [random_run(tmp_path / str(seed), backbone("llama"), seed) for seed in range(2)]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    weights = [load_file(run.model / "adapter_model.safetensors") for run in runs]
    a, b = ([one[name.replace("lora_B", part)] for one in weights] for part in ("lora_A", "lora_B"))
    wrong = 8 * (sum(b) / 2) @ (sum(a) / 2)
    assert (deltas(soup(runs, tmp_path / "soup"))[name] - wrong).abs().max() > 1e-3


def test_peft_loads_the_soup_and_its_merge_predicts_the_same(backbone, tmp_path):
    runs = [random_run(tmp_path / str(seed), backbone("llama"), seed, load_in_4bit=True) for seed in range(3)]
    mean = soup(runs, tmp_path / "soup")
    model, tokenizer = load_model(mean.recipe.model, mean.model)
    batch = pack(list(tokenize(read_battles(battle_frame(2)), tokenizer, PromptConfig(max_length=160))))
    merge(mean, tmp_path / "merged", torch.float32)
    whole, _ = load_model(replace(mean.recipe.model, load_in_4bit=False), tmp_path / "merged")
    with torch.no_grad():
        found, expected = (one(**batch).logits for one in (whole, model))
    assert expected.std() > 0.01
    assert (found - expected).abs().max() <= 1e-4


def test_runs_that_do_not_add_up_are_refused(backbone, tmp_path):
    first = random_run(tmp_path / "first", backbone("llama"), 0)

    def refused(other: Trained, message: str) -> None:
        with pytest.raises(InputError, match=message):
            soup([first, other], tmp_path / "soup")
        assert not (tmp_path / "soup").exists()

    recipe = first.recipe
    refused(random_run(tmp_path / "2", backbone("qwen3"), 0), "backbone is")
    refused(
        random_run(tmp_path / "3", backbone("llama"), 0, load_in_4bit=True), r"model\.load_in_4bit is True, but False"
    )
    refused(random_run(tmp_path / "4", backbone("llama"), 0, pooling="responses"), r"model\.pooling")
    refused(random_run(tmp_path / "5", backbone("llama"), 0, use_dora=True), "no exact mean")
    refused(random_run(tmp_path / "6", backbone("llama"), 0, lora_first_layer=1), "other layers have adapters")
    refused(random_run(tmp_path / "7", backbone("llama"), 0, use_peft=False), "has no adapter")
    refused(first._replace(dtype=torch.bfloat16), "precision")
    other = replace(recipe, prompt=replace(recipe.prompt, max_length=7))
    refused(first._replace(recipe=other), r"prompt\.max_length is 7")
    refused(first._replace(recipe=replace(recipe, objective=ObjectiveConfig("rao_kupper"))), r"objective\.name")
