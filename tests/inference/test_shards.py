import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from builders import battle_frame, load_once, small_recipe, with_trainer, write_csv
from fresh import FreshProcess, launch_fresh
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rewardmodel.battles import OUTCOMES
from rewardmodel.config.loader import dump_recipe
from rewardmodel.config.schema import InferenceConfig
from rewardmodel.errors import InputError
from rewardmodel.inference import shards
from rewardmodel.inference.predict import predict
from rewardmodel.inference.shards import Deadline, remove_shards
from rewardmodel.model import forward
from rewardmodel.model.forward import Predictor, split_by_tokens
from rewardmodel.predictions import has_both_orders, predicted, read_predictions
from rewardmodel.run_folder import RunFolder, load_run_recipe
from rewardmodel.training.train import train

ALONE, TWO = 1, 2
"""How many processes predict."""

TWO_PROCESSES = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu_ddp.yaml"

SLOW = """
import sys, time
from rewardmodel.cli import main
from rewardmodel.inference import shards
from rewardmodel.model.forward import Predictor

shards.BATCHES = 1
compute = Predictor.logits

def slow(self, rows, **given):
    time.sleep(float(sys.argv[1]))
    print("computed", *rows["id"], flush=True)
    return compute(self, rows, **given)

Predictor.logits = slow
sys.exit(main(sys.argv[2:]))
"""
"""The command line with a shard a micro-batch, each of them slow, that says which battles it computes."""


@pytest.fixture(autouse=True)
def models_are_loaded_once(monkeypatch):
    """Let predictions of the same model share it: loading it takes most of the time."""
    monkeypatch.setattr("rewardmodel.inference.predict.load_predictor", load_once)


