"""How fast rewardmodel trains LoRA, compared with stock transformers and TRL on the same battles and backbone.

    python scripts/bench_training.py train.csv --json scripts/results/training.json
    python scripts/bench_training.py --synthetic --shape llama-3-8b --repeats 1      # random weights, on a GPU

Every optimiser step has 8 battles. One epoch over all battles is timed, so that all compute the same sequences, from
the first batch to the last weight; a short run before it warms up.

ours      rewardmodel, both responses in one sequence
trainer   transformers.Trainer on the same: random batches of 8, each padded to its longest sequence
separate  rewardmodel on prompt and A, prompt and B: bradley_terry on decided battles
trl       trl.RewardTrainer on the same
"""

import gc
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from bench_battles import answer
from bench_compare import Plan, arguments, compare, figures_of, guarded
from bench_models import Counter, draw_head, our_model, profiled, stock_model, synchronise
from transformers import TrainerCallback, TrainingArguments

Trained = tuple[Any, Callable[[Any], Any]]
"""A model, and what makes a trainer of it for rows."""


def settings(plan: Plan) -> dict[str, Any]:
    """Return the arguments of every trainer."""
    return {
        "disable_tqdm": True,
        "eval_strategy": "no",
        "learning_rate": 2e-4,
        "logging_strategy": "no",
        "num_train_epochs": 1,
        "output_dir": str(plan.battles.with_name("output")),
        "report_to": "none",
        "save_strategy": "no",
        "seed": plan.seed,
    }


def stock_settings(plan: Plan) -> dict[str, Any]:
    """Return the arguments of the stock trainers."""
    names = TrainingArguments.__dataclass_fields__
    return {
        **settings(plan),
        next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names): (
            plan.checkpointing
        ),
        "bf16": plan.dtype == torch.bfloat16,
        "fp16": plan.dtype == torch.float16,
        "gradient_accumulation_steps": max(1, plan.step // plan.batch),
        "dataloader_pin_memory": plan.device.type == "cuda",
        "per_device_train_batch_size": plan.batch,
        "use_cpu": plan.device.type == "cpu",
    }


def ours(plan: Plan) -> Trained:
    """Return rewardmodel's, both responses in one sequence."""
    return rewardmodels(plan, "cross_entropy", lambda rows: rows)


def separate(plan: Plan) -> Trained:
    """Return rewardmodel's, each response alone with the prompt."""
    return rewardmodels(plan, "bradley_terry", shared)


def rewardmodels(plan: Plan, name: str, rows_of: Callable[[Any], Any]) -> Trained:
    """Return rewardmodel's under an objective."""
    model, tokenizer = our_model(plan, name)
    return model, trainer_of_ours(plan, model, tokenizer, name, rows_of)


def trainer_of_ours(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    name: str = "cross_entropy",
    rows_of: Callable[[Any], Any] = lambda rows: rows,
) -> Callable[[Any], Any]:
    """Return what makes rewardmodel's trainer of a model for rows.

    The tokens of a micro-batch are those that the trainer before it found to fit, when it warmed up.
    """
    from rewardmodel.config.schema import ObjectiveConfig, Recipe
    from rewardmodel.model.loading import compile_blocks
    from rewardmodel.training.arguments import compile_options, training_arguments
    from rewardmodel.training.trainer import PreferenceTrainer

    objective = ObjectiveConfig(name)
    keys = {"battles_per_step": plan.step, "gradient_checkpointing": plan.checkpointing, **plan.keys_of("trainer")}
    recipe, options = Recipe(trainer=settings(plan) | keys), compile_options(keys)
    if options is not None:
        compile_blocks(model, **options)
    last: list[Any] = []
    own_tokens = keys.get("micro_batch_tokens")

    def made(rows: Any) -> Any:
        args = training_arguments(recipe, plan.dtype, plan.device)
        tokens = (last.pop().tokens if last else own_tokens, None)
        last.append(PreferenceTrainer(model, args, rows_of(rows), None, tokenizer, objective, plan.dtype, tokens))
        return last[0]

    return made


def trainer(plan: Plan) -> Trained:
    """Return transformers'."""
    from transformers import DataCollatorWithPadding, Trainer

    model, tokenizer = stock_model(plan, num_labels=3)
    args = TrainingArguments(**stock_settings(plan))

    def made(rows: Any) -> Any:
        classes = [max(range(3), key=labels.__getitem__) for labels in rows["labels"][:]]
        battles = rows.select_columns("input_ids").add_column("labels", classes)
        return Trainer(model, args, train_dataset=battles, data_collator=DataCollatorWithPadding(tokenizer))

    return model, made


