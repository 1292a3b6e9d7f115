from dataclasses import replace

import numpy as np
import pytest
from builders import battle_frame, small_recipe, write_untrained_run

from rewardmodel.battles import BATTLE_FEATURES
from rewardmodel.config.schema import InferenceConfig, ObjectiveConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.evaluation.baselines import fit_baselines
from rewardmodel.evaluation.calibration import BLEND, Calibrator, save_calibrator
from rewardmodel.evaluation.text_regression import save_regression
from rewardmodel.inference.judge import gather_battles, load_judge, parse_battles
from rewardmodel.inference.predict import predict
from rewardmodel.predictions import write_predictions
from rewardmodel.run_folder import RunFolder


def as_rows(battles):
    return [{name: row[name] for name in ("id", "prompt", "response_a", "response_b")} for row in battles]


@pytest.fixture(scope="module")
def battles():
    return read_battles(battle_frame(6))


@pytest.fixture(scope="module")
def recipe(backbone, tmp_path_factory):
    return small_recipe(backbone("llama"), tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def run(recipe):
    return write_untrained_run(recipe)


def assert_predicts_the_same(run, recipe, battles):
    """Compare a judge's predictions with those of `predict`, to the last digit."""
    table = predict(run, battles, recipe)
    found = load_judge(run, recipe).predict(as_rows(battles))
    names = [name for name in table if "p_" in name]
    assert found[names].equals(table[names])
    return table


@pytest.mark.parametrize("settings", [{}, {"swap_tta": "none"}, {"tie_if_same": 0.9, "win_if_other_empty": 0.8}])
def test_it_predicts_what_predict_predicts(run, recipe, battles, settings):
    rows = as_rows(battles)
    rows[0]["response_a"] = rows[0]["response_b"]
    rows[1]["response_a"] = [""]
    rows[2] |= {name: rows[2][name] * 3 for name in ("prompt", "response_a", "response_b")}
    changed = gather_battles(rows)
    assert changed.features == BATTLE_FEATURES
    table = assert_predicts_the_same(run, replace(recipe, inference=InferenceConfig(**settings)), changed)
    if "tie_if_same" in settings:
        assert table["p_tie"][0] == pytest.approx(0.9)


@pytest.mark.parametrize("method", ["tie_mass", BLEND])
def test_it_calibrates_and_blends_as_predict_does(run, recipe, battles, method):
    files = RunFolder(run)
    write_predictions(predict(run, battles.select(range(8))), files.validation)
    save_calibrator(Calibrator(method, (0.7, 0.6, -0.5) if method == BLEND else (0.7,)), files.calibrator)
    if method == BLEND:
        save_regression(fit_baselines(battles)["tfidf"], files.blend_baseline)
        recipe = replace(recipe, inference=replace(recipe.inference, blend=True))
    try:
        table = assert_predicts_the_same(run, recipe, battles)
    finally:
        files.calibrator.unlink()
    mean = (table["ab_p_tie"] + table["ba_p_tie"]) / 2
    changed = (table["p_tie"] - mean).abs() > 1e-3
    assert changed.tolist() == [False] * 8 + [True] * 16  # those that the calibrator was fitted on stay as they are


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rewards_do_not_depend_on_what_else_is_asked(backbone, tmp_path, family):
    """Also where the tie parameter is of pairs, and where batches are padded."""
    recipe = small_recipe(backbone(family), tmp_path)
    pairs = {"pooling": "responses", "pair_ties": True} if family == "llama" else {}
    template = "response" if family == "llama" else None
    recipe = replace(
        recipe,
        objective=ObjectiveConfig(name="rao_kupper"),
        prompt=replace(recipe.prompt, template=template),
        model=replace(recipe.model, **pairs),
    )
    judge = load_judge(write_untrained_run(recipe))
    conversations = [(["who are you?"], [f"answer {number} " * (number + 1)]) for number in range(9)]
    alone = [judge.predictor.compute(judge.reward_rows([one]))[0, 0].item() for one in conversations]
    together = judge.reward_rows(conversations)
    assert len(together) == 1
    assert judge.predictor.compute(together)[:, 0].tolist() == pytest.approx(alone, abs=1e-5)
    small = replace(judge, predictor=replace(judge.predictor, budget=60))
    rows = small.reward_rows(conversations)
    assert len(rows) > 1
    found = np.concatenate([judge.predictor.compute([row])[:, 0].numpy() for row in rows])
    assert found.tolist() == pytest.approx(alone, abs=1e-5)
    assert (judge.no_verbatim_reward is None) == (family != "llama")


def test_raw_rows_become_battles():
    rows = [
        {"id": 7, "prompt": '["a", "b"]', "response_a": '["c", null]', "response_b": '["e", "f"]', "other": 1},
        {"prompt": "[1, 2] is a list", "response_a": "[3]", "response_b": None},
    ]
    assert parse_battles(rows, "here") == [
        {"id": "7", "prompt": ["a", "b"], "response_a": ["c", ""], "response_b": ["e", "f"]},
        {"id": "2", "prompt": ["[1, 2] is a list"], "response_a": ["[3]"], "response_b": [""]},
    ]
    with pytest.raises(InputError, match="here: row 1, column 'response_b': 1 turn, but the prompt has 2"):
        parse_battles([{"prompt": ["a", "b"], "response_a": ["c", "d"], "response_b": ["e"]}], "here")
