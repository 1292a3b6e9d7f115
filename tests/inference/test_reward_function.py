import dataclasses

import numpy as np
import pytest
import torch
from builders import make_backbone, small_recipe, with_trainer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewardmodel.config.schema import ObjectiveConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.inference.predict import predict
from rewardmodel.inference.reward_function import conversation_turns, reward_function
from rewardmodel.training.train import train


@pytest.fixture(scope="module")
def separate(backbone, tmp_path_factory):
    """Return the folder of a run that scores each response alone, and the file of its battles."""
    recipe = small_recipe(backbone("llama"), tmp_path_factory.mktemp("separate"))
    recipe = dataclasses.replace(
        with_trainer(recipe, max_steps=3),
        objective=ObjectiveConfig(name="davidson"),
        prompt=dataclasses.replace(recipe.prompt, template="response"),
    )
    return train(recipe)[0], recipe.data.train


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_rewards_are_those_of_prediction(separate):
    run, file = separate
    battles = read_battles(file)
    rewards = reward_function(run)
    sides = [rewards([turns[0] for turns in battles["prompt"]], [turns[0] for turns in battles[name]])
             for name in ("response_a", "response_b")]  # fmt: skip
    lead = np.subtract(*sides)
    table = predict(run, battles)
    assert lead == pytest.approx(np.log(table["p_model_a"] / table["p_model_b"]).to_numpy(), abs=1e-4)
    assert np.ptp(sides[0]) > 0


def test_messages_are_read_as_texts_are(separate):
    run, _ = separate
    rewards = reward_function(run)
    plain = rewards(["who are you?"], ["a kind answer"], completion_ids=[[1]], trainer_state=None)
    assert rewards([[user("who are you?")]], [[assistant("a kind answer")]]) == plain
    both = rewards(["who are you?"] * 2, ["a kind answer", "a rude one"])
    assert both[0] == pytest.approx(plain[0], abs=1e-6)


def test_conversations_become_turns():
    system, developer = ({"role": role, "content": "be kind"} for role in ("system", "developer"))
    assert conversation_turns("a", "b") == (["a"], ["b"])
    assert conversation_turns([system, user("a")], [assistant("b")]) == (["be kind\n\na"], ["b"])
    assert conversation_turns([developer, user("a")], [assistant("b")]) == (["be kind\n\na"], ["b"])
    assert conversation_turns([user("a"), assistant("b"), user("c")], "d") == (["a", "c"], ["b", "d"])
    assert conversation_turns([user("a"), user("b")], "c") == (["a\n\nb"], ["c"])
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    assert conversation_turns([parts], "c") == (["a"], ["c"])


def test_calls_of_tools_and_their_results_are_turns():
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    prompts, answers = conversation_turns(
        [user("1 + 1?")], [calls, {"role": "tool", "content": "2"}, assistant("It is 2.")]
    )
    assert prompts == ["1 + 1?", "2"]
    assert '"name": "add"' in answers[0]
    assert answers[1] == "It is 2."
    assert conversation_turns([user("a")], [{"role": "assistant", "content": None}]) == (["a"], [""])


@pytest.mark.parametrize("text", ['[{"name": "cut off', '[{"role": "user", "content": "x"}]', "\n\nHuman: a", ""])
def test_a_text_is_a_text_whatever_it_looks_like(text):
    assert conversation_turns("a", text) == (["a"], [text])


def test_a_lone_surrogate_is_replaced():
    assert conversation_turns("a \ud83d", [assistant("b \ud83d")]) == (["a \ufffd"], ["b \ufffd"])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user"}], r"rewards: row 3, column 'prompt': the message .* has no text"),
        ([{"role": "narrator", "content": "a"}], "the role 'narrator' is unknown"),
        ([3], "3 is not a message"),
    ],
)
def test_messages_that_are_none_are_refused_by_number(messages, reason):
    with pytest.raises(InputError, match=reason):
        conversation_turns(messages, "c", 3)


def test_no_completions_have_no_rewards_and_nan_is_an_error(separate, monkeypatch):
    rewards = reward_function(separate[0])
    assert rewards([], []) == []
    monkeypatch.setattr(
        "rewardmodel.model.forward.Predictor.logits",
        lambda self, rows, **_: np.array([0.5, np.nan])[: len(rows), None, None],
    )
    with pytest.raises(
        FloatingPointError, match="1 of 2 completions have a reward that is NaN or infinite, first number 2"
    ):
        rewards(["a", "a"], ["b", "c"])


def test_a_run_that_compares_gives_no_rewards(recipe):
    run, _ = train(with_trainer(recipe, max_steps=1))
    with pytest.raises(InputError, match="objective cross_entropy compares two responses and gives no reward"):
        reward_function(run)


@pytest.mark.filterwarnings("ignore")  # of TRL and transformers, about generation
def test_trl_trains_a_policy_on_the_rewards(separate, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    run, _ = separate
    folder = make_backbone("llama", tmp_path / "policy")
    given = []
    rewards = reward_function(run)

    def watched(prompts, completions, **others):
        given.append(rewards(prompts, completions, **others))
        return given[-1]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=watched,
        args=GRPOConfig(
            output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=8, learning_rate=0.1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["question number 1", "question number 2"]}),
    )  # fmt: skip
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert [len(one) for one in given] == [4]
    assert np.ptp(given[0]) > 0
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
