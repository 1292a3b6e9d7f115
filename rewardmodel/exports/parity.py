"""A run and its export -> how far apart their predictions are.

The run's side is computed in float32 from its weights as they were trained. The export's side is read back in a fresh
process, first by plain transformers without rewardmodel being imported, then by rewardmodel.
"""

import filecmp
import json
import logging
import os
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
from rewardmodel.errors import InputError
from rewardmodel.exports.checks import TrainedRun
from rewardmodel.inference.predict import predict, predict_with
from rewardmodel.metrics import log_loss
from rewardmodel.model.backbone import resolve_backbone, saved_backbone_folder
from rewardmodel.model.batching import pad
from rewardmodel.model.forward import Predictor
from rewardmodel.model.fp8 import Fp8Linear
from rewardmodel.model.loading import load_model, load_tokenizer
from rewardmodel.model.precision import compute_device, dtype_name
from rewardmodel.model.saved_model import is_adapter, read_about
from rewardmodel.objectives import find_objective
from rewardmodel.predictions import predicted, read_predictions, true_outcomes, write_predictions
from rewardmodel.prompt.tokenization import tokenize
from rewardmodel.run_folder import load_run_recipe

logger = logging.getLogger(__name__)

Parity = dict[str, Any]
"""What `check_parity` found, as parity.json holds it: `{"battles": 64, "max_abs_dp": 2e-6, "limits": {…}, …}`."""

PLAIN_BATTLES = 8
"""Battles whose sequences plain transformers classifies too, in one padded batch."""


class ParityLimits(NamedTuple):
    """The largest allowed difference of a probability, and of the log loss."""

    probability: float
    log_loss: float


EXACT, ROUNDED = ParityLimits(1e-4, 1e-3), ParityLimits(0.02, 1e-3)
"""Limits of exports in float32, and of those in 16 bits."""

FRESH_PROCESS = """
import json, sys, torch
sys.modules["rewardmodel"] = None  # importing it raises ImportError
from transformers import AutoModelForSequenceClassification
job = json.load(open(sys.argv[1]))
if job["batch"]:
    batch = torch.load(job["batch"])
    model = AutoModelForSequenceClassification.from_pretrained(
        job["folder"],
        dtype=getattr(torch, job["precision"]),
        device_map={"": job["device"]},
        trust_remote_code="segment_ids" in batch,  # the export's own code reads them
    ).eval()
    with torch.no_grad():
        logits = model(**{name: ids.to(job["device"]) for name, ids in batch.items()}).logits
    torch.save(logits.float().cpu(), job["logits"])
    del model
del sys.modules["rewardmodel"]
from rewardmodel.exports.parity import predict_export
predict_export(job)
"""
"""The program of the fresh process; its argument is the file of a job."""


def predict_in_float32(run: TrainedRun, battles: Dataset, *, round_activations: bool = False) -> pd.DataFrame:
    """Return the predictions of a run's weights as they were trained, computed in float32, without its calibrator.

    Args:
        run: with the model that predicts.
        battles: n battles.
        round_activations: let a run in 8 bits or fp8 round the inputs of its layers to 8 bits, as it does when it
            predicts (LLM.int8, Dettmers et al. 2022; `model.fp8`).
    """
    recipe = with_precision(run.recipe, "float32")
    model, tokenizer = load_model(recipe.model, run.model, getattr(torch, run.dtype))
    for weight in [*model.parameters(), *model.buffers()]:
        if weight.is_floating_point():
            weight.data = weight.data.float()
    for module in list(model.modules()):
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
        for name, child in () if round_activations else list(module.named_children()):
            if isinstance(child, Linear8bitLt):
                setattr(module, name, _dequantise_layer(child))
            if isinstance(child, Fp8Linear):
                setattr(module, name, child.dequantise())
    predictor = Predictor(model, tokenizer, torch.float32, recipe.inference.batch_tokens)
    return predict_with(predictor, recipe, battles)


def _dequantise_layer(layer: Linear8bitLt) -> torch.nn.Linear:
    """Return the layer with its 8-bit weight in float32."""
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    weight = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    plain.weight, plain.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
    return plain


def with_precision(recipe: Recipe, precision: str) -> Recipe:
    """Return a recipe that predicts in a precision, with the family's own attention, uncalibrated and without rules."""
    return replace(
        recipe,
        model=replace(recipe.model, dtype=cast(Any, precision), attn_implementation=None),
        inference=replace(recipe.inference, calibrate=False, tie_if_same=None, win_if_other_empty=None),
    )


