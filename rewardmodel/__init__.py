"""rewardmodel: human preference battles in, a calibrated model that predicts the winner out.

Each command of `rewardmodel --help` is a function here: `from rewardmodel import train, predict, evaluate`.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "InputError": "errors",
    "Recipe": "config.schema",
    "load_recipe": "config.loader",
    "read_battles": "data.formats",
    "train": "training.train",
    "predict": "inference.predict",
    "evaluate": "evaluation.evaluate",
    "evaluate_run": "evaluation.evaluate",
    "compare": "evaluation.evaluate",
    "baseline": "evaluation.baselines",
    "report": "evaluation.report",
    "export": "exports.export",
    "run": "pipeline",
    "prepare": "pipeline",
    "train_fold": "kfold",
    "train_folds": "kfold",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for, so that importing does nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rewardmodel' has no attribute '{name}'")
    return getattr(import_module(f"rewardmodel.{_HOMES[name]}"), name)
