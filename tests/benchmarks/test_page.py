from rewardmodel.benchmarks.figures import Compared
from rewardmodel.benchmarks.page import MOST_FIGURES, render_benchmark
from rewardmodel.benchmarks.results import BaselineScore, BenchmarkResult, RunScores, Score
from rewardmodel.evaluation.results import Interval


def run(name):
    random = {"random": BaselineScore(0.25, Interval(0.36, 0.2, 0.5))}
    scores = [
        Score("Math", 40, 38, False, True, Interval(0.61234, 0.5, 0.7), random),
        Score("mean of subsets", 48, 46, True, True, Interval(0.55617, 0.4, 0.6), {}),
    ]
    return RunScores(name, "Seq. Classifier", "tokenizer", "scores each response alone", 3, scores)


def test_the_page_shows_two_runs_and_their_difference():
    compared = [Compared(one.name, Interval(0.1, 0.02, 0.2), 0.004, 0.02) for one in run("a").scores]
    page = render_benchmark(BenchmarkResult("RewardBench 2", "<b>.jsonl", 48, 46, [run("a"), run("b")], compared))
    assert "RewardBench 2: a and b" in page
    assert "&lt;b&gt;.jsonl" in page
    assert "61.23" in page
    assert "25.00*" in page
    assert "+10.00" in page
    assert "&lt; 0.01" in page
    assert page.count('<svg class="chart"') == 1


def test_a_chart_has_only_so_many_figures():
    found = Interval(0.5, 0.4, 0.6)
    many = [Score(f"subset {n}", 9, 9, False, True, found, {}) for n in range(MOST_FIGURES)]
    many += [Score("mean of all", 9, 9, True, True, found, {}), Score("log loss", 9, 9, True, False, found, {})]
    runs = [RunScores("mine", "Seq. Classifier", "tokenizer", "scores each response alone", None, many)]
    page = render_benchmark(BenchmarkResult("JudgeBench", "data", 9, 9, runs, []))
    assert page.count('<svg class="chart"') == 2
    assert page.count("subset 3") == 1  # in the table, not in the chart
    assert page.count("mean of all") > 1
