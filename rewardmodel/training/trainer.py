"""A classifier and token rows -> trained weights: TRL's RewardTrainer, for battles."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerControl
from trl import RewardConfig, RewardTrainer

from rewardmodel.config.schema import ObjectiveConfig
from rewardmodel.config.trainer import TOKENS
from rewardmodel.distributed import is_main, wait_for_all
from rewardmodel.errors import InputError
from rewardmodel.files import whole_or_absent
from rewardmodel.metrics import accuracy, log_loss
from rewardmodel.model.backbone import Backbone
from rewardmodel.model.batching import EpochSampler, to_device
from rewardmodel.model.budget import Memory, find_budget, out_of_memory_error
from rewardmodel.model.forward import Predictor, choose_batching
from rewardmodel.model.heads import head_names
from rewardmodel.model.loading import save_model, unwrap
from rewardmodel.model.precision import autocast, dtype_name
from rewardmodel.objectives import find_objective, fit_tie, initial_tie
from rewardmodel.prompt.tokenization import MODEL_COLUMNS
from rewardmodel.training.arguments import SAME_RATES, LearningRates, split_groups
from rewardmodel.training.nan_guard import NanGuard

logger = logging.getLogger(__name__)


class PreferenceTrainer(RewardTrainer):
    """TRL's RewardTrainer for battles: any head width, soft outcomes, the loss a mean over battles.

    Takes rows of `prompt.tokenization.TOKEN_ROW_FEATURES`. From TRL come the set-up of PEFT, checkpoints, padding
    token, optimisation and logging. Different from TRL: no row is dropped; trainable weights stay float32 on a
    quantised backbone; a step is a number of battles, its micro-batches a number of tokens; and the loss of a step is
    the weighted mean over its battles, whatever micro-batches and processes they are in.

    Args:
        model, args, train_dataset, eval_dataset, processing_class: as for RewardTrainer; a step has
            `args.per_device_train_batch_size` battles, over all processes.
        objective: loss and probabilities.
        dtype: precision of the forward pass.
        tokens: of a micro-batch in training and in evaluation; None: as many as fit into memory.
        rates: learning rates other than `args.learning_rate`.
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
        rates: LearningRates = SAME_RATES,
    ) -> None:
        # what the methods that TRL's constructor calls need
        self.objective = find_objective(objective)
        self.settings = objective
        self.dtype = dtype
        self.tokens, self.eval_tokens = tokens
        self.rates = rates
        self.trainable: list[torch.nn.Parameter] = []
        self.batching = choose_batching(model, processing_class.pad_token_id)
        attention = model.config.get_text_config()._attn_implementation
        self.guard = NanGuard(f"{dtype_name(dtype)}, {attention} attention")

        # TRL accepts one label only, and casts trainable weights to bfloat16 on a quantised backbone: both are undone
        trainable = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        labels = model.config.id2label
        model.config.num_labels = 1
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
            if name in trainable:
                weight.data = trainable[name].to(weight.device)

        if self.objective.head.tie:
            self.set_tie(initial_tie(float(np.nanmean(np.array(train_dataset["labels"][:])[:, 2]))))
            for weight in self._tie_parameters():
                weight.requires_grad &= self.objective.learns_ties
        if args.gradient_checkpointing:
            model.disable_input_require_grads()  # needed for re-entrant checkpointing only; would undo lora_first_layer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return TRL's optimiser, with separate learning rates for the head and LoRA's B if the recipe has them."""
        optimizer = super().create_optimizer(model)
        rates = self.rates.of(model or self.model, head_names(unwrap(self.model)), self.args.learning_rate)
        optimizer.param_groups = split_groups(optimizer.param_groups, rates)
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Return all battles of each step, the same in every process; `training_step` takes the share of this one."""
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
        """Return the loss of a step and accumulate its gradients; out of memory, repeat it in smaller micro-batches.

        Raises:
            InputError: a single battle does not fit into memory, or `trainer.micro_batch_tokens` do not in one of
                several processes.
        """
        costs = [self.batching.tokens(row) for row in inputs]  # tokens of each battle: [412, 1044, ...]

        # tokens of a micro-batch: as set, or measured in the first step
        if self.tokens is None:
            self.tokens = self._find_budget(model)

        # all battles of the step, in micro-batches of that many tokens; fewer after each failure
        while True:
            shares = self.batching.plan(costs, self.tokens, self.accelerator.num_processes)
            mine = shares[self.accelerator.process_index]
            try:
                return self._accumulate(model, inputs, mine, num_items_in_batch)
            except torch.OutOfMemoryError as error:
                # other processes wait in their collectives, so that only a single one can repeat the step
                if self.accelerator.num_processes > 1:
                    raise InputError(
                        f"trainer.{TOKENS}: {self.tokens:,} tokens do not fit into the memory of process "
                        f"{self.accelerator.process_index}; set fewer"
                    ) from error
                if max(map(len, mine)) == 1:
                    raise out_of_memory_error(max(costs)) from error
                self.tokens = max(*costs, min(self.tokens, sum(costs)) // 2)
            model.zero_grad()
            torch.cuda.empty_cache()
            logger.warning("out of memory: the step is repeated in micro-batches of %s tokens", f"{self.tokens:,}")

    def _accumulate(self, model: Any, rows: list[dict], micro_batches: list[list[int]], weight: Any) -> torch.Tensor:
        """Return the loss of this process's battles of a step; the last backward pass reduces gradients over processes.

        Args:
            model: wrapped for the launch.
            rows: the battles of the step.
            micro_batches: row numbers of this process: [[0, 3], [2]].
            weight: total weight of the battles of the step.
        """
        if not (self.trainable and self.model.training):  # at the start, and after an evaluation
            self._enter_training(model)
        shortest = min(rows, key=self.batching.tokens)
        losses = []
        for number, micro in enumerate(micro_batches, 1):
            # every process computes the same number of micro-batches: an empty one computes a battle of weight 0
            chosen = [rows[row] for row in micro] or [{**shortest, "weight": 0.0}]
            last = number == len(micro_batches)
            self.accelerator.gradient_state._set_sync_gradients(last)
            # a GPU computes one micro-batch while the next is collated and sent: nothing here waits for it
            with nullcontext() if last else self.accelerator.no_sync(model), self.maybe_activation_offload_context:
                loss = self.compute_loss(model, self._make_batch(chosen), num_items_in_batch=weight)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _enter_training(self, model: Any) -> None:
        """Set the model to training mode; what walks over its thousands of modules does so here, not in every step."""
        model.train()
        getattr(self.optimizer, "train", lambda: None)()  # of schedule-free optimisers
        self.trainable = [weight for weight in model.parameters() if weight.requires_grad]
        model.zero_grad = self._forget_gradients

    def _forget_gradients(self, *_: Any) -> None:
        for weight in self.trainable:
            weight.grad = None

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        if self.is_fsdp_enabled:  # accelerate looks the model up by its parameters
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self.trainable, self.args.max_grad_norm)

    def _make_batch(self, rows: list[dict]) -> dict[str, Any]:
        """Return the arguments of the model, and labels, teacher (n, 3), weights (n,) and ids of the battles."""
        targets = {
            name: torch.tensor([row[name] for row in rows], dtype=torch.float32)
            for name in ("labels", "teacher", "weight")
        }
        batch = {"model": self.batching.collate(rows), **targets, "ids": [row["id"] for row in rows]}
        return to_device(batch, self.accelerator.device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> torch.Tensor:
        """Return the loss of a micro-batch: its share of the mean over the battles of the step.

        Raises:
            FloatingPointError: a loss of the previous step was NaN or infinite.
        """
        with autocast(self.accelerator.device, self.dtype):
            logits = model(**inputs["model"]).logits
        logits = logits.view(len(inputs["labels"]), -1, logits.shape[-1])
        losses = self.battle_losses(logits, inputs["labels"], inputs["teacher"])
        self.guard.record(self.state.global_step + 1, inputs["ids"], losses)
        total = (losses * inputs["weight"]).sum()
        return total / num_items_in_batch * self.accelerator.num_processes  # gradients are averaged over processes

    def battle_losses(
        self, logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the loss of each battle, (n,).

        Args:
            logits: (n, n_sequences, n_logits) of its sequences.
            labels: (n, 3) outcomes; NaN for battles without.
            teacher: (n, 3) a teacher's probabilities; NaN for battles without.
        """
        return self.objective.battle_losses(logits, labels, self.settings, teacher)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Compute log loss and accuracy of the validation battles, A shown first, and log them."""
        logits = torch.from_numpy(self._validation_logits())
        predicted = self.objective.probabilities_by_order(logits)[0].double().numpy()
        true = np.asarray(self.eval_dataset["labels"][:], dtype=np.float64)
        values = {"log_loss": log_loss(predicted, true), "accuracy": accuracy(predicted, true)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.guard.check(self.model)
        with whole_or_absent(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def save_to(self, folder: Path, backbone: Backbone) -> None:
        """Write the trained model, gathered from all processes that have parts of it, in the main process.

        Raises:
            FloatingPointError: a loss or a weight is NaN or infinite.
        """
        self.guard.check(self.model)
        state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if is_main():
            save_model(self.accelerator.unwrap_model(self.model), self.processing_class, backbone, folder, state)
        wait_for_all()

    def _validation_logits(self) -> np.ndarray:
        predictor = Predictor(self.model.eval(), self.processing_class, self.dtype, self.eval_tokens)
        self.eval_tokens = predictor.find_budget(self.eval_dataset)  # measured once, in the first evaluation
        return replace(predictor, budget=self.eval_tokens).logits(self.eval_dataset)

    def set_tie(self, value: float) -> None:
        """Set the head's tie parameter to a value."""
        for weight in self._tie_parameters():
            torch.nn.init.constant_(weight, value)

    def fit_tie(self) -> None:
        """Set the head's tie parameter to the value with the lowest log loss on the validation battles."""
        logits = self._validation_logits()
        if self.is_fsdp_enabled:
            self.model.reshard()  # a forward pass leaves a gathered copy of the head, and changes to that are lost
        self.set_tie(fit_tie(logits[..., 0], np.asarray(self.eval_dataset["labels"][:]), self.objective.link))

    def _tie_parameters(self) -> list[torch.nn.Parameter]:
        """Return the tie parameter, and PEFT's copy of it."""
        return [weight for name, weight in self.model.named_parameters() if name.endswith(".tie")]

    def _find_budget(self, model: Any) -> int:
        """Return the tokens of a micro-batch that fit into memory in every process."""
        longest = self.batching.longest_row(self.train_dataset)

        def work(rows: int) -> None:
            self._accumulate(model, [longest] * rows, [list(range(rows))], 1.0)
            model.zero_grad()

        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # keeps the random state of dropout
            memory = Memory(device) if device.type == "cuda" else None
            tokens = find_budget(memory, work, self.batching.tokens(longest))
        return int(self.accelerator.gather(torch.tensor([tokens], device=device)).min())

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> float:
        """Return the total weight of the battles of an optimiser step, over micro-batches and processes; 1 for 0."""
        rows = [row for rows in batch_samples for row in rows]
        denominators = self.objective.denominators(torch.tensor([row["labels"] for row in rows])).tolist()
        return sum(row["weight"] * count for row, count in zip(rows, denominators, strict=True)) or 1.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """Return the rows unchanged: TRL would drop long ones."""
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no model card: TRL's describes a pairwise reward model."""
