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
from rewardmodel.inference.reward_function import reward_function, split_turns
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
    assert table[["reward_a", "reward_b"]].to_numpy() == pytest.approx(np.transpose(sides), abs=1e-4)
    assert np.ptp(sides[0]) > 0


def test_messages_are_read_as_texts_are(separate):
    run, _ = separate
    rewards = reward_function(run)
    plain = rewards(["who are you?"], ["a kind answer"], completion_ids=[[1]], trainer_state=None)
    assert rewards([[user("who are you?")]], [[assistant("a kind answer")]]) == plain
    both = rewards(["who are you?"] * 2, ["a kind answer", "a rude one"])
    assert both[0] == pytest.approx(plain[0], abs=1e-6)


def test_conversations_become_turns():
    system = {"role": "system", "content": "be kind"}
    assert split_turns("a", "b") == (["a"], ["b"])
    assert split_turns([system, user("a")], [assistant("b")]) == (["be kind\n\na"], ["b"])
    assert split_turns([user("a"), assistant("b"), user("c")], "d") == (["a", "c"], ["b", "d"])
    with pytest.raises(InputError, match="messages of user, user, assistant; give user and assistant in turns"):
        split_turns([user("a"), user("b")], "c")
    for message in ({"role": "user"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}):
        with pytest.raises(InputError, match="give messages like"):
            split_turns([message], "c")


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
