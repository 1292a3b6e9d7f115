import dataclasses

import pytest
import torch
from builders import make_trainer, with_trainer

from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.training.arguments import LearningRates, split_groups, training_arguments


def test_groups_are_split_by_rate_and_nothing_else():
    one, two, three = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [{"params": [one, two], "lr": 0.1, "weight_decay": 0.5}, {"params": [three], "lr": 0.1, "weight_decay": 0}]
    found = split_groups(groups, {two: 0.7})
    assert found == [
        {"params": [one], "lr": 0.1, "weight_decay": 0.5},
        {"params": [two], "lr": 0.7, "weight_decay": 0.5},
        {"params": [three], "lr": 0.1, "weight_decay": 0},
    ]
    assert split_groups(found, {two: 0.7}) == found
    assert split_groups(groups, {}) == groups


def rates_of(trainer) -> dict[str, float]:
    trainer.create_optimizer()
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    return {names[weight]: group["lr"] for group in trainer.optimizer.param_groups for weight in group["params"]}


def kind(name: str) -> str:
    return next((part for part in ("lora_A", "lora_B", "score") if f".{part}." in name), "other")


def trainer_of(recipe, **keys):
    battles = read_battles(recipe.data.train).select(range(8))
    recipe = with_trainer(recipe, eval_strategy="no", save_strategy="no", learning_rate=0.001, **keys)
    trainer = make_trainer(recipe, battles, battles)
    trainer.rates = LearningRates(recipe.trainer["head_learning_rate"], recipe.trainer["loraplus_lr_ratio"])
    return trainer


def test_the_head_and_b_learn_at_their_own_rates(recipe):
    found = rates_of(trainer_of(recipe, head_learning_rate=0.5, loraplus_lr_ratio=16.0))
    by_kind = {kind(name): rate for name, rate in found.items()}
    assert by_kind == {"lora_A": 0.001, "lora_B": pytest.approx(0.016), "score": 0.5}
    plain = rates_of(trainer_of(recipe))
    assert plain.keys() == found.keys()
    assert set(plain.values()) == {0.001}


def test_a_rate_is_what_a_first_step_moves_by(recipe):
    trainer = trainer_of(recipe, head_learning_rate=0.5, lr_scheduler_type="constant", warmup_steps=0, max_steps=1)
    before = {name: w.detach().clone() for name, w in trainer.model.named_parameters() if w.requires_grad}
    trainer.train()
    moved = {
        name: (w - before[name]).abs().max().item() for name, w in trainer.model.named_parameters() if w.requires_grad
    }
    head = next(moved[name] for name in moved if kind(name) == "score")
    assert head == pytest.approx(0.5, rel=1e-2)  # Adam's first step is its rate, where there is a gradient
    assert all(step <= 0.0011 for name, step in moved.items() if kind(name) != "score")


def test_rates_are_scheduled_alike(recipe):
    trainer = trainer_of(recipe, head_learning_rate=0.5, lr_scheduler_type="linear", num_train_epochs=4)
    trainer.create_optimizer_and_scheduler(4)
    rates = []
    for _ in range(4):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        rates.append([group["lr"] for group in trainer.optimizer.param_groups if group["params"]])
    for first, *others in rates[:-1]:
        assert {round(other / first) for other in others} <= {1, 500}
    assert rates[-1] == [0.0] * len(rates[-1])


@pytest.mark.parametrize(
    ("keys", "use_peft", "message"),
    [
        ({"head_learning_rate": 0.0}, True, r"trainer\.head_learning_rate: 0\.0; give a number above 0"),
        ({"loraplus_lr_ratio": float("nan")}, True, r"trainer\.loraplus_lr_ratio: nan; give a number above 0"),
        ({"loraplus_lr_ratio": 16.0}, False, r"there is no LoRA without model\.use_peft"),
    ],
)
def test_rates_that_make_no_sense_are_refused(recipe, keys, use_peft, message):
    recipe = dataclasses.replace(
        with_trainer(recipe, **keys), model=dataclasses.replace(recipe.model, use_peft=use_peft)
    )
    with pytest.raises(InputError, match=message):
        training_arguments(recipe, torch.float32, torch.device("cpu"))
