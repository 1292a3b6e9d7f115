"""A run and its export -> the export's model card: README.md with the hub's metadata."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import rewardmodel
from rewardmodel.battles import OUTCOMES
from rewardmodel.config.schema import ModelConfig, Recipe, Source
from rewardmodel.evaluation.bias import format_bias
from rewardmodel.evaluation.calibration import BLEND
from rewardmodel.evaluation.evaluate import format_metrics
from rewardmodel.evaluation.results import read_evaluation
from rewardmodel.files import write_text
from rewardmodel.model.loading import load_tokenizer
from rewardmodel.model.precision import quantization_name
from rewardmodel.model.saved_model import is_adapter, read_about
from rewardmodel.model.weights import fetch_backbone
from rewardmodel.objectives import find_objective
from rewardmodel.prompt.encoder import PromptEncoder
from rewardmodel.run_folder import RunFolder, load_run_recipe

LICENCES = {"smollm2-135m-instruct": "apache-2.0", "gemma3-270m": "gemma", "all-minilm-l6-v2": "apache-2.0"}
"""Licences of the packaged backbones, by the hub's identifiers."""

LINK_FORMULAS = {
    "rao_kupper": "P(A) = sigmoid(d - eta), P(B) = sigmoid(-d - eta), P(tie) = the rest, eta = log(1 + exp(t))",
    "davidson": "P(A), P(B), P(tie) = softmax of (d / 2, -d / 2, t)",
    "bradley_terry": "P(A), P(B), P(tie) = softmax of (d / 2, -d / 2, t), so that P(A) / P(B) = exp(d)",
}
"""How the reward difference d and the tie parameter t become probabilities, by objective."""

SERVERS = {
    "vLLM": (
        ("llama", "qwen2", "qwen3", "gemma2", "mistral", "bert", "roberta", "modernbert"),
        "yes: `vllm serve FOLDER --runner pooling`, then `/classify` with `use_activation: false`",
    ),
    "SGLang": (
        ("llama", "gemma2", "qwen2", "qwen3"),
        "yes: `--is-embedding`, then `/v1/embeddings`, whose last value is the reward",
    ),
    "TEI": (("roberta", "xlm-roberta", "camembert", "modernbert"), "yes: `/predict` with `raw_scores: true`"),
}
"""Inference servers: the types of models that they load as classifiers, and how one that gives rewards is asked (their
documentation, autumn 2026)."""


def write_card(
    runs: Sequence[Path], model: Path, parity: dict[str, Any], parity_text: str, recipe: Recipe | None = None
) -> None:
    """Write README.md, the card of an export, next to its model.

    Args:
        runs: the folders of the runs that it was made of.
        model: folder of the export's model, with its recipe.
        parity: as of `exports.parity.check_parity`, with `kind`.
        parity_text: the same as lines of text.
        recipe: of the first run, if its backbone was moved; default: the one that the run carries.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    facts = collect_card_facts(runs, model, parity, parity_text, recipe)
    write_text(model / "README.md", environment.get_template("card.md.jinja").render(**facts))


def collect_card_facts(
    runs: Sequence[Path], model: Path, parity: dict[str, Any], parity_text: str, recipe: Recipe | None = None
) -> dict[str, Any]:
    """Return what the card's template prints; arguments as of `write_card`."""
    recipe, about = recipe or load_run_recipe(runs[0]), read_about(model)
    objective = find_objective(recipe.objective)
    merged = about.get("merged", {})
    bits = quantization_name(recipe.model)
    adapter, kind = is_adapter(model), _read_json(model / "config.json").get("model_type", "")
    return {
        "title": f"{Path(recipe.trainer['output_dir']).name}, {parity['kind']}",
        "version": rewardmodel.__version__,
        "base": _public_name(about["model_name_or_path"]),
        "fingerprint": about["fingerprint"],
        "licence": find_licence(recipe.model),
        "objective": recipe.objective.name,
        "joint": objective.encoding == "joint",
        "labels": objective.head.num_labels,
        "outcomes": OUTCOMES,
        "tie": about.get("tie"),
        "link": LINK_FORMULAS.get(recipe.objective.name),
        "bits": bits,
        "whole": not adapter,
        "vllm": kind in SERVERS["vLLM"][0],
        "plain": (plain := recipe.model.plain_head and (adapter or parity.get("plain") is not None)),
        "own_code": (own_code := not recipe.model.plain_head and parity.get("plain") is not None),
        "programs": describe_programs(
            kind,
            recipe.model.pooling,
            joint=objective.encoding == "joint",
            whole=not adapter,
            plain=plain,
            own_code=own_code,
        ),
        "pair_ties": recipe.model.pair_ties,
        "why_not_plain": _explain_not_plain(recipe.model),
        "form": _describe_form(merged, bits),
        "requantised": bool(merged.get("bits")),
        "max_length": recipe.prompt.max_length,
        "truncation": recipe.prompt.truncation,
        "example": _render_example(model, recipe),
        "folds": len(runs),
        "runs": [_collect_run_facts(run) for run in runs],
        "calibration": _describe_calibration(runs, model),
        "parity": parity_text,
    }


