import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import battle_frame, write_csv

from rewardmodel.battles import OUTCOMES, swap
from rewardmodel.calibration import Calibrator, save
from rewardmodel.config import DataConfig, InferenceConfig, ModelConfig, PromptConfig, Recipe
from rewardmodel.errors import InputError
from rewardmodel.formats import read_battles
from rewardmodel.inference import calibrate, predict, predict_with
from rewardmodel.model import build_model, load_model
from rewardmodel.objective import JOINT
from rewardmodel.pairs import retention, tokenize
from rewardmodel.predictions import average, predicted, write_predictions
from rewardmodel.runs import MODEL, RECIPE, load_run_recipe
from rewardmodel.trainer import train

SWAPPED = [1, 0, 2]


def fill_head(model, value=None):
    """Draw a head of standard normal weights, so that predictions differ, or fill it with one value."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "score" in name:
            torch.nn.init.normal_(weight) if value is None else torch.nn.init.constant_(weight, value)


@pytest.fixture(scope="module")
def battles():
    return read_battles(battle_frame(6))


@pytest.fixture(scope="module")
def tiny(backbone):
    """Return a model with a random head, its tokenizer and its recipe."""
    recipe = Recipe(
        prompt=PromptConfig(max_length=160),
        model=ModelConfig(model_name_or_path=str(backbone("llama")), device="cpu", dtype="float32", lora_r=4),
    )
    model, tokenizer = build_model(recipe.model, JOINT, seed=0)
    fill_head(model)
    return model.eval(), tokenizer, recipe


def predict_tiny(tiny, battles, **inference):
    model, tokenizer, recipe = tiny
    recipe = dataclasses.replace(recipe, inference=InferenceConfig(**inference))
    return predict_with(model, tokenizer, recipe, battles)


def test_predictions_are_one_row_a_battle_in_their_order(tiny, battles):
    table = predict_tiny(tiny, battles)
    assert table["id"].tolist() == battles["id"][:]
    np.testing.assert_allclose(predicted(table).sum(axis=1), 1, atol=1e-12)
    assert predicted(table).std(axis=0).min() > 1e-3  # battles are told apart, so an exchanged row would be seen


def test_predictions_follow_their_battles_in_any_order(tiny, battles):
    order = np.random.default_rng(0).permutation(len(battles))
    table, shuffled = predict_tiny(tiny, battles), predict_tiny(tiny, battles.select(order))
    assert shuffled["id"].tolist() == table["id"][order].tolist()
    np.testing.assert_allclose(predicted(shuffled), predicted(table)[order], atol=1e-6)


def test_both_orders_are_blind_to_which_response_is_a(tiny, battles):
    table, swapped = predict_tiny(tiny, battles), predict_tiny(tiny, swap(battles))
    np.testing.assert_allclose(predicted(swapped), predicted(table)[:, SWAPPED], rtol=0, atol=1e-6)
    np.testing.assert_allclose(predicted(swapped, "ab"), predicted(table, "ba")[:, SWAPPED], rtol=0, atol=1e-6)
    assert np.abs(predicted(table, "ab") - predicted(table, "ba")).max() > 1e-2  # one order alone is not


def test_the_prediction_is_the_mean_of_both_orders(tiny, battles):
    table = predict_tiny(tiny, battles)
    orders = [predicted(table, "ab"), predicted(table, "ba")]
    np.testing.assert_allclose(predicted(table), (orders[0] + orders[1]) / 2, atol=1e-6)
    np.testing.assert_array_equal(predicted(table), average([order.astype(np.float32) for order in orders]))


def test_one_order_has_no_columns_of_the_other(tiny, battles):
    one, both = predict_tiny(tiny, battles, swap_tta="none"), predict_tiny(tiny, battles, swap_tta="both")
    assert not [name for name in one if name.startswith("ba_")]
    assert [name for name in both if name.startswith("ba_")]
    np.testing.assert_allclose(predicted(one), predicted(both, "ab"), atol=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 500, 100_000])
def test_predictions_do_not_depend_on_the_batches(tiny, battles, batch_tokens):
    table = predict_tiny(tiny, battles, batch_tokens=batch_tokens)
    np.testing.assert_allclose(predicted(table), predicted(predict_tiny(tiny, battles)), rtol=0, atol=1e-5)


def test_battles_without_groups_get_one_a_prompt(tiny, battles):
    assert set(battles["group"]) == {-1}
    groups = predict_tiny(tiny, battles)["group"].to_numpy()
    assert groups.min() >= 0
    prompts = [tuple(turns) for turns in battles["prompt"]]
    assert len(set(zip(groups, prompts, strict=True))) == len(set(groups)) == len(set(prompts)) == 6


def test_groups_that_battles_have_are_kept(tiny, battles):
    groups = list(range(100, 100 + len(battles)))
    grouped = battles.remove_columns("group").add_column("group", groups)
    assert predict_tiny(tiny, grouped)["group"].tolist() == groups


def test_unlabelled_battles_are_predicted_like_labelled_ones(tiny, battles):
    unlabelled = read_battles(battle_frame(6).drop(columns=list(OUTCOMES)))
    table = predict_tiny(tiny, unlabelled)
    assert table[list(OUTCOMES)].isna().all(axis=None)
    np.testing.assert_array_equal(predicted(table), predicted(predict_tiny(tiny, battles)))


def test_predictions_that_are_no_numbers_name_the_battles(tiny, battles):
    model, tokenizer = build_model(tiny[2].model, JOINT, seed=0)
    fill_head(model, float("nan"))
    with pytest.raises(FloatingPointError) as caught:
        predict_with(model.eval(), tokenizer, tiny[2], battles)
    message = str(caught.value)
    assert message.startswith(f"{len(battles)} predictions are no numbers (torch.float32)")
    assert message.endswith(", ".join(battles["id"][:5]))


@pytest.fixture(scope="module")
def trained(backbone, tmp_path_factory):
    """Return the folder of a run with a template and a length that are not the defaults, and a file of battles."""
    folder = tmp_path_factory.mktemp("inference")
    recipe = Recipe(
        data=DataConfig(train=str(write_csv(battle_frame(), folder / "train.csv")), folds=4),
        prompt=PromptConfig(template="encoder", max_length=100),
        model=ModelConfig(model_name_or_path=str(backbone("llama")), device="cpu", dtype="float32", lora_r=4),
        trainer={"output_dir": str(folder / "run"), "disable_tqdm": True, "learning_rate": 0.1, "max_steps": 4},
        inference=InferenceConfig(swap_tta="none"),
    )
    run, _ = train(recipe)
    unlabelled = battle_frame(5, seed=1).drop(columns=list(OUTCOMES))
    return run, write_csv(unlabelled, folder / "test.csv")


def in_memory(run, file, **prompt):
    recipe = load_run_recipe(run)
    recipe = dataclasses.replace(recipe, prompt=dataclasses.replace(recipe.prompt, **prompt))
    model, tokenizer = load_model(recipe.model, run / MODEL)
    battles = read_battles(file)
    rows = tokenize(battles, tokenizer, PromptConfig(template="encoder", max_length=100))
    assert retention(rows)["battles_cut"] > 0
    return predict_with(model, tokenizer, recipe, battles)


def test_a_run_and_a_file_predict_what_the_model_in_memory_predicts(trained):
    run, file = trained
    table = predict(run, file)
    assert table.equals(in_memory(run, file))
    assert table.equals(predict(str(run), read_battles(file)))


@pytest.mark.parametrize("prompt", [{"template": "instruction", "max_length": 160}, {"max_length": 400}])
def test_template_and_truncation_are_those_of_the_run(trained, prompt):
    run, file = trained
    assert np.abs(predicted(predict(run, file)) - predicted(in_memory(run, file, **prompt))).max() > 1e-3


def test_the_recipe_is_the_run_s_own_unless_another_is_given(trained):
    run, file = trained
    assert "ba_p_tie" not in predict(run, file)
    other = dataclasses.replace(load_run_recipe(run), inference=InferenceConfig(swap_tta="both"))
    assert "ba_p_tie" in predict(run, file, other)


def test_predicting_writes_nothing_into_the_run(trained):
    run, file = trained
    before = sorted(run.rglob("*"))
    predict(run, file)
    assert sorted(run.rglob("*")) == before


def test_a_folder_that_is_no_run_is_refused(trained, tmp_path):
    with pytest.raises(InputError, match="give the folder of a run"):
        predict(tmp_path, trained[1])


def test_a_run_that_has_not_finished_training_is_refused(trained, tmp_path):
    (tmp_path / RECIPE).write_bytes((trained[0] / RECIPE).read_bytes())
    with pytest.raises(InputError, match="has the run finished training"):
        predict(tmp_path, trained[1])


def test_battles_that_are_not_there_are_refused(trained, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.csv: no such file"):
        predict(trained[0], tmp_path / "nowhere.csv")


def test_the_battles_that_a_calibrator_was_fitted_on_stay_as_the_model_states_them(tmp_path):
    names = ["p_model_a", "p_model_b", "p_tie"]
    table = pd.DataFrame({"id": ["1", "2"], "group": [0, 1], "prompt_chars": 5, "response_a_chars": 6})
    table = table.assign(
        response_b_chars=7, **dict.fromkeys([*OUTCOMES, *names, *(f"ba_{one}" for one in names)], 1 / 3)
    )
    fitted = table.copy()
    fitted.loc[1, "prompt_chars"] = 9  # another battle of the same id
    write_predictions(fitted, tmp_path / "validation.parquet")
    save(Calibrator("tie_mass", (np.log(2),)), tmp_path / "calibrator.json")
    for recipe, tie in ((Recipe(), [1 / 3, 1 / 2]), (Recipe(inference=InferenceConfig(calibrate=False)), [1 / 3] * 2)):
        assert calibrate(table.copy(), tmp_path, recipe)["p_tie"].tolist() == pytest.approx(tie)
    one_order = table.drop(columns=[f"ba_{one}" for one in names])
    assert calibrate(one_order, tmp_path, Recipe())["p_tie"].tolist() == pytest.approx([1 / 3] * 2)
