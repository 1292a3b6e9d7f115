import dataclasses
import json

import numpy as np
import pytest
from builders import battle_frame, small_recipe, write_csv

from rewardmodel import learning_curve
from rewardmodel.battles import outcomes
from rewardmodel.cli import main
from rewardmodel.config.loader import dump_recipe
from rewardmodel.config.schema import ObjectiveConfig
from rewardmodel.data.splits import load_battles, split
from rewardmodel.errors import InputError
from rewardmodel.inference.predict import predict_with
from rewardmodel.learning_curve import measure_learning_curve, plan_points
from rewardmodel.metrics import log_loss_terms
from rewardmodel.model.loading import load_predictor
from rewardmodel.predictions import predicted
from rewardmodel.run_folder import RunFolder
from rewardmodel.training.train import train


@pytest.fixture
def frozen(backbone, tmp_path, monkeypatch):
    """Return a recipe with a frozen backbone, and 160 battles of 40 prompts in four folds; heads are fitted quickly."""
    monkeypatch.setattr("rewardmodel.training.head_fit.PENALTIES", (10.0, 1.0))
    monkeypatch.setattr("rewardmodel.training.head_fit.MAX_ITERATIONS", 20)
    recipe = small_recipe(backbone("llama"), tmp_path)
    write_csv(battle_frame(40), tmp_path / "train.csv")
    model = dataclasses.replace(recipe.model, freeze_backbone=True, pooling="last_and_responses", pair_ties=True)
    prompt = dataclasses.replace(recipe.prompt, template="response")
    return dataclasses.replace(recipe, model=model, prompt=prompt, objective=ObjectiveConfig("davidson"))


def files_in(folder):
    return sorted(path.name for path in folder.glob("points/*/*.npz"))


def test_points_are_draws_of_whole_prompts_that_contain_each_other(frozen):
    battles = load_battles(frozen.data)
    groups, fold = np.asarray(battles["group"][:]), np.asarray(battles["fold"][:])
    points = plan_points(battles, frozen, [], 3, False)
    sizes = sorted({point.size for point in points})
    assert sizes == [15, 30, 60, 120]
    assert [len([one for one in points if one.size == size]) for size in sizes] == [3, 3, 3, 1]
    for point in points:
        assert point.size <= len(point.training) < point.size + 4
        assert set(fold[point.judged]) == {0}
        assert 0 not in fold[point.training]
        assert not set(groups[point.training]) & set(groups[point.judged])
        assert np.isin(groups, groups[point.training]).sum() == len(point.training)
    by_draw = [next(one for one in points if (one.size, one.draw) == (size, 1)).training for size in (15, 30)]
    assert set(by_draw[0]) < set(by_draw[1])
    everywhere = plan_points(battles, frozen, [40], 2, True)
    assert [(one.fold, one.draw) for one in everywhere] == [(fold, draw) for fold in range(4) for draw in range(2)]


@pytest.mark.parametrize(("sizes", "words"), [([121], "120 battles train"), ([1], "from 2 to that")])
def test_sizes_that_there_are_no_battles_for_are_refused(frozen, sizes, words):
    with pytest.raises(InputError, match=words):
        plan_points(load_battles(frozen.data), frozen, sizes, 2, False)


def test_the_curve_of_a_frozen_backbone_ends_where_training_on_all_battles_does(frozen, tmp_path, monkeypatch):
    output = tmp_path / "curve"
    curve = measure_learning_curve(frozen, output, draws=2)
    assert json.loads((output / "learning_curve.json").read_text())["held_out"] == 40
    assert "<svg" in (output / "learning_curve.html").read_text()
    run, parts = train(frozen)
    predictor = load_predictor(frozen.model, RunFolder(run).model, None)
    table = predict_with(predictor, frozen, parts.validation, cached=True)
    expected = log_loss_terms(predicted(table), outcomes(parts.validation)).mean()
    assert curve.sizes[-1].log_loss.value == pytest.approx(expected, abs=1e-4)

    # finished points are read back, a missing or broken one is made again, and nothing else
    before = files_in(output)
    assert len(before) == 7
    fit = learning_curve._fit
    monkeypatch.setattr(learning_curve, "_fit", None)
    assert measure_learning_curve(frozen, output, draws=2) == curve
    monkeypatch.setattr(learning_curve, "_fit", fit)
    files = sorted(output.glob("points/*/*.npz"))
    files[0].unlink()
    files[1].write_bytes(b"PK")
    assert measure_learning_curve(frozen, output, draws=2) == curve
    assert files_in(output) == before

    # another recipe has points of its own
    other = dataclasses.replace(frozen, model=dataclasses.replace(frozen.model, pair_ties=False))
    measure_learning_curve(other, output, sizes=[15], draws=1)
    assert len([*output.glob("points/*")]) == 2


