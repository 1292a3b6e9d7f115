import json
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from rewardmodel.battles import OUTCOMES
from rewardmodel.errors import InputError
from rewardmodel.exports import parity
from rewardmodel.exports.parity import EXACT, ROUNDED, format_parity, measure_differences
from rewardmodel.predictions import PROBABILITIES


def table(probabilities, outcomes=None) -> pd.DataFrame:
    rows = len(probabilities)
    true = np.full((rows, 3), np.nan) if outcomes is None else np.eye(3)[outcomes]
    columns = dict(zip((*PROBABILITIES, *OUTCOMES), np.hstack([probabilities, true]).T, strict=True))
    return pd.DataFrame({"id": [str(row) for row in range(rows)], "group": range(rows), **columns})


def test_differences_are_of_probabilities_and_of_the_log_loss():
    one = table([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], [0, 2])
    two = table([[0.4, 0.4, 0.2], [0.2, 0.2, 0.6]], [0, 2])
    found = measure_differences(one, two)
    assert found["max_abs_dp"] == pytest.approx(0.1)
    assert found["mean_abs_dp"] == pytest.approx(0.2 / 6)
    assert found["log_loss"]["difference"] == pytest.approx((np.log(0.5) - np.log(0.4)) / 2)
    assert found["log_loss"]["run"] == pytest.approx(-(np.log(0.5) + np.log(0.6)) / 2)


def test_unknown_outcomes_leave_the_log_loss_out():
    one = table([[0.5, 0.3, 0.2]])
    found = {**measure_differences(one, one), "precision": "float32", "limits": EXACT._asdict(), "plain": None}
    assert found["log_loss"] is None
    assert "log loss" not in format_parity(found)


@pytest.mark.parametrize(
    ("dp", "loss", "limits", "good"),
    [
        (9e-5, 0, EXACT, True),
        (2e-4, 0, EXACT, False),
        (0.019, 9e-4, ROUNDED, True),
        (0.021, 0, ROUNDED, False),
        (0.01, 2e-3, ROUNDED, False),
        (0.01, -2e-3, ROUNDED, False),
        (0.9, 0.5, None, True),
        (float("nan"), 0, ROUNDED, False),
    ],
)
def test_limits_are_kept_or_the_export_fails(dp, loss, limits, good):
    facts = {
        "battles": 64,
        "precision": "float32",
        "max_abs_dp": dp,
        "mean_abs_dp": dp,
        "plain": None,
        "log_loss": {"run": 1.0, "export": 1.0 + loss, "difference": loss},
        "limits": limits and limits._asdict(),
    }
    if good:
        parity._check_limits(facts, limits)
    else:
        with pytest.raises(FloatingPointError, match="does not predict as the run does"):
            parity._check_limits(facts, limits)


def test_the_last_line_of_a_failed_process_is_the_reason(tmp_path, monkeypatch):
    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "Traceback ...\nKeyError: 'x'\n")

    monkeypatch.setattr(parity.subprocess, "run", fail)
    with pytest.raises(InputError, match=r"cannot be read back in a fresh process \(KeyError: 'x'\)"):
        parity._run_in_fresh_process({}, tmp_path)


@pytest.mark.slow
def test_a_fresh_process_that_fails_reports_why(tmp_path):
    job = {"batch": "", "folder": str(tmp_path), "trained_in": "", "battles": str(tmp_path / "none")}
    with pytest.raises(InputError, match=r"cannot be read back in a fresh process \(.*none"):
        parity._run_in_fresh_process(job, tmp_path)
    assert json.loads((tmp_path / "job.json").read_text()) == job


def test_an_8_bit_layer_becomes_its_weights_in_float32():
    from bitsandbytes.nn import Linear8bitLt

    torch.manual_seed(0)
    layer = Linear8bitLt(16, 8, has_fp16_weights=False)
    plain = torch.nn.Linear(16, 8)
    layer.load_state_dict(plain.state_dict())
    found = parity._dequantise_layer(layer.to("cpu"))
    assert (found.weight - plain.weight).abs().max() <= plain.weight.abs().max() / 127
    assert torch.equal(found.bias, layer.bias)
