import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from builders import battle_frame, load_once, write_csv

from rewardmodel.battles import OUTCOMES, swap
from rewardmodel.config.loader import dump_recipe
from rewardmodel.config.schema import DataConfig, InferenceConfig, ModelConfig, PromptConfig, Recipe
from rewardmodel.data.formats import read_battles
from rewardmodel.data.splits import load_battles, split
from rewardmodel.errors import InputError
from rewardmodel.evaluation.baselines import fit_baselines
from rewardmodel.evaluation.calibration import Calibrator, save_calibrator
from rewardmodel.evaluation.text_regression import load_regression, predict_each, save_regression
from rewardmodel.inference.predict import predict, predict_with, read_calibration
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.forward import Predictor
from rewardmodel.model.loading import build_model, load_predictor
from rewardmodel.objectives import JOINT_HEAD
from rewardmodel.predictions import average_probabilities, predicted, write_predictions
from rewardmodel.prompt.tokenization import measure_row_retention, tokenize
from rewardmodel.run_folder import RunFolder, load_run_recipe
from rewardmodel.training.train import train

SWAPPED = [1, 0, 2]


@pytest.fixture(autouse=True)
def models_are_loaded_once(monkeypatch):
    """Let predictions of the same model share it: loading it takes most of the time."""
    monkeypatch.setattr("rewardmodel.inference.predict.load_predictor", load_once)


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
    """Return a predictor with a random head, and its recipe."""
    recipe = Recipe(
        prompt=PromptConfig(max_length=160),
        model=ModelConfig(model_name_or_path=str(backbone("llama")), device="cpu", dtype="float32", lora_r=4),
    )
    model, tokenizer = build_model(resolve_backbone(recipe.model), JOINT_HEAD, seed=0)
    fill_head(model)
    return Predictor(model.eval(), tokenizer, torch.float32), recipe


def predict_tiny(tiny, battles, **inference):
    predictor, recipe = tiny
    recipe = dataclasses.replace(recipe, inference=InferenceConfig(**inference))
    return predict_with(dataclasses.replace(predictor, budget=recipe.inference.batch_tokens), recipe, battles)


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
    np.testing.assert_array_equal(
        predicted(table), average_probabilities([order.astype(np.float32) for order in orders])
    )


def test_one_order_has_no_columns_of_the_other(tiny, battles):
    one, both = predict_tiny(tiny, battles, swap_tta="none"), predict_tiny(tiny, battles, swap_tta="both")
    assert not [name for name in one if name.startswith("ba_")]
    assert [name for name in both if name.startswith("ba_")]
    np.testing.assert_allclose(predicted(one), predicted(both, "ab"), atol=5e-6)


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


def test_predictions_that_are_nan_name_the_battles(tiny, battles):
    model, tokenizer = build_model(resolve_backbone(tiny[1].model), JOINT_HEAD, seed=0)
    fill_head(model, float("nan"))
    with pytest.raises(FloatingPointError) as caught:
        predict_with(Predictor(model.eval(), tokenizer, torch.float32), tiny[1], battles)
    message = str(caught.value)
    assert message.startswith(f"NaN or infinite predictions of {len(battles)} battles (torch.float32)")
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
    predictor = load_predictor(recipe.model, RunFolder(run).model, recipe.inference.batch_tokens)
    battles = read_battles(file)
    rows = tokenize(battles, predictor.tokenizer, PromptConfig(template="encoder", max_length=100))
    assert measure_row_retention(rows)["battles_cut"] > 0
    return predict_with(predictor, recipe, battles)


def test_a_run_and_a_file_predict_what_the_model_in_memory_predicts(trained):
    run, file = trained
    table = predict(run, file)
    assert table.drop(columns="seen").equals(in_memory(run, file))
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


def test_rules_for_responses_come_after_the_mean_and_know_no_order(trained):
    run, file = trained
    recipe = dataclasses.replace(load_run_recipe(run), inference=InferenceConfig(tie_if_same=0.9, batch_tokens=500))
    battles = pd.read_csv(file, dtype={"id": str})
    battles.loc[3, "response_b"] = battles["response_a"][3]
    battles = read_battles(battles)
    table, plain = predict(run, battles, recipe), predict(run, battles)
    assert predicted(table)[3] == pytest.approx([0.05, 0.05, 0.9])
    np.testing.assert_array_equal(predicted(predict(run, swap(battles), recipe))[3], predicted(table)[3])
    assert np.abs(predicted(table, "ab") - predicted(plain, "ab")).max() < 1e-6
    assert predicted(plain)[3, 2] != pytest.approx(0.9)


