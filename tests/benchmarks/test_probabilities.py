import numpy as np
import pandas as pd
import pytest

from rewardmodel.battles import OUTCOMES
from rewardmodel.benchmarks.figures import draw_values
from rewardmodel.benchmarks.probabilities import probability_baselines, probability_figures
from rewardmodel.evaluation.bootstrap import draw_groups, summarise


def test_figures_are_those_of_an_evaluation():
    random = np.random.default_rng(0)
    true = np.eye(3)[random.integers(0, 3, 60)]
    probabilities = random.dirichlet([1, 1, 1], 60)
    table = pd.DataFrame(dict(zip(OUTCOMES, true.T, strict=True)))
    table = table.assign(source=["arena"] * 40 + [""] * 20, response_a_chars=10, response_b_chars=range(60))
    figures = probability_figures(table, probabilities)
    groups = np.arange(60) // 3
    values = dict(zip([one.name for one in figures], draw_values(figures, draw_groups(groups)), strict=True))
    expected = summarise(probabilities, true, groups)
    assert values["log loss"][0] == pytest.approx(expected["log_loss"].value)
    assert np.quantile(values["log loss"][1:], 0.975) == pytest.approx(expected["log_loss"].high)
    assert values["accuracy of decided"][0] == pytest.approx(expected["accuracy_decided"].value)
    assert values["calibration error"][0] == pytest.approx(expected["expected_calibration_error"].value)
    part = summarise(probabilities[:40], true[:40], groups[:40])
    assert values["arena, log loss"][0] == pytest.approx(part["log_loss"].value)
    assert values["arena, calibration error"][0] == pytest.approx(part["expected_calibration_error"].value)
    assert "unknown, log loss" in values

    baselines = probability_baselines(table, None)
    assert [one.name for one in baselines["longer"]][-1] == "accuracy of decided"
    longer = draw_values(baselines["longer"], draw_groups(groups))[-1][0]
    hits = np.where(np.arange(60) < 10, true[:, 0], true[:, 1]) + np.where(np.arange(60) == 10, 0.5 - true[:, 1], 0) * (
        true[:, 2] == 0
    )
    assert longer == pytest.approx(hits.sum() / (true[:, 2] == 0).sum())


def test_a_source_without_decided_battles_has_no_accuracy():
    table = pd.DataFrame(np.eye(3)[[0, 1, 2, 2]], columns=list(OUTCOMES)).assign(source=["a", "a", "b", "b"])
    names = [one.name for one in probability_figures(table, np.full((4, 3), 1 / 3))]
    assert "a, accuracy of decided" in names
    assert "b, accuracy of decided" not in names
