import dataclasses

import pytest
import torch
from builders import make_trainer, with_trainer

from rewardmodel.cli import main
from rewardmodel.config.loader import dump_recipe
from rewardmodel.data.formats import read_battles
from rewardmodel.run_folder import RunFolder
from rewardmodel.training.nan_guard import NanGuard
from rewardmodel.training.train import train
from rewardmodel.training.trainer import PreferenceTrainer

NAN = float("nan")


def test_a_bad_loss_is_reported_a_step_later_with_its_battles():
    guard = NanGuard("bfloat16, packed_sdpa attention")
    guard.record(7, ["a", "b"], torch.tensor([1.0, NAN]))
    guard.record(7, ["c", "d"], torch.tensor([1.0, 2.0]))
    with pytest.raises(FloatingPointError, match=r"step 7: the loss of 1 of 2 .*\(bfloat16, packed_sdpa.*ids: b;"):
        guard.record(8, ["e"], torch.tensor([1.0]))


def test_what_is_good_is_forgotten():
    guard = NanGuard("")
    for step in range(1, 4):
        guard.record(step, ["a"], torch.tensor([1.0]))
        assert len(guard.pending) == 1
    guard.check_losses()
    assert not guard.pending


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_before_a_checkpoint_everything_is_looked_at(value):
    model = torch.nn.Linear(2, 2)
    guard = NanGuard("float32, eager attention")
    guard.check(model)
    guard.record(3, ["a"], torch.tensor([value]))
    with pytest.raises(FloatingPointError, match="step 3"):
        guard.check(model)
    torch.nn.init.constant_(model.weight, value)
    with pytest.raises(FloatingPointError, match="trainable weights are NaN or infinite"):
        NanGuard("").check(model)
    model.weight.requires_grad = False
    NanGuard("").check(model)


def spoilt(monkeypatch, step: int) -> None:
    """Let the loss of one battle of a step be NaN."""
    honest = PreferenceTrainer.battle_losses

    def losses(self, logits, labels, teacher):
        found = honest(self, logits, labels, teacher)
        return torch.cat([found[:1] * NAN, found[1:]]) if self.state.global_step + 1 == step else found

    monkeypatch.setattr(PreferenceTrainer, "battle_losses", losses)


def test_a_loss_that_is_nan_stops_the_run_and_spoils_no_checkpoint(recipe, tmp_path, monkeypatch, capsys):
    recipe = with_trainer(recipe, num_train_epochs=2, save_strategy="steps", eval_strategy="steps", save_steps=3)
    recipe = with_trainer(recipe, eval_steps=3, battles_per_step=12)
    whole, _ = train(with_trainer(recipe, output_dir=str(tmp_path / "whole")))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    with monkeypatch.context() as patched:
        spoilt(patched, step=6)
        assert main(["train", str(tmp_path / "recipe.yaml")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step 6: the loss of ")
    assert "(float32, packed_sdpa attention)" in error
    assert {path.name for path in recipe.run_folder.glob("checkpoint-*")} == {"checkpoint-3"}
    assert not RunFolder(recipe.run_folder).model.exists()
    assert main(["train", str(tmp_path / "recipe.yaml"), "--resume"]) == 0
    files = [RunFolder(folder).model / "adapter_model.safetensors" for folder in (whole, recipe.run_folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_battles_named_are_those_of_the_step(recipe, monkeypatch):
    battles = read_battles(recipe.data.train).select(range(8))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, lora_dropout=0.0))
    trainer = make_trainer(with_trainer(recipe, eval_strategy="no", save_strategy="no"), battles, battles)
    row = dict(trainer.train_dataset[5])
    spoilt(monkeypatch, step=1)
    trainer.training_step(trainer.model, [row], 1.0)
    with pytest.raises(FloatingPointError, match=f"ids: {row['id']};"):
        trainer.guard.check_losses()
