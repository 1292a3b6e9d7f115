import json
import re

import pytest
import torch
import yaml
from builders import make_backbone

from rewardmodel.config.schema import ModelConfig
from rewardmodel.exports.card import LICENCES, describe_programs, find_licence, write_card
from rewardmodel.exports.checks import load_trained_run
from rewardmodel.exports.merge import merge_run
from rewardmodel.exports.parity import format_parity
from rewardmodel.model.weights import PACKAGED

PARITY = {
    "kind": "merged",
    "battles": 64,
    "precision": "float32",
    "max_abs_dp": 1e-6,
    "mean_abs_dp": 1e-7,
    "log_loss": {"run": 1.0, "export": 1.0, "difference": 0.0},
    "limits": {"probability": 1e-4, "log_loss": 1e-3},
    "plain": {"battles": 8, "max_abs_dp": 1e-6},
}


@pytest.fixture
def card_of(untrained_run, tmp_path):
    """Return a function that merges a run and returns the card's metadata and text."""

    def make(*args, parity=PARITY, run=None, **model) -> tuple[dict, str]:
        folder = run or untrained_run("run", *args, **model)
        merge_run(load_trained_run(folder), tmp_path / "merged", torch.float32)
        write_card([folder], tmp_path / "merged", parity, format_parity(parity))
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
    example = re.search(r"special\ntokens included:\n\n```\n(.*?)\n```", text, re.S)[1]
    assert "### Response B:\nIt is 5." in example
    code = code.replace("FOLDER", str(tmp_path / "merged")).replace("[...]", "[example, example + ' and more']")
    names = {"example": example}
    exec(code, names)
    assert names["logits"].shape == (2, 3)


def test_a_reward_model_says_how_rewards_become_probabilities(card_of):
    _, text = card_of("rao_kupper", "response")
    assert "P(A) = sigmoid(d - eta)" in text
    assert "GRPOTrainer" in text
    assert re.search(r"t = -?\d+\.\d{6}", text)


def test_what_is_not_known_is_reported(card_of):
    _, text = card_of()
    assert "**Licence**: unknown; look up that of" in text
    assert "run was not evaluated: no metrics.json." in text
    assert "None: it did not help beyond noise" in text


@pytest.mark.slow  # seconds a case
def test_the_fingerprints_of_the_data_are_there(card_of, run_folder):
    _, text = card_of(run=run_folder)
    data = json.loads((run_folder / "environment.json").read_text())["data"]
    assert data["training"] in text
    assert data["validation"] in text


def test_a_model_that_plain_transformers_does_not_read_has_no_code_for_it(card_of):
    _, text = card_of(parity={**PARITY, "plain": None}, pooling="responses")
    assert "**Only rewardmodel loads this model.**" in text
    assert "AutoModelForSequenceClassification" not in text


def test_the_licence_is_that_of_the_backbones_own_card(tmp_path):
    folder = make_backbone("llama", tmp_path / "base")
    config = ModelConfig(str(folder))
    assert find_licence(config)["identifier"] is None
    (folder / "README.md").write_text("---\nlicense: llama3\nlanguage: en\n---\n# Base\n")
    assert find_licence(config)["identifier"] == "llama3"
    for broken in ("", "no metadata", "---\n- a\n---\n", "---\n{\n---\n"):
        (folder / "README.md").write_text(broken)
        assert find_licence(config)["identifier"] is None


def test_every_packaged_backbone_has_its_licence():
    assert LICENCES.keys() == PACKAGED.keys()


def test_servers_that_load_it_are_named_and_what_a_reward_is_not(card_of, tmp_path):
    _, text = card_of()
    assert "| vLLM | as a classifier, not as a reward: its clients take the last of the three probabilities" in text
    assert "| TRL | no: they need a reward of one response; `recipes/student_reward.yaml` distils" in text
    assert 'convert="classify"' in text
    (tmp_path / "merged").rename(tmp_path / "other")
    _, text = card_of("davidson", "response")
    assert "| vLLM | yes: `vllm serve FOLDER --runner pooling`" in text
    assert "| SGLang | yes: `--is-embedding`" in text
    assert "| TEI | no: it has no classifier of type `llama` |" in text
    assert "| verl, OpenRLHF, LLaMA-Factory | through `rewardmodel serve FOLDER` |" in text


def test_a_head_with_its_own_code_has_the_call_for_it(card_of, tmp_path):
    _, text = card_of("davidson", "response", pooling="last_and_responses", pair_ties=True)
    assert "| transformers | yes, with `trust_remote_code=True` and inputs of `model.encode` |" in text
    assert "| vLLM | no: it has no code for this head |" in text
    assert "| verl, OpenRLHF, LLaMA-Factory | no: they send finished texts" in text
    assert "reward_function" in text
    assert "a tie parameter t that depends on\nboth responses, P(A), P(B), P(tie) = softmax" in text
    code = re.search(r"```python\n(.*?predict_battles.*?)```", text, re.S)[1]
    compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("model_type", "joint", "whole", "program", "start"),
    [
        ("deberta-v2", False, True, "vLLM", "no: it has no classifier of type `deberta-v2`"),
        ("deberta-v2", False, True, "TRL", "yes"),
        ("roberta", False, True, "TEI", "yes: `/predict`"),
        ("llama", False, False, "vLLM", "no: export with `--kind merged`"),
        ("llama", False, False, "TRL", "yes: `reward_funcs=` the model that PEFT loads"),
        ("qwen3", True, True, "SGLang", "as a classifier, not as a reward"),
    ],
)
def test_what_loads_an_export_depends_on_backbone_head_and_form(model_type, joint, whole, program, start):
    found = describe_programs(model_type, "last", joint=joint, whole=whole, plain=True, own_code=False)
    assert found[program].startswith(start)
