import dataclasses
import math
import re
import warnings
from functools import cache
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from rewardmodel.evaluation.charts import (
    CHART_WIDTH,
    COLOURS,
    ChartRow,
    draw_intervals,
    draw_learning_curve,
    draw_orders,
    draw_power_law,
    draw_reliability,
    draw_win_rates,
    make_legible,
)
from rewardmodel.evaluation.results import ReliabilityBin

BIN = ReliabilityBin(0.3, 0.4, 123, confidence=0.35, hit_rate=0.4, hit_low=0.3, hit_high=0.5)
BINS = [BIN, dataclasses.replace(BIN, low=0.4, high=0.5, battles=45, confidence=0.44)]
ROWS = [
    ChartRow("on these battles", kind="heading"),
    ChartRow("this model", 0.931, 0.91, 0.95),
    ChartRow("class prior", 1.097, 1.09, 1.1, "baseline"),
    ChartRow("Gemma-2-9B", 0.93, kind="published"),
]


def orders(count=300):
    random = np.random.default_rng(0)
    given = random.beta(2, 3, count)
    return given, np.clip(given + random.normal(0, 0.1, count), 0, 1)


def lengths(count=300):
    ratio = np.linspace(-3, 3, count)
    model = 1 / (1 + np.exp(-ratio))
    return ratio, (model > 0.5).astype(float), model, np.arange(count) // 2


LAW = [(125, 1.09, 1.08, 1.1), (250, 1.0, 0.99, 1.01), (1000, 0.95, 0.9, 0.97)]

CHARTS = {
    "intervals": lambda name: draw_intervals(ROWS, "log loss", name, 1.0986),
    "reliability": lambda name: draw_reliability(BINS, name),
    "both_orders": lambda name: draw_orders(*orders(), name),
    "by_length": lambda name: draw_win_rates(*lengths(), name),
    "learning_curve": lambda name: draw_learning_curve([(10, 1.1), (20, 1.0)], [(20, 1.05)], 1.09, name),
    "power_law": lambda name: draw_power_law(
        [(125, 1.08), (125, 1.1), (250, 1.0)], [(125, 1.09), (250, 1.0)], LAW, 1.0986, name
    ),
}
LABELS = {
    "power_law": ["training battles", "log loss", "draws", "mean", "power law", "class prior", "125", "250", "1,000"],
    "intervals": ["log loss", "on these battles", "this model", "0.931", "class prior", "1.097", "Gemma-2-9B", "0.930"],
    "reliability": ["probability of the likeliest outcome", "accuracy", "battles"],
    "both_orders": ["P(A wins), A shown first", "P(A wins), B shown first"],
    "by_length": ["length of A against B, in characters", "win rate of A", "people", "model", "same", "2×", "longer"],
    "learning_curve": ["optimiser step", "loss", "training loss", "validation log loss", "class prior"],
}


@cache
def drawn(chart):
    return CHARTS[chart]("mine")


def texts(svg):
    return ["".join(one.itertext()) for one in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize("chart", CHARTS)
def test_chart_stands_in_a_page(chart):
    svg = drawn(chart)
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert root.get("viewBox").startswith(f"0 0 {72 * CHART_WIDTH:.0f} ")
    assert "width" not in root.attrib
    ids = [one.get("id") for one in root.iter() if one.get("id")]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("mine-") for name in ids)
    referred = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    assert referred <= set(ids)
    for never in ("<?xml", "<!DOCTYPE", "<style", "<metadata", "http", "xlink", "font-family"):
        assert never not in svg


@pytest.mark.parametrize("chart", CHARTS)
def test_chart_has_its_labels_as_text(chart):
    assert set(LABELS[chart]) <= set(texts(drawn(chart)))


@pytest.mark.parametrize("chart", CHARTS)
def test_chart_is_the_same_bytes_whatever_the_style_of_the_process(chart):
    drawn(chart)
    with mpl.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        assert CHARTS[chart]("mine") == drawn(chart)
        assert mpl.rcParams["font.size"] == 30


@pytest.mark.parametrize("chart", CHARTS)
def test_every_colour_can_be_changed_by_the_page(chart):
    svg = drawn(chart)
    assert set(re.findall("#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", svg))) <= set()
    for name, hue in re.findall(r"var\(--(\w+), (#[0-9a-f]{6})\)", svg):
        assert COLOURS[hue] == name
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
    assert min(sizes) >= 10  # of 360 px


def marks(svg, name, colour):
    """x of the marks of a colour, top to bottom."""
    root = ElementTree.fromstring(svg)
    uses = [one for one in root.iter("use") if f"--{colour}," in one.get("style", "") and float(one.get("y")) < 110]
    return [float(one.get("x")) for one in sorted(uses, key=lambda one: float(one.get("y")))]


def test_marks_stand_where_their_figures_are():
    rows = [ChartRow("a", 1.0), ChartRow("b", 2.0), ChartRow("c", 4.0)]
    places = marks(draw_intervals(rows, "log loss", "mine"), "mine", "model")
    assert len(places) == 3
    assert (places[2] - places[1]) / (places[1] - places[0]) == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize(
    "label", ["<b>&amp;</b>", "$x^2$ $", 'id="x" url(#y) #0b62a8', "مرحبا 漢字 👩‍👩‍👧", "a\nb\0c\ud800", "w" * 999, ""]
)
def test_any_label_is_text(label):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = draw_intervals([ChartRow(label, 1.0)], "log loss", "mine")
    svg.encode()
    shown = " ".join(make_legible(label).split())
    if shown:
        assert any(one == shown or (one.endswith("…") and shown.startswith(one[:-1])) for one in texts(svg))
    assert len(ElementTree.fromstring(svg).findall(".//b")) == 0


def test_a_value_that_is_not_finite_is_named_and_not_drawn():
    svg = draw_intervals(
        [ChartRow("gone", math.nan), ChartRow("far", math.inf), ChartRow("there", 1.0, 0.9, math.nan)],
        "log loss",
        "mine",
    )
    assert texts(svg).count("not finite") == 2
    assert len(marks(svg, "mine", "model")) == 1


def test_nothing_but_one_row_or_one_bin_or_one_step_is_drawn():
    assert "0.500" in texts(draw_intervals([ChartRow("one", 0.5)], "log loss", "mine"))
    assert texts(draw_reliability([BIN], "mine"))
    assert texts(draw_orders(np.array([0.5]), np.array([0.5]), "mine"))
    assert "validation log loss" not in texts(draw_learning_curve([(1, 1.0)], [], None, "mine"))
    assert "class prior" not in texts(draw_learning_curve([(1, 1.0)], [], math.nan, "mine"))


def test_losses_that_are_nan_leave_gaps():
    losses = [(step, math.nan if step % 7 == 0 else 1.0) for step in range(60)]
    assert "nan" not in draw_learning_curve(losses, [(59, math.nan)], 1.0, "mine").lower()


def test_lengths_that_do_not_differ_are_drawn():
    flat = np.zeros(50)
    assert "same" in texts(draw_win_rates(flat, flat + 0.5, flat + 0.5, np.arange(50), "mine"))


def test_many_battles_stay_small():
    assert len(draw_orders(*orders(50_000), "mine")) < 200_000
    assert len(draw_learning_curve([(step, 1.0) for step in range(5000)], [], 1.0, "mine")) < 300_000


def test_legible_keeps_text_and_replaces_what_no_page_can_hold():
    assert make_legible("a\tb\r\nc\rd é 漢 👩") == "a\tb\nc\nd é 漢 👩"
    assert make_legible("\0\x1b\x7f\x85\ud800\ufffe") == "\ufffd" * 6
