"""What `predict` is given, read and checked before a model is loaded: battles, weights, time limit; needs no torch."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardmodel.data.source_checks import OWN_PARTS
from rewardmodel.errors import InputError, plural
from rewardmodel.run_folder import check_same_inputs, is_k_fold, load_run_recipe, model_folder, trained_models

if TYPE_CHECKING:
    from datasets import Dataset

    from rewardmodel.data.formats import SourceReport

COMPARED_BATTLES = 64
"""Battles that an export or a server and its run are compared on, at least."""


def battles_to_predict(run: Path, battles: Any, reports: "list[SourceReport] | None" = None) -> "Dataset":
    """Return battles of a Dataset, a DataFrame, dicts or a path, or a part of the run's own that it did not train on.

    Args:
        run: the run folder.
        battles: what to read; `validation`, `calibration` and `holdout` are the run's own.
        reports: gets a report of each source that is read.

    Raises:
        InputError: battles that cannot be read, a part that is empty, or the run's own battles have changed since
            training.
    """
    from rewardmodel.data.formats import read_battles  # pandas and datasets from here on
    from rewardmodel.data.splits import fingerprint_parts, load_battles, split

    if not (isinstance(battles, str) and battles in OWN_PARTS):
        return read_battles(battles, role="test", reports=reports)
    data = load_run_recipe(run).data
    parts = split(load_battles(data, reports=reports), None if is_k_fold(run) else data.fold)
    check_same_inputs(run, {"data": fingerprint_parts(parts)})
    part: Dataset = getattr(parts, battles)
    if not len(part):
        raise InputError(f"{run}: its data.{battles} is 0: no battles were kept for that; set it before training")
    return part


def single_model(run: Path) -> Path:
    """Return the folder of the only model of a run.

    Raises:
        InputError: as `trained_models`, or it is a run of several folds.
    """
    folders = trained_models(run)
    if len(folders) > 1:
        raise InputError(
            f"{run}: a run of {len(folders)} folds; give the folder of one fold, or export the run with --kind soup"
        )
    return model_folder(run)


def battles_to_compare(run: Path, battles: Any = None) -> "Dataset":
    """Return the battles that two ways to predict with a run are compared on.

    Args:
        run: the run folder.
        battles: what `battles_to_predict` takes; default: `COMPARED_BATTLES` of the battles that the run held out, or
            of the sample if those are not on this machine.

    Raises:
        InputError: fewer than `COMPARED_BATTLES` are given.
    """
    import numpy as np

    from rewardmodel.data.formats import read_battles

    if battles is not None:
        given = battles_to_predict(run, battles)
        if len(given) < COMPARED_BATTLES:
            few = plural(len(given), "battle")
            raise InputError(f"--battles: {few}; give at least {COMPARED_BATTLES} to compare on")
        return given
    try:
        held_out = battles_to_predict(run, "validation")
    except InputError:  # the run's data is on another machine
        held_out = None
    if held_out is None or len(held_out) < COMPARED_BATTLES:
        held_out = read_battles("sample")
    return held_out.select(np.linspace(0, len(held_out) - 1, COMPARED_BATTLES).astype(int))


def check_weights(weights: Sequence[float] | None, runs: int) -> list[float]:
    """Return the weight of each run in the mean; default: equal.

    Raises:
        InputError: not one weight per run, one that is negative or not finite, or all of them 0.
    """
    shares = [1.0] * runs if weights is None else [float(weight) for weight in weights]
    if len(shares) != runs:
        raise InputError(f"weights: {len(shares)} for {plural(runs, 'run')}; give one for each run")
    if not all(0 <= share < math.inf for share in shares) or not any(shares):
        raise InputError(
            f"weights: {', '.join(f'{share:g}' for share in shares)}; give numbers from 0, not all of them 0"
        )
    return shares


def check_time_limit(seconds: float | None) -> None:
    """Raise unless a time limit is None or a finite number of seconds from 0.

    Raises:
        InputError: it is negative, NaN or infinite.
    """
    if seconds is not None and not 0 <= seconds < math.inf:
        raise InputError(f"time limit: {seconds:g}; give seconds, from 0")
