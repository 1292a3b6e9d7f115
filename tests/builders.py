"""Tiny random backbones of every family, tiny battles: what the tests build."""

import dataclasses
import itertools
import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from fresh import run_fresh

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")
ENCODERS = ("deberta-v2", "bert", "roberta", "distilbert", "modernbert")

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
    "bert": {"max_position_embeddings": 512, "type_vocab_size": 2},
    "electra": {"max_position_embeddings": 512, "type_vocab_size": 2, "embedding_size": 64},
    "roberta": {"max_position_embeddings": 513, "type_vocab_size": 1},
    "distilbert": {"dim": 64, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 512},
    "modernbert": {"local_attention": 32, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
}
"""What configurations of encoders say beside `SMALL`, as those of DeBERTa-v3, BERT, RoBERTa, DistilBERT and
ModernBERT do."""


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
    encoder = family in (*ENCODERS, "electra")
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


def write_csv(frame: pd.DataFrame, path: Path) -> Path:
    """Write battles as CSV and return the path."""
    frame.to_csv(path, index=False)
    return path


def from_columns(columns, source: str):
    """Return battles in memory of columns by name, the others at their defaults."""
    from datasets import Dataset

    from rewardmodel.battles import BATTLE_FEATURES, COLUMN_DEFAULTS

    count = len(columns["id"])
    defaults = {name: [value] * count for name, value in {**COLUMN_DEFAULTS, "source": source}.items()}
    return Dataset.from_dict(
        {name: columns.get(name, defaults.get(name)) for name in BATTLE_FEATURES}, features=BATTLE_FEATURES
    )


OWN = """\
{# The way that a file is written: blocks on lines of their own, which leave no line behind. #}
Two assistants answered.
{% for round in rounds %}
    {% if loop.first %}
[Prompt]
    {% else %}
[And then]
    {% endif %}
{{ round.prompt }}
[Response A]
{{ round.response_a }}
[Response B]
{{ round.response_b }}
{% endfor %}
[Verdict: A, B, tie]
"""


OWN_SEPARATE = """\
{% for round in rounds %}
Q{{ loop.index }}: {{ round.prompt }}
A{{ loop.index }}: {{ round.response }}
{% endfor %}
How good is it?
"""


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


GEMMA = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}"""


CHAT_TOKENS = ["<end_of_turn>", "<start_of_turn>", "<|im_start|>", "<|im_end|>"]


def chat_tokenizer(chat_template: str, add_bos: bool = True, special: bool = True):
    """Return the tiny tokenizer with a chat template, whose tokens are special ones, or text like any other."""
    tokenizer = make_tokenizer(add_bos)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    tokenizer.chat_template = chat_template
    return tokenizer


def config_of(folder, **changes):
    from rewardmodel.config.schema import ModelConfig

    return ModelConfig(model_name_or_path=str(folder), device="cpu", dtype="float32", lora_r=4, **changes)


TOKENIZED: dict[tuple, list[dict]] = {}
"""What `rows_of` has made."""


def rows_of(tokenizer, battles: int = 6, encoding: str = "joint", template: str | None = None) -> list[dict]:
    """Return the token rows of up to eight battles; each tokenizer tokenises them once a session."""
    from rewardmodel.config.schema import PromptConfig
    from rewardmodel.data.formats import read_battles
    from rewardmodel.prompt.tokenization import tokenize

    key = (tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token, tokenizer.chat_template, encoding, template)
    if key not in TOKENIZED:
        prompt = PromptConfig(template=template, max_length=160)
        TOKENIZED[key] = list(tokenize(read_battles(battle_frame(2)), tokenizer, prompt, encoding=encoding))
    return [dict(row) for row in TOKENIZED[key][:battles]]


def pack(rows):
    """Pack rows for the dense kernels, with the masks of plain causal attention and of the window of `SLIDING`."""
    from rewardmodel.model import batching
    from rewardmodel.model.layout import arrange_padded

    return batching.pack(rows, partial(arrange_padded, windows=(None, 32), masked=True))


def batch_of(tokenizer):
    return pack(rows_of(tokenizer))


def logits(model, batch):
    import torch

    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def train_a_little(model, batch) -> None:
    import torch

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        output = model(**batch).logits
        labels = torch.arange(len(output)) % output.shape[1]
        torch.nn.functional.cross_entropy(output, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


RELOAD = """
import json, pathlib, sys, torch
from rewardmodel.config.schema import ModelConfig
from rewardmodel.model.fusion import fuse_projections
from rewardmodel.model.loading import load_model
folder = pathlib.Path(sys.argv[1])
logits = {}
for name, (config, saved) in json.loads((folder / "cases.json").read_text()).items():
    model, _ = load_model(ModelConfig(**config), pathlib.Path(saved))
    fuse_projections(model)
    with torch.no_grad():
        logits[name] = model(**torch.load(folder / f"{name}.pt", weights_only=False)).logits
