"""A recipe's numbers in, an error by key out where one cannot be meant: checked as the recipe is read.

What depends on other settings, on the data or on the backbone is checked where these are known.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rewardmodel.errors import InputError


class Range(NamedTuple):
    """The values that a number can have.

    Attributes:
        words: what to give, for the error.
        holds: whether a value is one of them; False for NaN.
    """

    words: str
    holds: Callable[[float], bool]


COUNT = Range("at least 1", lambda value: value >= 1)
INDEX = Range("a number from 0", lambda value: value >= 0)
NOT_NEGATIVE = Range("a finite number from 0", lambda value: 0 <= value < float("inf"))
POSITIVE = Range("a number above 0", lambda value: 0 < value < float("inf"))
SHARE = Range("a share from 0 to below 1", lambda value: 0 <= value < 1)

RANGES: dict[str, Range] = {
    "data.limit": Range("a positive number of battles, or leave it out", lambda value: value >= 1),
    "data.folds": Range("at least 2: one fold is held out while the others train", lambda value: value >= 2),
    "data.fold": INDEX,
    "data.calibration": SHARE,
    "data.holdout": SHARE,
    "data.seed": INDEX,
    "prompt.max_length": COUNT,
    "model.num_hidden_layers": COUNT,
    "model.lora_r": INDEX,
    "model.lora_alpha": COUNT,
    "model.lora_dropout": SHARE,
    "model.lora_first_layer": INDEX,
    "objective.label_smoothing": SHARE,
    "objective.margin": NOT_NEGATIVE,
    "objective.center_rewards": NOT_NEGATIVE,
    "objective.temperature": POSITIVE,
    "objective.weight_votes": NOT_NEGATIVE,
    "objective.weight_teacher": NOT_NEGATIVE,
    "objective.weight_cosine": NOT_NEGATIVE,
    "inference.batch_tokens": COUNT,
    "trainer.adam_beta1": SHARE,
    "trainer.adam_beta2": SHARE,
    "trainer.adam_epsilon": NOT_NEGATIVE,
    "trainer.battles_per_step": COUNT,
    "trainer.dataloader_num_workers": INDEX,
    "trainer.dataset_num_proc": COUNT,
    "trainer.early_stopping_patience": COUNT,
    "trainer.eval_delay": NOT_NEGATIVE,
    "trainer.eval_steps": POSITIVE,
    "trainer.head_learning_rate": POSITIVE,
    "trainer.learning_rate": NOT_NEGATIVE,
    "trainer.logging_steps": POSITIVE,
    "trainer.loraplus_lr_ratio": POSITIVE,
    "trainer.max_grad_norm": NOT_NEGATIVE,
    "trainer.max_steps": Range("at least 1, or -1 to count epochs", lambda value: value >= 1 or value == -1),
    "trainer.micro_batch_tokens": COUNT,
    "trainer.neftune_noise_alpha": NOT_NEGATIVE,
    "trainer.num_train_epochs": POSITIVE,
    "trainer.save_steps": POSITIVE,
    "trainer.save_total_limit": COUNT,
    "trainer.seed": INDEX,
    "trainer.warmup_steps": NOT_NEGATIVE,
    "trainer.weight_decay": NOT_NEGATIVE,
}
"""Keys of a recipe and what their numbers can be; null and texts are not looked at."""


def check_ranges(sections: Mapping[str, Mapping[str, Any]], where: str | Path) -> None:
    """Raise if a number of a recipe is out of its range, or counts layers that the backbone's folder does not have.

    Args:
        sections: keys and values by section: `{"model": {"lora_r": 16}, "trainer": {"learning_rate": 2e-4}}`.
        where: the recipe, for the error.

    Raises:
        InputError: the key, its value and what to give.
    """
    for key, allowed in RANGES.items():
        section, _, name = key.partition(".")
        value = sections.get(section, {}).get(name)
        if isinstance(value, int | float) and not allowed.holds(value):
            raise InputError(f"{where}: {key}: {value}; give {allowed.words}")
    data, model = sections.get("data", {}), sections.get("model", {})
    if data.get("calibration", 0) + data.get("holdout", 0) >= 1:
        raise InputError(f"{where}: data.calibration and data.holdout: together 1 or more; leave battles to train on")
    layers = _stored_layers(model.get("model_name_or_path"))
    if layers is not None and model.get("num_hidden_layers") is not None and model["num_hidden_layers"] > layers:
        given = model["num_hidden_layers"]
        raise InputError(f"{where}: model.num_hidden_layers: {given}, but the backbone has {layers}; set at most that")


def _stored_layers(name: str | None) -> int | None:
    """Return the number of layers of a backbone by its config.json, or None where that is not a local folder."""
    try:
        config = json.loads((Path(name or "") / "config.json").read_text(encoding="utf-8"))
        found = config.get("text_config", config).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None
