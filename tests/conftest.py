"""Tiny random backbones of every family, tiny battles, and no network: what the tests stand on."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
import shutil
import tempfile
from pathlib import Path

os.environ["REWARDMODEL_USER_CACHE"] = os.environ.get("REWARDMODEL_CACHE", "")
os.environ["REWARDMODEL_CACHE"] = tempfile.mkdtemp(prefix="rewardmodel-tests-")

import numpy as np
import pandas as pd
import pytest

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")
ENCODERS = ("deberta-v2", "roberta", "distilbert", "modernbert")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "vocab_size": 400,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
"""Padding and end of sequence share an id, as in many real tokenizers."""


def make_tokenizer(add_bos: bool = True):
    """Return a byte-level BPE tokenizer with special tokens, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<bos>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL["vocab_size"],
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["### Prompt: Response A: Response B: which is better answer tie"] * 4, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        additional_special_tokens=["<end_of_turn>"],
    )


def make_encoder_tokenizer():
    """Return the tiny tokenizer as encoders have it: `[CLS] ... [SEP]`, with a padding token of its own."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<eos>", "cls_token": "<bos>", "sep_token": "<end_of_turn>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <end_of_turn>", special_tokens=[("<bos>", 1), ("<end_of_turn>", 2)]
    )
    return tokenizer


SLIDING = ("gemma2", "gemma3_text", "mistral", "phi3")
"""Families some of whose layers see 32 tokens here."""

AS_ENCODERS = {
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "layer_norm_eps": 1e-7,
        "position_biased_input": False,
        "type_vocab_size": 0,
        "max_position_embeddings": 512,
    },
    "roberta": {"max_position_embeddings": 513, "type_vocab_size": 1},
    "distilbert": {"dim": 64, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 512},
    "modernbert": {"local_attention": 32, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
}
"""What configurations of encoders say beside `SMALL`, as those of DeBERTa-v3, RoBERTa, DistilBERT and ModernBERT do."""


def make_backbone(family: str, folder: Path, num_labels: int | None = None, **overrides) -> Path:
    """Write a tiny random backbone of a family as a hub repository holds it: a language model, or a classifier."""
    import torch
    from transformers import (
        CONFIG_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
    )

    torch.manual_seed(0)
    encoder = family in (*ENCODERS, "bert")
    small = {**SMALL, "sliding_window": 32} if family in SLIDING else SMALL
    if encoder:
        small = {key: SMALL[key] for key in SMALL.keys() - {"num_key_value_heads", "head_dim"}}
    kind = AutoModelForMaskedLM if encoder else AutoModelForCausalLM
    labels = {} if num_labels is None else {"num_labels": num_labels}
    kind = kind if num_labels is None else AutoModelForSequenceClassification
    settings = {**small, **AS_ENCODERS.get(family, {}), "initializer_range": 0.2, **labels, **overrides}
    kind.from_config(CONFIG_MAPPING[family](**settings)).save_pretrained(folder)
    (make_encoder_tokenizer() if encoder else make_tokenizer()).save_pretrained(folder)
    return folder


def pytest_sessionfinish():
    """Remove the cache of this session."""
    shutil.rmtree(os.environ["REWARDMODEL_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """Return the folder of a tiny backbone: backbone("llama")."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_backbone(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """Return the tiny tokenizer."""
    return make_tokenizer()


def battle_frame(prompts: int = 12, seed: int = 0) -> pd.DataFrame:
    """Return labelled battles in the competition's format, four a prompt: the kinder response wins, equal ones tie."""
    random = np.random.default_rng(seed)
    words = ["kind", "rude"]
    rows = []
    for number in range(prompts):
        for pair, (first, second) in enumerate([(0, 1), (1, 0), (0, 0), (1, 1)]):
            texts = [
                f"a {words[kind]} answer about {number} " + "and more " * int(random.integers(0, 6))
                for kind in (first, second)
            ]
            rows.append(
                {
                    "id": f"{number:03d}{pair}",
                    "model_a": words[first],
                    "model_b": words[second],
                    "prompt": json.dumps([f"question number {number}"]),
                    "response_a": json.dumps(texts[:1]),
                    "response_b": json.dumps(texts[1:]),
                    "winner_model_a": int(first < second),
                    "winner_model_b": int(first > second),
                    "winner_tie": int(first == second),
                }
            )
    return pd.DataFrame(rows)


@pytest.fixture
def frame() -> pd.DataFrame:
    """Return 48 labelled battles of 12 prompts."""
    return battle_frame()


@pytest.fixture
def recipe(backbone, tmp_path):
    """Return a recipe that trains a tiny Llama in a second, in float32 on the CPU."""
    from rewardmodel.config import DataConfig, ModelConfig, PromptConfig, Recipe

    return Recipe(
        data=DataConfig(train=str(write_csv(battle_frame(), tmp_path / "train.csv")), folds=4),
        prompt=PromptConfig(max_length=160),
        model=ModelConfig(
            model_name_or_path=str(backbone("llama")), device="cpu", dtype="float32", lora_r=4, lora_dropout=0.1
        ),
        trainer={"output_dir": str(tmp_path / "run"), "disable_tqdm": True, "learning_rate": 1e-2, "seed": 3},
    )


def write_csv(frame: pd.DataFrame, path: Path) -> Path:
    """Write battles as CSV and return the path."""
    frame.to_csv(path, index=False)
    return path


@pytest.fixture
def user_cache(monkeypatch):
    """Let converted real backbones be found in, and kept in, the user's own cache."""
    if os.environ["REWARDMODEL_USER_CACHE"]:
        monkeypatch.setenv("REWARDMODEL_CACHE", os.environ["REWARDMODEL_USER_CACHE"])
    else:
        monkeypatch.delenv("REWARDMODEL_CACHE")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real battles, or skip."""
    folder = os.environ.get("REWARDMODEL_REAL_DATA")
    if not folder:
        pytest.skip("REWARDMODEL_REAL_DATA is not set: no real battles to test on")
    return Path(folder)


def from_columns(columns, source: str):
    """Return battles in memory of columns by name, the others at their defaults."""
    from datasets import Dataset

    from rewardmodel.battles import DEFAULTS, FEATURES

    count = len(columns["id"])
    defaults = {name: [value] * count for name, value in {**DEFAULTS, "source": source}.items()}
    return Dataset.from_dict({name: columns.get(name, defaults.get(name)) for name in FEATURES}, features=FEATURES)
