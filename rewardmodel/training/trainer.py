"""A classifier and tokenised rows -> trained weights: TRL's trainer, for battles."""

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
from rewardmodel.metrics import accuracy, log_loss
from rewardmodel.model.backbone import Backbone
from rewardmodel.model.batching import EpochSampler, to_device
from rewardmodel.model.budget import Memory, find_budget, no_room
from rewardmodel.model.forward import Predictor, choose_batching
from rewardmodel.model.heads import head_names
from rewardmodel.model.loading import save_model, unwrap
from rewardmodel.model.precision import autocast
from rewardmodel.objectives import find_objective, fit_tie, initial_tie
from rewardmodel.prompt.tokenization import MODEL_COLUMNS
from rewardmodel.training.arguments import EVEN, LearningRates, split_groups
from rewardmodel.training.nan_guard import NanGuard

logger = logging.getLogger(__name__)


class PreferenceTrainer(RewardTrainer):
    """TRL's RewardTrainer for battles: any head width, soft outcomes, the loss a mean over battles.

    Takes rows of `prompt.tokenization.ROWS`. TRL's: set-up of PEFT, checkpointing, padding token, optimisation,
    logging. Ours: no row is dropped, trainable weights stay float32 under 4-bit, a step is a
    number of battles and its micro-batches a number of tokens, and the loss of a step is the weighted mean over its
    battles, however they are spread over micro-batches and processes.

    Args:
        model, args, train_dataset, eval_dataset, processing_class: as for RewardTrainer; a step has
            `args.per_device_train_batch_size` battles, over all processes.
        objective: loss and probabilities.
        dtype: precision of the forward pass.
        tokens: of a micro-batch in training and in evaluation; None: as many as fit.
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
        rates: LearningRates = EVEN,
    ) -> None:
        self.objective = find_objective(objective)
        self.settings = objective
        self.dtype = dtype
        self.tokens, self.eval_tokens = tokens
        self.rates = rates
        self.batching = choose_batching(model, processing_class.pad_token_id)
        attention = model.config.get_text_config()._attn_implementation
        self.guard = NanGuard(f"{str(dtype).removeprefix('torch.')}, {attention} attention")
        trainable = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        labels = model.config.id2label
        model.config.num_labels = 1  # TRL accepts nothing else
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
            model.disable_input_require_grads()  # not needed without re-entrance, and it would undo lora_first_layer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return TRL's optimiser, with separate learning rates for the head and LoRA's B if the recipe has them."""
        optimizer = super().create_optimizer(model)
        rates = self.rates.of(model or self.model, head_names(unwrap(self.model)), self.args.learning_rate)
        optimizer.param_groups = split_groups(optimizer.param_groups, rates)
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Return the battles of each step, the same in every process; each process then computes its share of them."""
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
        """Return the loss of the battles of a step, gradients accumulated; repeat it in smaller parts if out of memory.

        Raises:
            InputError: a single battle does not fit into memory.
        """
        costs = [self.batching.tokens(row) for row in inputs]  # tokens of each battle: [412, 1044, ...]
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
        """Return the loss of some battles of a step; gradients are reduced over processes in the last backward pass."""
        shortest = min(rows, key=self.batching.tokens)
        losses = []
        for number, micro in enumerate(micro_batches, 1):
            # Every process computes the same number of micro-batches; one without battles repeats one of weight 0.
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
        device, ids = self.accelerator.device, [row["id"] for row in rows]
        return {"model": to_device(self.batching.collate(rows), device), **to_device(counted, device), "ids": ids}

    def compute_loss(
        self,
        model: Any,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> torch.Tensor:
        """Return this micro-batch's share of the mean loss over the step's battles.

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
        """Return the loss of each battle, (n,), of the logits of its sequences, (n, n_sequences, width).

        Labels and the teacher's probabilities are (n, 3), with NaN in the rows of battles without them.
        """
        return self.objective.battle_losses(logits, labels, self.settings, teacher)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Return log loss and accuracy of the validation battles in the order given, and log them."""
        logits = torch.from_numpy(self._validation_logits())
        predicted = self.objective.probabilities_by_order(logits)[0].double().numpy()
        true = np.asarray(self.eval_dataset["labels"][:], dtype=np.float64)
        found = {"log_loss": log_loss(predicted, true), "accuracy": accuracy(predicted, true)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.guard.check(self.model)
        super()._save_checkpoint(model, trial)

    def save_to(self, folder: Path, backbone: Backbone) -> None:
        """Write the trained model once, gathered from the processes that hold it.

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
        self.eval_tokens = predictor.find_budget(self.eval_dataset)  # measured once, on the first evaluation
        return replace(predictor, budget=self.eval_tokens).logits(self.eval_dataset)

    def set_tie(self, value: float) -> None:
        """Set the head's tie parameter."""
        for weight in self._ties():
            torch.nn.init.constant_(weight, value)

    def fit_tie(self) -> None:
        """Set the head's tie parameter to the one with the least log loss on the validation battles."""
        logits = self._validation_logits()
        if self.is_fsdp_enabled:
            self.model.reshard()  # a forward pass leaves the head gathered, and changes to the gathered copy are lost
        self.set_tie(fit_tie(logits[..., 0], np.asarray(self.eval_dataset["labels"][:]), self.objective.link))

    def _ties(self) -> list[torch.nn.Parameter]:
        """Return the tie parameter; PEFT keeps two of them."""
        return [weight for name, weight in self.model.named_parameters() if name.endswith(".tie")]

    def _find_budget(self, model: Any) -> int:
        longest = self.batching.longest_row(self.train_dataset)

        def work(rows: int) -> None:
            self._accumulate(model, [longest] * rows, [list(range(rows))], 1.0)
            model.zero_grad()

        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # keeps dropout's random state
            memory = Memory(device) if device.type == "cuda" else None
            found = find_budget(memory, work, self.batching.tokens(longest))
        return int(self.accelerator.gather(torch.tensor([found], device=device)).min())

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> float:
        """Return the total weight of the battles of an optimiser step, over all micro-batches and processes."""
        rows = [row for rows in batch_samples for row in rows]
        counted = self.objective.denominators(torch.tensor([row["labels"] for row in rows])).tolist()
        return sum(row["weight"] * count for row, count in zip(rows, counted, strict=True)) or 1.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """Return the rows as they are: TRL would drop the long ones."""
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no card: TRL's describes a pairwise reward model."""
