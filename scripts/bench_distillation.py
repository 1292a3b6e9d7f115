"""Whether soft pseudo-labels teach more than hard ones, on real battles: paired on prompts that no model has seen.

    python scripts/bench_distillation.py train.csv --json scripts/results/distillation.json
    python scripts/bench_distillation.py train.csv --limit 120 --max-length 128 --steps 2     # does it run?

Prompt groups are dealt: half are labelled, three tenths lose their outcomes, two tenths are held out. A teacher learns
from the labelled half by recipes/arena_smollm2_135m.yaml and predicts the battles without outcomes. Students begin as
the teacher did and learn, for as many epochs, from the labelled half and from these battles:

hard    the likeliest outcome by the teacher counts as a vote
soft    the teacher's probabilities count as the outcome
both    that vote and the teacher's probabilities, by the distillation objective

Differences are of log loss on the held-out prompts, with 95 % intervals by group; negative: the first is better.
"""

import argparse
import os
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_battles import tell

RECIPE = Path(__file__).parents[1] / "recipes" / "arena_smollm2_135m.yaml"
SHARES = {"labelled": 5, "new": 3, "held_out": 2}
"""Tenths of the battles, by prompt group."""

PAIRS = [("soft", "hard"), ("both", "hard"), ("both", "soft"), ("hard", "teacher"), ("soft", "teacher")]
"""What is compared with what."""


def dealt(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the parts, those called new without outcomes, and return them with theirs, by name."""
    from rewardmodel.battles import OUTCOMES, with_column, write_parquet
    from rewardmodel.config import DataConfig
    from rewardmodel.parts import load_battles

    tenths = sum(SHARES.values())
    battles = load_battles(DataConfig(train=options.train, folds=tenths, limit=options.limit, seed=options.seed))
    of = np.repeat(list(SHARES), list(SHARES.values()))[np.array(battles["fold"][:])]
    parts = {name: battles.select(np.flatnonzero(of == name)) for name in SHARES}
    new = parts["new"]
    for outcome in OUTCOMES:
        new = with_column(new, outcome, np.array([None] * len(new), dtype=object))
    for name, part in {**parts, "new": new}.items():
        write_parquet(part, folder / f"{name}.parquet")
    return parts


def write_pseudo_labels(teacher: Path, battles: Any, folder: Path) -> None:
    """Write the teacher's predictions of the new battles, and these battles with the likeliest outcome as a vote."""
    from rewardmodel import predict
    from rewardmodel.battles import OUTCOMES, with_column, write_parquet
    from rewardmodel.predictions import predicted, write_predictions

    table = predict(teacher, str(folder / "new.parquet"))
    write_predictions(table, folder / "soft.parquet")
    votes = np.eye(3)[predicted(table).argmax(axis=1)]
    for name, values in zip(OUTCOMES, votes.T, strict=True):
        battles = with_column(battles, name, values)
    write_parquet(battles, folder / "hard.parquet")


def recipes(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the recipe of the teacher and of each student by name, the teacher's first."""
    from rewardmodel import load_recipe
    from rewardmodel.config import ObjectiveConfig, Source

    labelled, soft = str(folder / "labelled.parquet"), str(folder / "soft.parquet")
    hard = Source(str(folder / "hard.parquet"), validation=False)
    sources: dict[str, Any] = {
        "teacher": labelled,
        "hard": [labelled, hard],
        "soft": [labelled, Source(str(folder / "new.parquet"), teacher=soft)],
        "both": [labelled, replace(hard, teacher=soft)],
    }
    base = load_recipe(RECIPE)
    keys = {"eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "num_train_epochs": options.epochs}
    keys |= {"max_steps": options.steps or -1, "seed": options.seed}
    return {
        name: replace(
            base,
            data=replace(base.data, train=train, test=None, folds=20, seed=options.seed),
            prompt=replace(base.prompt, max_length=options.max_length),
            objective=ObjectiveConfig("distillation" if name == "both" else "cross_entropy"),
            trainer={**base.trainer, **keys, "output_dir": str(folder / name)},
        )
        for name, train in sources.items()
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train the teacher and its students, and return what each reaches on the held-out battles."""
    from rewardmodel import predict, train
    from rewardmodel.metrics import paired_difference, summary
    from rewardmodel.predictions import predicted, true_outcomes

    parts = dealt(options, folder)
    tables, figures = {}, {"battles": {name: len(part) for name, part in parts.items()}, "models": {}}
    for name, recipe in recipes(options, folder).items():
        start = time.perf_counter()
        run, trained = train(recipe)
        if name == "teacher":
            write_pseudo_labels(run, parts["new"], folder)
        tables[name] = predict(run, str(folder / "held_out.parquet"))
        seconds = round(time.perf_counter() - start)
        found = summary(predicted(tables[name]), true_outcomes(tables[name]), tables[name]["group"].to_numpy())
        figures["models"][name] = {
            "trained_on": len(trained.training),
            "log_loss": {key: round(value, 4) for key, value in found["log_loss"].items()},
            "seconds": seconds,
        }
        print(name, figures["models"][name], flush=True)
    true, groups = (of(tables["teacher"]) for of in (true_outcomes, lambda table: table["group"].to_numpy()))
    figures["log_loss_differences"] = {
        f"{first} - {second}": {
            key: round(value, 4)
            for key, value in paired_difference(
                *(predicted(tables[one]) for one in (first, second)), true, groups
            ).items()
        }
        for first, second in PAIRS
    }
    return figures


def main() -> None:
    """Parse, train, measure, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="labelled battles")
    parser.add_argument("--limit", type=int, default=1000, help="battles in all, whole prompt groups")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--steps", type=int, help="of training at most, to see that it runs")
    parser.add_argument("--seed", type=int, default=0, help="of parts and training")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "settings": {name: getattr(options, name) for name in ("limit", "max_length", "epochs", "steps", "seed")},
    }
    with tempfile.TemporaryDirectory() as folder:
        tell(figures | measure(options, Path(folder)), options.json)


if __name__ == "__main__":
    main()
