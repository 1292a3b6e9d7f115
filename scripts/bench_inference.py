"""How fast rewardmodel predicts battles in both orders, compared with transformers on the same battles and backbone.

    python scripts/bench_inference.py train.csv --json scripts/results/inference.json
    python scripts/bench_inference.py --synthetic --shape llama-3-8b --repeats 1      # random weights, on a GPU

The adapters are not merged. Tokenising is not timed; what comes after it is, collation and softmax included. The
probabilities of the competitors are compared too: the same weights must say the same up to rounding.

ours    rewardmodel
stock   Trainer.predict, batches of 8 in the order of the file, each padded to its longest sequence
sorted  the same with the battles sorted by length first
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from bench_battles import answer
from bench_compare import Plan, arguments, compare, figures_of, guarded
from bench_models import Counter, draw_head, our_model, profiled, stock_model, synchronise

Predicts = tuple[Any, Callable[[dict[str, Any]], list[np.ndarray]]]
"""A model, and what makes probabilities (n, 3) of A, B and tie, A shown first and B shown first, of a plan's rows."""


def ours(plan: Plan) -> Predicts:
    """Return rewardmodel's."""
    model, tokenizer = our_model(plan)
    return model, predict_with_ours(plan, model, tokenizer)


def predict_with_ours(plan: Plan, model: Any, tokenizer: Any) -> Callable[[dict[str, Any]], list[np.ndarray]]:
    """Return what predicts rows with rewardmodel's model.

    The tokens of a batch are those that it found to fit when it warmed up.
    """
    from rewardmodel.config.schema import ObjectiveConfig
    from rewardmodel.model.forward import Predictor
    from rewardmodel.objectives import find_objective

    objective = find_objective(ObjectiveConfig())
    predictor = Predictor(model.eval(), tokenizer, plan.dtype)

    def predict(rows: dict[str, Any]) -> list[np.ndarray]:
        nonlocal predictor
        if predictor.budget is None:
            predictor = replace(predictor, budget=predictor.find_budget(plan.rows("both")[1]))
        logits = predictor.logits(rows["both"])
        return [order.numpy() for order in objective.probabilities_by_order(torch.from_numpy(logits))]

    return predict


def stock(plan: Plan, by_length: bool = False) -> Predicts:
    """Return transformers'."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    model, tokenizer = stock_model(plan, num_labels=3)
    args = TrainingArguments(
        output_dir=str(plan.battles.with_name("output")),
        per_device_eval_batch_size=plan.batch,
        report_to="none",
        disable_tqdm=True,
        bf16=plan.dtype == torch.bfloat16,
        fp16=plan.dtype == torch.float16,
        use_cpu=plan.device.type == "cpu",
        dataloader_pin_memory=plan.device.type == "cuda",
    )
    trainer = Trainer(model, args, data_collator=DataCollatorWithPadding(tokenizer))

    def one_order(rows: Any) -> np.ndarray:
        lengths = np.asarray(rows["length"][:])
        order = np.argsort(-lengths, kind="stable") if by_length else np.arange(len(rows))
        logits = trainer.predict(rows.select_columns("input_ids").select(order)).predictions
        result = np.empty((len(rows), 3), dtype=np.float32)
        result[order] = torch.from_numpy(logits).float().softmax(dim=-1).numpy()
        return result

    return model, lambda rows: [one_order(rows["given"]), one_order(rows["swapped"])[:, [1, 0, 2]]]


def stock_sorted(plan: Plan) -> Predicts:
    """Return transformers' on sorted battles."""
    return stock(plan, by_length=True)


COMPETITORS: dict[str, Callable[[Plan], Predicts]] = {"ours": ours, "stock": stock, "sorted": stock_sorted}


def warmed(path: str, name: str) -> tuple[Plan, Any, dict[str, Any], Callable[[dict[str, Any]], list[np.ndarray]]]:
    """Return a competitor that has predicted a little: plan, model, rows by order, and what predicts them."""
    plan = Plan.read(path)
    with plan.weights():
        model, predict = COMPETITORS[name](plan)
    draw_head(model, plan.seed)
    rows = {order: plan.rows(order) for order in ("given", "swapped", "both")}
    predict({order: warm for order, (warm, _) in rows.items()})
    return plan, model, {order: measured for order, (_, measured) in rows.items()}, predict


def both_orders(path: str, name: str) -> dict:
    """Predict all battles in both orders and return the figures."""
    plan, model, rows, predict = warmed(path, name)
    counter = Counter(model)
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronise(plan.device)
    start = time.perf_counter()
    mean = np.mean(predict(rows), axis=0)
    seconds = time.perf_counter() - start
    lengths = [int(length) for order in ("given", "swapped") for length in rows[order]["length"][:]]
    figures = figures_of(plan, lengths, len(mean), seconds, counter.tokens, training=False)
    own = plan.battles.with_name("ours.npy")
    if name == "ours":
        np.save(own, mean)
    elif own.is_file():
        figures["largest_difference_from_ours"] = round(float(np.abs(mean - np.load(own)).max()), 5)
    return {**figures, "batches": counter.batches, "attention": model.config._attn_implementation}


def profile(path: str, name: str) -> dict:
    """Print where the time of 32 battles goes, or of all if they are fewer."""
    plan, _, rows, predict = warmed(path, name)
    count = min(len(rows["both"]), 32)
    few = {order: part.select(range(count)) for order, part in rows.items()}
    profiled(plan, lambda: predict(few))
    return {"battles": count}


MEASUREMENTS = {"competitor": guarded(both_orders), "profile": profile}


def main() -> None:
    """Parse, measure, write JSON."""
    if not answer(MEASUREMENTS):
        compare(__file__, arguments(__doc__ or "", tuple(COMPETITORS), "inference_battles").parse_args())


if __name__ == "__main__":
    main()
