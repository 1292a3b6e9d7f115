"""What is known of a run and its export in, the export's model card out: README.md with the hub's metadata."""

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

CARD = "README.md"

LICENCES = {"smollm2-135m-instruct": "apache-2.0", "gemma3-270m": "gemma"}
"""Licences of the packaged backbones, in the hub's words."""

LINKS = {
    "rao_kupper": "P(A) = sigmoid(d - eta), P(B) = sigmoid(-d - eta), P(tie) = the rest, eta = log(1 + exp(t))",
    "davidson": "P(A), P(B), P(tie) = softmax of (d / 2, -d / 2, t)",
    "bradley_terry": "P(A), P(B), P(tie) = softmax of (d / 2, -d / 2, t), so that P(A) / P(B) = exp(d)",
}
"""How rewards become probabilities, by objective."""


def write_card(runs: Sequence[Path], model: Path, parity: dict[str, Any], parity_text: str) -> None:
    """Write the card of an export beside its model.

    Args:
        runs: the folders of the runs that it was made of.
        model: the export's model, with its recipe.
        parity: what `exports.parity.check_parity` found.
        parity_text: the same as lines of text.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    facts = card_facts(runs, model, parity, parity_text)
    write_text(model / CARD, environment.get_template("card.md.jinja").render(**facts))


def card_facts(runs: Sequence[Path], model: Path, parity: dict[str, Any], parity_text: str) -> dict[str, Any]:
    """Return what the card's template prints."""
    recipe, about = load_run_recipe(runs[0]), read_about(model)
    objective = find_objective(recipe.objective)
    merged = about.get("merged", {})
    bits = quantization_name(recipe.model)
    return {
        "title": f"{Path(recipe.trainer['output_dir']).name}, {parity['kind']}",
        "version": rewardmodel.__version__,
        "base": _shown(about["model_name_or_path"]),
        "fingerprint": about["fingerprint"],
        "licence": licence(recipe.model),
        "objective": recipe.objective.name,
        "joint": objective.encoding == "joint",
        "labels": objective.head.num_labels,
        "outcomes": OUTCOMES,
        "tie": about.get("tie"),
        "link": LINKS.get(recipe.objective.name),
        "bits": bits,
        "whole": not is_adapter(model),
        "plain": recipe.model.plain_head and (is_adapter(model) or parity["plain"] is not None),
        "why_not_plain": _why_not_plain(recipe.model),
        "form": _form(merged, bits) if merged else "the adapter and its head as they were trained, in PEFT's layout",
        "requantised": bool(merged.get("bits")),
        "max_length": recipe.prompt.max_length,
        "truncation": recipe.prompt.truncation,
        "example": _example(model, recipe),
        "folds": len(runs),
        "runs": [_run_facts(run) for run in runs],
        "calibration": _calibration(runs, model),
        "parity": parity_text,
    }


def licence(config: ModelConfig) -> dict[str, str | None]:
    """Return the licence of a backbone: its `identifier` in the hub's words, if known, and a `sentence`."""
    identifier = LICENCES.get(config.model_name_or_path)
    where = "of its package"
    if identifier is None:
        identifier, where = _licence_of_card(config), "of its own model card"
    if identifier is None:
        unknown = f"that of `{_shown(config.model_name_or_path)}`, to be looked up there: nothing here tells it."
        return {"identifier": None, "sentence": unknown}
    return {"identifier": identifier, "sentence": f"{identifier}, that {where}; it holds for this model too."}


def _licence_of_card(config: ModelConfig) -> str | None:
    """Return the licence that the backbone's own card states: the one in its folder, or on the hub."""
    folder = fetch_backbone(config.model_name_or_path, config.model_revision)
    try:
        _, header, _ = (folder / CARD).read_text(encoding="utf-8").split("---\n", 2)
        return yaml.safe_load(header)["license"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        pass
    if folder.parent.name != "snapshots":  # of the hub's cache
        return None
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError

    try:
        stated = model_info(config.model_name_or_path, timeout=10).card_data
        return stated.get("license") if stated else None
    except (HfHubHTTPError, OSError, ValueError):  # OSError: no network, or none wanted
        return None


def _form(merged: dict[str, Any], bits: str | None) -> str:
    added = f"the backbone's weights out of {bits}" if bits else "the backbone's weights"
    form = f"one model: {added}, what was trained added in float32, saved in {merged['dtype']}"
    return f"{form} and quantised once more to {merged['bits']} bits, the head left out" if merged["bits"] else form


def _why_not_plain(config: ModelConfig) -> str:
    if not config.plain_head:
        return (
            f"**Only rewardmodel loads this model.** Its head is another than plain transformers' (`model.pooling: "
            f"{config.pooling}`, `model.pair_ties: {str(config.pair_ties).lower()}`)."
        )
    return "**Only rewardmodel loads this model** as it was trained; plain transformers was not checked on it."


def _example(model: Path, recipe: Recipe) -> str:
    """Return a small battle in the template's text, one sequence."""
    tokenizer = load_tokenizer(model)
    encoder = PromptEncoder(tokenizer, recipe.prompt, find_objective(recipe.objective).encoding)
    texts = ["What is 2 + 2?", "4", "It is 5."][: 1 + len(encoder.responses)]
    sequence = next(encoder(*([[text]] for text in texts)))
    return tokenizer.decode(sequence.input_ids)


def _run_facts(run: Path) -> dict[str, Any]:
    data = _json(RunFolder(run).environment).get("data", {})
    metrics = RunFolder(run).metrics
    evaluation = read_evaluation(metrics) if metrics.is_file() else None
    given = load_run_recipe(run).data.train
    sources = [one.path if isinstance(one, Source) else one for one in (given if isinstance(given, list) else [given])]
    return {
        "name": run.resolve().name,
        "source": ", ".join(map(_shown, sources)),
        "training": data.get("training", "unknown"),
        "validation": data.get("validation", "unknown"),
        "metrics": format_metrics(evaluation) if evaluation else None,
        "bias": format_bias(evaluation) if evaluation else None,
    }


def _shown(source: str) -> str:
    """Return a source as a card may show it: of a local file, its name alone."""
    return Path(source).name if Path(source).exists() or Path(source).is_absolute() else source


def _calibration(runs: Sequence[Path], model: Path) -> str:
    if len(runs) > 1:
        return "None: the calibrators of the runs were fitted to each by itself."
    calibrator = _json(RunFolder(model).calibrator)
    if not calibrator.get("method"):
        return "None is applied: it did not help beyond noise, or was switched off."
    parameters = ", ".join(f"{value:.4f}" for value in calibrator["parameters"])
    blended = f", with the baseline in {RunFolder(model).blend_baseline.name}" if calibrator["method"] == BLEND else ""
    return (
        f"`rewardmodel predict` applies {calibrator['method']} ({parameters}), of calibrator.json{blended}; plain "
        "transformers gives the probabilities before it."
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
