"""How fast rewardmodel predicts battles in both orders beside stock transformers, on the same battles and backbone.

    python scripts/bench_inference.py train.csv --json scripts/results/inference.json
    python scripts/bench_inference.py --synthetic --shape llama-3-8b --repeats 1      # random weights, on a GPU

The adapters are not merged. Tokenising is not timed; what comes after it is, collation and softmax included. The
probabilities of the competitors are compared too: the same weights must say the same up to rounding.

ours    rewardmodel
stock   Trainer.predict, batches of 8 in the order of the file, each padded to its longest sequence
sorted  the same with the battles sorted by length first
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_battles import answer
from bench_compare import Plan, arguments, compare, figures_of, guarded
from bench_models import Counter, draw_head, our_config, profiled, stock_model, synchronise

Predicts = tuple[Any, Callable[[list[Any]], list[np.ndarray]]]
"""A model, and what makes probabilities (n, 3), of A, B and tie in that order, of the rows of each order."""


def ours(plan: Plan) -> Predicts:
    """Return rewardmodel's."""
    from rewardmodel.inference import probabilities
    from rewardmodel.model import build_model
    from rewardmodel.objective import OBJECTIVES

    model, tokenizer = build_model(our_config(plan), 3, plan.seed)
    model.eval()
    rest = (tokenizer.pad_token_id, OBJECTIVES["cross_entropy"], plan.dtype, plan.batch_tokens)
    return model, lambda orders: [probabilities(model, rows, *rest) for rows in orders]


def stock(plan: Plan, by_length: bool = False) -> Predicts:
    """Return transformers'."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    model, tokenizer = stock_model(plan, num_labels=3)
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_eval_batch_size=plan.batch, report_to="none", disable_tqdm=True,
        bf16=plan.dtype == torch.bfloat16, use_cpu=plan.device.type == "cpu",
        dataloader_pin_memory=plan.device.type == "cuda",
    )  # fmt: skip
    trainer = Trainer(model, args, data_collator=DataCollatorWithPadding(tokenizer))

    def predict(rows: Any) -> np.ndarray:
        lengths = np.asarray(rows["length"][:])
        order = np.argsort(-lengths, kind="stable") if by_length else np.arange(len(rows))
        logits = trainer.predict(rows.select_columns("input_ids").select(order)).predictions
        result = np.empty((len(rows), 3), dtype=np.float32)
        result[order] = torch.from_numpy(logits).float().softmax(dim=-1).numpy()
        return result

    return model, lambda orders: [predict(rows) for rows in orders]


def stock_sorted(plan: Plan) -> Predicts:
    """Return transformers' on sorted battles."""
    return stock(plan, by_length=True)


COMPETITORS: dict[str, Callable[[Plan], Predicts]] = {"ours": ours, "stock": stock, "sorted": stock_sorted}


def warmed(path: str, name: str) -> tuple[Plan, Any, list[Any], Callable[[list[Any]], list[np.ndarray]]]:
    """Return a competitor that has predicted a little: plan, model, rows of both orders, and what predicts them."""
    plan = Plan.read(path)
    with plan.weights():
        model, predict = COMPETITORS[name](plan)
    draw_head(model, plan.seed)
    warm, rows = zip(*(plan.rows(order) for order in ("given", "swapped")), strict=True)
    predict(list(warm))
    return plan, model, list(rows), predict


def both_orders(path: str, name: str) -> dict:
    """Predict all battles in both orders and return the figures."""
    plan, model, orders, predict = warmed(path, name)
    counter = Counter(model)
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronise(plan.device)
    start = time.perf_counter()
    given, swapped = predict(orders)
    seconds = time.perf_counter() - start
    lengths = [int(length) for rows in orders for length in rows["length"][:]]
    figures = figures_of(plan, lengths, len(orders[0]), seconds, counter.tokens, training=False)
    own = plan.battles.with_name("ours.npy")
    mean = (given + swapped[:, [1, 0, 2]]) / 2
    if name == "ours":
        np.save(own, mean)
    elif own.is_file():
        figures["largest_difference_from_ours"] = round(float(np.abs(mean - np.load(own)).max()), 5)
    return {**figures, "batches": counter.batches, "attention": model.config._attn_implementation}


def profile(path: str, name: str) -> dict:
    """Print where the time of 32 battles goes."""
    plan, _, orders, predict = warmed(path, name)
    few = [rows.select(range(32)) for rows in orders]
    profiled(plan, lambda: predict(few))
    return {"battles": len(few[0])}


MEASUREMENTS = {"competitor": guarded(both_orders), "profile": profile}


def main() -> None:
    """Parse, measure, write JSON."""
    if not answer(MEASUREMENTS):
        compare(__file__, arguments(__doc__ or "", tuple(COMPETITORS), "inference_battles").parse_args())


if __name__ == "__main__":
    main()