@pytest.mark.parametrize(("name", "template"), [("cross_entropy", "instruction"), ("bradley_terry", "response")])
def test_heads_of_both_encodings_are_fitted_and_judged_on_every_fold(frozen, tmp_path, name, template):
    model, prompt = (
        dataclasses.replace(frozen.model, pair_ties=False),
        dataclasses.replace(frozen.prompt, template=template),
    )
    recipe = dataclasses.replace(frozen, model=model, prompt=prompt, objective=ObjectiveConfig(name))
    curve = measure_learning_curve(recipe, tmp_path / "curve", sizes=[60], draws=2, all_folds=True)
    assert curve.held_out == 160
    assert [len(one.draws) for one in curve.sizes] == [2]
    assert curve.sizes[0].log_loss.value < curve.prior
    assert curve.refusal == "a power law has three parameters and needs 4 sizes; there are 1"


def test_heads_of_a_curve_start_as_those_of_training_do(frozen, tmp_path, monkeypatch):
    monkeypatch.setattr("rewardmodel.training.head_fit.PENALTIES", (1e6,))  # heads stay where they start
    prompt = dataclasses.replace(frozen.prompt, template="instruction")
    data = dataclasses.replace(frozen.data, swap_augmentation="both")
    recipe = dataclasses.replace(frozen, data=data, prompt=prompt, objective=ObjectiveConfig("cross_entropy"))
    losses = {}
    for start in ("zero", "answer"):
        model = dataclasses.replace(frozen.model, pair_ties=False, head_init=start)
        own = dataclasses.replace(recipe, model=model)
        losses[start] = measure_learning_curve(own, tmp_path / start, sizes=[120], draws=1).sizes[0].log_loss.value
    run, parts = train(own)
    predictor = load_predictor(own.model, RunFolder(run).model, None)
    table = predict_with(predictor, own, parts.validation, cached=True)
    expected = log_loss_terms(predicted(table), outcomes(parts.validation)).mean()
    assert losses["answer"] == pytest.approx(expected, abs=1e-4)
    assert abs(losses["answer"] - losses["zero"]) > 1e-3


def test_a_head_that_the_objective_cannot_have_is_refused(frozen, tmp_path):
    recipe = dataclasses.replace(frozen, objective=ObjectiveConfig("bradley_terry"))
    with pytest.raises(InputError, match="pair_ties: bradley_terry has no tie parameter to learn"):
        measure_learning_curve(recipe, tmp_path / "curve", sizes=[15], draws=1)


def test_a_trained_recipe_is_trained_for_each_point_and_continues(recipe, tmp_path, monkeypatch, caplog):
    from rewardmodel.training import train as module

    caplog.set_level("INFO", logger="rewardmodel")
    output, real, trained = tmp_path / "curve", module.train, []

    def stop_at_the_second(*args, **given):
        trained.append(given["parts"])
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(*args, **given)

    monkeypatch.setattr(module, "train", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        measure_learning_curve(recipe, output, sizes=[12, 20], draws=1)
    assert "12 to 20 battles, 2 points: 2 trainings" in caplog.text
    assert files_in(output) == ["fold-0-battles-12-draw-0.npz"]
    curve = measure_learning_curve(recipe, output, sizes=[12, 20], draws=1)
    assert "2 points: 1 training, 1 done before" in caplog.text
    assert len(trained) == 3
    assert not [path for path in output.rglob("*") if path.name == "model"]
    assert [one.battles for one in curve.sizes] == [12, 20]
    held_out = set(split(load_battles(recipe.data), 0).validation["id"])
    for parts in trained:
        assert not held_out & {*parts.training["id"], *parts.validation["id"]}


def test_the_command_prints_the_curve_and_where_it_is(frozen, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(dump_recipe(frozen))
    assert main(["learning-curve", str(tmp_path / "tiny.yaml"), "--draws", "1", "--sizes", "20", "60"]) == 0
    out = capsys.readouterr().out
    assert "needs 4 sizes; there are 2" in out
    assert out.endswith("run_learning_curve/learning_curve.html\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draws", "0"], "--draws: 0; give at least 1"),
        (["--sizes", "0", "60"], "--sizes: 0; give numbers of battles from 2"),
        (["--sizes", "9999"], "--sizes: 120 battles train; give sizes from 2 to that"),
        (["--fold", "2"], "--fold: 2; give `all`, or choose one fold with --data.fold"),
        (["--output", "train.csv"], "--output: train.csv is a file; name a folder"),
    ],
)
def test_what_cannot_be_measured_is_an_error(frozen, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(dump_recipe(frozen))
    assert main(["learning-curve", "tiny.yaml", *words]) == 2
    assert f"error: {message}" in capsys.readouterr().err
