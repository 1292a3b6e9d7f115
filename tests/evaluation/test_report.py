import html
import re
import subprocess
import sys

import numpy as np
import pytest
from builders import from_columns

from rewardmodel.battles import OUTCOMES
from rewardmodel.errors import InputError
from rewardmodel.evaluation.evaluate import evaluate, evaluate_run, format_evaluation
from rewardmodel.evaluation.report import report
from rewardmodel.predictions import build_predictions, write_predictions


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes the run folder of 60 predictions; the outcomes are always the same."""

    def made(name, seed=0):
        winners = np.random.default_rng(0).integers(3, size=60)
        texts = {
            text: [[f"{text} {row} <script>"] for row in range(60)] for text in ("prompt", "response_a", "response_b")
        }
        columns = {"id": [str(row) for row in range(60)], "group": list(range(60)), **texts}
        columns |= dict(zip(OUTCOMES, np.eye(3)[winners].T.tolist(), strict=True))
        orders = np.random.default_rng(seed).dirichlet([1, 1, 1], (2, 60))
        folder = tmp_path / name
        folder.mkdir()
        write_predictions(build_predictions(from_columns(columns, "made"), *orders), folder / "validation.parquet")
        return folder

    return made


def test_a_runs_page_is_all_that_is_written(make_run):
    run = make_run("one")
    path = report(run)
    assert path == run / "report.html"
    assert {one.name for one in run.iterdir()} == {"validation.parquet", "report.html"}
    page = path.read_text(encoding="utf-8")
    assert f"{evaluate(run).metrics['log_loss'].value:.3f}" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.slow  # seconds a case
def test_a_page_of_an_evaluation_that_is_given_is_the_same(make_run, monkeypatch):
    run = make_run("one")
    expected = report(run).read_bytes()
    evaluation = evaluate_run(run)
    monkeypatch.setattr("rewardmodel.evaluation.report.evaluate", None)
    assert report(run, evaluations=[evaluation]).read_bytes() == expected


def test_page_and_terminal_say_the_same_of_what_stands_out(make_run):
    run = make_run("one")
    listed = re.search('<ul class="findings">(.*?)</ul>', report(run).read_text(encoding="utf-8"))[1]
    on_page = [html.unescape(one) for one in re.findall("<li>(.*?)</li>", listed)]
    on_terminal = format_evaluation(evaluate(run)).split("what stands out\n")[1].replace("\n    ", " ")
    assert [f"  - {one}" for one in on_page] == on_terminal.splitlines()
    assert on_page


def test_a_page_goes_where_it_is_asked_to(make_run, tmp_path):
    assert report(make_run("one"), tmp_path / "here.html") == tmp_path / "here.html"
    assert (tmp_path / "here.html").is_file()


def test_several_runs_are_compared_with_the_first(make_run):
    first, second = make_run("first", 1), make_run("second", 2)
    path = report([first, second])
    assert path == first / "comparison.html"
    assert all(name in path.read_text(encoding="utf-8") for name in ("first", "second"))


def test_a_run_that_is_not_there_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(InputError):
        report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_report_in_a_fresh_process_never_imports_torch(make_run):
    code = """if True:
        import sys
        from rewardmodel.evaluation.report import report
        report(sys.argv[1])
        print({"torch", "transformers", "trl"} & set(sys.modules))"""
    run = make_run("one")
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
