"""Runs and battles in, a file of predictions or a submission out; everything given is checked before torch loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rewardmodel.config.loader import Overrides
from rewardmodel.distributed import is_main
from rewardmodel.errors import InputError
from rewardmodel.inference.battles import battles_to_predict, check_time_limit, check_weights
from rewardmodel.predictions import check_sample, write_predictions, write_submission
from rewardmodel.run_folder import as_folders, load_run_recipe, trained_models


def predict_to_file(
    runs: str | Path | Sequence[str | Path],
    battles: Any,
    output: str | Path,
    *,
    overrides: Overrides = (),
    weights: Sequence[float] | None = None,
    sample_submission: str | Path | None = None,
    time_limit: float | None = None,
) -> pd.DataFrame:
    """Predict battles with one or several runs and write the predictions to a file.

    Finished shards are kept next to the output, in OUTPUT.shards, until it is written: after a crash the same call
    continues from them. Options, paths, run folders, battles and ids are checked, in this order, before torch is
    imported.

    Args:
        runs: one or several run folders, as for `predict`.
        battles: as for `predict`.
        output: .parquet for the predictions table, .csv for a submission; written completely or not at all.
        overrides: keys of the runs' recipes for this call: `{"inference.swap_tta": "none"}`, or as typed:
            `["--inference.swap_tta", "none"]`.
        weights: of each run in the mean; default: equal.
        sample_submission: a submission with the columns and ids that the output, a .csv, must have.
        time_limit: seconds, as for `predict`.

    Returns:
        The predictions table, one row per battle.

    Raises:
        InputError: something given cannot be used; nothing was written.
        FloatingPointError: a prediction is NaN or infinite; the battles are named.
    """
    folders, output = as_folders(runs), Path(output)
    sample = Path(sample_submission) if sample_submission else None
    _check_output(output, sample)
    check_weights(weights, len(folders))
    check_time_limit(time_limit)
    output.parent.mkdir(parents=True, exist_ok=True)

    for run in folders:
        trained_models(run)
    recipes = [load_run_recipe(run, overrides) for run in folders]
    read = battles_to_predict(folders[0], battles)
    if sample:
        check_sample(sample, read["id"])

    from rewardmodel.inference.predict import predict  # imports torch
    from rewardmodel.inference.shards import remove_shards

    shards = output.with_name(f"{output.name}.shards")
    table = predict(folders, read, recipes, weights, work=shards, time_limit=time_limit)
    if is_main():
        write = write_submission if output.suffix == ".csv" else write_predictions
        write(table, output)
        remove_shards(shards)
    return table


def _check_output(output: Path, sample: Path | None) -> None:
    if output.suffix not in (".parquet", ".csv"):
        raise InputError(f"--output: {output} ends in neither .parquet nor .csv; give one of them")
    if sample and output.suffix != ".csv":
        raise InputError(f"--sample-submission: {output} is not a submission; let --output end in .csv")
    if output.is_dir():
        raise InputError(f"--output: {output} is a folder; give the name of a file")
