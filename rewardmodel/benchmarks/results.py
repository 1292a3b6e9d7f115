"""What a benchmark found: the types of results.json, and the same as lines for a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from rewardmodel.benchmarks.figures import Compared
from rewardmodel.errors import plural
from rewardmodel.evaluation.results import Interval

BASELINE_NOTE = "* the run differs from this baseline beyond noise (95 %, by prompt, paired)"


@dataclass(frozen=True)
class BaselineScore:
    """A baseline's figure on the same rows, and the run's minus it."""

    value: float
    difference: Interval


@dataclass(frozen=True)
class Score:
    """A figure of one run, with its interval.

    Attributes:
        name: of the subset, or of what summarises several.
        rows: that count.
        prompts: that these rows are of.
        summary: whether it summarises other figures.
        percent: whether it is a share; higher is better.
        found: the figure.
        baselines: by name.
    """

    name: str
    rows: int
    prompts: int
    summary: bool
    percent: bool
    found: Interval
    baselines: dict[str, BaselineScore]


@dataclass(frozen=True)
class RunScores:
    """The figures of one run.

    Attributes:
        run: its name.
        model_type: as leaderboards call it: `Seq. Classifier`, or `Custom Classifier` if it compares two responses.
        chat_template: the name of its template; `tokenizer`: the backbone's chat template.
        how: how its responses were scored, in words.
        seen: rows whose prompt or responses were in its training battles; None: unknown.
        scores: in the order of the benchmark.
    """

    run: str
    model_type: str
    chat_template: str
    how: str
    seen: int | None
    scores: list[Score]


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark found of one run, or of two.

    Attributes:
        benchmark: its name for people.
        data: the file or hub id.
        rows: of it.
        prompts: that these are of.
        runs: in the order given.
        compared: the first run minus the second; empty for one run.
    """

    benchmark: str
    data: str
    rows: int
    prompts: int
    runs: list[RunScores]
    compared: list[Compared]


def leaderboard_entry(run: RunScores) -> dict[str, str | float]:
    """Return a run's scores as the leaderboard of RewardBench has them: {"model": ..., "Math": 0.61, ...}."""
    about: dict[str, str | float] = {
        "model": run.run,
        "model_type": run.model_type,
        "chat_template": run.chat_template,
    }
    subsets = [one for one in run.scores if not one.summary] or run.scores
    return about | {one.name: one.found.value for one in subsets}


def format_benchmark(result: BenchmarkResult) -> str:
    """Return a result as tables for a terminal."""
    parts = [f"{result.benchmark}: {plural(result.rows, 'row')} of {plural(result.prompts, 'prompt')}, {result.data}"]
    parts += [_format_run(run) for run in result.runs]
    if result.compared:
        parts.append(_format_compared(result))
    return "\n\n".join(parts)


def _format_run(run: RunScores) -> str:
    """Return a table of one run: a line a figure, a column a baseline."""
    names = list(dict.fromkeys(name for one in run.scores for name in one.baselines))
    rows = [["", "rows", "score", "95 %", *names]]
    for one in run.scores:
        cells = [_baseline(one, name) for name in names]
        rows.append([one.name, f"{one.rows:,}", _value(one.found.value, one), _bracket(one.found, one), *cells])
    lines = [f"{run.run}: {run.how}"]
    if run.seen:
        lines.append(
            f"a prompt or responses of its training battles are in {plural(run.seen, 'row')}: they do not measure how "
            "new ones are judged"
        )
    starred = any(cell.endswith("*") for row in rows for cell in row)
    return "\n".join([*lines, *align(rows), *([f"  {BASELINE_NOTE}"] if starred else [])])


def _format_compared(result: BenchmarkResult) -> str:
    kinds = {one.name: one for one in result.runs[0].scores}
    rows = [["", "difference", "95 %", "p", "p, Holm"]]
    for one in result.compared:
        kind = kinds[one.name]
        p_values = [format_p(p) for p in (one.p, one.p_holm)]
        value = _value(one.difference.value, kind, "+")
        rows.append([one.name, value, _bracket(one.difference, kind, "+"), *p_values])
    title = f"{result.runs[0].run} minus {result.runs[1].run}, paired; p by Holm for the number of subsets"
    return "\n".join([title, *align(rows)])


def format_p(p: float | None) -> str:
    """Return a p-value as a table shows it."""
    return "" if p is None else "< 0.01" if p < 0.01 else f"{p:.2f}"


def _value(value: float, kind: Score, sign: str = "") -> str:
    text = f"{100 * value:{sign}.2f}" if kind.percent else f"{value:{sign}.4f}"
    return "–" if value != value else text  # noqa: PLR0124  NaN


def _bracket(found: Interval, kind: Score, sign: str = "") -> str:
    if found.low is None or found.high is None:
        return "no interval"
    return f"[{_value(found.low, kind, sign)}, {_value(found.high, kind, sign)}]"


def _baseline(score: Score, name: str) -> str:
    baseline = score.baselines.get(name)
    if baseline is None:
        return ""
    return _value(baseline.value, score) + ("*" if baseline.difference.excludes() else " ")


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(f"  {first.ljust(widths[0])}  {'  '.join(cells)}".rstrip())
    return lines
