"""Results of an evaluation in, inline SVG charts out: drawn for 360 px, text as text, colours by CSS variable.

Every function returns one `<svg>` to embed in HTML: no XML header, no style sheet, no URL, ids that begin with the
chart's `name` (which is unique in its page), and the same bytes for the same input. A page may set the CSS variables
of `COLOURS`, e.g. for dark mode; without them the colours are those written here.
"""

import html
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from rewardmodel.errors import plural
from rewardmodel.evaluation.results import ReliabilityBin

INK, MUTED, GRID, PAPER = "#1f2329", "#5c6570", "#d9dde2", "#fffffe"
MODEL, HUMANS = "#0b62a8", "#c2510a"

COLOURS = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", MODEL: "model", HUMANS: "humans"}
"""Colour -> CSS variable. The model's blue and the humans' vermilion differ for every kind of colour vision, and in
marker and dash too."""

CHART_WIDTH = 5.0
"""Inches of every chart: 360 px at the 72 px an inch of SVG."""

RowKind = Literal["run", "baseline", "published", "heading"]
"""What is evaluated; what it is compared with on the same battles; published results; a heading."""

MIN_LENGTH_BATTLES = 50
"""Battles that `draw_win_rates` needs; a bin has half of them or more."""

MANY_LOSSES = 50
"""Logged losses from which on a learning curve also shows their means."""

