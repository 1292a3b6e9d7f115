import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders import make_backbone
from trl import RewardConfig

from rewardmodel.config import trainer
from rewardmodel.config.json_schema import recipe_keys
from rewardmodel.config.loader import dump_recipe, load_recipe
from rewardmodel.config.schema import SECTIONS, DataConfig, Recipe, Source
from rewardmodel.config.trainer import TRAINER_DEFAULTS, TRAINER_REFUSED, installed_versions, read_trl_keys
from rewardmodel.data.splits import load_battles
from rewardmodel.errors import InputError
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.loading import build_model
from rewardmodel.objectives import OBJECTIVES
from rewardmodel.prompt.tokenization import tokenize
from rewardmodel.run_folder import load_run_recipe
from rewardmodel.training.arguments import training_arguments

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")

MODEL_TYPES = {
    "smollm2-135m-instruct": "llama",
    "gemma3-270m": "gemma3_text",
    "all-minilm-l6-v2": "bert",
    "google/gemma-2-9b-it": "gemma2",
    "google/gemma-2-2b-it": "gemma2",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama",
    "Qwen/Qwen3-1.7B": "qwen3",
    "Qwen/Qwen3-4B-Instruct-2507": "qwen3",
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": "llama",
    "microsoft/deberta-v3-base": "deberta-v2",
    "FacebookAI/roberta-base": "roberta",
    "distilbert/distilbert-base-uncased": "distilbert",
    "answerdotai/ModernBERT-base": "modernbert",
}


@pytest.fixture
def write(tmp_path):
    def written(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return written


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {
        "quickstart",
        "arena_smollm2_135m",
        "arena_gemma3_270m",
        "gemma2_9b_qlora",
        "gemma2_2b_qlora",
        "llama3_8b_qlora",
        "qwen3_4b_qlora",
        "llama3_8b_from_reward_model",
        "arena_small_cpu",
        "arena_small_gpu",
        "deberta_v3_base",
        "deberta_v3_base_lora",
        "deberta_v3_base_qlora",
        "roberta_base",
        "distilbert_base",
        "modernbert_base",
    }


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name == "seeds"], ids=lambda path: path.stem)
def test_a_seeds_recipe_says_in_its_header_what_it_reproduces_and_what_is_known_of_it(path):
    header = " ".join(line[2:] for line in path.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"project grew from", header)
    assert re.search(r"[Kk]nown: .*1\.0\d\d|No figure of it is known", header)
    assert f"{load_recipe(path).prompt.max_length} tokens" in header


@pytest.mark.slow  # seconds a case
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_and_builds_a_tiny_model_of_its_family(path, tmp_path):
    import torch

    recipe = load_recipe(path)
    assert recipe.trainer["output_dir"] == f"runs/{path.stem}"
    objective = OBJECTIVES[recipe.objective.name]
    labels = objective.head.num_labels if recipe.model.keep_head else None
    folder = make_backbone(MODEL_TYPES[recipe.model.model_name_or_path], tmp_path / "backbone", labels)
    first_layer = min(recipe.model.lora_first_layer, 1)
    model = dataclasses.replace(
        recipe.model,
        model_name_or_path=str(folder),
        lora_first_layer=first_layer,
        num_hidden_layers=recipe.model.num_hidden_layers and 1,
        device="cpu",
        dtype="float32",
    )
    built, tokenizer = build_model(resolve_backbone(model), objective.head, seed=0)
    tokenizer.chat_template = "{% for message in messages %}<{{ message.role }}> {{ message.content }}{% endfor %}"
    battles = load_battles(DataConfig()).select(range(4))
    rows = tokenize(battles, tokenizer, recipe.prompt, encoding=objective.encoding)
    assert len(rows) == 4
    assert any(weight.requires_grad for weight in built.parameters())
    args = training_arguments(recipe, torch.float32, torch.device("cpu"))
    assert args.learning_rate == recipe.trainer["learning_rate"]


