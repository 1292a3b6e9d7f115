import re

import numpy as np

from rewardmodel.evaluation.curve_page import render_curve
from rewardmodel.evaluation.learning_curve import LearningCurve, summarise_curve

SIZES = np.array([125.0, 250, 500, 1000, 2000])


def curve_of(expected: np.ndarray) -> LearningCurve:
    """Return a curve of these losses, on 400 battles that differ a little."""
    random = np.random.default_rng(0)
    losses = [one + random.normal(0, 0.01, (2, 400)) for one in expected]
    return summarise_curve("tiny", SIZES, losses, np.arange(400) // 2, 1.0986)


def test_the_page_has_the_chart_the_sizes_and_the_outlook_and_loads_nothing():
    curve = curve_of(0.9 + 2 * SIZES**-0.5)
    page = render_curve(curve)
    assert page == render_curve(curve)
    assert "4,000 battles (2.0 times as many)" in page
    for words in ("training battles", "class prior", "power law", "<th>125</th>", "<th>2,000</th>", "12,000"):
        assert words in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)


def test_what_cannot_be_told_is_not_drawn():
    page = render_curve(curve_of(np.ones(5)))
    assert "What more battles would give cannot be told" in page
    assert "12,000" not in page
