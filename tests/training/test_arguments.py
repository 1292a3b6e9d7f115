import pytest
import torch
from transformers import TrainingArguments
from trl import RewardConfig

from rewardmodel.config.schema import ModelConfig, Recipe
from rewardmodel.config.trainer import OWN_KEYS
from rewardmodel.errors import InputError
from rewardmodel.training.arguments import RENAMED_KEYS, training_arguments

CPU = torch.device("cpu")


@pytest.fixture
def arguments(tmp_path):
    """Return the training arguments of a recipe whose `trainer` has these keys, on the CPU."""

    def made(dtype=torch.float32, **trainer):
        return training_arguments(Recipe(trainer={"output_dir": str(tmp_path), **trainer}), dtype, CPU)

    return made


def test_keys_of_the_recipe_are_passed_on(arguments, tmp_path):
    args = arguments(learning_rate=3e-5, seed=7, num_train_epochs=2, optim="adamw_torch", max_grad_norm=0.5)
    assert isinstance(args, RewardConfig)
    assert args.output_dir == str(tmp_path)
    assert (args.learning_rate, args.seed, args.num_train_epochs) == (3e-5, 7, 2)
    assert (args.optim, args.max_grad_norm) == ("adamw_torch", 0.5)


def test_what_a_recipe_does_not_say_is_as_documented(arguments):
    args = arguments()
    assert (args.learning_rate, args.lr_scheduler_type, args.num_train_epochs) == (2e-4, "cosine", 1)
    assert (args.eval_strategy, args.save_strategy, args.save_total_limit) == ("epoch", "epoch", 2)
    assert args.load_best_model_at_end
    assert args.report_to == []
    assert not args.disable_dropout


def test_our_own_keys_are_not_transformers(arguments):
    args = arguments(battles_per_step=24, micro_batch_tokens=4096, early_stopping_patience=3)
    assert args.per_device_train_batch_size == 24
    assert args.gradient_accumulation_steps == 1
    assert not set(OWN_KEYS) & set(vars(args))


def test_battles_of_any_length_are_taken_and_judged_by_log_loss(arguments):
    args = arguments()
    assert args.max_length is None
    assert args.metric_for_best_model == "log_loss"
    assert args.greater_is_better is False


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"),
    [(torch.float32, False, False), (torch.bfloat16, False, False), (torch.float16, False, True)],
)
def test_precision_and_device_are_those_of_the_model(dtype, bf16, fp16, arguments):
    args = arguments(dtype)
    assert (args.bf16, args.fp16) == (bf16, fp16)
    assert args.use_cpu
    assert args.device == CPU


def test_early_stopping_counts_on_after_a_resume_where_there_is_any(arguments):
    assert not arguments().restore_callback_states_from_checkpoint
    assert arguments(early_stopping_patience=2).restore_callback_states_from_checkpoint


def test_rows_of_a_step_are_not_pinned_before_they_are_tensors(arguments):
    assert not arguments().dataloader_pin_memory


