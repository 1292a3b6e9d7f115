"""A recipe's `trainer` section -> TRL's arguments and the learning rates of parameter groups."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from trl import RewardConfig

from rewardmodel.config.schema import Recipe
from rewardmodel.config.trainer import BATTLES, EARLY_STOPPING, HEAD_RATE, LORAPLUS, OWN_KEYS, TOKENS
from rewardmodel.errors import InputError, nearest
from rewardmodel.hub import check_repository
from rewardmodel.progress import in_terminal

RENAMED_KEYS = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Keys that later releases of transformers 5 have renamed, where the old name gives a warning."""


COMPILE_KEYS = {"torch_compile": None, "torch_compile_backend": "backend", "torch_compile_mode": "mode"}
"""Keys of which transformers would compile the whole model, and the arguments of `torch.compile` that they set."""


def compile_options(trainer: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of `torch.compile` by a recipe's `trainer` section; None: nothing is compiled."""
    if not trainer.get("torch_compile"):
        return None
    return {argument: trainer[key] for key, argument in COMPILE_KEYS.items() if argument and trainer.get(key)}


def training_arguments(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> RewardConfig:
    """Return TRL's arguments: the recipe's `trainer` section, and what other sections of the recipe imply.

    Args:
        recipe: its sections trainer and model are read.
        dtype: precision of the forward pass.
        device: to train on.

    Raises:
        InputError: keys that transformers refuses together, or several GPUs in one process.
    """
    # the keys that RewardConfig is to have, and defaults that depend on others
    ours = {*OWN_KEYS, *COMPILE_KEYS}
    keys = {key: value for key, value in recipe.trainer.items() if key not in ours}
    keys.setdefault("ddp_find_unused_parameters", False)
    if keys.get("disable_tqdm") is None:
        keys["disable_tqdm"] = not in_terminal()
    if recipe.model.head_init != "zero":  # logs the loss that training starts from
        keys.setdefault("eval_on_start", keys["eval_strategy"] != "no")
    for old, new in RENAMED_KEYS.items():
        if old in keys and new in RewardConfig.__dataclass_fields__:
            keys.setdefault(new, keys.pop(old))
    if keys["eval_strategy"] == "no" or keys["save_strategy"] == "no":
        keys["load_best_model_at_end"] = False

    # TRL's arguments, with what other sections imply
    try:
        args = RewardConfig(
            **keys,
            bf16=False,  # the trainer computes under autocast itself; FSDP would cast the float32 head
            fp16=dtype == torch.float16,
            use_cpu=device.type == "cpu",
            max_length=None,
            per_device_train_batch_size=recipe.trainer[BATTLES],
            metric_for_best_model="log_loss",
            greater_is_better=False,
            restore_callback_states_from_checkpoint=recipe.trainer[EARLY_STOPPING] is not None,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"trainer: transformers refuses its keys: {' '.join(str(error).split())}") from error
    if args.n_gpu > 1:
        raise InputError(
            f"model.device: {args.n_gpu} GPUs are visible to one process; start one process a GPU with "
            "scripts/launch.sh, or show it one with CUDA_VISIBLE_DEVICES=0"
        )
    _check_own_keys(recipe, args)
    _check_trackers(args)
    _check_scheduler(args)
    _check_optimizer(args)
    if args.push_to_hub:
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        check_repository(name, "trainer.push_to_hub", args.hub_token)
    return args


def _check_own_keys(recipe: Recipe, args: RewardConfig) -> None:
    if recipe.trainer[EARLY_STOPPING] is not None and not args.load_best_model_at_end:
        raise InputError(
            f"trainer.{EARLY_STOPPING}: needs the best checkpoint; set eval_strategy and save_strategy alike, not 'no'"
        )
    for key in (BATTLES, TOKENS):
        if recipe.trainer[key] is not None and recipe.trainer[key] < 1:
            raise InputError(f"trainer.{key}: {recipe.trainer[key]}; give at least 1")
    for key in (HEAD_RATE, LORAPLUS):
        if recipe.trainer[key] is not None and not 0 < recipe.trainer[key] < math.inf:
            raise InputError(f"trainer.{key}: {recipe.trainer[key]}; give a number above 0, or leave it out")
    if recipe.trainer[LORAPLUS] is not None and not recipe.model.use_peft:
        raise InputError(f"trainer.{LORAPLUS}: there is no LoRA without model.use_peft; leave it out")


def _check_trackers(args: RewardConfig) -> None:
    """Raise if the run is to be reported to a service that transformers does not know, or whose package is missing."""
    installed = {*get_available_reporting_integrations(), "flyte"}  # flyte's is inside its own tasks
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise InputError(
                f"trainer.report_to: transformers does not know '{name}'{nearest(name, INTEGRATION_TO_CALLBACK)}; "
                f"known: {known}, all, none"
            )
        if name not in installed:
            raise InputError(
                f"trainer.report_to: the package of {name} is not installed; install it, or set `none` "
                f"(installed: {', '.join(sorted(installed - {'flyte'})) or 'none of them'})"
            )


def _check_scheduler(args: RewardConfig) -> None:
    """Raise if transformers cannot make the learning-rate scheduler, tried on one weight."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    keys = args.lr_scheduler_kwargs
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(100), 100, keys)
    except Exception as error:  # any of its functions' own, all of them about these keys
        raise InputError(
            f"trainer.lr_scheduler_type: {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)} with "
            f"lr_scheduler_kwargs {keys or {}}: {' '.join(str(error).split())}; set them, or another type"
        ) from error


def _check_optimizer(args: RewardConfig) -> None:
    """Raise if the optimiser's package is missing or its arguments are wrong, as far as that needs no model."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except Exception as error:
        needs_model = any(name in str(args.optim).lower() for name in ("galore", "apollo", "lomo"))
        if isinstance(error, ImportError) or not needs_model:
            name = getattr(args.optim, "value", args.optim)
            raise InputError(
                f"trainer.optim: {name}: {' '.join(str(error).split())}; set another, like adamw_torch_fused"
            ) from error


class LearningRates(NamedTuple):
    """Learning rates other than `trainer.learning_rate`.

    Attributes:
        head: of the classification head; None: `trainer.learning_rate`.
        loraplus_lr_ratio: learning rate of LoRA's B divided by that of its A (LoRA+, Hayou, Ghosh & Yu 2024); None: 1.
    """

    head: float | None = None
    loraplus_lr_ratio: float | None = None

    def of(self, model: torch.nn.Module, heads: list[str], learning_rate: float) -> dict[torch.nn.Parameter, float]:
        """Return the learning rate of each weight that has another one than `learning_rate`.

        Args:
            model: to train.
            heads: names of the head's modules.
            learning_rate: of all other weights.
        """
        rates = {}
        for name, weight in model.named_parameters():
            if self.head is not None and any(f".{head}." in f".{name}" for head in heads):
                rates[weight] = self.head
            elif self.loraplus_lr_ratio is not None and ".lora_B." in name:
                rates[weight] = self.loraplus_lr_ratio * learning_rate
        return rates


SAME_RATES = LearningRates()
"""All weights learn at `trainer.learning_rate`."""


def split_groups(groups: list[dict[str, Any]], rates: Mapping[torch.nn.Parameter, float]) -> list[dict[str, Any]]:
    """Return an optimiser's parameter groups, split so that each has one learning rate.

    Args:
        groups: of the optimiser, with their learning rate in `lr`.
        rates: learning rate of each weight that has another one.
    """
    result = []
    for group in groups:
        by_rate: dict[float, list[torch.nn.Parameter]] = {}
        for weight in group["params"]:
            by_rate.setdefault(rates.get(weight, group["lr"]), []).append(weight)
        result += [{**group, "params": weights, "lr": rate} for rate, weights in by_rate.items()]
    return result
