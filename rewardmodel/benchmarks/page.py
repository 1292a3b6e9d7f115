"""A benchmark's result in, one self-contained HTML page out, in the style of a run's report."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from rewardmodel.benchmarks.results import BenchmarkResult, Score
from rewardmodel.evaluation import charts
from rewardmodel.evaluation.charts import ChartRow
from rewardmodel.evaluation.page import fill_template

MOST_FIGURES = 8
"""Of one chart; a benchmark with more shows the first of those that summarise."""


def render_benchmark(result: BenchmarkResult) -> str:
    """Return the page; the same result gives the same bytes."""
    drawn = {}
    for percent, axis in ((True, "score, % (higher is better)"), (False, "lower is better")):
        rows = _chart_rows(result, percent)
        if rows:
            drawn[axis] = Markup(charts.draw_intervals(rows, axis, f"scores-{int(percent)}", digits=2))
    kinds = {one.name: one for one in result.runs[0].scores}
    names = list(dict.fromkeys(name for one in result.runs[0].scores for name in one.baselines))
    return fill_template(
        title=f"{result.benchmark}: {' and '.join(run.run for run in result.runs)}",
        benchmark=result,
        baseline_columns=names,
        kinds=kinds,
        charts=drawn,
    )


def _chart_rows(result: BenchmarkResult, percent: bool) -> list[ChartRow]:
    """Return the figures under headings, one a run, with the baselines of the first run's."""
    names = [one.name for one in result.runs[0].scores if one.percent == percent]
    if len(names) > MOST_FIGURES:
        names = [one.name for one in result.runs[0].scores if one.percent == percent and one.summary][:MOST_FIGURES]
    scale, rows = 100 if percent else 1, []
    for name in names:
        scores = [(run.run, _find(run.scores, name)) for run in result.runs]
        rows.append(ChartRow(name, kind="heading"))
        for run, score in scores:
            low, high = (math.nan if end is None else scale * end for end in (score.found.low, score.found.high))
            rows.append(ChartRow(run, scale * score.found.value, low, high))
        rows += [
            ChartRow(baseline, scale * one.value, kind="baseline") for baseline, one in scores[0][1].baselines.items()
        ]
    return rows


def _find(scores: Sequence[Score], name: str) -> Score:
    return next(one for one in scores if one.name == name)