_MARKERS = {"run": ("o", MODEL, MODEL), "baseline": ("s", INK, INK), "published": ("D", MUTED, PAPER)}
"""Marker, its edge and its face by kind."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rewardmodel",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.fontsize": 10.5,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class ChartRow:
    """One line of a chart of intervals; `low` and `high` are NaN where there is no interval."""

    label: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    kind: RowKind = "run"


def draw_intervals(rows: Sequence[ChartRow], axis: str, name: str, line: float | None = None, digits: int = 3) -> str:
    """Return a horizontal chart: a marker, its interval and its value a row, the first row on top.

    Args:
        rows: one or more.
        axis: label of the horizontal axis.
        name: prefix of the chart's ids.
        line: a value to draw a dashed vertical line at.
        digits: decimals of the values.
    """
    with _style():
        # markers and intervals
        figure = Figure(figsize=(CHART_WIDTH, 0.95 + 0.31 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        if line is not None:
            axes.axvline(line, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for place, row in enumerate(rows):
            if row.kind == "heading":
                continue
            marker, edge, face = _MARKERS[row.kind]
            if math.isfinite(row.low) and math.isfinite(row.high):
                axes.plot([row.low, row.high], [place, place], color=edge, linewidth=2.2, solid_capstyle="round")
            axes.plot([row.value], [place], marker, color=edge, markerfacecolor=face, markersize=7, linestyle="none")
        # labels on the left, values on the right
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [_label(row.label) for row in rows])
        values = axes.secondary_yaxis("right")
        values.set_yticks(range(len(rows)), [_format_value(row, digits) for row in rows])
        for side, one in (("left", axes), ("right", values)):
            one.tick_params(axis="y", length=0, pad=6, labelcolor=INK)
            one.spines[side].set_visible(False)
        for row, text in zip(rows, axes.get_yticklabels(), strict=True):
            text.set_color(MUTED if row.kind == "heading" else INK)
        axes.grid(axis="x")
        axes.margins(x=0.06)
        axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
        axes.set_xlabel(axis)
        listed = ", ".join(f"{row.label} {_format_value(row, digits)}" for row in rows if row.kind != "heading")
        return _svg(figure, name, f"{axis}: {listed}")


def draw_reliability(bins: Sequence[ReliabilityBin], name: str) -> str:
    """Return a reliability diagram over a histogram of its battles.

    Args:
        bins: one or more, none of them empty.
        name: prefix of the chart's ids.
    """
    columns = [(one.hit_rate, one.battles, one.confidence, one.hit_low, one.hit_high) for one in bins]
    hits, counts, confidence, low, high = np.array(columns).T
    with _style():
        figure = Figure(figsize=(CHART_WIDTH, 5.3), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.vlines(confidence, low, high, color=MODEL, linewidth=2.2)
        axes.plot(confidence, hits, "o-", color=MODEL, markersize=6, linewidth=1.2)
        axes.set(ylim=(0, 1.02), ylabel="accuracy")
        widths = [one.high - one.low for one in bins]
        below.bar([one.low for one in bins], counts, widths, align="edge", color=MODEL, edgecolor=PAPER, linewidth=1)
        below.set(xlim=(0, 1), xlabel="probability of the likeliest outcome", ylabel="battles")
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        for one in (axes, below):
            one.grid(axis="both")
            one.tick_params(length=0, pad=6)
        figure.align_ylabels()
        battles = plural(int(counts.sum()), "battle")
        return _svg(figure, name, f"Reliability diagram of {battles} in {plural(len(bins), 'bin')}")


def draw_orders(as_given: np.ndarray, exchanged: np.ndarray, name: str) -> str:
    """Return P(A) with A shown first against P(A) with B shown first, as hexagons; darker is more battles.

    Args:
        as_given: (n_battles,) float, A shown first.
        exchanged: (n_battles,) float of the same A, B shown first.
        name: prefix of the chart's ids.
    """
    with _style():
        figure = Figure(figsize=(CHART_WIDTH, 4.9), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
        extent = (0.0, 1.0, 0.0, 1.0)
        cells = axes.hexbin(as_given, exchanged, gridsize=22, extent=extent, mincnt=1, linewidths=0.3)
        counts = np.asarray(cells.get_array())
        shade = 0.2 + 0.8 * counts / counts.max(initial=1)
        cells.set_array(None)
        cells.set_facecolor([(*mpl.colors.to_rgb(MODEL), float(alpha)) for alpha in shade.round(2)])
        cells.set_edgecolor("none")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set(xlabel="P(A wins), A shown first", ylabel="P(A wins), B shown first")
        axes.tick_params(length=0, pad=6)
        axes.grid()
        return _svg(figure, name, f"P(A) in both orders of {plural(len(as_given), 'battle')}")


def draw_win_rates(ratio: np.ndarray, humans: np.ndarray, model: np.ndarray, groups: np.ndarray, name: str) -> str:
    """Return the win rate of A against how much longer A is than B, in bins of equally many battles.

    Args:
        ratio: (n_battles,) log2 of the length of A over that of B; `MIN_LENGTH_BATTLES` or more.
        humans: (n_battles,) 1 where A won, 0 where B won, a half for a tie.
        model: (n_battles,) the same of the predicted probabilities.
        groups: (n_battles,) labels, for the intervals.
        name: prefix of the chart's ids.
    """
    # bins of equally many battles, each at its mean ratio
    bins = np.array_split(np.argsort(ratio, kind="stable"), min(len(ratio) // (MIN_LENGTH_BATTLES // 2), 10))
    places = [float(ratio[one].mean()) for one in bins]
    with _style():
        figure = Figure(figsize=(CHART_WIDTH, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for label, wins, colour, form in (("people", humans, HUMANS, "s--"), ("model", model, MODEL, "o-")):
            rows = [_mean(wins[one], groups[one]) for one in bins]
            axes.vlines(places, [row.low for row in rows], [row.high for row in rows], color=colour, alpha=0.45)
            axes.plot(places, [row.value for row in rows], form, color=colour, markersize=6, label=label)
        # ticks in words: "2× longer"
        reach = max(1, math.ceil(max(map(abs, places))))
        ticks = sorted({-reach, -1, 0, 1, reach})
        words = [f"{2 ** abs(tick):,}×\n{'longer' if tick > 0 else 'shorter'}" if tick else "same" for tick in ticks]
        axes.set_xticks(ticks, words)
        axes.set_xlim(-reach * 1.12, reach * 1.12)
        axes.set(xlabel="length of A against B, in characters", ylabel="win rate of A")
        axes.tick_params(length=0, pad=6)
        axes.grid()
        figure.legend(loc="outside upper left", ncols=2, handlelength=2.6)
        return _svg(figure, name, f"Win rate of A by length in {len(bins)} bins, people and model")


def _mean(values: np.ndarray, groups: np.ndarray) -> ChartRow:
    """Return a mean with its 95 % normal interval, from the sums of residuals by group (Liang & Zeger 1986)."""
    mean, (_, members) = float(values.mean()), np.unique(groups, return_inverse=True)
    half = 1.96 * math.sqrt((np.bincount(members, values - mean) ** 2).sum()) / len(values)
    return ChartRow("", mean, mean - half, mean + half)


def draw_learning_curve(
    training: Sequence[tuple[float, float]], validation: Sequence[tuple[float, float]], prior: float | None, name: str
) -> str:
    """Return training loss and validation log loss by step.

    Args:
        training: step and loss; NaN leaves a gap. From `MANY_LOSSES` on, means over ranges of steps are drawn, too.
        validation: step and log loss.
        prior: log loss of the class prior, a dashed line, or None.
        name: prefix of the chart's ids.
    """
    with _style():
        figure = Figure(figsize=(CHART_WIDTH, 3.9), layout="constrained")
        axes = figure.add_subplot()
        if training:
            steps, losses = np.array(training, dtype=np.float64).T
            if len(steps) >= MANY_LOSSES:
                axes.plot(steps, losses, color=HUMANS, linewidth=0.8, alpha=0.4)
                pieces = min(len(steps) // 5, 25)
                steps, losses = (
                    np.array([one.mean() for one in np.array_split(array, pieces)]) for array in (steps, losses)
                )
            axes.plot(steps, losses, color=HUMANS, marker=".", label="training loss")
        if prior is not None and math.isfinite(prior):
            axes.axhline(prior, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="class prior")
        if validation:
            steps, losses = zip(*validation, strict=True)
            axes.plot(steps, losses, "o-", color=MODEL, markersize=5, label="validation log loss")
        axes.set(xlabel="optimiser step", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.tick_params(length=0, pad=6)
        axes.grid()
        figure.legend(loc="outside upper left", ncols=2, handlelength=1.8, columnspacing=1.2)
        return _svg(figure, name, f"Learning curve: {len(training)} training and {len(validation)} validation losses")


def draw_power_law(
    draws: Sequence[tuple[float, float]],
    means: Sequence[tuple[float, float]],
    law: Sequence[tuple[float, float, float, float]],
    prior: float,
    name: str,
) -> str:
    """Return log loss by number of training battles, on a logarithmic axis.

    Args:
        draws: training battles and log loss of each draw.
        means: the same of each size, ascending.
        law: training battles, fitted log loss and its bounds, ascending; dashed beyond the last of the means.
        prior: log loss of the class prior, a dashed line.
        name: prefix of the chart's ids.
    """
    with _style():
        figure = Figure(figsize=(CHART_WIDTH, 4.1), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(prior, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="class prior")
        axes.plot(*zip(*draws, strict=True), ".", color=MUTED, markersize=4, label="draws")
        if law:
            battles, fitted, low, high = np.array(law).T
            axes.fill_between(battles, low, high, color=MODEL, alpha=0.15, linewidth=0)
            inside = battles <= means[-1][0] * 1.001
            axes.plot(battles[inside], fitted[inside], color=MODEL, label="power law")
            axes.plot(battles[~inside], fitted[~inside], color=MODEL, linestyle=(0, (3, 2)))
        axes.plot(*zip(*means, strict=True), "o", color=MODEL, markersize=7, label="mean")
        axes.set_xscale("log")
        ticks = [one for one, _ in means] + ([law[-1][0]] if law and law[-1][0] > means[-1][0] * 1.3 else [])
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="training battles", ylabel="log loss")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(length=0, pad=6)
        axes.grid()
        figure.legend(loc="outside upper left", ncols=4, handlelength=1.6, columnspacing=1.0)
        listed = ", ".join(f"{size:,.0f} battles {loss:.4f}" for size, loss in means)
        return _svg(figure, name, f"Log loss by training battles: {listed}")


_ILLEGIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def make_legible(text: str) -> str:
    """Return a text with what HTML, XML and UTF-8 cannot hold (NUL, other controls, lone surrogates) as U+FFFD."""
    return _ILLEGIBLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def _label(text: str) -> str:
    """Return a row's label, at most 27 characters."""
    words = " ".join(make_legible(text).split())
    return words if len(words) <= 27 else words[:26].rstrip() + "…"