def describe_programs(
    model_type: str, pooling: str, *, joint: bool, whole: bool, plain: bool, own_code: bool
) -> dict[str, str]:
    """Return whether each program loads an export, and how, by name.

    Args:
        model_type: of the backbone, Hugging Face's name.
        pooling: the recipe's `model.pooling`.
        joint: whether the head returns three outcomes, not a reward.
        whole: whether it is a model, not an adapter.
        plain: whether plain transformers (of an adapter, PEFT) loads it as it was trained.
        own_code: whether plain transformers does, with the code in the export.
    """
    found = {"rewardmodel": "yes: `rewardmodel predict FOLDER` and `rewardmodel serve FOLDER`"}
    if plain:
        found["transformers"] = "yes" if whole else "yes, through PEFT, on the same backbone"
    else:
        found["transformers"] = "yes, with `trust_remote_code=True` and inputs of `model.encode`" if own_code else "no"
    for name, (types, how) in SERVERS.items():
        if not plain:
            found[name] = "no: it has no code for this head"
        elif not whole:
            found[name] = "no: export with `--kind merged`"
        elif model_type not in types:
            found[name] = f"no: it has no classifier of type `{model_type}`"
        elif joint:
            found[name] = (
                "as a classifier, not as a reward: its clients take the last of the three probabilities, that of a "
                "tie, for a reward"
            )
        else:
            found[name] = how
    rewards = "verl, OpenRLHF, LLaMA-Factory"
    if joint:
        found |= dict.fromkeys(
            ("TRL", rewards),
            "no: they need a reward of one response; `recipes/student_reward.yaml` distils this model into one",
        )
    else:
        function = 'yes: `reward_funcs=rewardmodel.reward_function("FOLDER")`'
        model = 'yes: `reward_funcs="FOLDER"`' if whole else "yes: `reward_funcs=` the model that PEFT loads"
        found["TRL"] = model if plain else function
        served = "through `rewardmodel serve FOLDER`"
        unmarked = "no: they send finished texts, in which nothing marks the response; train with `model.pooling: last`"
        found[rewards] = served if pooling == "last" else unmarked
    return found


def find_licence(config: ModelConfig) -> dict[str, str | None]:
    """Return the licence of a backbone: its `identifier` on the hub, if it is known, and a `sentence`."""
    identifier = LICENCES.get(config.model_name_or_path)
    source = "its package"
    if identifier is None:
        identifier, source = _read_licence(config), "its model card"
    if identifier is None:
        name = _public_name(config.model_name_or_path)
        return {"identifier": None, "sentence": f"unknown; look up that of `{name}`, which applies here too."}
    return {"identifier": identifier, "sentence": f"{identifier}, the backbone's ({source}), which applies here too."}


def _read_licence(config: ModelConfig) -> str | None:
    """Return the licence in the backbone's own model card: the one in its folder, or on the hub."""
    folder = fetch_backbone(config.model_name_or_path, config.model_revision)
    try:
        _, header, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        return yaml.safe_load(header)["license"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        pass
    if folder.parent.name != "snapshots":  # not in the hub's cache
        return None
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError

    try:
        card = model_info(config.model_name_or_path, timeout=10).card_data
        return card.get("license") if card else None
    except (HfHubHTTPError, OSError, ValueError):  # OSError: no network, or offline mode
        return None


def _describe_form(merged: dict[str, Any], bits: str | None) -> str:
    if not merged:
        return "the adapter and its head as they were trained, in PEFT's layout"
    backbone = f"the backbone's weights, dequantised from {bits}," if bits else "the backbone's weights"
    form = f"one model: {backbone} and the adapter's updates, added in float32 and saved in {merged['dtype']}"
    return f"{form}, then quantised to {merged['bits']} bits except for the head" if merged["bits"] else form


def _explain_not_plain(config: ModelConfig) -> str:
    if not config.plain_head:
        return (
            f"**Only rewardmodel loads this model.** Plain transformers does not have its head (`model.pooling: "
            f"{config.pooling}`, `model.pair_ties: {str(config.pair_ties).lower()}`); `--kind merged` exports it with "
            "the code that it needs there."
        )
    return "**Only rewardmodel loads this model** as it was trained; plain transformers was not checked on it."


def _render_example(model: Path, recipe: Recipe) -> str:
    """Return a small battle in the template's text, one sequence."""
    tokenizer = load_tokenizer(model)
    encoder = PromptEncoder(tokenizer, recipe.prompt, find_objective(recipe.objective).encoding)
    texts = ["What is 2 + 2?", "4", "It is 5."][: 1 + len(encoder.responses)]
    sequence = next(encoder(*([[text]] for text in texts)))
    return tokenizer.decode(sequence.input_ids)


def _collect_run_facts(run: Path) -> dict[str, Any]:
    files = RunFolder(run)
    data = _read_json(files.environment).get("data", {})
    evaluation = read_evaluation(files.metrics) if files.metrics.is_file() else None
    train = load_run_recipe(run).data.train
    sources = [one.path if isinstance(one, Source) else one for one in (train if isinstance(train, list) else [train])]
    return {
        "name": run.resolve().name,
        "source": ", ".join(map(_public_name, sources)),
        "training": data.get("training", "unknown"),
        "validation": data.get("validation", "unknown"),
        "metrics": format_metrics(evaluation) if evaluation else None,
        "bias": format_bias(evaluation) if evaluation else None,
    }


def _public_name(source: str) -> str:
    """Return a source as it may be published: only the name of a local file, not its path."""
    return Path(source).name if Path(source).exists() or Path(source).is_absolute() else source


def _describe_calibration(runs: Sequence[Path], model: Path) -> str:
    if len(runs) > 1:
        return "None: each run's calibrator was fitted to that run alone."
    calibrator = _read_json(RunFolder(model).calibrator)
    if not calibrator.get("method"):
        return "None: it did not help beyond noise, or was switched off."
    parameters = ", ".join(f"{value:.4f}" for value in calibrator["parameters"])
    baseline = RunFolder(model).blend_baseline.name
    blend = f", and the baseline in {baseline}" if calibrator["method"] == BLEND else ""
    return (
        f"`rewardmodel predict` applies {calibrator['method']} ({parameters}) from calibrator.json{blend}; plain "
        "transformers returns uncalibrated probabilities."
    )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
