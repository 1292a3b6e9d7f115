import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from builders import battle_frame, load_once, small_recipe, with_trainer, write_csv

from rewardmodel.benchmarks.benchmark import benchmark
from rewardmodel.benchmarks.pairs import pair_battles
from rewardmodel.benchmarks.play import ROW_RESPONSES, play
from rewardmodel.benchmarks.questions import Question
from rewardmodel.benchmarks.results import format_benchmark
from rewardmodel.config.schema import ObjectiveConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.evaluation.baselines import fit_baselines
from rewardmodel.evaluation.text_regression import save_regression
from rewardmodel.inference.predict import predict
from rewardmodel.inference.reward_function import reward_function
from rewardmodel.metrics import log_loss
from rewardmodel.predictions import predicted, true_outcomes
from rewardmodel.run_folder import RunFolder, load_run_recipe
from rewardmodel.training.train import train


@pytest.fixture(autouse=True)
def models_are_loaded_once(monkeypatch):
    """Let all scores of the same model share it: loading it takes most of the time."""
    for module in ("benchmarks.play", "inference.predict", "inference.reward_function"):
        monkeypatch.setattr(f"rewardmodel.{module}.load_predictor", load_once)


def with_tfidf(run):
    """Return the run with the baseline that a whole run keeps."""
    training = read_battles(load_run_recipe(run).data.train)
    save_regression(fit_baselines(training)["tfidf"], RunFolder(run).blend_baseline)
    return run


@pytest.fixture(scope="module")
def separate(backbone, tmp_path_factory):
    """Return a run that scores each response alone."""
    recipe = small_recipe(backbone("llama"), tmp_path_factory.mktemp("separate"))
    run = train(
        dataclasses.replace(
            with_trainer(recipe, max_steps=2),
            objective=ObjectiveConfig(name="davidson"),
            prompt=dataclasses.replace(recipe.prompt, template="response"),
        )
    )[0]
    return with_tfidf(run)


@pytest.fixture(scope="module")
def joint(backbone, tmp_path_factory):
    """Return a run that compares two responses."""
    recipe = small_recipe(backbone("llama"), tmp_path_factory.mktemp("joint"))
    return with_tfidf(train(with_trainer(recipe, max_steps=2, learning_rate=0.1))[0])


def ask(row, responses, right=1, subset="Math"):
    texts = [
        f"a {'kind' if number % 2 else 'rude'} answer, number {number}" + " more" * number
        for number in range(responses)
    ]
    correct = np.arange(responses) < right
    return Question(row, str(row), subset, f"question number {row}", texts, correct, f"question number {row}")


QUESTIONS = [ask(1, 2), ask(2, 4), ask(3, ROW_RESPONSES + 3, right=2), ask(4, 4)]


def test_a_reward_is_the_same_alone_and_beside_others(separate, tmp_path):
    pairs = pair_battles(QUESTIONS, across=False, where="here")
    scored = play(separate, load_run_recipe(separate), QUESTIONS, pairs, False, tmp_path)
    rewards = reward_function(separate)
    for question, one in zip(QUESTIONS, scored, strict=True):
        alone = rewards([question.prompt] * len(question.responses), question.responses)
        assert one.scores == pytest.approx(alone, abs=1e-5)
        assert np.ptp(one.scores) > 0


def test_folds_give_the_mean_of_their_rewards(separate, tmp_path, monkeypatch):
    folds = iter([[np.array([1.0, 5.0])], [np.array([2.0, 3.0])]])
    monkeypatch.setattr("rewardmodel.benchmarks.play.trained_models", lambda run: [run / "fold-0", run / "fold-1"])
    monkeypatch.setattr("rewardmodel.benchmarks.play._reward_responses", lambda *_: next(folds))
    pairs = pair_battles(QUESTIONS[:1], across=False, where="here")
    (scored,) = play(separate, load_run_recipe(separate), QUESTIONS[:1], pairs, False, tmp_path)
    assert scored.scores.tolist() == [1.5, 4]


@pytest.mark.parametrize("across", [False, True])
def test_pairs_are_played_in_both_orders(joint, tmp_path, across):
    questions = QUESTIONS[:2]
    pairs = pair_battles(questions, across, "here")
    scored = play(joint, load_run_recipe(joint), questions, pairs, across, tmp_path)
    table = predict(joint, pairs)
    a_first, b_first = (predicted(table, order) for order in ("ab", "ba"))
    first = scored[1].first
    assert first[0, 1] == pytest.approx(a_first[1, 0] - a_first[1, 1], abs=1e-6)
    assert first[1, 0] == pytest.approx(b_first[1, 1] - b_first[1, 0], abs=1e-6)
    assert abs(first[0, 1] + first[1, 0]) > 1e-6  # the order matters to this model
    assert np.isnan(first[1, 2]) == across
    assert not list(tmp_path.rglob("*.partial"))


