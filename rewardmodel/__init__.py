"""rewardmodel: human preference battles in, a calibrated model that predicts the winner out.

Each command of `rewardmodel --help` is a function here: `from rewardmodel import train, predict, evaluate`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "InputError": "errors",
    "Recipe": "config.schema",
    "Source": "config.schema",
    "load_recipe": "config.loader",
    "recipe_schema": "config.json_schema",
    "read_battles": "data.formats",
    "train": "training.train",
    "predict": "inference.predict",
    "predict_to_file": "inference.to_file",
    "reward_function": "inference.reward_function",
    "Scorer": "inference.scorer",
    "evaluate": "evaluation.evaluate",
    "evaluate_run": "evaluation.evaluate",
    "compare": "evaluation.evaluate",
    "baseline": "evaluation.baselines",
    "benchmark": "benchmarks.benchmark",
    "report": "evaluation.report",
    "export": "exports.export",
    "doctor": "planning.doctor",
    "serve": "serving.serve",
    "compare_responses": "serving.compare",
    "parity": "serving.parity",
    "run": "pipeline",
    "prepare": "pipeline",
    "train_fold": "kfold",
    "train_folds": "kfold",
}
"""Public names, and the module of each."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its module at first use, so that `import rewardmodel` alone imports nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rewardmodel' has no attribute '{name}'")
    return getattr(import_module(f"rewardmodel.{_HOMES[name]}"), name)
