"""What `predict` is given, read and checked before a model is loaded: battles, weights, time limit; needs no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from rewardmodel.data.formats import read_battles
from rewardmodel.data.splits import fingerprint_parts, load_battles, split
from rewardmodel.errors import InputError
from rewardmodel.run_folder import check_same_inputs, is_k_fold, load_run_recipe

OWN_PARTS = ("validation", "calibration", "holdout")
"""Parts of a run's own battles that can be predicted by name."""


def battles_to_predict(run: Path, battles: Any) -> Dataset:
    """Return battles of a Dataset, a DataFrame, dicts or a path, or a part of the run's own that it did not train on.

    Args:
        run: the run folder.
        battles: what to read; `validation`, `calibration` and `holdout` are the run's own.

    Raises:
        InputError: battles that cannot be read, a part that is empty, or the run's own battles have changed since
            training.
    """
    if not (isinstance(battles, str) and battles in OWN_PARTS):
        return read_battles(battles, role="test")
    data = load_run_recipe(run).data
    parts = split(load_battles(data), None if is_k_fold(run) else data.fold)
    check_same_inputs(run, {"data": fingerprint_parts(parts)})
    part: Dataset = getattr(parts, battles)
    if not len(part):
        raise InputError(f"{run}: its data.{battles} is 0: no battles were kept for that; set it before training")
    return part


def check_weights(weights: Sequence[float] | None, runs: int) -> list[float]:
    """Return the weight of each run in the mean; default: equal.

    Raises:
        InputError: not one weight per run, one that is negative or not finite, or all of them 0.
    """
    shares = [1.0] * runs if weights is None else [float(weight) for weight in weights]
    if len(shares) != runs:
        raise InputError(f"weights: {len(shares)} for {runs} runs; give one for each run")
    if not all(0 <= share < np.inf for share in shares) or not any(shares):
        raise InputError(
            f"weights: {', '.join(f'{share:g}' for share in shares)}; give numbers from 0, not all of them 0"
        )
    return shares


def check_time_limit(seconds: float | None) -> None:
    """Raise unless a time limit is None or a finite number of seconds from 0.

    Raises:
        InputError: it is negative, NaN or infinite.
    """
    if seconds is not None and not 0 <= seconds < np.inf:
        raise InputError(f"time limit: {seconds:g}; give seconds, from 0")
