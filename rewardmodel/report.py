"""A predictions table with known outcomes in, its metrics beside the class prior out; needs no torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rewardmodel.errors import InputError
from rewardmodel.metrics import class_prior, log_loss, summary
from rewardmodel.predictions import predicted, read_predictions, true_outcomes
from rewardmodel.runs import METRICS, VALIDATION, write_json


def evaluate(predictions: str | Path | pd.DataFrame) -> dict[str, Any]:
    """Return the metrics of predictions whose outcomes are known, and write metrics.json if they are a run's.

    Args:
        predictions: a run folder (its validation predictions), a predictions file, or a table.

    Returns:
        `battles`, `groups`; `metrics`: name -> value, low, high (95 %, clustered by prompt group); `prior`: the log
        loss of these battles' own outcome shares; `orders`, where both were predicted: the log loss of each order
        alone, and how often the likeliest outcome changes with the order.

    Raises:
        InputError: no such predictions, or outcomes that are not known.
    """
    if isinstance(predictions, pd.DataFrame):
        return _measure(predictions, "predictions")
    path = Path(predictions)
    file = path / VALIDATION if path.is_dir() else path
    result = _measure(read_predictions(file), str(file))
    if path.is_dir():
        write_json(path / METRICS, result)
    return result


def _measure(table: pd.DataFrame, where: str) -> dict[str, Any]:
    true, probabilities = true_outcomes(table), predicted(table)
    if not len(true) or np.isnan(true).any():
        raise InputError(f"{where}: the outcomes of these battles are not known; give predictions of labelled battles")
    prior = np.broadcast_to(class_prior(true), true.shape)
    result: dict[str, Any] = {
        "battles": len(table),
        "groups": int(table["group"].nunique()),
        "metrics": summary(probabilities, true, table["group"].to_numpy()),
        "prior": log_loss(prior, true),
    }
    if "ba_p_tie" in table:
        orders = [predicted(table, "ab"), predicted(table, "ba")]
        flips = orders[0].argmax(axis=1) != orders[1].argmax(axis=1)
        result["orders"] = {
            "log_loss_ab": log_loss(orders[0], true),
            "log_loss_ba": log_loss(orders[1], true),
            "flip_rate": float(flips.mean()),
        }
    return result


def format_metrics(result: dict[str, Any]) -> str:
    """Return what `evaluate` found as lines for a terminal."""
    lines = [f"{result['battles']} battles of {result['groups']} prompts"]
    for name, metric in result["metrics"].items():
        lines.append(f"  {name:<28}{metric['value']:.4f}   95 % [{metric['low']:.4f}, {metric['high']:.4f}]")
    gain = result["prior"] - result["metrics"]["log_loss"]["value"]
    lines.append(f"  {'class prior, log_loss':<28}{result['prior']:.4f}   the model is {abs(gain):.4f} "
                 f"{'better' if gain >= 0 else 'WORSE'}")  # fmt: skip
    if "orders" in result:
        orders = result["orders"]
        lines.append(f"  {'log_loss, A first / B first':<28}{orders['log_loss_ab']:.4f} / {orders['log_loss_ba']:.4f}")
        lines.append(f"  {'verdict flips with order':<28}{100 * orders['flip_rate']:.1f} %")
    return "\n".join(lines)