torch.save(logits, folder / "logits.pt")
"""


def reload_in_fresh_process(cases, folder: Path):
    """Return the logits of saved models, each reloaded in one fresh process: name -> (config, saved model, batch)."""
    import torch

    folder.mkdir()
    for name, (_, _, batch) in cases.items():
        torch.save(batch, folder / f"{name}.pt")
    described = {name: (dataclasses.asdict(config), str(saved)) for name, (config, saved, _) in cases.items()}
    (folder / "cases.json").write_text(json.dumps(described))
    run_fresh(RELOAD, folder)
    return torch.load(folder / "logits.pt")


def reload_model(config, folder: Path):
    """Return a saved model with its layers computing together, as in training and prediction, and its tokenizer."""
    from rewardmodel.model.fusion import fuse_projections
    from rewardmodel.model.loading import load_model

    model, tokenizer = load_model(config, folder)
    fuse_projections(model)
    return model, tokenizer


SETTINGS = {
    "as is": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "other names skipped": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head"]},
    "layers skipped": {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp"]},
    "8 bits": {"load_in_8bit": True},
}


def stored(folder, tmp_path, settings, kind=None):
    """Write a backbone as bitsandbytes holds it, like the hub's *-bnb-4bit ones."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    kind = kind or AutoModelForCausalLM
    target = tmp_path / "stored"
    quantized = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings)
    kind.from_pretrained(folder, quantization_config=quantized, dtype=torch.float32).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


WORDS = ["the", "a", "of", "we", "it", "is", "water", "sky", "stone", "moves", "over", "green", "cold", "early", "late"]


def battles_of(pairs, outcomes, **columns):
    """Return battles of one turn; a prompt is its row's number."""
    from rewardmodel.battles import OUTCOMES

    given = {
        "id": [f"id{row}" for row in range(len(pairs))],
        "prompt": [[f"prompt {row}"] for row in range(len(pairs))],
        "response_a": [[first] for first, _ in pairs],
        "response_b": [[second] for _, second in pairs],
    }
    given |= dict(zip(OUTCOMES, np.asarray(outcomes, dtype=float).T.tolist(), strict=True))
    return from_columns(given | {"group": list(range(len(pairs)))} | columns, "made")


def drawn(count, seed=0, soft=False):
    """Return battles of random words and lengths, the longer and the kinder response wins more often."""
    random = np.random.default_rng(seed)
    pairs, lead = [], np.empty(count)
    for row in range(count):
        texts = [" ".join(random.choice(WORDS, size=int(random.integers(3, 60)))) for _ in range(2)]
        kind = random.integers(0, 2, 2)
        pairs.append(tuple(text + " thanks" * int(one) for text, one in zip(texts, kind, strict=True)))
        lead[row] = np.log(len(texts[0]) / len(texts[1])) + 2.0 * (int(kind[0]) - int(kind[1]))
    shares = 0.7 / (1 + np.exp(-2 * lead))
    chances = np.stack([shares, 0.7 - shares, np.full(count, 0.3)], axis=1)
    outcomes = chances if soft else np.eye(3)[[random.choice(3, p=row) for row in chances]]
    return battles_of(pairs, outcomes, fold=(np.arange(count) % 4).tolist())


def changed(battles, **columns):
    from rewardmodel.battles import BATTLE_FEATURES

    data = battles.to_dict() | columns
    return type(battles).from_dict(data, features=BATTLE_FEATURES)


def small_recipe(backbone: Path, folder: Path, **sections):
    """Return a recipe that trains a tiny backbone in a second, in float32 on the CPU; it writes to `folder`."""
    from rewardmodel.config.schema import DataConfig, ModelConfig, PromptConfig, Recipe

    return Recipe(
        **{
            "data": DataConfig(train=str(write_csv(battle_frame(), folder / "train.csv")), folds=4),
            "prompt": PromptConfig(max_length=160),
            "model": ModelConfig(str(backbone), device="cpu", dtype="float32", lora_r=4, lora_dropout=0.1),
            "trainer": {"output_dir": str(folder / "run"), "disable_tqdm": True, "learning_rate": 1e-2, "seed": 3},
            **sections,
        }
    )