@pytest.mark.parametrize("keys", [{"eval_strategy": "no"}, {"save_strategy": "no"}])
def test_without_evaluations_or_checkpoints_there_is_no_best_one(keys, arguments):
    args = arguments(**keys)
    assert not args.load_best_model_at_end
    ((key, value),) = keys.items()
    assert getattr(args, key) == value


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"battles_per_step": 0}, r"trainer\.battles_per_step: 0; give at least 1"),
        ({"battles_per_step": -3}, r"trainer\.battles_per_step: -3; give at least 1"),
        ({"micro_batch_tokens": 0}, r"trainer\.micro_batch_tokens: 0; give at least 1"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, r"trainer\.early_stopping_patience: needs the best"),
        ({"early_stopping_patience": 2, "save_strategy": "no"}, r"trainer\.early_stopping_patience: needs the best"),
        (
            {"early_stopping_patience": 2, "load_best_model_at_end": False},
            r"trainer\.early_stopping_patience: needs the best checkpoint; set eval_strategy and save_strategy alike",
        ),
        ({"eval_strategy": "steps", "eval_steps": 5}, "trainer: .*load_best_model_at_end requires the save and eval"),
        ({"learning_rat": 1e-3}, "trainer: .*unexpected keyword argument 'learning_rat'"),
        ({"lr_scheduler_type": "sideways"}, "trainer: .*sideways"),
        ({"warmup_steps": -1}, "trainer: .*warmup_steps"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(keys, message, arguments):
    with pytest.raises(InputError, match="^" + message) as caught:
        arguments(**keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"report_to": "wandb"}, "trainer.report_to: the package of wandb is not installed; install it, or set `none`"),
        ({"report_to": ["none", "wandbb"]}, "trainer.report_to: transformers does not know '(none|wandbb)'"),
        ({"report_to": "wandbb"}, "does not know 'wandbb' .did you mean 'wandb'"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "trainer.lr_scheduler_type: cosine_with_min_lr with lr_scheduler_kwargs {}: One of min_lr or min_lr_rate",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}},
            "trainer.lr_scheduler_type: cosine with",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "trainer.lr_scheduler_type: warmup_stable_decay with"),
        ({"optim": "galore_adamw"}, "trainer.optim: galore_adamw: .*set another, like adamw_torch_fused"),
        ({"optim": "adamw_torch_4bit"}, "trainer.optim: adamw_torch_4bit: "),
        ({"push_to_hub": True}, "trainer.push_to_hub: .*: (not logged in to the hub|the hub cannot be reached)"),
    ],
)
def test_what_the_trainer_would_refuse_after_loading_is_refused_before(keys, message, arguments, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(InputError, match=message) as caught:
        arguments(**keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"lr_scheduler_type": "cosine", "learning_rate": 0.0},
        {"report_to": "none"},
        {"report_to": "all"},
        {"optim": "adafactor"},
        {"optim": "paged_adamw_8bit"},
    ],
)
def test_what_the_trainer_takes_is_taken(keys, arguments):
    assert arguments(**keys)


def test_the_least_step_and_micro_batch_are_taken(arguments):
    assert arguments(battles_per_step=1, micro_batch_tokens=1).per_device_train_batch_size == 1


@pytest.mark.parametrize(
    ("fitted", "strategy", "judged"), [(True, "epoch", True), (True, "no", False), (False, "epoch", False)]
)
def test_what_a_fitted_head_starts_from_is_judged(fitted, strategy, judged, tmp_path):
    model = ModelConfig(head_init="fitted" if fitted else "zero")
    recipe = Recipe(model=model, trainer={"output_dir": str(tmp_path), "eval_strategy": strategy})
    assert training_arguments(recipe, torch.float32, CPU).eval_on_start is judged


def test_several_devices_in_one_process_are_refused(arguments, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(InputError, match=r"^model\.device: 2 GPUs are visible to one process; start one process a GPU"):
        arguments()


def test_a_recipe_is_left_as_it_was(tmp_path):
    recipe = Recipe(trainer={"output_dir": str(tmp_path), "eval_strategy": "no", "gradient_checkpointing": True})
    before = dict(recipe.trainer)
    training_arguments(recipe, torch.float32, CPU)
    assert recipe.trainer == before


def checkpointing(args):
    """Return whether and how activations are checkpointed, by whichever name this release has."""
    fields = RewardConfig.__dataclass_fields__
    return [getattr(args, new if new in fields else old) for old, new in RENAMED_KEYS.items()]


def test_gradient_checkpointing_is_passed_on_by_the_name_that_this_release_has(arguments):
    how = {"use_reentrant": False}
    assert checkpointing(arguments())[0] is False
    assert checkpointing(arguments(gradient_checkpointing=True, gradient_checkpointing_kwargs=how)) == [True, how]


def test_the_later_name_is_taken_too(arguments):
    if "activation_checkpointing" not in RewardConfig.__dataclass_fields__:
        pytest.skip("this release of transformers has the older name alone")
    assert checkpointing(arguments(activation_checkpointing=True))[0] is True