def test_a_dumped_recipe_reads_back_equal(tmp_path, write):
    path = write("trainer:\n  lr_scheduler_kwargs: {num_cycles: 2}\n  warmup_steps: 7\ndata:\n  limit: 5\n")
    recipe = load_recipe(path, ["--model.lora_target_modules", "[q_proj]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("style", [["--trainer.learning_rate", "1e-4"], ["--trainer.learning_rate=1e-4"]])
def test_overrides_win_and_scientific_notation_is_a_number(style, write):
    recipe = load_recipe(write("trainer:\n  learning_rate: 3e-4\n  seed: 7\n"), style)
    assert recipe.trainer["learning_rate"] == 1e-4
    assert recipe.trainer["seed"] == 7


def test_an_empty_recipe_is_the_defaults_with_a_run_folder_of_its_name(write):
    recipe = load_recipe(write(""))
    assert recipe == Recipe(trainer={"output_dir": "runs/recipe"})
    assert recipe.trainer == {**TRAINER_DEFAULTS, "output_dir": "runs/recipe"}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("model:\n  lora_init: pissa\n", [], "model.lora_init does not exist any more: LoRA always starts from a zero"),
        ("trainer:\n  eval_strategy: no\n", [], "YAML reads an unquoted no, yes, off or on as a boolean"),
        ("model:\n  lora_r: null\n", [], "model.lora_r: null; give a value, or delete the line"),
        ("model:\n  lora_rr: 3\n", [], "unknown key 'model.lora_rr' (did you mean 'model.lora_r'?)"),
        ("modle:\n  lora_r: 3\n", [], "unknown key 'modle.lora_r' (did you mean 'model.lora_r'?)"),
        ("", ["--trainer.learning_rat", "1"], "did you mean 'trainer.learning_rate'?"),
        ("", ["--trainer.learning_rat=1"], "did you mean 'trainer.learning_rate'?"),
        ("trainer:\n  max_length: 3\n", [], "trainer.max_length is not accepted: set prompt.max_length"),
        ("", ["--trainer.bf16", "true"], "trainer.bf16 is not accepted: set model.dtype"),
        ("model:\n  lora_r: many\n", [], "model.lora_r"),
        ("data:\n  swap_augmentation: twice\n", [], "one of ['none', 'random', 'both']"),
        ("- a list\n", [], "one mapping per section"),
        ("model: 3\n", [], "one mapping per section"),
        ("model: [\n", [], "not YAML"),
        ("", ["stray"], "stray"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(text, overrides, message, write):
    path = write(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_in_python_refuses_the_same_keys():
    with pytest.raises(InputError, match=r"trainer\.fp16 is not accepted: set model\.dtype"):
        Recipe(trainer={"fp16": True})


def test_refused_keys_are_trls_and_name_keys_that_are_there():
    known = {f"{section}.{key}" for section, content in recipe_keys().items() for key in content["properties"]}
    assert set(TRAINER_REFUSED) <= set(RewardConfig.__dataclass_fields__)
    assert not {f"trainer.{key}" for key in TRAINER_REFUSED} & known
    for hint in TRAINER_REFUSED.values():
        assert set(re.findall(r"\w+\.\w+", hint)) <= known


def test_every_field_is_documented_under_itself_and_read_by_something():
    config = ast.parse((ROOT / "rewardmodel" / "config" / "schema.py").read_text())
    others = "".join(path.read_text() for path in (ROOT / "rewardmodel").rglob("*.py") if path.parent.name != "config")
    for section in (node for node in config.body if isinstance(node, ast.ClassDef) and node.name in class_names()):
        for field, after in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{section.name}.{field.target.id} has no text under it"
                assert f".{field.target.id}" in others, f"nothing reads {section.name}.{field.target.id}"


def class_names() -> set[str]:
    return {section.__name__ for section in SECTIONS.values()}


def test_sources_of_a_recipe_are_read_and_dumped_and_read_back(tmp_path, write):
    path = write(
        "data:\n  train:\n  - a.csv\n  - {path: b.parquet, weight: 0.5, columns: {prompt: question, id: null}}\n"
    )
    recipe = load_recipe(path)
    assert recipe.data.train == ["a.csv", Source("b.parquet", weight=0.5, columns={"prompt": "question", "id": None})]
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again).data == recipe.data


def test_a_path_on_the_command_line_takes_the_place_of_sources(write):
    path = write("data:\n  train: [{path: a.csv}]\n")
    assert load_recipe(path, ["--data.train", "b.csv"]).data.train == "b.csv"


def test_options_of_a_source_may_be_typed_one_by_one(write):
    path = write("data:\n  train: a.csv\n  test: {path: t.csv, split: dev}\n")
    typed = ["--data.train.columns", "{prompt: question}", "--data.test.outcomes={1: model_a, 0: model_b}"]
    data = load_recipe(path, [*typed, "--data.train", "b.csv"]).data
    assert data.train == Source("b.csv", columns={"prompt": "question"})
    assert data.test == Source("t.csv", split="dev", outcomes={"1": "model_a", "0": "model_b"})


@pytest.mark.parametrize(
    ("text", "typed", "message"),
    [
        (
            "train: [a.csv, b.csv]",
            ["--data.train.weight=2"],
            r"data\.train\.weight: there are 2 sources; give path and",
        ),
        ("seed: 1", ["--data.test.split=dev"], r"data\.test\.split: there is no source"),
        (
            "seed: 1",
            ["--data.train.wieght=2"],
            r"unknown key 'data\.train\.wieght' \(did you mean 'data\.train\.weight'",
        ),
        (
            "seed: 1",
            ["--data.train", "{path: x, wieght: 2}"],
            r"unknown key 'data\.train\.wieght' \(did you mean 'weight'",
        ),
        (
            "seed: 1",
            ["--data.train", "{path: x, pairs: any}"],
            r"data\.train: {path: x, pairs: any}: not a path and its",
        ),
    ],
)
def test_options_of_a_source_that_cannot_be_used_are_refused(write, text, typed, message):
    with pytest.raises(InputError, match=message):
        load_recipe(write(f"data:\n  {text}\n"), typed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data:\n  train: [a.csv, {path: b.csv, wieght: 2}]\n",
            r"unknown key 'data.train\[1\].wieght' \(did you mean 'weight'",
        ),
        ("data:\n  test: {paht: b.csv}\n", "unknown key 'data.test.paht' .did you mean 'path'"),
    ],
)
def test_an_unknown_key_of_a_source_names_the_nearest(write, text, message):
    with pytest.raises(InputError, match=message):
        load_recipe(write(text))


@pytest.mark.parametrize("value", ["default", "pissa"])
def test_the_recipe_of_a_saved_run_may_have_keys_that_were_removed(value, tmp_path, write):
    path = write(f"model:\n  lora_r: 3\n  lora_init: {value}\n")
    assert load_recipe(path, of_run=True) == load_recipe(write("model:\n  lora_r: 3\n"))
    (tmp_path / "recipe.yaml").write_text(f"model:\n  lora_r: 3\n  lora_init: {value}\n")
    assert load_run_recipe(tmp_path).model.lora_r == 3


def test_the_recipe_of_a_saved_run_may_have_keys_of_a_trl_that_is_not_here(write, monkeypatch):
    monkeypatch.setattr(trainer, "find_trl_keys", lambda: pytest.fail("trl was imported"))
    monkeypatch.setattr(trainer, "installed_versions", lambda: pytest.fail("trl was looked for"))
    path = write("trainer:\n  key_of_tomorrow: [1e-3]\n  seed: 7\n")
    assert load_recipe(path, of_run=True).trainer == {
        **TRAINER_DEFAULTS,
        **{"key_of_tomorrow": [1e-3], "seed": 7, "output_dir": "runs/recipe"},
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.lora_r"], "model.lora_r: has no value"),
        (["--model.lora_r", "--model.lora_alpha", "3"], "model.lora_r: has no value"),
        (["--model.lora_r", "3", "4"], "'4' is not the value of a key"),
    ],
)
def test_an_override_is_a_key_and_a_value(overrides, message, write):
    with pytest.raises(InputError, match=message):
        load_recipe(write(""), overrides)