def test_a_folder_that_is_no_run_is_refused(trained, tmp_path):
    with pytest.raises(InputError, match="give the folder of a run"):
        predict(tmp_path, trained[1])


def test_a_run_that_has_not_finished_training_is_refused(trained, tmp_path):
    (RunFolder(tmp_path).recipe).write_bytes(RunFolder(trained[0]).recipe.read_bytes())
    with pytest.raises(InputError, match="give a run that finished training"):
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
    save_calibrator(Calibrator("tie_mass", (np.log(2),)), RunFolder(tmp_path).calibrator)
    for recipe, tie in ((Recipe(), [1 / 3, 1 / 2]), (Recipe(inference=InferenceConfig(calibrate=False)), [1 / 3] * 2)):
        assert read_calibration(tmp_path, recipe).apply(table.copy())["p_tie"].tolist() == pytest.approx(tie)
    late = table.copy()
    late.loc[1, [f"ba_{one}" for one in names]] = np.nan
    assert read_calibration(tmp_path, Recipe()).apply(late)["p_tie"].tolist() == pytest.approx([1 / 3] * 2)
    late["id"] = ["3", "4"]
    assert read_calibration(tmp_path, Recipe()).apply(late)["p_tie"].tolist() == pytest.approx([1 / 2, 1 / 3])
    one_order = table.drop(columns=[f"ba_{one}" for one in names])
    assert read_calibration(tmp_path, Recipe()).apply(one_order)["p_tie"].tolist() == pytest.approx([1 / 3] * 2)


@pytest.fixture(scope="module")
def two_runs(backbone, tmp_path_factory):
    """Return two runs that hold out different folds of the same file, and a file of new battles."""
    folder = tmp_path_factory.mktemp("ensemble")
    file = str(write_csv(battle_frame(), folder / "train.csv"))
    model = ModelConfig(model_name_or_path=str(backbone("llama")), device="cpu", dtype="float32", lora_r=4)
    runs = []
    for fold in (0, 1):
        trainer = {"output_dir": str(folder / f"run{fold}"), "disable_tqdm": True, "learning_rate": 0.1, "max_steps": 4}
        data = DataConfig(train=file, folds=4, fold=fold)
        recipe = Recipe(data=data, prompt=PromptConfig(max_length=160), model=model, trainer=trainer)
        runs.append(train(recipe)[0])
    new = battle_frame(3, seed=1).drop(columns=list(OUTCOMES))
    new["prompt"] = new["prompt"].str.replace("question", "riddle")
    for name in ("response_a", "response_b"):
        new[name] = new[name].str.replace("answer", "reply")
    return runs, file, write_csv(new, folder / "new.csv")


@pytest.mark.slow  # seconds a case
@pytest.mark.parametrize("weights", [None, [2, 1], [0.25, 0.75], [0, 3]])
def test_several_runs_are_averaged_with_their_weights(two_runs, weights):
    runs, _, new = two_runs
    each = [predict(run, new) for run in runs]
    assert np.abs(predicted(each[0]) - predicted(each[1])).max() > 1e-3
    table = predict(runs, new, weights=weights)
    first, second = weights or [1, 1]
    for order in ("", "ab", "ba"):
        mean = (first * predicted(each[0], order) + second * predicted(each[1], order)) / (first + second)
        np.testing.assert_allclose(predicted(table, order), mean, rtol=0, atol=1e-7)
    np.testing.assert_allclose(predicted(table).sum(axis=1), 1, atol=1e-12)
    assert table["id"].tolist() == each[0]["id"].tolist()
    assert list(table) == list(each[0])
    assert not table["seen"].any()


def test_each_run_is_calibrated_by_itself_before_the_mean(two_runs, tmp_path):
    runs, _, new = two_runs
    raw = [predicted(predict(run, new)) for run in runs]
    calibrator = Calibrator("tie_mass", (1.0,))
    copies = [shutil.copytree(run, tmp_path / run.name) for run in runs]
    save_calibrator(calibrator, copies[0] / "calibrator.json")
    table = predict_with_tables(copies[0], new)
    write_predictions(table, copies[0] / "validation.parquet")
    table = predict(copies, new)
    np.testing.assert_allclose(predicted(table), (calibrator(raw[0]) + raw[1]) / 2, atol=1e-6)


