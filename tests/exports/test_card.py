import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from builders import make_backbone

from rewardmodel.config.schema import ModelConfig, ObjectiveConfig
from rewardmodel.exports.card import LICENCES, licence, write_card
from rewardmodel.exports.merge import merge, trained
from rewardmodel.model.weights import PACKAGED
from rewardmodel.training.train import train

PARITY = {
    "kind": "merged", "battles": 64, "precision": "float32", "max_abs_dp": 1e-6, "mean_abs_dp": 1e-7,
    "log_loss": {"run": 1.0, "export": 1.0, "difference": 0.0}, "limits": {"probability": 1e-4, "log_loss": 1e-3},
    "plain": {"battles": 8, "max_abs_dp": 1e-6},
}  # fmt: skip


@pytest.fixture
def card_of(recipe, tmp_path):
    """Return a function that trains a step, merges, and returns the card's metadata and text."""

    def make(parity=PARITY, **sections) -> tuple[dict, str]:
        steps = {**recipe.trainer, "max_steps": 1, "load_best_model_at_end": False}
        folder, _ = train(replace(recipe, trainer=steps, **sections))
        merge(trained(folder), tmp_path / "merged", torch.float32)
        write_card([folder], tmp_path / "merged", parity)
        _, header, text = (tmp_path / "merged" / "README.md").read_text().split("---\n", 2)
        return yaml.safe_load(header), text

    return make


def test_the_metadata_is_what_the_hub_reads(card_of):
    header, text = card_of()
    assert header["pipeline_tag"] == "text-classification"
    assert header["library_name"] == "transformers"
    assert header["license"] == "other"
    assert header["base_model"].startswith("llama")  # a folder's name, not the path on this machine
    assert "/" not in header["base_model"]
    assert text.startswith("# run, merged\n")


def test_the_code_for_plain_transformers_runs_on_the_example(card_of, tmp_path):
    _, text = card_of()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "AutoTokenizer" in block)
    example = re.search(r"special tokens\nincluded:\n\n```\n(.*?)\n```", text, re.S)[1]
    assert "### Response B:\nIt is 5." in example
    code = code.replace("FOLDER", str(tmp_path / "merged")).replace("[...]", "[example, example + ' and more']")
    names = {"example": example}
    exec(code, names)
    assert names["logits"].shape == (2, 3)


def test_a_reward_model_says_how_rewards_become_probabilities(card_of, recipe):
    _, text = card_of(objective=ObjectiveConfig(name="rao_kupper"), prompt=replace(recipe.prompt, template="response"))
    assert "P(A) = sigmoid(d - eta)" in text
    assert "GRPOTrainer" in text
    assert re.search(r"t = -?\d+\.\d{6}", text)


def test_what_is_not_known_is_said(card_of):
    _, text = card_of()
    assert "to be looked up there" in text
    assert "run was not evaluated: no metrics.json." in text
    assert "None is applied" in text


def test_the_fingerprints_of_the_data_are_there(card_of, recipe):
    _, text = card_of()
    data = json.loads((recipe.run_folder / "environment.json").read_text())["data"]
    assert data["training"] in text
    assert data["validation"] in text


def test_a_model_that_plain_transformers_does_not_read_has_no_code_for_it(card_of, recipe):
    parity = {**PARITY, "plain": None}
    _, text = card_of(parity, model=replace(recipe.model, pooling="responses"))
    assert "**Only rewardmodel loads this model.**" in text
    assert "AutoModelForSequenceClassification" not in text


def test_the_licence_is_that_of_the_backbones_own_card(tmp_path):
    folder = make_backbone("llama", tmp_path / "base")
    config = ModelConfig(str(folder))
    assert licence(config)["identifier"] is None
    (folder / "README.md").write_text("---\nlicense: llama3\nlanguage: en\n---\n# Base\n")
    assert licence(config)["identifier"] == "llama3"
    for broken in ("", "no metadata", "---\n- a\n---\n", "---\n{\n---\n"):
        (folder / "README.md").write_text(broken)
        assert licence(config)["identifier"] is None


def test_every_packaged_backbone_has_its_licence():
    assert LICENCES.keys() == PACKAGED.keys()
