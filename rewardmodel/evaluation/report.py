"""Evaluated runs in, HTML pages out: one run's report, or a comparison of several. Needs no torch."""

from collections.abc import Sequence
from pathlib import Path

from rewardmodel.evaluation.evaluate import compare, evaluate, evaluated_predictions
from rewardmodel.evaluation.page import ComparedRun, render_comparison, render_run
from rewardmodel.evaluation.results import Evaluation
from rewardmodel.evaluation.run_facts import describe_run
from rewardmodel.files import check_page, write_text
from rewardmodel.run_folder import RunFolder, as_folders


def report(
    runs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    evaluations: Sequence[Evaluation] | None = None,
) -> Path:
    """Write one self-contained HTML file about a run, or about several side by side, and nothing else.

    Several runs are compared on the battles of their validation folds, which must be the same.

    Args:
        runs: a run folder, or several; all are compared with the first.
        output: the file to write; default: report.html in the run, comparison.html in the first of several.
        evaluations: of the runs, as `evaluate_run` returned them, in their order; default: they are computed.

    Returns:
        The path of the file.

    Raises:
        InputError: no such run, runs that were validated on different battles, or a file that is no .html.
    """
    folders = as_folders(runs)
    if output:
        check_page(Path(output))
    found = [evaluate(folder) for folder in folders] if evaluations is None else list(evaluations)
    if len(folders) == 1:
        path = Path(output or RunFolder(folders[0]).report)
        page = render_run(found[0], evaluated_predictions(folders[0], found[0]), folders[0])
    else:
        path = Path(output or folders[0] / "comparison.html")
        differences = [None, *(compare(folder, folders[0]) for folder in folders[1:])]
        names = [folder.resolve().name for folder in folders]
        names = [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]
        about = [describe_run(*one) for one in zip(folders, found, strict=True)]
        rows = zip(names, found, differences, about, strict=True)
        page = render_comparison([ComparedRun(*row) for row in rows])
    write_text(path, page)
    return path