def choose_precision(run: TrainedRun, dtype: torch.dtype) -> str:
    """Return the precision to compute a merged model in: that of its weights if this machine supports it, or float32.

    Args:
        run: that was merged.
        dtype: of the merged weights.
    """
    recipe = with_precision(run.recipe, dtype_name(dtype)).model
    try:
        resolve_backbone(recipe, folder=saved_backbone_folder(recipe, run.model))
    except InputError:
        return "float32"
    return dtype_name(dtype)


def check_parity(
    run: TrainedRun,
    expected: pd.DataFrame,
    folder: Path,
    battles: Dataset,
    precision: str,
    limits: ParityLimits | None,
    plain: bool,
) -> Parity:
    """Return how far an export's predictions are from its run's, measured in a fresh process.

    Args:
        run: that was exported.
        expected: its predictions of the battles, by `predict_in_float32`.
        folder: of the export.
        battles: n battles.
        precision: to compute a whole model in; adapters are computed in float32.
        limits: that the export must keep; None: it is only measured.
        plain: whether plain transformers must read it too.

    Returns:
        `battles`; `precision`; `max_abs_dp` and `mean_abs_dp`, of probabilities; `log_loss` of `run`, `export` and
        their `difference`, None if outcomes are unknown; `limits`; and `plain`, the number of `battles` that plain
        transformers predicted and `max_abs_dp` between it and rewardmodel on the same export.

    Raises:
        FloatingPointError: a difference above its limit.
        InputError: plain transformers does not read the export as rewardmodel does.
    """
    parity: Parity
    with tempfile.TemporaryDirectory() as temporary:
        # write what the fresh process reads, and run it
        work = Path(temporary)
        if plain:
            torch.save(_make_plain_batch(run, battles), work / "batch.pt")
        battles.save_to_disk(work / "battles")
        job = {
            "folder": str(folder),
            "precision": precision,
            "device": str(compute_device(run.recipe.model)),
            "trained_in": run.dtype if is_adapter(folder) else "",
            "batch": str(work / "batch.pt") if plain else "",
            "battles": str(work / "battles"),
            "logits": str(work / "logits.pt"),
            "predictions": str(work / "predictions.parquet"),
        }
        logger.info("reading the export back in a new process, which predicts the %d battles again …", len(battles))
        _run_in_fresh_process(job, work)

        # compare its predictions with the run's, and with plain transformers'
        table = read_predictions(work / "predictions.parquet")
        parity = {"precision": precision, **measure_differences(expected, table)}
        parity["limits"] = limits and limits._asdict()
        logits = torch.load(work / "logits.pt") if plain else None
        parity["plain"] = None if logits is None else _compare_plain(run, folder, logits, table)
    _check_limits(parity, limits)
    return parity


def check_copy(model: Path, copy: Path) -> Parity:
    """Return that a copied model has the same files, byte for byte, so that it predicts the same.

    Returns:
        `files`, their number.

    Raises:
        FloatingPointError: a file is missing or differs.
    """
    names = sorted(path.relative_to(model) for path in model.rglob("*") if path.is_file())
    for name in names:
        if not ((copy / name).is_file() and filecmp.cmp(model / name, copy / name, shallow=False)):
            raise FloatingPointError(f"{name}: the copy in the export differs from {model / name}; export again")
    return {"files": len(names)}


def measure_differences(one: pd.DataFrame, other: pd.DataFrame) -> Parity:
    """Return how far apart two predictions of the same battles are.

    Returns:
        `battles`; `max_abs_dp` and `mean_abs_dp`, of probabilities; `log_loss` of the first (`run`), of the second
        (`export`) and their `difference`, second minus first, in nats; None if outcomes are unknown.
    """
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
    """Predict with an export as a job of `check_parity` says, and write the table; called in the fresh process."""
    folder, battles = Path(job["folder"]), load_from_disk(job["battles"])
    recipe = load_run_recipe(folder)
    if job["trained_in"]:
        table = predict_in_float32(TrainedRun(folder, recipe, job["trained_in"]), battles)
    else:
        table = predict(folder, battles, with_precision(recipe, job["precision"]))
    write_predictions(table, Path(job["predictions"]))