@pytest.fixture
def blending(two_runs, tmp_path):
    """Return copies of the two runs that blend with baselines of their own, and the calibrators."""
    runs, _, new = two_runs
    copies, calibrators = [], [Calibrator("blend", (0.1, 1.5, -1.0)), Calibrator("blend", (0.3, 0.7, 0.1))]
    for number, (run, calibrator) in enumerate(zip(runs, calibrators, strict=True)):
        write_predictions(predict_with_tables(run, new), tmp_path / "fitted.parquet")
        copy = shutil.copytree(run, tmp_path / run.name)
        shutil.move(tmp_path / "fitted.parquet", copy / "validation.parquet")
        save_calibrator(calibrator, RunFolder(copy).calibrator)
        recipe = load_run_recipe(copy)
        fitted = fit_baselines(split(load_battles(recipe.data), number).training)["tfidf"]
        save_regression(fitted, RunFolder(copy).blend_baseline)
        recipe = dataclasses.replace(recipe, inference=InferenceConfig(blend=True))
        RunFolder(copy).recipe.write_text(dump_recipe(recipe))
        copies.append(copy)
    return copies, calibrators


def by_hand(model, baseline, calibrator):
    a, b, c = calibrator.parameters
    mixed = model**a * baseline**b * np.exp([0, 0, c])
    return mixed / mixed.sum(axis=1, keepdims=True)


def test_a_run_that_blends_mixes_in_its_baseline(two_runs, blending):
    (run, other), calibrators = blending
    new = two_runs[2]
    model = predicted(predict(run, new, load_run_recipe(two_runs[0][0])))
    baseline = predict_each([load_regression(RunFolder(run).blend_baseline)], read_battles(new))[0]
    table = predict(run, new)
    np.testing.assert_allclose(predicted(table), by_hand(model, baseline, calibrators[0]), atol=1e-9)
    np.testing.assert_array_equal(predicted(table, "baseline"), baseline)
    np.testing.assert_allclose((predicted(table, "ab") + predicted(table, "ba")) / 2, model, atol=1e-6)
    swapped = predicted(predict(run, swap(read_battles(new))))[:, SWAPPED]
    np.testing.assert_allclose(swapped, predicted(table), rtol=0, atol=1e-6)
    assert np.abs(predicted(table) - model).max() > 0.05
    both = predict([run, other], new, weights=[3, 1])
    mean = (3 * predicted(table) + predicted(predict(other, new))) / 4
    np.testing.assert_allclose(predicted(both), mean, atol=1e-9)


@pytest.mark.parametrize("inference", [{"blend": False}, {"blend": True, "calibrate": False}])
def test_a_blend_that_is_switched_off_leaves_the_model_alone_and_asks_for_no_baseline(two_runs, blending, inference):
    run, new = blending[0][0], two_runs[2]
    RunFolder(run).blend_baseline.unlink()
    table = predict(run, new, dataclasses.replace(load_run_recipe(run), inference=InferenceConfig(**inference)))
    pd.testing.assert_frame_equal(table, predict(two_runs[0][0], new))


def test_a_blend_without_its_baseline_is_refused_before_a_model_is_loaded(two_runs, blending, monkeypatch):
    run, new = blending[0][0], two_runs[2]
    monkeypatch.setattr("rewardmodel.inference.predict.load_predictor", lambda *_: pytest.fail("loaded"))
    RunFolder(run).blend_baseline.unlink()
    message = r"blend_baseline\.npz: cannot read a baseline \(no such file\); train again with --resume, .*blend false"
    with pytest.raises(InputError, match=message):
        predict(run, new)


def test_a_blend_that_was_fitted_on_both_orders_waits_for_both(two_runs, blending):
    run, new = blending[0][0], two_runs[2]
    late = predict(run, new, time_limit=0)
    assert late["ba_p_tie"].isna().all()
    alone = average_probabilities([predicted(late, "ab")])  # sums are 1 in float64
    np.testing.assert_allclose(predicted(late), alone, atol=1e-9)
    pd.testing.assert_frame_equal(predict(run, new, time_limit=1e6), predict(run, new), atol=1e-6)


