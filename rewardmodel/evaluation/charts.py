"""Figures of an evaluation in, inline SVG out: drawn for 360 px, text as text, colours by CSS variable.

Every function returns one `<svg>` that stands in a page of HTML: no XML header, no style sheet, no address, ids that
begin with the chart's `name` (which is unique in its page), and the same bytes for the same input. A page may set the
CSS variables of `COLOURS`, for dark mode say; without them the colours stand as they are written here.
"""

import html
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID, PAPER = "#1f2329", "#5c6570", "#d9dde2", "#fffffe"
MODEL, HUMANS = "#0b62a8", "#c2510a"

COLOURS = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", MODEL: "model", HUMANS: "humans"}
"""Colour -> CSS variable. The model's blue and the humans' vermilion differ for every kind of colour vision, and in
marker and dash too."""

WIDTH = 5.0
"""Inches of every chart: 360 px at the 72 px an inch of SVG."""

RUNS, FLOOR, PUBLISHED, HEADING = "run", "floor", "published", "heading"
"""Kinds of a `Row`: what is judged, what it is compared with on the same battles, figures of others; words alone."""

FEWEST = 50
"""Battles that `by_length` needs; a bin has half of them or more."""

MANY = 50
"""Logged losses from which on a learning curve shows their means beside them."""

_MARKS = {RUNS: ("o", MODEL, MODEL), FLOOR: ("s", INK, INK), PUBLISHED: ("D", MUTED, PAPER)}
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
class Row:
    """One line of a chart of intervals; `low` and `high` are NaN where there is no interval."""

    label: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    kind: str = RUNS