def format_parity(parity: Parity) -> str:
    """Return what `check_parity` or `check_copy` found as lines for a terminal; of several models below their names."""
    if "models" in parity:
        return "\n".join(f"{name}\n{format_parity(found)}" for name, found in parity["models"].items())
    if "files" in parity:
        return f"parity: its {parity['files']} files are the run's, byte for byte"

    def limit(name: str) -> str:
        return f"   limit {parity['limits'][name]:g}" if parity["limits"] else "   measured, no limit"

    lines = [
        f"parity on {parity['battles']} battles, the run in float32 and the export in {parity['precision']}",
        f"  {'max |dp|':<30}{parity['max_abs_dp']:.2e}{limit('probability')}",
        f"  {'mean |dp|':<30}{parity['mean_abs_dp']:.2e}",
    ]
    if parity["log_loss"]:
        losses = parity["log_loss"]
        change = f"{losses['difference']:+.2e}{limit('log_loss')}"
        lines.append(f"  {'log loss':<30}{losses['run']:.4f} -> {losses['export']:.4f}, {change}")
    if parity["plain"]:
        lines.append(f"  {'plain transformers, max |dp|':<30}{parity['plain']['max_abs_dp']:.2e}")
    others = {"probability_average": "from the runs averaged", "rounded_run": "from the run in 8 bits"}
    for key, name in others.items():
        if key in parity:
            other = parity[key]
            loss = f", log loss {other['log_loss']['difference']:+.2e}" if other["log_loss"] else ""
            lines.append(f"  {name:<30}{other['max_abs_dp']:.2e}, mean {other['mean_abs_dp']:.2e}{loss}")
    return "\n".join(lines)


def _check_limits(parity: Parity, limits: ParityLimits | None) -> None:
    measured = format_parity(parity).replace("\n ", ";")
    loss = abs(parity["log_loss"]["difference"]) if parity["log_loss"] else 0.0
    if limits and not (parity["max_abs_dp"] <= limits.probability and loss <= limits.log_loss):
        raise FloatingPointError(
            f"the export does not predict as the run does: {measured}; export with --dtype float32"
        )
    plain = parity["plain"]["max_abs_dp"] if parity["plain"] else 0.0
    if not plain <= (limits or ROUNDED).probability:
        raise InputError(
            f"plain transformers does not read this export as rewardmodel does: {measured}; do the sequences end in "
            "the padding token? Accept with --rewardmodel-only"
        )


def _run_in_fresh_process(job: dict[str, str], work: Path) -> None:
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-c", FRESH_PROCESS, str(work / "job.json")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules")}  # for copies of an export's own code
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise InputError(f"the export cannot be read back in a fresh process ({reason}); fix that and export again")


def _make_plain_batch(run: TrainedRun, battles: Dataset) -> dict[str, torch.Tensor]:
    """Return the sequences of the first battles as plain transformers takes them, padded on the right."""
    tokenizer = load_tokenizer(run.model)
    first = battles.select(range(PLAIN_BATTLES))
    rows = tokenize(first, tokenizer, run.recipe.prompt, encoding=find_objective(run.recipe.objective).encoding)
    batch = pad(list(rows), tokenizer.pad_token_id)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if not run.recipe.model.plain_head:
        plain["segment_ids"] = segments = torch.zeros_like(batch["input_ids"])
        segments.view(-1)[batch["responses"]] = batch["response_of"] % 2 + 1
    return plain


def _compare_plain(run: TrainedRun, folder: Path, logits: torch.Tensor, table: pd.DataFrame) -> Parity:
    """Return how far plain transformers' predictions are from rewardmodel's.

    Args:
        run: that was exported.
        folder: of the export.
        logits: (n_sequences, n_logits) of the first battles, by plain transformers.
        table: rewardmodel's predictions with the same export.
    """
    objective = find_objective(run.recipe.objective)
    outputs = logits.view(PLAIN_BATTLES, -1, logits.shape[-1])
    if objective.head.tie and outputs.shape[-1] == 1:
        tie = torch.full_like(outputs, read_about(folder)["tie"])
        outputs = torch.cat([outputs, tie], dim=-1)
    found = objective.probabilities_by_order(outputs)[0].numpy()
    apart = np.abs(found - predicted(table.head(PLAIN_BATTLES), "ab"))
    return {"battles": PLAIN_BATTLES, "max_abs_dp": float(apart.max())}