def trl(plan: Plan) -> Trained:
    """Return TRL's."""
    from trl import RewardConfig, RewardTrainer

    model, tokenizer = stock_model(plan, num_labels=1)
    args = RewardConfig(**stock_settings(plan), max_length=None)
    return model, lambda rows: RewardTrainer(model, args, train_dataset=decided(rows), processing_class=tokenizer)


def decided(rows: Any) -> Any:
    """Return the decided battles as TRL's pairs: the sequence of a battle without the one response, or the other."""
    from datasets import Dataset

    def without(row: dict, segment: int) -> list[int]:
        return [token for token, of in zip(row["input_ids"], row["segment_ids"], strict=True) if of != segment]

    battles = [(row, row["labels"][0] > row["labels"][1]) for row in rows if row["labels"][2] < 0.5]
    pairs = {
        "chosen_ids": [without(row, 2 if a_wins else 1) for row, a_wins in battles],
        "rejected_ids": [without(row, 1 if a_wins else 2) for row, a_wins in battles],
    }
    return Dataset.from_dict(pairs)


def shared(rows: Any) -> Any:
    """Return the decided battles as rewardmodel's rows of both sequences of TRL's pairs, the prompt once."""
    from datasets import Dataset

    from rewardmodel.prompt.tokenization import TOKEN_ROW_FEATURES, pack_sequences

    def alone(row: dict, segment: int) -> Any:
        kept = [number for number, of in enumerate(row["segment_ids"]) if of != 3 - segment]
        ids, of = (np.array(row[name])[kept] for name in ("input_ids", "segment_ids"))
        return SimpleNamespace(input_ids=ids, segment_ids=of)

    merged = [(row, pack_sequences([alone(row, 1), alone(row, 2)])) for row in rows if row["labels"][2] < 0.5]
    battles = [row | one._asdict() | {"length": len(one.input_ids)} for row, one in merged]
    return Dataset.from_list(battles, features=TOKEN_ROW_FEATURES)


COMPETITORS: dict[str, Callable[[Plan], Trained]] = {"ours": ours, "trainer": trainer, "separate": separate, "trl": trl}


class Clock(TrainerCallback):
    """Takes the time between the first batch and the last step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        synchronise(self.device)
        self.start = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        synchronise(self.device)
        self.seconds = time.perf_counter() - self.start


def warmed(path: str, name: str) -> tuple[Plan, Any, Any, Callable[[Any], Any]]:
    """Return a competitor that has trained a little: plan, model, rows, and what makes a trainer for rows."""
    plan = Plan.read(path)
    with plan.weights():
        model, trainer_of = COMPETITORS[name](plan)
    draw_head(model, plan.seed)
    warm, rows = plan.rows()
    trainer_of(warm).train()
    return plan, model, rows, trainer_of


def train(path: str, name: str) -> dict:
    """Train an epoch and return its figures."""
    plan, model, rows, trainer_of = warmed(path, name)
    counter, clock = Counter(model), Clock(plan.device)
    trainer = trainer_of(rows)
    trainer.add_callback(clock)
    gc.collect()  # the optimiser of the trainer before
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loss = trainer.train().training_loss
    pairs = decided(rows) if name in ("trl", "separate") else None
    columns = [pairs["chosen_ids"][:], pairs["rejected_ids"][:]] if pairs else [rows["input_ids"][:]]
    lengths = [len(row) for column in columns for row in column]
    battles = len(pairs) if pairs else len(rows)
    figures = figures_of(plan, lengths, battles, clock.seconds, counter.tokens, training=True)
    steps = {"optimiser_steps": trainer.state.global_step, "batches": counter.batches, "loss": round(loss, 4)}
    return {**figures, **steps, "attention": model.config._attn_implementation}


def profile(path: str, name: str) -> dict:
    """Print where the time of four steps goes, or of all if they are fewer."""
    plan, _, rows, trainer_of = warmed(path, name)
    trainer = trainer_of(rows.select(range(min(len(rows), 4 * plan.batch))))
    profiled(plan, trainer.train)
    return {"optimiser_steps": trainer.state.global_step}


MEASUREMENTS = {"competitor": guarded(train), "profile": profile}


def main() -> None:
    """Parse, measure, write JSON."""
    if answer(MEASUREMENTS):
        return
    compare(__file__, arguments(__doc__ or "", tuple(COMPETITORS), "training_battles").parse_args())


if __name__ == "__main__":
    main()