def judgebench(path, count=24):
    rows = [
        {
            "pair_id": f"pair {number}",
            "question": f"question number {number}",
            "response_A": "a kind answer" + " and more" * (number % 5),
            "response_B": "a rude answer" + " and more" * 2,
            "label": "A>B" if number % 3 else "B>A",
            "source": ["mmlu-pro-law", "livecodebench"][number % 2],
        }
        for number in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_two_runs_are_measured_and_compared(separate, joint, tmp_path):
    data = judgebench(tmp_path / "judge.jsonl")
    result = benchmark("judgebench", [separate, joint], data, tmp_path / "out")
    assert (result.rows, result.prompts) == (24, 24)
    alone, compares = result.runs
    assert alone.how == "scores each response alone: 48 responses, each once"
    assert compares.how.startswith("compares two responses: 24 pairs, each in both orders")
    assert (alone.model_type, compares.model_type) == ("Seq. Classifier", "Custom Classifier")
    assert (alone.chat_template, compares.chat_template) == ("response", "instruction")
    assert alone.seen == compares.seen > 0  # the questions are those of training

    scores = {one.name: one for one in alone.scores}
    assert list(scores)[:3] == ["knowledge", "coding", "all pairs"]
    assert (scores["knowledge"].rows, scores["knowledge"].summary, scores["all pairs"].summary) == (12, False, True)
    longer = scores["all pairs"].baselines["longer"].value  # longer by chance; equal lengths are no win for A
    assert longer == np.mean([(number % 5 > 2) == bool(number % 3) for number in range(24)])
    assert scores["all pairs"].baselines["random"].value == 0.5
    assert {"random", "longer", "TF-IDF"} == scores["coding"].baselines.keys()
    assert scores["all pairs"].found.value == pytest.approx(
        (scores["knowledge"].found.value + scores["coding"].found.value) / 2
    )
    both = {one.name: one.found.value for one in compares.scores}
    assert both["all pairs, both orders"] <= both["all pairs"]
    difference = {one.name: one.difference.value for one in result.compared}
    assert difference["all pairs"] == pytest.approx(scores["all pairs"].found.value - both["all pairs"])

    # files
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["leaderboard", "page.html", "results.json", "rows.parquet"]
    entry = json.loads((out / "leaderboard" / "run-1.json").read_text())
    assert list(entry)[:4] == ["model", "model_type", "chat_template", "knowledge"]
    assert entry["knowledge"] == scores["knowledge"].found.value
    rows = pd.read_parquet(out / "rows.parquet")
    assert rows.groupby("run")["one_order"].mean()["run-1"] == scores["all pairs"].found.value
    assert rows["id"][:2].tolist() == ["pair 0", "pair 1"]
    assert len(rows["scores"][0]) == 2
    assert json.loads((out / "results.json").read_text())["rows"] == 24

    # what is shown
    text, page = format_benchmark(result), (out / "page.html").read_text()
    for shown in (text, page):
        assert "JudgeBench" in shown
        assert "all pairs, both orders" in shown
        assert "scores each response alone" in shown
        assert "TF-IDF" in shown
        assert "p, Holm" in shown
    assert "<script" not in page


def test_preferences_are_measured_by_probability(joint, tmp_path):
    frame = battle_frame(12, seed=5).assign(source=lambda table: ["one", "two"] * (len(table) // 2))
    frame["prompt"] = [json.dumps([f"another question, {row // 4}"]) for row in range(len(frame))]
    result = benchmark("preferences", joint, write_csv(frame, tmp_path / "new.csv"))
    scores = {one.name: one for one in result.runs[0].scores}
    assert list(scores)[-3:] == ["log loss", "accuracy of decided", "calibration error"]
    assert scores["one, log loss"].rows == 24
    assert scores["accuracy of decided"].rows == 24
    assert scores["log loss"].baselines["random"].value == pytest.approx(np.log(3))
    assert scores["log loss"].baselines["class prior"].value == pytest.approx(1.5 * np.log(2))
    assert set(scores["accuracy of decided"].baselines) == {"random", "class prior", "longer", "TF-IDF"}
    assert scores["accuracy of decided"].baselines["random"].value == 0.5
    assert scores["log loss"].found.low < scores["log loss"].found.value
    table = predict(joint, tmp_path / "new.csv")
    loss = log_loss(predicted(table), true_outcomes(table))
    assert scores["log loss"].found.value == pytest.approx(loss, abs=1e-6)
    written = pd.read_parquet(joint / "benchmarks" / "preferences" / "rows.parquet")
    assert "response_a" not in written
    assert predicted(written) == pytest.approx(predicted(table), abs=1e-6)


def test_what_cannot_be_measured_is_refused(separate, tmp_path):
    data = judgebench(tmp_path / "judge.jsonl", 2)
    with pytest.raises(InputError, match="3 runs; give one, or two"):
        benchmark("judgebench", [separate] * 3, data)
    with pytest.raises(InputError, match="is a file; give the name of a folder"):
        benchmark("judgebench", separate, data, data)
    unlabelled = battle_frame(2).drop(columns=["winner_model_a", "winner_model_b", "winner_tie"])
    with pytest.raises(InputError, match="outcomes of these battles are not known"):
        benchmark("preferences", separate, write_csv(unlabelled, tmp_path / "new.csv"))
    with pytest.raises(InputError, match="me/none: no such file, and the hub gave no data set"):
        benchmark("judgebench", separate, "me/none")
