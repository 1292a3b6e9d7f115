"""Trained runs in, HTML pages out: one run's report, or a comparison of several; needs no torch."""

from collections.abc import Sequence
from pathlib import Path

from rewardmodel.evaluation.evaluate import compare, measure_run
from rewardmodel.evaluation.page import render, render_comparison
from rewardmodel.files import write_text
from rewardmodel.run_folder import RunFolder


def report(runs: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Return the path of one self-contained HTML file about a run, or about several side by side.

    The runs are evaluated again, so that metrics.json has every figure of the page. Several runs are compared on the
    battles of their validation folds, which must be the same.

    Args:
        runs: a run folder, or several; all are compared with the first.
        output: the file to write; none: report.html in the run, comparison.html in the first of several.

    Raises:
        InputError: no such run, or runs that were validated on different battles.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(one) for one in runs]
    if len(folders) == 1:
        path = Path(output or RunFolder(folders[0]).report)
        facts, table = measure_run(folders[0])
        write_text(path, render(facts, table, folders[0]))
        return path
    measured = [measure_run(folder)[0] for folder in folders]
    differences = [None, *(compare(folder, folders[0]) for folder in folders[1:])]
    rows = [
        {"name": folder.name, "facts": found, "difference_to_first": difference}
        for folder, found, difference in zip(folders, measured, differences, strict=True)
    ]
    path = Path(output or folders[0] / "comparison.html")
    write_text(path, render_comparison(rows))
    return path