class Clock:
    """Goes on by a second with each shard that is computed."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def trained(backbone, tmp_path_factory):
    """Return the folder of a run of small batches, trained for four steps."""
    recipe = small_recipe(
        backbone("llama"), tmp_path_factory.mktemp("shards"), inference=InferenceConfig(batch_tokens=600)
    )
    return train(with_trainer(recipe, max_steps=4, learning_rate=0.1))[0]


@pytest.fixture
def run(trained, tmp_path):
    """Return a copy of that run, which a test may change, and a file of 40 unlabelled battles."""
    battles = battle_frame(10, seed=1).drop(columns=list(OUTCOMES))
    return shutil.copytree(trained, tmp_path / "run"), write_csv(battles, tmp_path / "test.csv")


@pytest.fixture
def computed(monkeypatch):
    """Return a list that gets the number of rows of each shard computed; a shard is a micro-batch here."""
    rows_of, compute = [], Predictor.logits

    def counted(self, rows, **given):
        rows_of.append(len(rows))
        return compute(self, rows, **given)

    monkeypatch.setattr(Predictor, "logits", counted)
    monkeypatch.setattr(shards, "BATCHES", 1)
    return rows_of


@pytest.fixture
def slow(tmp_path):
    """Return a function that starts a prediction: slow(processes, seconds a shard, arguments)."""
    (tmp_path / "slow.py").write_text(SLOW)

    def start(processes, seconds, *arguments):
        command = [seconds, "predict", *arguments]
        if processes == ALONE:
            return FreshProcess(SLOW, *command)
        return launch_fresh(TWO_PROCESSES, tmp_path / "slow.py", *command)

    return start


def ended(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    names = [name for line in out.splitlines() if line.startswith("computed") for name in line.split()[1:]]
    return names, err


def killed(process, work, count):
    """Kill a prediction, all its processes, as soon as there are so many shards, and return how many battles are."""
    while len(list(work.glob("*/*-*.npz"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], check=False, capture_output=True, text=True
    ).stdout.split()
    for one in (process.pid, *map(int, children)):
        os.kill(one, signal.SIGKILL)
    process.communicate()
    return [np.load(path)["rows"] for path in work.glob("*/*-*.npz")]


@pytest.mark.slow  # starts three fresh processes, or as many pairs of them
@pytest.mark.parametrize("processes", [ALONE, pytest.param(TWO, marks=pytest.mark.distributed)])
def test_a_killed_prediction_goes_on_to_the_same_table(run, slow, tmp_path, processes):
    folder, battles = run
    output = tmp_path / "x.parquet"
    whole, _ = ended(slow(processes, 0, folder, battles, "--output", tmp_path / "whole.parquet"))
    work = tmp_path / "x.parquet.shards"
    done = killed(slow(processes, 0.3, folder, battles, "--output", output), work, 2)
    assert not output.exists()
    assert 0 < len(np.concatenate(done)) < 40
    names, said = ended(slow(processes, 0, folder, battles, "--output", output))
    assert f"continues: {len(np.concatenate(done))} of 40 battles are already computed (predicting)" in said
    ids = read_predictions(output)["id"]
    kept = set(ids[np.concatenate(done)])
    assert sorted(names) == sorted(name for name in ids if name not in kept)  # not computed again
    assert sorted(whole) == sorted(ids)
    expected = read_predictions(tmp_path / "whole.parquet")
    assert read_predictions(output).equals(expected)  # bit for bit, in their order
    np.testing.assert_allclose(predicted(expected), predicted(predict(folder, battles)), rtol=0, atol=1e-6)
    assert not work.exists()


@pytest.mark.slow  # starts fresh processes
@pytest.mark.distributed
def test_one_process_goes_on_where_two_were_killed(run, slow, tmp_path):
    folder, battles = run
    output, work = tmp_path / "x.parquet", tmp_path / "x.parquet.shards"
    command = (folder, battles, "--output", output, "--time-limit", "600")
    kept = len(np.concatenate(killed(slow(TWO, 0.3, *command), work, 2)))
    names, _ = ended(slow(ALONE, 0, *command))
    assert len(names) == 80 - kept
    table = read_predictions(output)
    assert has_both_orders(table).all()
    np.testing.assert_allclose(predicted(table), predicted(predict(folder, battles)), rtol=0, atol=1e-6)


def interrupted(run, work, monkeypatch, **given):
    """Leave the first two shards of a prediction, as a kill does."""
    write, written = shards._write, []

    def stop(*piece):
        write(*piece)
        written.append(piece)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            predict(*run, work=work, **given)


def other_model(run):
    adapter = RunFolder(run).model / "adapter_model.safetensors"
    weights = load_file(adapter)
    save_file({name: weight * (1.5 if "score" in name else 1) for name, weight in weights.items()}, adapter)


def other_prompt(run):
    recipe = load_run_recipe(run)
    changed = dataclasses.replace(recipe, prompt=dataclasses.replace(recipe.prompt, max_length=120))
    (run / "recipe.yaml").write_text(dump_recipe(changed))


def other_order(run):
    recipe = load_run_recipe(run)
    one = dataclasses.replace(recipe, inference=dataclasses.replace(recipe.inference, swap_tta="none"))
    (run / "recipe.yaml").write_text(dump_recipe(one))


@pytest.mark.slow  # seconds a case
@pytest.mark.parametrize(
    "change", [other_model, other_prompt, other_order, None], ids=["model", "prompt", "order", "battles"]
)
def test_shards_of_another_prediction_are_not_used(run, computed, tmp_path, monkeypatch, change):
    work = tmp_path / "work"
    interrupted(run, work, monkeypatch)
    before = len(computed)
    if change is None:
        battles = battle_frame(10, seed=2).drop(columns=list(OUTCOMES))
        write_csv(battles, run[1])
    else:
        change(run[0])
    expected = predict(*run)
    computed.clear()
    table = predict(*run, work=work)
    assert before == 2
    assert sum(computed) == 40
    np.testing.assert_allclose(predicted(table), predicted(expected), rtol=0, atol=1e-6)


def test_a_shard_that_cannot_be_read_is_computed_again(run, computed, tmp_path, monkeypatch, caplog):
    work = tmp_path / "work"
    interrupted(run, work, monkeypatch)
    one, two = sorted(work.glob("*/*.npz"))
    one.write_bytes(one.read_bytes()[:100])
    two_rows = len(np.load(two)["rows"])
    computed.clear()
    table = predict(*run, work=work)
    assert sum(computed) == 40 - two_rows
    assert f"{one} cannot be read" in caplog.text
    np.testing.assert_allclose(predicted(table), predicted(predict(*run)), rtol=0, atol=1e-6)
    computed.clear()
    assert predict(*run, work=work).equals(table)
    assert computed == []


def test_only_shards_are_removed(run, computed, tmp_path):
    work = tmp_path / "work"
    predict(*run, work=work)
    (work / "mine.txt").write_text("mine")
    remove_shards(work)
    assert list(work.iterdir()) == [work / "mine.txt"]
    (work / "mine.txt").unlink()
    remove_shards(work)
    remove_shards(work)
    assert not work.exists()


def test_the_tokens_of_a_batch_are_found_once(run, tmp_path, monkeypatch):
    recipe = dataclasses.replace(load_run_recipe(run[0]), inference=InferenceConfig())
    monkeypatch.setattr(forward, "find_budget", lambda *_: 700)
    predict(*run, recipe, work=tmp_path / "work")
    assert json.loads(next(tmp_path.glob("work/*/budget.json")).read_text()) == {"cpu": 700}
    monkeypatch.setattr(forward, "find_budget", lambda *_: pytest.fail("found again"))
    predict(*run, recipe, work=tmp_path / "work")


def test_without_time_every_battle_is_predicted_in_one_order(run, computed, caplog):
    caplog.set_level("INFO", "rewardmodel")
    table = predict(*run, time_limit=0)
    one = dataclasses.replace(load_run_recipe(run[0]), inference=InferenceConfig(swap_tta="none"))
    assert table.filter(like="ba_").isna().all(axis=None)
    assert table.filter(like="ba_").shape == (40, 3)
    np.testing.assert_allclose(predicted(table), predicted(predict(*run, one)), rtol=0, atol=1e-6)
    assert "time is up: 0 of 40 battles were predicted in both orders, all in one" in caplog.text


def test_with_time_enough_it_is_as_without_a_limit(run, computed, caplog):
    caplog.set_level("INFO", "rewardmodel")
    table, expected = predict(*run, time_limit=600), predict(*run)
    for order in ("", "ab", "ba"):
        np.testing.assert_allclose(predicted(table, order), predicted(expected, order), rtol=0, atol=1e-6)
    assert "40 battles predicted, each in both orders" in caplog.text


@pytest.fixture
def ticking(computed, monkeypatch):
    """Let a second go by with each shard that is computed, and nothing else take time."""
    clock, compute = Clock(), Predictor.logits

    def tick(self, rows, **given):
        clock.now += 1
        return compute(self, rows, **given)

    monkeypatch.setattr(Predictor, "logits", tick)
    monkeypatch.setattr("rewardmodel.inference.predict.Deadline", lambda seconds: Deadline(seconds, clock))
    return clock


def test_the_shortest_battles_get_the_second_order_in_time(run, computed, ticking, caplog):
    whole = predict(*run, time_limit=1000)
    first = computed.index(40) if 40 in computed else next(n for n in range(40) if sum(computed[:n]) == 40)
    assert len(computed) > first + 4
    computed.clear()
    begun = ticking.now
    table = predict(*run, time_limit=first + 2.5)
    both = has_both_orders(table)
    assert first + 1 <= ticking.now - begun <= first + 3  # no more than a shard too long
    assert 0 < both.sum() == sum(computed[first:]) < 40
    chars = table.filter(like="_chars").sum(axis=1)
    assert chars[both].max() <= chars[~both].min() + 8  # tokens are not characters
    np.testing.assert_allclose(predicted(table)[both], predicted(whole)[both], rtol=0, atol=1e-6)
    np.testing.assert_allclose(predicted(table)[~both], predicted(whole, "ab")[~both], rtol=0, atol=1e-6)
    np.testing.assert_allclose(predicted(table).sum(axis=1), 1, atol=1e-12)
    assert f"time is up: {both.sum()} of 40 battles were predicted in both orders" in caplog.text


@pytest.mark.slow  # trains two runs
def test_all_runs_predict_one_order_before_any_predicts_the_other(run, computed, ticking):
    two = [run[0], shutil.copytree(run[0], run[0].with_name("two"))]
    other_model(two[1])
    whole = predict(two, run[1], time_limit=1000)
    shards_of_one = len(computed) // 4
    assert has_both_orders(whole).all()
    np.testing.assert_allclose(predicted(whole), predicted(predict(two, run[1])), rtol=0, atol=1e-6)
    table = predict(two, run[1], time_limit=2 * shards_of_one)
    assert not has_both_orders(table).any()
    np.testing.assert_allclose(predicted(table), predicted(whole, "ab"), rtol=0, atol=1e-6)
    table = predict(two, run[1], time_limit=2 * shards_of_one + 6.5)
    both = has_both_orders(table)
    assert 0 < both.sum() < 40
    np.testing.assert_allclose(predicted(table)[both], predicted(whole)[both], rtol=0, atol=1e-6)
    np.testing.assert_allclose(predicted(table, "ba")[both], predicted(whole, "ba")[both], rtol=0, atol=1e-6)


def test_one_order_that_takes_longer_is_finished(run, computed, ticking, caplog):
    caplog.set_level("INFO", "rewardmodel")
    one = dataclasses.replace(load_run_recipe(run[0]), inference=InferenceConfig(swap_tta="none", batch_tokens=600))
    table = predict(*run, one, time_limit=1)
    assert "ba_p_tie" not in table
    assert np.isfinite(predicted(table)).all()
    assert "another was not asked for, or changes nothing; that took longer than the time limit" in caplog.text


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(run, seconds):
    with pytest.raises(InputError, match=r"^time limit: .*; give seconds, from 0"):
        predict(*run, time_limit=seconds)


@given(st.lists(st.integers(1, 50), min_size=1), st.one_of(st.none(), st.integers(1, 200)), st.randoms())
def test_shards_have_each_row_once_and_about_as_many_tokens(costs, least, random):
    costs, order = np.array(costs), np.array(random.sample(range(len(costs)), len(costs)))
    found = split_by_tokens(costs, order, least)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(costs)))
    assert all(len(shard) and (np.diff(shard) > 0).all() for shard in found)
    if least is None:
        assert len(found) == 1
    else:
        assert all(costs[shard].sum() < least + costs.max() for shard in found)
        assert len(found) <= 1 + costs.sum() / min(least, costs.sum())


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 20))
def test_the_first_shards_are_smaller_and_each_twice_as_large_as_the_one_before(costs, first):
    costs, order = np.array(costs), np.arange(len(costs))
    found = split_by_tokens(costs, order, 8 * first, first)
    assert np.concatenate(found).tolist() == order.tolist()
    starts = np.cumsum(costs) - costs
    bounds = first * np.array([1, 3, 7, *range(15, 16 + costs.sum(), 8)])
    assert [len(set(np.searchsorted(bounds, starts[shard], side="right"))) for shard in found] == [1] * len(found)
