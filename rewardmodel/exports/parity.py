"""A run and what was exported of it in, how far the export's predictions are from the run's out.

The run's side is its weights as they were trained, computed in float32. The export's side is read back in a fresh
process, first by plain transformers in which nothing of rewardmodel is imported, then by rewardmodel.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from datasets import Dataset, load_from_disk

from rewardmodel.config.schema import Recipe
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.exports.merge import Trained
from rewardmodel.inference.predict import battles_to_predict, predict, predict_with
from rewardmodel.metrics import log_loss
from rewardmodel.model.batching import pad
from rewardmodel.model.forward import Predictor
from rewardmodel.model.loading import load_model, load_tokenizer
from rewardmodel.model.precision import compute_device, dtype_name
from rewardmodel.model.saved_model import is_adapter, read_about
from rewardmodel.objectives import find_objective
from rewardmodel.predictions import predicted, read_predictions, true_outcomes, write_predictions
from rewardmodel.prompt.tokenization import tokenize
from rewardmodel.run_folder import load_run_recipe

Facts = dict[str, Any]

BATTLES = 64
"""Battles that are predicted beside the run, at least."""

PLAIN_BATTLES = 8
"""Battles of these whose sequences plain transformers classifies as well, in one padded batch."""


class Limits(NamedTuple):
    """The most that a probability, and the log loss, may differ."""

    probability: float
    log_loss: float


EXACT, ROUNDED = Limits(1e-4, 1e-3), Limits(0.02, 1e-3)
"""Limits of exports in float32, and of those in 16 bits."""

FRESH_PROCESS = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification
job = json.load(open(sys.argv[1]))
if job["batch"]:
    batch = torch.load(job["batch"])
    model = AutoModelForSequenceClassification.from_pretrained(
        job["folder"], dtype=getattr(torch, job["precision"]), device_map={"": job["device"]}
    ).eval()
    with torch.no_grad():
        logits = model(**{name: ids.to(job["device"]) for name, ids in batch.items()}).logits
    torch.save(logits.float().cpu(), job["logits"])
    assert not any(name.startswith("rewardmodel") for name in sys.modules)
    del model
from rewardmodel.exports.parity import predict_export
predict_export(job)
"""
"""The program of the fresh process."""


def battles_to_compare(run: Trained, battles: Any = None) -> Dataset:
    """Return what export and run predict: the battles given, else `BATTLES` of the run's held-out ones, or of `sample`.

    Raises:
        InputError: fewer than `BATTLES` are given.
    """
    if battles is not None:
        given = battles_to_predict(run.folder, battles)
        if len(given) < BATTLES:
            raise InputError(f"--battles: {len(given)} battles; give at least {BATTLES} to compare export and run on")
        return given
    try:
        held_out = battles_to_predict(run.folder, "validation")
    except InputError:  # the run's data is on another machine
        held_out = None
    if held_out is None or len(held_out) < BATTLES:
        held_out = read_battles("sample")
    return held_out.select(np.linspace(0, len(held_out) - 1, BATTLES).astype(int))


def predict_run(run: Trained, battles: Dataset, rounded: bool = False) -> pd.DataFrame:
    """Return the predictions of a run's weights as they were trained, computed in float32, without its calibrator.

    Args:
        run: what predicts.
        battles: n battles.
        rounded: whether a run in 8 bits rounds the activations of its layers to 8 bits, too, as it does by itself
            (LLM.int8, Dettmers et al. 2022).
    """
    recipe = computed_in("float32", run.recipe)
    model, tokenizer = load_model(recipe.model, run.model, run.dtype)
    for weight in [*model.parameters(), *model.buffers()]:
        if weight.is_floating_point():
            weight.data = weight.data.float()
    for module in list(model.modules()):
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
        for name, child in () if rounded else list(module.named_children()):
            if isinstance(child, Linear8bitLt):
                setattr(module, name, _unrounded(child))
    predictor = Predictor(model, tokenizer, torch.float32, recipe.inference.batch_tokens)
    return predict_with(predictor, recipe, battles)


def _unrounded(layer: Linear8bitLt) -> torch.nn.Linear:
    """Return the layer with its 8-bit weight in float32."""
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    weight = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    plain.weight, plain.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
    return plain


def computed_in(precision: str, recipe: Recipe) -> Recipe:
    """Return a recipe that predicts in a precision, with an attention that knows it, uncalibrated and by no rule."""
    return replace(
        recipe,
        model=replace(recipe.model, dtype=cast(Any, precision), attn_implementation=None),
        inference=replace(recipe.inference, calibrate=False, tie_if_same=None, win_if_other_empty=None),
    )


def check_parity(
    run: Trained,
    beside: pd.DataFrame,
    folder: Path,
    battles: Dataset,
    precision: str,
    limits: Limits | None,
    plain: bool,
) -> Facts:
    """Return how far an export is from its run, measured in a fresh process.

    Args:
        run: what was exported.
        beside: its predictions of the battles, of `predict_run`.
        folder: of the export.
        battles: n battles.
        precision: that the export computes in.
        limits: what it must keep; none: it is only measured.
        plain: whether plain transformers must read it too.

    Returns:
        `battles`; `precision`; `max_abs_dp` and `mean_abs_dp`, of probabilities; `log_loss` of `run`, `export` and
        their `difference`, None if outcomes are unknown; `limits`; and `plain`, the battles that plain transformers
        predicted and `max_abs_dp` between it and rewardmodel on the same export.

    Raises:
        FloatingPointError: beyond the limits.
        InputError: plain transformers does not read the export as rewardmodel does.
    """
    facts: Facts
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if plain:
            torch.save(_plain_batch(run, battles), work / "batch.pt")
        battles.save_to_disk(work / "battles")
        device = str(compute_device(run.recipe.model))
        names = {"battles": "battles", "logits": "logits.pt", "predictions": "predictions.parquet"}
        trained_in = dtype_name(run.dtype) if is_adapter(folder) else ""
        job = {"folder": str(folder), "precision": precision, "device": device, "trained_in": trained_in}
        job |= {"batch": str(work / "batch.pt") if plain else ""} | {name: str(work / at) for name, at in names.items()}
        _in_fresh_process(job, work)
        table = read_predictions(work / "predictions.parquet")
        facts = {"precision": precision, **differences(beside, table)}
        facts["limits"] = limits and limits._asdict()
        logits = torch.load(work / "logits.pt") if plain else None
        facts["plain"] = None if logits is None else _plain_facts(run, folder, logits, table)
    _judge(facts, limits)
    return facts