def intervals(rows: Sequence[Row], axis: str, name: str, line: float | None = None, digits: int = 3) -> str:
    """Return a horizontal chart: a mark, its interval and its figure a row, the first row on top.

    Args:
        rows: one or more.
        axis: what the figures are, under the horizontal axis.
        name: begins the chart's ids.
        line: a figure to draw a dashed vertical line at.
        digits: decimals of the figures.
    """
    with _style():
        figure = Figure(figsize=(WIDTH, 0.95 + 0.31 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        if line is not None:
            axes.axvline(line, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for place, row in enumerate(rows):
            if row.kind == HEADING:
                continue
            marker, edge, face = _MARKS[row.kind]
            if math.isfinite(row.low) and math.isfinite(row.high):
                axes.plot([row.low, row.high], [place, place], color=edge, linewidth=2.2, solid_capstyle="round")
            axes.plot([row.value], [place], marker, color=edge, markerfacecolor=face, markersize=7, linestyle="none")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [_label(row.label) for row in rows])
        figures = axes.secondary_yaxis("right")
        figures.set_yticks(range(len(rows)), [_figure(row, digits) for row in rows])
        for side, one in (("left", axes), ("right", figures)):
            one.tick_params(axis="y", length=0, pad=6, labelcolor=INK)
            one.spines[side].set_visible(False)
        for row, text in zip(rows, axes.get_yticklabels(), strict=True):
            text.set_color(MUTED if row.kind == HEADING else INK)
        axes.grid(axis="x")
        axes.margins(x=0.06)
        axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
        axes.set_xlabel(axis)
        told = ", ".join(f"{row.label} {_figure(row, digits)}" for row in rows if row.kind != HEADING)
        return _svg(figure, name, f"{axis}: {told}")


def reliability(bins: Sequence[dict[str, float]], name: str) -> str:
    """Return a reliability diagram over a histogram of its battles.

    Args:
        bins: `low, high, battles, confidence, hit_rate, hit_low, hit_high` of each bin of confidence.
        name: begins the chart's ids.
    """
    kept = [one for one in bins if one["battles"]]
    columns = ("hit_rate", "battles", "confidence", "hit_low", "hit_high")
    hits, counts, confidence, low, high = np.array([[one[key] for key in columns] for one in kept]).T
    with _style():
        figure = Figure(figsize=(WIDTH, 5.3), layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.vlines(confidence, low, high, color=MODEL, linewidth=2.2)
        axes.plot(confidence, hits, "o-", color=MODEL, markersize=6, linewidth=1.2)
        axes.set(ylim=(0, 1.02), ylabel="share that is right")
        widths = [one["high"] - one["low"] for one in kept]
        below.bar([one["low"] for one in kept], counts, widths, align="edge", color=MODEL, edgecolor=PAPER, linewidth=1)
        below.set(xlim=(0, 1), xlabel="probability of the likeliest outcome", ylabel="battles")
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        for one in (axes, below):
            one.grid(axis="both")
            one.tick_params(length=0, pad=6)
        figure.align_ylabels()
        return _svg(figure, name, f"Reliability diagram of {int(counts.sum())} battles in {len(kept)} bins")


def both_orders(as_given: np.ndarray, exchanged: np.ndarray, name: str) -> str:
    """Return how P(A) with A shown first goes with P(A) with B shown first, as hexagons; darker is more battles.

    Args:
        as_given: (n_battles,) float.
        exchanged: (n_battles,) float, of the same A.
        name: begins the chart's ids.
    """
    with _style():
        figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
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
        return _svg(figure, name, f"P(A) in both orders of {len(as_given)} battles")


def by_length(ratio: np.ndarray, humans: np.ndarray, model: np.ndarray, groups: np.ndarray, name: str) -> str:
    """Return the win rate of A against how much longer A is than B, in bins of equally many battles.

    Args:
        ratio: (n_battles,) log2 of the length of A by that of B; `FEWEST` battles or more.
        humans: (n_battles,) 1 where A won, 0 where B won, a half for a tie.
        model: (n_battles,) the same of the predicted probabilities.
        groups: (n_battles,) labels, for the intervals.
        name: begins the chart's ids.
    """
    bins = np.array_split(np.argsort(ratio, kind="stable"), min(len(ratio) // (FEWEST // 2), 10))
    places = [float(ratio[one].mean()) for one in bins]
    with _style():
        figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for label, wins, colour, form in (("people", humans, HUMANS, "s--"), ("model", model, MODEL, "o-")):
            rows = [_mean(wins[one], groups[one]) for one in bins]
            axes.vlines(places, [row.low for row in rows], [row.high for row in rows], color=colour, alpha=0.45)
            axes.plot(places, [row.value for row in rows], form, color=colour, markersize=6, label=label)
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


def _mean(values: np.ndarray, groups: np.ndarray) -> Row:
    """Return a mean with its 95 % normal interval, from the sums of residuals by group (Liang & Zeger 1986)."""
    mean, (_, members) = float(values.mean()), np.unique(groups, return_inverse=True)
    half = 1.96 * math.sqrt((np.bincount(members, values - mean) ** 2).sum()) / len(values)
    return Row("", mean, mean - half, mean + half)


def learning_curve(
    training: Sequence[tuple[float, float]], validation: Sequence[tuple[float, float]], prior: float | None, name: str
) -> str:
    """Return training loss and validation log loss by step.

    Args:
        training: step and loss; a loss that is no number leaves a gap. Of `MANY` or more, means of stretches, too.
        validation: step and log loss.
        prior: log loss of the class prior, a dashed line, or None.
        name: begins the chart's ids.
    """
    with _style():
        figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
        axes = figure.add_subplot()
        if training:
            steps, losses = np.array(training, dtype=np.float64).T
            if len(steps) >= MANY:
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


_ILLEGIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")

LABEL = 27
"""Characters of a row's label; longer ones are cut."""


def legible(text: str) -> str:
    """Return a text with what HTML, XML and UTF-8 cannot hold (NUL, other controls, half characters) as U+FFFD."""
    return _ILLEGIBLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def _label(text: str) -> str:
    words = " ".join(legible(text).split())
    return words if len(words) <= LABEL else words[: LABEL - 1].rstrip() + "…"


def _figure(row: Row, digits: int) -> str:
    if row.kind == HEADING:
        return ""
    return f"{row.value:.{digits}f}".replace("-", "−") if math.isfinite(row.value) else "no number"


@contextmanager
def _style() -> Iterator[None]:
    """Set the style for one chart; characters without a glyph here have one in the reader's browser."""
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
    label = html.escape(legible(description))
    return f'<svg class="chart" role="img" aria-label="{label}" {size}>{body.strip()}'


def _tag(tag: str, name: str) -> str:
    """Return a tag with ids of this chart, colours that a page may change, and the page's own font."""
    tag = re.sub(' font-family: [^;"]+;?', "", tag)
    tag = re.sub('(?<= id=")|(?<=xlink:href="#)|(?<=url[(]#)', f"{name}-", tag).replace("xlink:href", "href")
    return re.sub(
        "#[0-9a-f]{6}", lambda hue: f"var(--{COLOURS[hue[0]]}, {hue[0]})" if hue[0] in COLOURS else hue[0], tag
    )
