from rewardmodel.benchmarks.figures import Compared
from rewardmodel.benchmarks.results import (
    BaselineScore,
    BenchmarkResult,
    RunScores,
    Score,
    format_benchmark,
    format_p,
    leaderboard_entry,
)
from rewardmodel.evaluation.results import Interval


def run(name):
    random = {"random": BaselineScore(0.25, Interval(0.36, 0.2, 0.5))}
    scores = [
        Score("Math", 40, 38, False, True, Interval(0.61234, 0.5, 0.7), random),
        Score("Ties", 8, 8, False, True, Interval(0.5, None, None), {}),
        Score("mean of subsets", 48, 46, True, True, Interval(0.55617, 0.4, 0.6), {}),
    ]
    return RunScores(name, "Seq. Classifier", "tokenizer", "scores each response alone", 3, scores)


def test_the_table_shows_scores_in_percent_with_baselines_beside():
    compared = [
        Compared("Math", Interval(0.101, 0.02, 0.2), 0.004, 0.02),
        Compared("Ties", Interval(0.0, None, None), None, None),
        Compared("mean of subsets", Interval(0.05, -0.01, 0.1), 0.2, None),
    ]
    lines = format_benchmark(BenchmarkResult("RewardBench 2", "file.jsonl", 48, 46, [run("a"), run("b")], compared))
    assert lines.splitlines() == [
        "RewardBench 2: 48 rows of 46 prompts, file.jsonl",
        "",
        *[
            line.replace("NAME", name)
            for name in ("a", "b")
            for line in (
                "NAME: scores each response alone",
                "a prompt or responses of its training battles are in 3 rows: they do not measure how new ones are "
                "judged",
                "                   rows  score            95 %  random",
                "  Math               40  61.23  [50.00, 70.00]  25.00*",
                "  Ties                8  50.00     no interval",
                "  mean of subsets    48  55.62  [40.00, 60.00]",
                "  * the run differs from this baseline beyond noise (95 %, by prompt, paired)",
                "",
            )
        ],
        "a minus b, paired; p by Holm for the number of subsets",
        "                   difference             95 %       p  p, Holm",
        "  Math                 +10.10  [+2.00, +20.00]  < 0.01     0.02",
        "  Ties                  +0.00      no interval",
        "  mean of subsets       +5.00  [-1.00, +10.00]    0.20",
    ]


def test_the_leaderboard_gets_the_subsets():
    assert leaderboard_entry(run("mine")) == {
        "model": "mine",
        "model_type": "Seq. Classifier",
        "chat_template": "tokenizer",
        "Math": 0.61234,
        "Ties": 0.5,
    }


def test_small_p_values_are_not_shown_as_zero():
    assert [format_p(p) for p in (None, 0.0001, 0.0523)] == ["", "< 0.01", "0.05"]