def predict_with_tables(run, new):
    """Return predictions of other battles than those of `new`, as a calibrator was fitted on."""
    table = predict(run, new, dataclasses.replace(load_run_recipe(run), inference=InferenceConfig(calibrate=False)))
    return table.assign(id=[f"other {name}" for name in table["id"]])


def test_a_battle_is_predicted_by_the_runs_alone_that_did_not_train_on_it(two_runs):
    runs, file, _ = two_runs
    each = [predict(run, file) for run in runs]
    seen = np.stack([table["seen"] for table in each])
    assert seen.sum(axis=1).tolist() == [36, 36]
    assert seen.all(axis=0).sum() == 24
    table = predict(runs, file, weights=[3, 1])
    np.testing.assert_array_equal(table["seen"], seen.all(axis=0))
    probabilities = [predicted(one) for one in each]
    expected = np.where(seen.all(axis=0)[:, None], (3 * probabilities[0] + probabilities[1]) / 4, np.nan)
    for number in (0, 1):
        alone = ~seen[number] & seen[1 - number]
        expected[alone] = probabilities[number][alone]
    np.testing.assert_allclose(predicted(table), expected, atol=1e-6)


def test_one_battle_of_a_group_is_enough_to_have_been_seen(two_runs):
    runs, file, _ = two_runs
    given = pd.read_csv(file, dtype={"id": str})
    trained = given[predict(runs[0], file)["seen"].to_numpy()].iloc[:1]
    other = trained.assign(id="paraphrase", prompt='["asked in other words"]')
    essay = '["one and the same answer under both of the prompts, at such a length that it ties them together"]'
    planted = pd.concat([trained, other], ignore_index=True).assign(response_a=essay)
    assert predict(runs[0], planted)["seen"].tolist() == [True, True]
    assert predict(runs[0], planted[1:])["seen"].tolist() == [False]


def test_orders_that_not_all_runs_have_are_left_out_of_the_mean(two_runs):
    runs, _, new = two_runs
    own = [load_run_recipe(run) for run in runs]
    one_order = dataclasses.replace(own[1], inference=InferenceConfig(swap_tta="none"))
    table = predict(runs, new, [own[0], one_order])
    assert "ba_p_tie" not in table
    expected = (predicted(predict(runs[0], new)) + predicted(predict(runs[1], new, one_order))) / 2
    np.testing.assert_allclose(predicted(table), expected, atol=1e-7)


def test_a_run_that_does_not_say_what_it_trained_on_predicts_all_the_same(two_runs, tmp_path, caplog):
    runs, file, _ = two_runs
    bare = shutil.copytree(runs[0], tmp_path / "bare", ignore=shutil.ignore_patterns("training_keys.npy"))
    table = predict(bare, file)
    assert "seen" not in table
    assert "whether it trained on the battles is unknown" in caplog.text
    np.testing.assert_array_equal(predicted(table), predicted(predict(runs[0], file)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "weights: 1 for 2 runs; give one for each"),
        ([1, -1], "weights: 1, -1; give numbers from 0"),
        ([0, 0], "weights: 0, 0; give numbers from 0, not all of them 0"),
        ([1, float("nan")], "weights: 1, nan; give numbers from 0"),
        ([1, float("inf")], "weights: 1, inf; give numbers from 0"),
    ],
)
def test_weights_that_are_none_are_refused(two_runs, weights, message):
    with pytest.raises(InputError, match="^" + message):
        predict(two_runs[0], two_runs[2], weights=weights)


def test_all_runs_must_be_whole_before_any_predicts(two_runs, tmp_path, monkeypatch):
    runs, _, new = two_runs
    monkeypatch.setattr("rewardmodel.inference.predict.load_predictor", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match=r"no recipe\.yaml there"):
        predict([runs[0], tmp_path], new)
    (RunFolder(tmp_path).recipe).write_bytes(RunFolder(runs[0]).recipe.read_bytes())
    with pytest.raises(InputError, match="give a run that finished training"):
        predict([runs[0], tmp_path], new)


def test_a_part_by_name_is_that_of_the_first_run(two_runs):
    runs, *_ = two_runs
    table = predict(runs, "validation")
    assert len(table) == 12
    assert not table["seen"].any()
    np.testing.assert_allclose(predicted(table), predicted(predict(runs[0], "validation")), atol=1e-6)