LIGHT = """
import json, sys
from rewardmodel.config.json_schema import recipe_schema
from rewardmodel.config.loader import dump_recipe, load_recipe
from rewardmodel.errors import InputError
dump_recipe(load_recipe(sys.argv[1]))
recipe_schema()
for override in ("--model.lora_r=x", "--model.lora_rr=1", "--trainer.learning_rat=1", "--trainer.bf16=true"):
    try:
        load_recipe(sys.argv[1], [override])
    except InputError:
        continue
    raise AssertionError(override)
heavy = ("torch", "transformers", "trl", "peft", "sklearn", "jsonargparse")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def test_recipes_are_read_and_refused_without_torch_or_trl():
    command = [sys.executable, "-c", LIGHT, ROOT / "recipes" / "quickstart.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    same = read_trl_keys()["versions"] == installed_versions()
    assert json.loads(done.stdout) == [] or not same  # an unknown trainer key is looked up in another trl


@pytest.mark.parametrize("beside", [True, False])
def test_a_template_file_becomes_part_of_the_recipe(tmp_path, write, monkeypatch, beside):
    path = write("prompt: {template: mine.jinja}\n")
    folder = path.parent if beside else tmp_path / "here"
    folder.mkdir(exist_ok=True)
    (folder / "mine.jinja").write_text("{{ rounds[0].prompt }}\n")
    monkeypatch.chdir(tmp_path if beside else folder)
    assert load_recipe(path).prompt.template == "{{ rounds[0].prompt }}\n"


def test_a_template_file_that_is_not_there_is_refused(write):
    with pytest.raises(InputError, match=r"nowhere\.jinja: no such file"):
        load_recipe(write("prompt: {template: nowhere.jinja}\n"))


@pytest.mark.parametrize(("key", "value"), [("tie_if_same", "1.5"), ("win_if_other_empty", "-1")])
def test_rules_give_probabilities(key, value, tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    message = f"inference.{key}: {value}; give a probability from 0 to 1, or null"
    with pytest.raises(InputError, match=message):
        load_recipe(tmp_path / "recipe.yaml", [f"--inference.{key}", value])
    assert getattr(load_recipe(tmp_path / "recipe.yaml", [f"--inference.{key}", "0.5"]).inference, key) == 0.5
    assert getattr(load_recipe(tmp_path / "recipe.yaml").inference, key) is None
