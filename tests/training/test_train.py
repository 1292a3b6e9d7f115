import dataclasses
import shutil
from functools import cache, partial

import numpy as np
import pytest
from builders import battle_frame, small_recipe
from fresh import run_fresh
from safetensors import safe_open

from rewardmodel.config.schema import ModelConfig, ObjectiveConfig
from rewardmodel.errors import InputError
from rewardmodel.exports.export import export
from rewardmodel.inference.predict import predict
from rewardmodel.inference.reward_function import reward_function
from rewardmodel.kfold import train_folds
from rewardmodel.metrics import log_loss
from rewardmodel.model.forward import Predictor
from rewardmodel.predictions import predicted, read_predictions, true_outcomes
from rewardmodel.run_folder import RunFolder
from rewardmodel.training.train import train

several = pytest.mark.slow  # trains several runs, or exports one

JOINT = ("cross_entropy",)
OBJECTIVES = (*JOINT, "davidson", "bradley_terry")


def freeze(recipe, objective):
    """Return the recipe with a frozen backbone of one layer, for an objective."""
    model = dataclasses.replace(
        recipe.model, freeze_backbone=True, num_hidden_layers=1, pooling="responses", lora_first_layer=5
    )
    data = dataclasses.replace(recipe.data, swap_augmentation="both")
    prompt = dataclasses.replace(recipe.prompt, template="instruction" if objective in JOINT else "response")
    return dataclasses.replace(recipe, model=model, data=data, prompt=prompt, objective=ObjectiveConfig(objective))


@pytest.fixture
def frozen(recipe):
    """Return a function that returns a recipe with a frozen backbone, for an objective."""
    return partial(freeze, recipe)


@pytest.fixture(scope="module")
def frozen_run(backbone, tmp_path_factory):
    """Return a function that trains a head on a frozen backbone once an objective: recipe, run folder and parts."""

    @cache
    def trained(objective):
        recipe = freeze(small_recipe(backbone("llama"), tmp_path_factory.mktemp("frozen")), objective)
        return recipe, *train(recipe)

    return trained


@pytest.mark.slow  # seconds a case
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_head_on_a_frozen_backbone_learns_is_saved_and_predicts(frozen_run, objective):
    _, run, parts = frozen_run(objective)
    with safe_open(RunFolder(run).model / "adapter_model.safetensors", "pt") as weights:
        names = list(weights.keys())
    assert names
    assert all(".score." in name for name in names)
    table = predict(run, parts.validation)
    loss = log_loss(predicted(table), true_outcomes(table))
    assert loss < 0.9  # 1.04 without looking
    assert ("ba_p_tie" in table) == (objective in JOINT)


PREDICT = """
import sys
from rewardmodel.cli import main
for run in sys.argv[1:]:
    main(["predict", run, "validation", "--output", f"{run}.parquet"])
"""


@pytest.mark.slow  # starts a fresh process, one for all objectives
def test_heads_on_a_frozen_backbone_predict_the_same_in_a_fresh_process(frozen_run, tmp_path):
    runs = {objective: tmp_path / objective for objective in OBJECTIVES}
    for objective, copy in runs.items():
        shutil.copytree(frozen_run(objective)[1], copy)
    run_fresh(PREDICT, *runs.values())
    for objective in runs:
        _, run, parts = frozen_run(objective)
        found = read_predictions(tmp_path / f"{objective}.parquet")
        np.testing.assert_allclose(predicted(found), predicted(predict(run, parts.validation)), atol=1e-6)


@several
def test_folds_read_the_features_of_a_battle_once(frozen, monkeypatch, tmp_path):
    monkeypatch.setenv("REWARDMODEL_CACHE", str(tmp_path / "cache"))
    count, compute = [], Predictor.logits

    def counted(self, rows, **given):
        count.extend(rows["id"][:])
        return compute(self, rows, **given)

    monkeypatch.setattr(Predictor, "logits", counted)
    _, facts = train_folds(frozen("davidson"))
    assert sorted(count) == sorted(battle_frame()["id"])
    assert facts.metrics["log_loss"].value < 0.9


@several
def test_what_a_frozen_run_exports_predicts_alike(frozen, tmp_path, read_back_in_a_fork):
    recipe = frozen("cross_entropy")
    last = dataclasses.replace(recipe.model, pooling="last")
    run, _ = train(dataclasses.replace(recipe, model=last))
    facts = export(run, tmp_path / "merged", "merged", dtype="float32")
    assert facts["max_abs_dp"] <= 1e-4


