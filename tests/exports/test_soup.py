from dataclasses import replace

import pytest
import torch
from builders import battle_frame, pack
from peft import LoraConfig
from safetensors.torch import load_file

from rewardmodel.config.schema import ObjectiveConfig, PromptConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.exports.checks import TrainedRun
from rewardmodel.exports.merge import merge_run
from rewardmodel.exports.soup import average_adapters
from rewardmodel.model.loading import load_model
from rewardmodel.prompt.tokenization import tokenize


@pytest.fixture
def run_of(random_run, backbone, tmp_path):
    """Return a function that writes a run of random weights: run_of("name", seed, **model)."""

    def make(name, seed, family="llama", **changes) -> TrainedRun:
        return random_run(backbone(family), folder=tmp_path / name, seed=seed, **changes)[0]

    return make


def deltas(run: TrainedRun) -> dict[str, torch.Tensor]:
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
def test_updates_and_heads_are_averaged_exactly(ranks, use_rslora, run_of, tmp_path):
    runs = [run_of(str(seed), seed, lora_r=rank, use_rslora=use_rslora) for seed, rank in enumerate(ranks)]
    mean = deltas(average_adapters(runs, tmp_path / "soup"))
    parts = [deltas(run) for run in runs]
    assert mean.keys() == parts[0].keys()
    for name, value in mean.items():
        assert (value - sum(part[name] for part in parts) / len(parts)).abs().max() <= 1e-7, name


def test_the_mean_is_not_that_of_the_factors(run_of, tmp_path):
    runs = [run_of(str(seed), seed) for seed in range(2)]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    weights = [load_file(run.model / "adapter_model.safetensors") for run in runs]
    a, b = ([one[name.replace("lora_B", part)] for one in weights] for part in ("lora_A", "lora_B"))
    wrong = 8 * (sum(b) / 2) @ (sum(a) / 2)
    assert (deltas(average_adapters(runs, tmp_path / "soup"))[name] - wrong).abs().max() > 1e-3


def test_peft_loads_the_soup_and_its_merge_predicts_the_same(run_of, tmp_path):
    runs = [run_of(str(seed), seed, load_in_4bit=True) for seed in range(3)]
    mean = average_adapters(runs, tmp_path / "soup")
    model, tokenizer = load_model(mean.recipe.model, mean.model)
    batch = pack(list(tokenize(read_battles(battle_frame(2)), tokenizer, PromptConfig(max_length=160))))
    merge_run(mean, tmp_path / "merged", torch.float32)
    whole, _ = load_model(replace(mean.recipe.model, load_in_4bit=False), tmp_path / "merged")
    with torch.no_grad():
        found, expected = (one(**batch).logits for one in (whole, model))
    assert expected.std() > 0.01
    assert (found - expected).abs().max() <= 1e-4


def test_runs_that_cannot_be_averaged_are_refused(run_of, tmp_path):
    first = run_of("first", 0)

    def refused(other: TrainedRun, message: str) -> None:
        with pytest.raises(InputError, match=message):
            average_adapters([first, other], tmp_path / "soup")
        assert not (tmp_path / "soup").exists()

    recipe = first.recipe
    refused(run_of("2", 0, "qwen3"), "backbone is")
    refused(run_of("3", 0, load_in_4bit=True), r"model\.load_in_4bit is True, but False")
    refused(run_of("4", 0, pooling="responses"), r"model\.pooling")
    refused(run_of("5", 0, use_dora=True), "no exact mean")
    refused(run_of("6", 0, lora_first_layer=1), "its adapters are on other layers")
    refused(run_of("7", 0, use_peft=False), "has no adapter")
    refused(first._replace(dtype="bfloat16"), "precision")
    other = replace(recipe, prompt=replace(recipe.prompt, max_length=7))
    refused(first._replace(recipe=other), r"prompt\.max_length is 7")
    refused(first._replace(recipe=replace(recipe, objective=ObjectiveConfig("rao_kupper"))), r"objective\.name")
