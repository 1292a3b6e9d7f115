"""The `trainer` section of a recipe: keys, types, defaults and help of trl.RewardConfig without importing trl.

`trainer_keys.json` is a table of them, written by `write_trl_keys` with the versions that it was made from. A key that
is not in it is looked up in the installed trl, if that is another version.
"""

import json
from collections.abc import Iterable
from dataclasses import MISSING, fields
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

from rewardmodel.config.types import Schema, type_to_schema

EARLY_STOPPING = "early_stopping_patience"
BATTLES = "battles_per_step"
TOKENS = "micro_batch_tokens"
HEAD_RATE = "head_learning_rate"
LORAPLUS = "loraplus_lr_ratio"

OWN_KEYS: dict[str, tuple[Any, Any, str]] = {
    BATTLES: (int, 8, "Battles per optimiser step, over all processes; the loss of a step is their mean."),
    EARLY_STOPPING: (
        int | None,
        None,
        "Stop after this many evaluations in a row without a lower validation log loss; default: never.",
    ),
    HEAD_RATE: (float | None, None, "Learning rate of the classification head; default: learning_rate."),
    LORAPLUS: (
        float | None,
        None,
        "Learning rate of LoRA's B relative to that of A (LoRA+, whose authors recommend 16); default: equal.",
    ),
    TOKENS: (
        int | None,
        None,
        "Tokens per micro-batch, into which the battles of a step are divided; default: as many as fit into free "
        "memory.",
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
"""Our defaults; every other key has TRL's own."""

TRAINER_REFUSED = {
    "auto_find_batch_size": "leave it out; trainer.micro_batch_tokens adapts to free memory",
    "bf16": "set model.dtype",
    "bf16_full_eval": "set model.dtype",
    "center_rewards_coefficient": "set objective.center_rewards",
    "chat_template_path": "set prompt.template",
    "data_seed": "set trainer.seed",
    "dataloader_drop_last": "leave it out; no battle is dropped",
    "dataloader_multiprocessing_context": "leave it out; workers are started in the platform's default way",
    "dataloader_pin_memory": "leave it out; micro-batches are pinned where they are made",
    "eos_token": "set prompt.template",
    "eval_accumulation_steps": "leave it out; the logits of all battles fit into memory",
    "fp16": "set model.dtype",
    "fp16_full_eval": "set model.dtype",
    "gradient_accumulation_steps": "set trainer.battles_per_step; micro-batches follow from trainer.micro_batch_tokens",
    "greater_is_better": "leave it out; checkpoints are compared by validation log loss",
    "label_smoothing_factor": "set objective.label_smoothing",
    "liger_kernel_config": "leave it out; model.use_liger_kernel uses all kernels but those of losses",
    "max_length": "set prompt.max_length",
    "metric_for_best_model": "leave it out; checkpoints are compared by validation log loss",
    "model_init_kwargs": "set the keys of model",
    "pad_to_multiple_of": "leave it out; rows are padded to the longest of a batch",
    "pad_token": "leave it out; padding is marked by the attention mask",
    "per_device_eval_batch_size": "set inference.batch_tokens",
    "per_device_train_batch_size": "set trainer.battles_per_step",
    "torch_empty_cache_steps": "leave it out; a step that runs out of memory empties the cache by itself",
    "train_sampling_strategy": "leave it out; trainer.seed shuffles battles, and a step batches them by length",
    "trust_remote_code": "leave it out; code from a model folder is never run",
    "use_cpu": "set model.device",
    "use_liger_kernel": "set model.use_liger_kernel",
}
"""Keys of RewardConfig that another key decides or that nothing would read, and what to do instead."""

TRL_KEYS_FILE = Path(__file__).with_name("trainer_keys.json")
"""The table: `versions` of trl and transformers, and `keys`: name -> JSON schema with `default` and `description`."""


def trainer_keys(used: Iterable[str] = ()) -> dict[str, Schema]:
    """Return every key that `trainer` takes, with its type, default and help as a JSON schema.

    Args:
        used: names that a recipe uses. The installed trl is imported only if one of them is in no table and the
            table was made from other versions of trl or transformers.
    """
    table = read_trl_keys()
    known = table["keys"]
    if not {*used} <= {*known, *OWN_KEYS} and table["versions"] != installed_versions():
        known = known | find_trl_keys()
    own = {key: property_of(hint, default, text) for key, (hint, default, text) in OWN_KEYS.items()}
    taken = own | {key: schema for key, schema in known.items() if key not in TRAINER_REFUSED}
    return {key: schema | _our_default(key) for key, schema in taken.items()}


def trainer_default(key: str) -> Any:
    """Return the default of a key of `trainer`, None for one that is unknown."""
    return trainer_keys([key]).get(key, {}).get("default")


def _our_default(key: str) -> Schema:
    return {"default": TRAINER_DEFAULTS[key]} if key in TRAINER_DEFAULTS else {}


def property_of(hint: Any, default: Any, description: str) -> Schema:
    """Return the JSON schema of a key; `MISSING` as its default makes one without."""
    return {
        **type_to_schema(hint),
        **({} if default is MISSING else {"default": default}),
        "description": " ".join(description.split()),
    }


@cache
def read_trl_keys() -> dict[str, Any]:
    """Return the shipped table `trainer_keys.json`."""
    return json.loads(TRL_KEYS_FILE.read_text(encoding="utf-8"))


def find_trl_keys() -> dict[str, Schema]:
    """Return the keys of the installed trl's RewardConfig by name; imports trl."""
    from trl import RewardConfig

    hints, found = get_type_hints(RewardConfig), {}
    for field in fields(RewardConfig):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        found[field.name] = property_of(hints[field.name], default, field.metadata.get("help", ""))
    return found


def installed_versions() -> dict[str, str]:
    """Return the installed versions of the packages that define RewardConfig."""
    return {name: metadata.version(name) for name in ("transformers", "trl")}


def write_trl_keys() -> None:
    """Write the table from the installed trl; call this when constraints.txt has another version of it.

    `python -c 'from rewardmodel.config.trainer import write_trl_keys; write_trl_keys()'`; a test compares the two.
    """
    keys = ",\n".join(f"{json.dumps(key)}: {json.dumps(schema)}" for key, schema in find_trl_keys().items())
    text = f'{{"versions": {json.dumps(installed_versions())},\n"keys": {{\n{keys}\n}}}}\n'
    TRL_KEYS_FILE.write_text(text, encoding="utf-8")