def _format_value(row: ChartRow, digits: int) -> str:
    if row.kind == "heading":
        return ""
    return f"{row.value:.{digits}f}".replace("-", "−") if math.isfinite(row.value) else "not finite"


@contextmanager
def _style() -> Iterator[None]:
    """Set the style for one chart; a character without a glyph in this font has one in the reader's browser."""
    with mpl.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def _svg(figure: Figure, name: str, description: str) -> str:
    buffer = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    head, body = re.split("(?<=>)", buffer.getvalue().partition("<svg")[2], maxsplit=1)
    size = re.findall('viewBox="[^"]+"', head)[0]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub("<[^>]+>", lambda tag: _tag(tag[0], name), body)  # not the text between tags: it may look like one
    label = html.escape(make_legible(description))
    return f'<svg class="chart" role="img" aria-label="{label}" {size}>{body.strip()}'


def _tag(tag: str, name: str) -> str:
    """Return a tag with ids of this chart, colours that a page may change, and the page's own font."""
    tag = re.sub(' font-family: [^;"]+;?', "", tag)
    tag = re.sub('(?<= id=")|(?<=xlink:href="#)|(?<=url[(]#)', f"{name}-", tag).replace("xlink:href", "href")
    return re.sub(
        "#[0-9a-f]{6}", lambda hue: f"var(--{COLOURS[hue[0]]}, {hue[0]})" if hue[0] in COLOURS else hue[0], tag
    )
