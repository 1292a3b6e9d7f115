"""Runs and battles in, a file of predictions or a submission out; everything given is checked before torch loads."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardmodel.config.loader import Overrides
from rewardmodel.data.source_checks import OWN_PARTS, announce, check_source
from rewardmodel.distributed import is_main
from rewardmodel.errors import InputError
from rewardmodel.files import check_replaceable, check_writable, lock_output
from rewardmodel.inference.battles import battles_to_predict, check_time_limit, check_weights
from rewardmodel.run_folder import as_folders, load_run_recipe, trained_models

if TYPE_CHECKING:
    import pandas as pd

    from rewardmodel.data.formats import SourceReport


def predict_to_file(
    runs: str | Path | Sequence[str | Path],
    battles: Any,
    output: str | Path,
    *,
    overrides: Overrides = (),
    weights: Sequence[float] | None = None,
    sample_submission: str | Path | None = None,
    time_limit: float | None = None,
) -> "pd.DataFrame":
    """Predict battles with one or several runs and write the predictions to a file.

    Finished shards are kept next to the output, in OUTPUT.shards, until it is written: after a crash the same call
    continues from them. Options, paths, run folders, battles and ids are checked, in this order, before torch is
    imported.

    Args:
        runs: one or several run folders, as for `predict`.
        battles: as for `predict`.
        output: .parquet for the predictions table, .csv for a submission; written completely or not at all. A file that
            is there is replaced if it holds predictions, else refused. The .csv of chosen and rejected responses also
            says which of them is A, and the probability of what was chosen.
        overrides: keys of the runs' recipes for this call: `{"inference.swap_tta": "none"}`, or as typed:
            `["--inference.swap_tta", "none"]`.
        weights: of each run in the mean; default: equal.
        sample_submission: a submission with the columns and ids that the output, a .csv, must have: probabilities, or
            `id` and `winner`.
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
    check_replaceable(output)
    check_writable(output, "--output")
    for run in folders:
        trained_models(run)
    with lock_output(output) if is_main() else nullcontext():
        return _predict_to(output, folders, battles, overrides, weights, sample, time_limit)


def _predict_to(
    output: Path,
    folders: list[Path],
    battles: Any,
    overrides: Overrides,
    weights: Sequence[float] | None,
    sample: Path | None,
    time_limit: float | None,
) -> "pd.DataFrame":
    """Predict, with what needs no pandas checked, and write the file."""
    recipes = [load_run_recipe(run, overrides) for run in folders]
    if isinstance(battles, str | Path) and str(battles) not in OWN_PARTS:
        check_source(str(battles))
    announce([battles if isinstance(battles, str | Path) else f"<{type(battles).__name__}>"])
    from rewardmodel.predictions import check_sample, read_labels, write_predictions, write_submission  # pandas

    reports: list[SourceReport] = []
    read = battles_to_predict(folders[0], battles, reports)
    labels = read_labels(sample) if sample else None
    if sample:
        check_sample(sample, read["id"])

    from rewardmodel.inference.predict import predict  # imports torch
    from rewardmodel.inference.shards import remove_shards

    shards = output.with_name(f"{output.name}.shards")
    table = predict(folders, read, recipes, weights, work=shards, time_limit=time_limit)
    if is_main():
        if output.suffix == ".csv":
            write_submission(table, output, labels, any(one.tossed for one in reports) and not sample)
        else:
            write_predictions(table, output)
        remove_shards(shards)
    return table


def _check_output(output: Path, sample: Path | None) -> None:
    if output.suffix not in (".parquet", ".csv"):
        raise InputError(f"--output: {output} ends in neither .parquet nor .csv; give one of them")
    if sample and output.suffix != ".csv":
        raise InputError(f"--sample-submission: {output} is not a submission; let --output end in .csv")
    if output.is_dir():
        raise InputError(f"--output: {output} is a folder; give the name of a file")