def write_untrained_run(recipe) -> Path:
    """Write the run folder of a recipe whose head and adapters are random, without training."""
    import torch

    from rewardmodel.config.loader import dump_recipe
    from rewardmodel.model.backbone import resolve_backbone
    from rewardmodel.model.loading import build_model, save_model
    from rewardmodel.objectives import find_objective

    backbone = resolve_backbone(recipe.model)
    model, tokenizer = build_model(backbone, find_objective(recipe.objective).head, seed=0)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.requires_grad and ("score" in name or "lora_B" in name):
            torch.nn.init.normal_(weight, std=0.3)
    recipe.run_folder.mkdir(parents=True)
    save_model(model, tokenizer, backbone, recipe.run_folder / "model")
    (recipe.run_folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return recipe.run_folder


def with_trainer(recipe, **keys):
    return dataclasses.replace(recipe, trainer={**recipe.trainer, **keys})


def make_trainer(recipe, training, validation):
    import torch

    from rewardmodel.model.backbone import resolve_backbone
    from rewardmodel.model.loading import build_model
    from rewardmodel.objectives import JOINT_HEAD
    from rewardmodel.prompt.tokenization import tokenize
    from rewardmodel.training.arguments import training_arguments
    from rewardmodel.training.trainer import PreferenceTrainer

    model, tokenizer = build_model(resolve_backbone(recipe.model), JOINT_HEAD, seed=0)
    rows = [tokenize(battles, tokenizer, recipe.prompt) for battles in (training, validation)]
    args = training_arguments(recipe, torch.float32, torch.device("cpu"))
    tokens = (recipe.trainer["micro_batch_tokens"], None)
    return PreferenceTrainer(model, args, *rows, tokenizer, recipe.objective, torch.float32, tokens)


@contextmanager
def attending(model, name):
    """Let the model attend with an implementation of that name, as transformers knows it, in the block."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def sequences(row, column="input_ids"):
    """Return the values of each sequence of a row, shared ones first."""
    shared, *branches = row["branches"]
    ends = list(itertools.accumulate(branches, initial=shared))
    return [row[column][:shared] + row[column][begin:end] for begin, end in itertools.pairwise(ends)]


def plain_logits(model, rows):
    """Return the logits of each sequence alone, (n_sequences, n_logits), by transformers' own attention."""
    import torch

    from rewardmodel.model.loading import unwrap

    inner, found = unwrap(model), []
    score = getattr(inner.score, "modules_to_save", {"default": inner.score})["default"]
    with attending(model, "eager"):
        for row in rows:
            for ids, segments in zip(sequences(row), sequences(row, "segment_ids"), strict=True):
                hidden = inner.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
                means = [hidden[torch.tensor(segments) == response].mean(dim=0) for response in (1, 2)]
                read = hidden[-1] if inner.pooling == "last" else torch.cat(means)
                found.append(torch.cat([score.weight @ read, *([score.tie] if inner.shape.tie else [])]))
    return torch.stack(found)


def assert_same(found, expected):
    """Compare tensors up to rounding."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def parametrize_some(names, cases, quick):
    """Parametrise a test by all cases; those that are not among the quick ones are marked slow: they are many."""
    import pytest

    cases = list(cases)
    assert {*quick} <= {*cases}
    values = {case: case if isinstance(case, tuple) else (case,) for case in cases}
    return pytest.mark.parametrize(
        names, [case if case in quick else pytest.param(*values[case], marks=pytest.mark.slow) for case in cases]
    )


LOADED: dict[str, object] = {}
"""What `load_once` has loaded."""


def load_once(config, folder: Path, budget: int | None = None):
    """Stand in for `load_predictor`: models that are the same, byte by byte and in their settings, are loaded once."""
    from rewardmodel.inference.shards import _model_digest
    from rewardmodel.model.loading import load_predictor

    key = f"{config} {_model_digest(folder)}"
    if key not in LOADED:
        LOADED[key] = load_predictor(config, folder)
    return dataclasses.replace(LOADED[key], budget=budget)