def differences(one: pd.DataFrame, other: pd.DataFrame) -> Facts:
    """Return how far two predictions of the same battles are apart; the second's log loss minus the first's."""
    apart = np.abs(predicted(one) - predicted(other))
    true = true_outcomes(one)
    losses = None
    if not np.isnan(true).any():
        before, after = (log_loss(predicted(table), true) for table in (one, other))
        losses = {"run": before, "export": after, "difference": after - before}
    return {
        "battles": len(one),
        "max_abs_dp": float(apart.max()),
        "mean_abs_dp": float(apart.mean()),
        "log_loss": losses,
    }


def predict_export(job: dict[str, str]) -> None:
    """Predict with an export as a job of the fresh process says, and write the table."""
    folder, battles = Path(job["folder"]), load_from_disk(job["battles"])
    recipe = load_run_recipe(folder)
    if job["trained_in"]:
        table = predict_run(Trained(folder, recipe, getattr(torch, job["trained_in"])), battles)
    else:
        table = predict(folder, battles, computed_in(job["precision"], recipe))
    write_predictions(table, Path(job["predictions"]))


def format_parity(facts: Facts) -> str:
    """Return what `check_parity` found as lines for a terminal."""
    lines = [
        f"parity on {facts['battles']} battles, the run in float32 beside the export in {facts['precision']}",
        f"  {'max |dp|':<30}{facts['max_abs_dp']:.2e}{_limit(facts, 'probability')}",
        f"  {'mean |dp|':<30}{facts['mean_abs_dp']:.2e}",
    ]
    if facts["log_loss"]:
        losses = facts["log_loss"]
        change = f"{losses['difference']:+.2e}{_limit(facts, 'log_loss')}"
        lines.append(f"  {'log loss':<30}{losses['run']:.4f} -> {losses['export']:.4f}, {change}")
    if facts["plain"]:
        lines.append(f"  {'plain transformers, max |dp|':<30}{facts['plain']['max_abs_dp']:.2e}")
    for key, name in OTHERS.items():
        if key in facts:
            other = facts[key]
            loss = f", log loss {other['log_loss']['difference']:+.2e}" if other["log_loss"] else ""
            lines.append(f"  {name:<30}{other['max_abs_dp']:.2e}, mean {other['mean_abs_dp']:.2e}{loss}")
    return "\n".join(lines)


OTHERS = {"probability_average": "from the runs averaged", "rounded_run": "from the run in 8 bits"}
"""Other predictions that the run's are measured against, by their key, and how a terminal calls them."""


def _limit(facts: Facts, name: str) -> str:
    return f"   limit {facts['limits'][name]:g}" if facts["limits"] else "   measured, no limit"


def _judge(facts: Facts, limits: Limits | None) -> None:
    said = format_parity(facts).replace("\n ", ";")
    loss = abs(facts["log_loss"]["difference"]) if facts["log_loss"] else 0.0
    if limits and not (facts["max_abs_dp"] <= limits.probability and loss <= limits.log_loss):
        raise FloatingPointError(f"the export does not predict as the run does: {said}; export with --dtype float32")
    plain = facts["plain"]["max_abs_dp"] if facts["plain"] else 0.0
    if not plain <= (limits or ROUNDED).probability:
        raise InputError(
            f"plain transformers reads this export otherwise than rewardmodel: {said}; do the sequences end in the "
            "padding token? Accept with --rewardmodel-only"
        )


def _in_fresh_process(job: dict[str, str], work: Path) -> None:
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-c", FRESH_PROCESS, str(work / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"the export cannot be read back in a fresh process: {reason}")


def _plain_batch(run: Trained, battles: Dataset) -> dict[str, torch.Tensor]:
    """Return the sequences of the first battles as plain transformers takes them: filled up on the right."""
    tokenizer = load_tokenizer(run.model)
    first = battles.select(range(PLAIN_BATTLES))
    rows = tokenize(first, tokenizer, run.recipe.prompt, encoding=find_objective(run.recipe.objective).encoding)
    batch = pad(list(rows), tokenizer.pad_token_id)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _plain_facts(run: Trained, folder: Path, logits: torch.Tensor, table: pd.DataFrame) -> Facts:
    """Return how far plain transformers' predictions of an export are from rewardmodel's."""
    objective = find_objective(run.recipe.objective)
    outputs = logits.view(PLAIN_BATTLES, -1, logits.shape[-1])
    if objective.head.tie:
        tie = torch.full_like(outputs, read_about(folder)["tie"])
        outputs = torch.cat([outputs, tie], dim=-1)
    found = objective.probabilities_by_order(outputs)[0].numpy()
    apart = np.abs(found - predicted(table.head(PLAIN_BATTLES), "ab"))
    return {"battles": PLAIN_BATTLES, "max_abs_dp": float(apart.max())}
