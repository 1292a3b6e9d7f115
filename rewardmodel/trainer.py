"""A recipe and labelled battles in, a trained run folder out: `train`, and the TRL trainer under it."""

import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import RewardConfig, RewardTrainer

from rewardmodel.battles import AUGMENTATIONS
from rewardmodel.config import ObjectiveConfig, Recipe
from rewardmodel.errors import InputError, nearest
from rewardmodel.metrics import accuracy, log_loss
from rewardmodel.model import build_model, placement, save_model
from rewardmodel.objective import OBJECTIVES, Objective
from rewardmodel.pairs import MODEL_COLUMNS, MODEL_INPUTS, PadCollator, retention, tokenize
from rewardmodel.parts import Parts, fingerprints, load_battles, split
from rewardmodel.runs import (
    MODEL,
    check_run,
    check_same_inputs,
    last_checkpoint,
    open_run,
    write_environment,
)
from rewardmodel.trainer_keys import EARLY_STOPPING
from rewardmodel.weights import fingerprint, resolve

logger = logging.getLogger(__name__)


RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Keys that later releases of transformers 5 know by another name, and warn of under the old one."""


class PreferenceTrainer(RewardTrainer):
    """TRL's RewardTrainer for battles: any head width, soft outcomes, the loss a mean over battles.

    Takes rows of `rewardmodel.pairs.ROWS`. What stays TRL's: set-up of PEFT, checkpointing, padding token,
    optimisation, logging. What is ours: no row is dropped, trainable weights stay float32 under 4-bit, and the
    loss of an optimiser step is the weighted mean over its battles, however they are spread over micro-batches.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: RewardConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        objective: ObjectiveConfig,
    ) -> None:
        self.objective = find_objective(objective)
        self.label_smoothing = objective.label_smoothing
        trainable = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        labels = model.config.id2label
        model.config.num_labels = 1  # all that TRL lets in
        super().__init__(
            model=model,
            args=args,
            data_collator=PadCollator(processing_class.pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=self.validation_metrics,
        )
        model.config.id2label = labels
        model.config.label2id = {name: number for number, name in labels.items()}
        for name, weight in model.named_parameters():
            if name in trainable:  # TRL casts them to bfloat16 on a quantised backbone
                weight.data = trainable[name].to(weight.device)
        if args.gradient_checkpointing:
            model.disable_input_require_grads()  # needless without re-entrance, and it defeats lora_first_layer
        self.label_names = ["labels"]

    def validation_metrics(self, evaluated: EvalPrediction) -> dict[str, float]:
        """Return log loss and accuracy of the validation battles in the order given."""
        logits = torch.from_numpy(np.asarray(evaluated.predictions))
        predicted = self.objective.probabilities(logits).double().numpy()
        true = np.asarray(evaluated.label_ids, dtype=np.float64)
        return {"log_loss": log_loss(predicted, true), "accuracy": accuracy(predicted, true)}

    def compute_loss(
        self,
        model: Any,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Return this micro-batch's share of the mean loss over the step's battles (its own mean in evaluation)."""
        outputs = model(**{name: inputs[name] for name in MODEL_INPUTS})
        losses = self.objective.loss(outputs.logits, inputs["labels"], self.label_smoothing if model.training else 0.0)
        total = (losses * inputs["weight"]).sum()
        if model.training and num_items_in_batch is not None:
            loss = total / num_items_in_batch * self.accelerator.num_processes  # gradients are averaged over processes
        else:
            loss = total / inputs["weight"].sum()
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Return the total weight of the battles of an optimiser step, over all micro-batches and processes."""
        if not batch_samples:
            return None
        weight = torch.stack([batch["weight"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(weight).sum()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        """Return the sampler; one that groups by length draws each epoch by seed and epoch alone."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return EpochSampler(sampler, lambda: self.args.seed + int(self.state.epoch))
        return sampler

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """Return the rows as they are: TRL would drop the long ones."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(MODEL_COLUMNS)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write nothing: TRL's card describes a pairwise reward model."""


class EpochSampler(torch.utils.data.Sampler):
    """Draws a length-grouped order anew each epoch, from a seed of that epoch.

    transformers draws it from the global random state, which a resumed run does not have back yet at that point.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: Callable[[], int]) -> None:
        self.sampler = sampler
        self.seed = seed

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed())
        return iter(self.sampler)


def find_objective(config: ObjectiveConfig) -> Objective:
    """Return the entry of `OBJECTIVES`, or raise InputError naming the nearest."""
    if config.name not in OBJECTIVES:
        raise InputError(f"objective.name: no objective '{config.name}'{nearest(config.name, OBJECTIVES)}")
    return OBJECTIVES[config.name]


def training_arguments(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> RewardConfig:
    """Return TRL's arguments: the recipe's `trainer` section, and what other sections decide for it.

    Raises:
        InputError: keys that transformers refuses together, or several GPUs in one process.
    """
    keys = {key: value for key, value in recipe.trainer.items() if key != EARLY_STOPPING}
    keys.setdefault("dataloader_pin_memory", device.type == "cuda")
    for old, new in RENAMED.items():
        if old in keys and new in RewardConfig.__dataclass_fields__:
            keys.setdefault(new, keys.pop(old))
    if keys["eval_strategy"] == "no" or keys["save_strategy"] == "no":
        keys["load_best_model_at_end"] = False
    try:
        args = RewardConfig(
            **keys,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            use_cpu=device.type == "cpu",
            max_length=None,
            metric_for_best_model="log_loss",
            greater_is_better=False,
            restore_callback_states_from_checkpoint=recipe.trainer[EARLY_STOPPING] is not None,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from error
    if args.n_gpu > 1 or args.world_size > 1:
        raise InputError(
            f"model.device: {args.n_gpu} GPUs, {args.world_size} processes; a run is one process on one device: "
            "show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if recipe.trainer[EARLY_STOPPING] is not None and not args.load_best_model_at_end:
        raise InputError(
            f"trainer.{EARLY_STOPPING}: needs the best checkpoint; set eval_strategy and save_strategy alike, not 'no'"
        )
    if args.per_device_train_batch_size < 1 or args.per_device_eval_batch_size < 1:
        raise InputError("trainer.per_device_train_batch_size, per_device_eval_batch_size: give at least 1")
    return args


def train(recipe: Recipe, battles: Any = None, *, resume: bool = False, overwrite: bool = False) -> tuple[Path, Parts]:
    """Train a model on labelled battles and save it as a run.

    Args:
        recipe: what to do; `recipe.run_folder` is written.
        battles: a Dataset, a DataFrame or a path in the place of `recipe.data.train`.
        resume: continue the run that is there from its last complete checkpoint; one that is done stays as it is.
        overwrite: replace the run that is there.

    Returns:
        The run folder and its battles, by part.

    Raises:
        InputError: what was given cannot be used; nothing was written then.
    """
    recipe = recipe if battles is None else _with_source(recipe, battles)
    objective = find_objective(recipe.objective)
    check_run(recipe, resume, overwrite)
    parts = split(load_battles(recipe.data, battles), recipe.data.fold)
    data = fingerprints(parts)
    if resume and (recipe.run_folder / MODEL).is_dir():
        check_same_inputs(recipe.run_folder, {"data": data})
        open_run(recipe, resume, overwrite)
        logger.info("%s: already trained", recipe.run_folder)
        return recipe.run_folder, parts

    backbone = resolve(recipe.model.model_name_or_path, recipe.model.model_revision)
    device, dtype = placement(recipe.model, backbone)
    args = training_arguments(recipe, dtype, device)
    model, tokenizer = build_model(recipe.model, objective.head_width, args.seed)
    rows, validation_rows = _rows(parts, tokenizer, recipe)
    facts = {
        "backbone": {"name": recipe.model.model_name_or_path, "fingerprint": fingerprint(backbone)},
        "data": data,
        "compute": {"device": _device_name(device), "dtype": str(dtype).removeprefix("torch.")},
    }
    if resume:
        check_same_inputs(recipe.run_folder, facts)
    trainer = PreferenceTrainer(model, args, rows, validation_rows, tokenizer, recipe.objective)
    run = open_run(recipe, resume, overwrite)
    write_environment(run, facts)
    if recipe.trainer[EARLY_STOPPING] is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.trainer[EARLY_STOPPING]))
    checkpoint = last_checkpoint(run) if resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, recipe.model, run / MODEL)
    trainer.accelerator.wait_for_everyone()
    return run, parts


def _rows(parts: Parts, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Return the tokenised training and validation battles, and log what truncation leaves of the former."""
    training = AUGMENTATIONS[recipe.data.swap_augmentation](parts.training, recipe.data.seed)
    num_proc = recipe.trainer.get("dataset_num_proc")
    rows, validation = (tokenize(part, tokenizer, recipe.prompt, num_proc) for part in (training, parts.validation))
    kept = retention(rows)
    logger.info(
        "%d battles to train on (%d rows), %d for validation; max_length %d cuts %.1f %% of battles and keeps %.1f %% "
        "of the responses' tokens",
        len(parts.training), len(rows), len(validation), recipe.prompt.max_length,
        100 * kept["battles_cut"], 100 * kept["responses_kept"],
    )  # fmt: skip
    return rows, validation


def _with_source(recipe: Recipe, battles: Any) -> Recipe:
    """Return the recipe with `data.train` telling what was given in its place."""
    given = str(battles) if isinstance(battles, str | Path) else f"<{type(battles).__name__}>"
    return replace(recipe, data=replace(recipe.data, train=given))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