@several
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "lora"])
def test_ties_of_pairs_are_learnt_saved_and_exported(frozen, freeze, tmp_path, read_back_in_a_fork):
    recipe = frozen("davidson")
    model = dataclasses.replace(
        recipe.model,
        pooling="last_and_responses",
        pair_ties=True,
        freeze_backbone=freeze,
        num_hidden_layers=2,
        lora_first_layer=0,
    )
    run, _ = train(dataclasses.replace(recipe, model=model))
    with safe_open(RunFolder(run).model / "adapter_model.safetensors", "pt") as weights:
        apart = [weights.get_tensor(name) for name in list(weights.keys()) if name.endswith("tie_apart")]
    assert len(apart) == 1
    assert apart[0].abs().max() > 0
    facts = export(run, tmp_path / "merged", "merged", dtype="float32", rewardmodel_only=True)
    assert facts["max_abs_dp"] <= 1e-4
    odd = [[f"question number {number}"] for number in range(3)]
    alone = [reward_function(run)([prompt], [prompt])[0] for [prompt] in odd]
    assert reward_function(run)([prompt for [prompt] in odd], [prompt for [prompt] in odd]) == pytest.approx(alone)


@several
def test_frozen_folds_are_exported_as_their_mean(frozen, tmp_path, read_back_in_a_fork):
    recipe = frozen("davidson")
    inference = dataclasses.replace(recipe.inference, tie_if_same=0.9, win_if_other_empty=0.8)
    run, _ = train_folds(dataclasses.replace(recipe, inference=inference))
    facts = export(run, tmp_path / "mean", "soup", dtype="float32", rewardmodel_only=True)
    assert facts["max_abs_dp"] <= 1e-4
    assert facts["probability_average"]["max_abs_dp"] < 0.2


def test_ties_of_pairs_need_a_tie_parameter_that_learns(frozen):
    for objective in ("cross_entropy", "bradley_terry"):
        recipe = frozen(objective)
        model = dataclasses.replace(recipe.model, pair_ties=True)
        with pytest.raises(InputError, match=f"model.pair_ties: {objective} has no tie parameter to learn"):
            train(dataclasses.replace(recipe, model=model))


def test_a_frozen_run_that_is_done_is_left_alone_and_one_that_was_killed_goes_on(frozen, monkeypatch):
    recipe = frozen("davidson")
    with monkeypatch.context() as patch:
        patch.setattr("rewardmodel.training.train.fit_last_layer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    run, _ = train(recipe, resume=True)
    before = (RunFolder(run).model / "adapter_model.safetensors").read_bytes()
    train(recipe, resume=True)
    assert (RunFolder(run).model / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.slow  # seconds a case
@pytest.mark.parametrize("fitted", [False, True])
def test_a_head_is_fitted_to_a_backbone_in_fp8(fitted, frozen, tmp_path):
    recipe = frozen("davidson")
    first = {"freeze_backbone": False, "lora_first_layer": 0, "head_init": "fitted"} if fitted else {}
    model = dataclasses.replace(recipe.model, load_in_fp8=True, **first)
    still = recipe.trainer | ({"learning_rate": 1e-12, "max_steps": 1} if fitted else {})
    run, parts = train(dataclasses.replace(recipe, model=model, trainer=still))
    table = predict(run, parts.validation)
    assert log_loss(predicted(table), true_outcomes(table)) < 0.9  # the class prior has 1.04
    assert np.array_equal(predicted(predict(run, parts.validation)), predicted(table))


@several
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_starts_from_a_head_that_is_fitted_to_what_the_untouched_backbone_reads(
    frozen_run, objective, tmp_path, monkeypatch
):
    recipe, run, parts = frozen_run(objective)
    alone = predicted(predict(run, parts.validation))
    model = dataclasses.replace(recipe.model, freeze_backbone=False, lora_first_layer=0, head_init="fitted")
    still = recipe.trainer | {"output_dir": str(tmp_path / "still"), "learning_rate": 1e-12, "max_steps": 1}
    run, _ = train(dataclasses.replace(recipe, model=model, trainer=still), parts=parts)
    np.testing.assert_allclose(predicted(predict(run, parts.validation)), alone, atol=1e-4)
    with monkeypatch.context() as patch:  # a checkpoint has its head already
        patch.setattr("rewardmodel.training.train.fit_last_layer", lambda *_: pytest.fail("fitted again"))
        shutil.rmtree(RunFolder(run).model)
        train(dataclasses.replace(recipe, model=model, trainer=still), parts=parts, resume=True)
    np.testing.assert_allclose(predicted(predict(run, parts.validation)), alone, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"keep_head": True}, "model.keep_head: freeze_backbone fits a new last layer of the head"),
        ({"head_init": "fitted"}, "model.head_init: .*freeze_backbone always fits one"),
        ({"use_peft": False}, "model.freeze_backbone: .*use_peft is false"),
        ({"num_hidden_layers": 3}, "model.num_hidden_layers: 3, but the backbone has 2"),
        ({"num_hidden_layers": 0}, "model.num_hidden_layers: 0; give at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(frozen, keys, message):
    recipe = frozen("davidson")
    model: ModelConfig = dataclasses.replace(recipe.model, **keys)
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(recipe, model=model))
    assert not recipe.run_folder.exists()
