"""A recipe and labelled battles in, a trained run folder out: `train`, and the TRL trainer under it."""

import logging
import platform
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerControl
from trl import RewardConfig, RewardTrainer

from rewardmodel.arguments import training_arguments
from rewardmodel.batches import EpochSampler, to_device
from rewardmodel.battles import AUGMENTATIONS
from rewardmodel.budget import Memory, find_budget, no_room
from rewardmodel.config import ModelConfig, ObjectiveConfig, Recipe
from rewardmodel.errors import InputError
from rewardmodel.forward import batching, forward_budget, longest_row, row_logits
from rewardmodel.metrics import accuracy, log_loss
from rewardmodel.model import build_model, load_tokenizer, save_model
from rewardmodel.objective import find_objective, fit_tie, initial_tie
from rewardmodel.pairs import MODEL_COLUMNS, retention, saved, tokenize
from rewardmodel.parts import Parts, fingerprints, load_battles, split, write_training_keys
from rewardmodel.placement import autocast, placement
from rewardmodel.processes import is_main, wait_for_all
from rewardmodel.runs import (
    MODEL,
    check_run,
    check_same_inputs,
    last_checkpoint,
    open_run,
    write_environment,
)
from rewardmodel.teachers import check_taught, with_soft_outcomes
from rewardmodel.trainer_keys import EARLY_STOPPING, TOKENS
from rewardmodel.weights import fingerprint, resolve

logger = logging.getLogger(__name__)


