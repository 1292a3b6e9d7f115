"""The `trainer` section of a recipe: our defaults over TRL's, and the keys that we do not take."""

from typing import Any

EARLY_STOPPING = "early_stopping_patience"
BATTLES = "battles_per_step"
TOKENS = "micro_batch_tokens"
HEAD_RATE = "head_learning_rate"
LORAPLUS = "loraplus_lr_ratio"

OWN_KEYS: dict[str, tuple[Any, Any, str]] = {
    BATTLES: (int, 8, "Battles of an optimiser step, over all processes; its loss is the mean over them."),
    EARLY_STOPPING: (
        int | None,
        None,
        "Stop after so many evaluations in a row without a better validation log loss; null: never.",
    ),
    HEAD_RATE: (float | None, None, "Learning rate of the classification head; null: learning_rate."),
    LORAPLUS: (
        float | None,
        None,
        "How many times as fast as LoRA's A its B learns (LoRA+; its authors advise 16); null: as fast.",
    ),
    TOKENS: (
        int | None,
        None,
        "Tokens of a micro-batch, into which a step's battles are dealt; null: as many as fit into free memory.",
    ),
}
"""Keys of `trainer` that RewardConfig does not have: type, default and help."""

TRAINER_DEFAULTS: dict[str, Any] = {
    "disable_dropout": False,
    **{key: default for key, (_, default, _) in OWN_KEYS.items()},
    "eval_strategy": "epoch",
    "gradient_checkpointing": False,
    "learning_rate": 2e-4,
    "load_best_model_at_end": True,
    "logging_nan_inf_filter": False,
    "logging_steps": 10,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "output_dir": "runs/unnamed",
    "report_to": "none",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "seed": 42,
    "warmup_steps": 0.05,
}
"""What `trainer` says where a recipe does not; every other key has TRL's own default."""

TRAINER_REFUSED = {
    "auto_find_batch_size": "leave it out; trainer.micro_batch_tokens fits free memory by itself",
    "bf16": "set model.dtype",
    "bf16_full_eval": "set model.dtype",
    "center_rewards_coefficient": "set objective.name; no objective takes it",
    "chat_template_path": "set prompt.template",
    "data_seed": "set trainer.seed",
    "dataloader_drop_last": "leave it out; no battle is dropped",
    "dataloader_multiprocessing_context": "leave it out; rows are read by the platform's own way of starting workers",
    "dataloader_pin_memory": "leave it out; micro-batches are pinned where they are made",
    "eos_token": "set prompt.template",
    "eval_accumulation_steps": "leave it out; logits of all battles are small",
    "fp16": "set model.dtype",
    "fp16_full_eval": "set model.dtype",
    "gradient_accumulation_steps": "set trainer.battles_per_step; micro-batches follow from trainer.micro_batch_tokens",
    "greater_is_better": "leave it out; the measure is the validation log loss",
    "label_smoothing_factor": "set objective.label_smoothing",
    "max_length": "set prompt.max_length",
    "metric_for_best_model": "leave it out; the measure is the validation log loss",
    "model_init_kwargs": "set the keys of model",
    "pad_to_multiple_of": "leave it out; rows are padded to the longest of a batch",
    "pad_token": "leave it out; padding is told by the attention mask",
    "per_device_eval_batch_size": "set inference.batch_tokens",
    "per_device_train_batch_size": "set trainer.battles_per_step",
    "train_sampling_strategy": "leave it out; battles are shuffled by trainer.seed and dealt by length in a step",
    "trust_remote_code": "leave it out; code out of a model folder is never run",
    "use_cpu": "set model.device",
}
"""Keys of RewardConfig that would be overruled or read by nothing, each with what to do instead."""
