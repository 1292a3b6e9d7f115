"""The `trainer` section of a recipe: our defaults over TRL's, and the keys that we do not take."""

from typing import Any

EARLY_STOPPING = "early_stopping_patience"
EARLY_STOPPING_HELP = "Stop after so many evaluations in a row without a better validation log loss; null: never."
"""The one key of `trainer` that RewardConfig does not have (in transformers it is a callback's argument)."""

TRAINER_DEFAULTS: dict[str, Any] = {
    "disable_dropout": False,
    EARLY_STOPPING: None,
    "eval_strategy": "epoch",
    "gradient_checkpointing": False,
    "learning_rate": 2e-4,
    "load_best_model_at_end": True,
    "logging_nan_inf_filter": False,
    "logging_steps": 10,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "output_dir": "runs/unnamed",
    "per_device_eval_batch_size": 16,
    "per_device_train_batch_size": 8,
    "report_to": "none",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "seed": 42,
    "train_sampling_strategy": "group_by_length",
    "warmup_steps": 0.05,
}
"""What `trainer` says where a recipe does not; every other key has TRL's own default."""

TRAINER_REFUSED = {
    "bf16": "set model.dtype",
    "bf16_full_eval": "set model.dtype",
    "center_rewards_coefficient": "set objective.name; no objective takes it",
    "chat_template_path": "set prompt.template",
    "data_seed": "set trainer.seed",
    "eos_token": "set prompt.template",
    "fp16": "set model.dtype",
    "fp16_full_eval": "set model.dtype",
    "greater_is_better": "leave it out; the measure is the validation log loss",
    "label_smoothing_factor": "set objective.label_smoothing",
    "max_length": "set prompt.max_length",
    "metric_for_best_model": "leave it out; the measure is the validation log loss",
    "model_init_kwargs": "set the keys of model",
    "pad_to_multiple_of": "leave it out; rows are padded to the longest of a batch",
    "pad_token": "leave it out; padding is told by the attention mask",
    "trust_remote_code": "leave it out; code out of a model folder is never run",
    "use_cpu": "set model.device",
}
"""Keys of RewardConfig that would be overruled or read by nothing, each with what to do instead."""