class PreferenceTrainer(RewardTrainer):
    """TRL's RewardTrainer for battles: any head width, soft outcomes, the loss a mean over battles.

    Takes rows of `rewardmodel.pairs.ROWS`. What stays TRL's: set-up of PEFT, checkpointing, padding token,
    optimisation, logging. What is ours: no row is dropped, trainable weights stay float32 under 4-bit, a step is a
    number of battles and its micro-batches a number of tokens, and the loss of a step is the weighted mean over its
    battles, however they are spread over micro-batches and processes.

    Args:
        model, args, train_dataset, eval_dataset, processing_class: as for RewardTrainer; a step has
            `args.per_device_train_batch_size` battles, over all processes.
        objective: loss and probabilities.
        dtype: precision of the forward pass.
        tokens: of a micro-batch in training and in evaluation; none: as many as fit.
    """

    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        model: Any,
        args: RewardConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        objective: ObjectiveConfig,
        dtype: torch.dtype,
        tokens: tuple[int | None, int | None] = (None, None),
    ) -> None:
        self.objective = find_objective(objective)
        self.settings = objective
        self.dtype = dtype
        self.tokens, self.eval_tokens = tokens
        self.batching = batching(model, processing_class.pad_token_id)
        trainable = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        labels = model.config.id2label
        model.config.num_labels = 1  # all that TRL lets in
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )
        model.config.id2label = labels
        model.config.label2id = {name: number for number, name in labels.items()}
        for name, weight in model.named_parameters():
            if name in trainable:  # TRL casts them to bfloat16 on a quantised backbone
                weight.data = trainable[name].to(weight.device)
        if self.objective.head.tie:
            self.set_tie(initial_tie(float(np.nanmean(np.array(train_dataset["labels"][:])[:, 2]))))
            for weight in self._ties():
                weight.requires_grad &= self.objective.learns_ties
        if args.gradient_checkpointing:
            model.disable_input_require_grads()  # needless without re-entrance, and it defeats lora_first_layer

    def get_train_dataloader(self) -> DataLoader:
        """Return the battles of each step, the same in every process, which then computes its share of them."""
        rows = self.train_dataset.select_columns(list(MODEL_COLUMNS))
        return DataLoader(
            rows,
            batch_size=self.args.per_device_train_batch_size,
            sampler=EpochSampler(len(rows), lambda: self.args.seed + int(self.state.epoch)),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
        )

    def training_step(self, model: Any, inputs: list[dict], num_items_in_batch: float | None = None) -> torch.Tensor:
        """Return the loss of the battles of a step, gradients added; out of memory, it is begun anew in smaller parts.

        Raises:
            InputError: one battle alone is more than the memory takes.
        """
        costs = [self.batching.tokens(row) for row in inputs]
        if self.tokens is None:
            self.tokens = self._find_budget(model)
        while True:
            shares = self.batching.plan(costs, self.tokens, self.accelerator.num_processes)
            mine = shares[self.accelerator.process_index]
            try:
                return self._accumulate(model, inputs, mine, num_items_in_batch)
            except torch.OutOfMemoryError as error:
                if self.accelerator.num_processes > 1:
                    raise InputError(
                        f"trainer.{TOKENS}: {self.tokens:,} tokens do not fit into the memory of process "
                        f"{self.accelerator.process_index}; set fewer"
                    ) from error
                if max(map(len, mine)) == 1:
                    raise no_room(max(costs)) from error
                self.tokens = max(*costs, min(self.tokens, sum(costs)) // 2)
            model.zero_grad()
            torch.cuda.empty_cache()
            logger.warning("out of memory: the step is repeated in micro-batches of %s tokens", f"{self.tokens:,}")

    def _accumulate(self, model: Any, rows: list[dict], micro_batches: list[list[int]], weight: Any) -> torch.Tensor:
        """Return the loss of some battles of a step; gradients meet those of other processes in the last backward."""
        shortest = min(rows, key=self.batching.tokens)
        losses = []
        for number, micro in enumerate(micro_batches, 1):
            # Every process computes as many micro-batches; one without battles repeats one that counts nothing.
            chosen = [rows[row] for row in micro] or [{**shortest, "weight": 0.0}]
            last = number == len(micro_batches)
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, self._tensors(chosen), weight))
        return torch.stack(losses).sum()

    def _tensors(self, rows: list[dict]) -> dict[str, Any]:
        counted = {
            name: torch.tensor([row[name] for row in rows], dtype=torch.float32)
            for name in ("labels", "teacher", "weight")
        }
        device = self.accelerator.device
        return {"model": to_device(self.batching.collate(rows), device), **to_device(counted, device)}

    def compute_loss(
        self,
        model: Any,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> torch.Tensor:
        """Return this micro-batch's share of the mean loss over the step's battles."""
        with autocast(self.accelerator.device, self.dtype):
            logits = model(**inputs["model"]).logits
        logits = logits.view(len(inputs["labels"]), -1, logits.shape[-1])
        losses = self.battle_losses(logits, inputs["labels"], inputs["teacher"])
        total = (losses * inputs["weight"]).sum()
        return total / num_items_in_batch * self.accelerator.num_processes  # gradients are averaged over processes

    def battle_losses(
        self, logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the loss of each battle, (n,), of the logits of its sequences, (n, n_sequences, width).

        Labels and the teacher's probabilities are (n, 3), NaN in the rows of battles that have none.
        """
        if self.objective.encoding == "separate":
            return self.objective.loss(logits, labels, self.settings, teacher)
        losses = []
        for number, order in enumerate([[0, 1, 2], [1, 0, 2]][: logits.shape[1]]):
            taught = None if teacher is None else teacher[:, order]
            losses.append(self.objective.loss(logits[:, number], labels[:, order], self.settings, taught))
        return torch.stack(losses).mean(dim=0)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Return log loss and accuracy of the validation battles in the order given, and log them."""
        logits = torch.from_numpy(self._validation_logits())
        predicted = self.objective.orders(logits)[0].double().numpy()
        true = np.asarray(self.eval_dataset["labels"][:], dtype=np.float64)
        found = {"log_loss": log_loss(predicted, true), "accuracy": accuracy(predicted, true)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_to(self, folder: Path, config: ModelConfig) -> None:
        """Write the trained model, once, out of however many processes hold it."""
        state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if is_main():
            save_model(self.accelerator.unwrap_model(self.model), self.processing_class, config, folder, state)
        wait_for_all()

    def _validation_logits(self) -> np.ndarray:
        rows, model, pad_token_id = self.eval_dataset, self.model.eval(), self.processing_class.pad_token_id
        if self.eval_tokens is None:
            self.eval_tokens = forward_budget(model, rows, pad_token_id, self.dtype)
        return row_logits(model, rows, pad_token_id, self.dtype, self.eval_tokens)

    def set_tie(self, value: float) -> None:
        """Set the head's tie parameter."""
        for weight in self._ties():
            torch.nn.init.constant_(weight, value)

    def fit_tie(self) -> None:
        """Set the head's tie parameter to what fits the validation battles best."""
        logits = self._validation_logits()
        self.set_tie(fit_tie(logits[..., 0], np.asarray(self.eval_dataset["labels"][:]), self.objective.link))

    def _ties(self) -> list[torch.nn.Parameter]:
        """Return the tie parameter; PEFT keeps two of them."""
        return [weight for name, weight in self.model.named_parameters() if name.endswith(".tie")]

    def _find_budget(self, model: Any) -> int:
        longest = longest_row(self.train_dataset, self.batching)

        def work(rows: int) -> None:
            self._accumulate(model, [longest] * rows, [list(range(rows))], 1.0)
            model.zero_grad()

        device = self.accelerator.device
        found = find_budget(Memory(device) if device.type == "cuda" else None, work, self.batching.tokens(longest))
        return int(self.accelerator.gather(torch.tensor([found], device=device)).min())

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> float:
        """Return the total weight of the battles of an optimiser step, over all micro-batches and processes."""
        rows = [row for rows in batch_samples for row in rows]
        counted = self.objective.counted(torch.tensor([row["labels"] for row in rows])).tolist()
        return sum(row["weight"] * count for row, count in zip(rows, counted, strict=True)) or 1.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """Return the rows as they are: TRL would drop the long ones."""
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write nothing: TRL's card describes a pairwise reward model."""


def train(
    recipe: Recipe, battles: Any = None, *, parts: Parts | None = None, resume: bool = False, overwrite: bool = False
) -> tuple[Path, Parts]:
    """Train a model on labelled battles and save it as a run.

    Args:
        recipe: what to do; `recipe.run_folder` is written.
        battles: a Dataset, a DataFrame or a path in the place of `recipe.data.train`.
        parts: its battles, if they were read before.
        resume: continue the run that is there from its last complete checkpoint; one that is done stays as it is.
        overwrite: replace the run that is there.

    Returns:
        The run folder and its battles, by part.

    Raises:
        InputError: what was given cannot be used; nothing was written then.
    """
    recipe = recipe if battles is None else with_source(recipe, battles)
    objective = find_objective(recipe.objective)
    check_run(recipe, resume, overwrite)
    config = resolve(recipe.model.model_name_or_path, recipe.model.model_revision, weights=False)
    device, dtype = placement(recipe.model, config)
    args = training_arguments(recipe, dtype, device)
    with args.main_process_first():  # the others then find in the cache what it read
        parts = parts or split(load_battles(recipe.data, battles), recipe.data.fold)
        check_taught(parts.training, recipe.objective.name, objective.teacher)
        data = fingerprints(parts)
        if resume and (recipe.run_folder / MODEL).is_dir():
            check_same_inputs(recipe.run_folder, {"data": data})
            if is_main():
                open_run(recipe, resume, overwrite)
            logger.info("%s: already trained", recipe.run_folder)
            return recipe.run_folder, parts
        rows, validation_rows = _rows(parts, load_tokenizer(config), recipe)
    backbone = resolve(recipe.model.model_name_or_path, recipe.model.model_revision)
    facts = {"data": data, **_facts(recipe.model, backbone, device, dtype, args.world_size)}
    if resume:
        check_same_inputs(recipe.run_folder, facts)
    model, tokenizer = build_model(recipe.model, objective.head, args.seed)
    tokens = (recipe.trainer[TOKENS], recipe.inference.batch_tokens)
    trainer = PreferenceTrainer(model, args, rows, validation_rows, tokenizer, recipe.objective, dtype, tokens)
    if recipe.trainer[EARLY_STOPPING] is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.trainer[EARLY_STOPPING]))
    checkpoint = last_checkpoint(recipe.run_folder) if resume else None
    if is_main():
        write_environment(open_run(recipe, resume, overwrite), facts)
        write_training_keys(recipe.run_folder, parts.training)
    wait_for_all()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not objective.learns_ties:
        trainer.fit_tie()
    trainer.save_to(recipe.run_folder / MODEL, recipe.model)
    return recipe.run_folder, parts


def _rows(parts: Parts, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Return the tokenised training and validation battles, and log what truncation leaves of the former."""
    num_proc, objective = recipe.trainer.get("dataset_num_proc"), find_objective(recipe.objective)
    training = parts.training if objective.teacher else with_soft_outcomes(parts.training)
    training = AUGMENTATIONS[recipe.data.swap_augmentation](training, recipe.data.seed)
    encoding = objective.encoding
    both = encoding == "joint" and recipe.data.swap_augmentation == "both"
    rows = tokenize(training, tokenizer, recipe.prompt, num_proc, encoding=encoding, both_orders=both)
    validation = tokenize(parts.validation, tokenizer, recipe.prompt, num_proc, encoding=encoding)
    kept = retention(rows)
    logger.info(
        "%d battles to train on, %d for validation; max_length %d cuts %.1f %% of battles and keeps %.1f %% of the "
        "responses' tokens%s",
        len(rows), len(validation), recipe.prompt.max_length,
        100 * kept["battles_cut"], 100 * kept["responses_kept"],
        f"; its sequences share {100 * saved(rows):.1f} % of their tokens" if len(rows[0]["branches"]) > 2 else "",
    )  # fmt: skip
    return rows, validation


def with_source(recipe: Recipe, battles: Any) -> Recipe:
    """Return the recipe with `data.train` telling what was given in its place."""
    given = str(battles) if isinstance(battles, str | Path) else f"<{type(battles).__name__}>"
    return replace(recipe, data=replace(recipe.data, train=given))


def _facts(config: ModelConfig, backbone: Path, device: torch.device, dtype: torch.dtype, processes: int) -> dict:
    """Return what a run remembers of its backbone and of what it computes on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "backbone": {"name": config.model_name_or_path, "fingerprint": fingerprint(backbone)},
        "compute": {"device": name, "dtype": str(dtype).removeprefix("torch."), "processes": processes},
    }
