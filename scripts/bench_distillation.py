"""Whether soft pseudo-labels teach more than hard ones, on real battles: paired on prompts that no model has seen.

    python scripts/bench_distillation.py train.csv more_arena.parquet --json scripts/results/distillation.json
    python scripts/bench_distillation.py train.csv --recipe recipes/arena_smollm2_135m.yaml --limit 1000   # adapters
    python scripts/bench_distillation.py train.csv more_arena.parquet --reward --json …/student_reward.json

Prompt groups are dealt again for each seed: half are labelled, three tenths lose their outcomes, two tenths are held
out. A teacher learns from the labelled half and predicts the battles without outcomes. Students begin as the teacher
did and learn in the same way from the labelled half and from these battles:

hard    the likeliest outcome by the teacher counts as a vote
soft    the teacher's probabilities count as the outcome
both    that vote and the teacher's probabilities, by the distillation objective, if the recipe's objective is joint

With --reward, heads on a frozen backbone: a teacher of three classes that reads both responses in one sequence, in both
orders, and reward models that learn from it on the same battles, as recipes/student_reward.yaml does. Battles are dealt
into five folds by prompt group. What judges a fold has learnt from the others, and what a student learns of a battle is
by a teacher that has seen neither that battle's fold nor the one that is judged.

votes      the votes alone, as without a teacher
both       votes and teacher at equal weight
teacher    the teacher's probabilities alone

Each of them with a head that servers load (the last token, one tie parameter), and with the recipe's own.

Differences are of log loss on the held-out prompts, with 95 % intervals by group; negative: the first is better.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from bench_battles import tell
from bench_quality import rounded
from levers import JOINT
from out_of_fold import Fold, Read, fitted_out_of_fold, read

RECIPE = Path(__file__).parents[1] / "recipes" / "arena_small_cpu.yaml"
SHARES = {"labelled": 5, "new": 3, "held_out": 2}
"""Tenths of the battles, by prompt group."""

PAIRS = [("soft", "hard"), ("both", "hard"), ("both", "soft"), ("hard", "teacher"), ("soft", "teacher")]
"""What is compared with what."""


TEACHER = {**JOINT, "prompt.template": "instruction"}
"""Keys of the recipe that make it a teacher of three classes."""

SHARES_OF_TEACHER = {"votes": 0.0, "both": 0.5, "teacher": 1.0}
"""Share of the teacher in what a reward model learns of a battle."""

REWARD_HEADS: dict[str, dict[str, Any]] = {"served": {"pooling": "last", "pair_ties": False}, "own": {}}
"""Changes of the recipe's `model` section: a head that vLLM, SGLang and TRL load, and the recipe's own."""


def dealt(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Write the parts, those called new without outcomes, and return them with theirs, by name."""
    from rewardmodel.battles import OUTCOMES, with_column, write_parquet
    from rewardmodel.config.schema import DataConfig
    from rewardmodel.data.splits import load_battles

    tenths = sum(SHARES.values())
    battles = load_battles(DataConfig(train=options.train, folds=tenths, limit=options.limit, seed=seed))
    of = np.repeat(list(SHARES), list(SHARES.values()))[np.array(battles["fold"][:])]
    parts = {name: battles.select(np.flatnonzero(of == name)) for name in SHARES}
    new = parts["new"]
    for outcome in OUTCOMES:
        new = with_column(new, outcome, np.array([None] * len(new), dtype=object))
    for name, part in {**parts, "new": new}.items():
        write_parquet(part, folder / f"{name}.parquet")
    return parts


def predictions(run: Path, recipe: Any, battles: Any) -> Any:
    """Return what a run predicts, uncalibrated; a frozen backbone reads each battle once for all models."""
    from rewardmodel.inference.predict import predict_with
    from rewardmodel.model.loading import load_predictor
    from rewardmodel.run_folder import RunFolder

    return predict_with(load_predictor(recipe.model, RunFolder(run).model), recipe, battles, cached=True)


def write_pseudo_labels(table: Any, battles: Any, folder: Path) -> None:
    """Write the teacher's predictions of the new battles, and these battles with the likeliest outcome as a vote."""
    from rewardmodel.battles import OUTCOMES, with_column, write_parquet
    from rewardmodel.predictions import predicted, write_predictions

    write_predictions(table, folder / "soft.parquet")
    votes = np.eye(3)[predicted(table).argmax(axis=1)]
    for name, values in zip(OUTCOMES, votes.T, strict=True):
        battles = with_column(battles, name, values)
    write_parquet(battles, folder / "hard.parquet")


def recipes(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Return the recipe of the teacher and of each student by name, the teacher's first."""
    from rewardmodel import load_recipe
    from rewardmodel.config.schema import Source
    from rewardmodel.objectives import find_objective

    labelled, soft = str(folder / "labelled.parquet"), str(folder / "soft.parquet")
    hard = Source(str(folder / "hard.parquet"), validation=False)
    sources: dict[str, Any] = {
        "teacher": labelled,
        "hard": [labelled, hard],
        "soft": [labelled, Source(str(folder / "new.parquet"), teacher=soft)],
        "both": [labelled, replace(hard, teacher=soft)],
    }
    base = load_recipe(options.recipe, options.keys)
    if find_objective(base.objective).encoding != "joint":
        del sources["both"]
    keys = {"eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "seed": seed}
    return {
        name: replace(
            base,
            data=replace(base.data, train=train, test=None, folds=20, seed=seed),
            objective=replace(base.objective, name="distillation") if name == "both" else base.objective,
            trainer={**base.trainer, **keys, "output_dir": str(folder / name)},
        )
        for name, train in sources.items()
    }


def measure(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Train the teacher and its students, and return what each reaches on the held-out battles."""
    from rewardmodel import read_battles, train
    from rewardmodel.data.splits import find_seen_battles
    from rewardmodel.evaluation.bootstrap import paired_difference, summarise
    from rewardmodel.predictions import predicted, true_outcomes

    parts = dealt(options, folder, seed)
    tables, figures = {}, {"battles": {name: len(part) for name, part in parts.items()}, "models": {}}
    for name, recipe in recipes(options, folder, seed).items():
        start = time.perf_counter()
        run, trained = train(recipe)
        if name == "teacher":
            new = read_battles(str(folder / "new.parquet"), role="test")
            seen = find_seen_battles([run], new)[0]
            write_pseudo_labels(predictions(run, recipe, new).assign(seen=seen), parts["new"], folder)
        tables[name] = predictions(run, recipe, parts["held_out"])
        seconds = round(time.perf_counter() - start)
        found = summarise(predicted(tables[name]), true_outcomes(tables[name]), tables[name]["group"].to_numpy())
        figures["models"][name] = {
            "trained_on": len(trained.training),
            "log_loss": {key: round(value, 4) for key, value in asdict(found["log_loss"]).items()},
            "seconds": seconds,
        }
        print(seed, name, figures["models"][name], flush=True)
    true, groups = (of(tables["teacher"]) for of in (true_outcomes, lambda table: table["group"].to_numpy()))
    figures["log_loss_differences"] = {
        f"{first} - {second}": {
            key: round(value, 4)
            for key, value in asdict(
                paired_difference(*(predicted(tables[one]) for one in (first, second)), true, groups)
            ).items()
        }
        for first, second in PAIRS
        if {first, second} <= tables.keys()
    }
    return figures


def taught(teacher: Any, given: Read, dealing: Fold) -> dict[int, np.ndarray]:
    """Return, for each fold that is judged, the teacher's probabilities (n, 3) of the other battles, NaN for its own.

    Each battle's are by a teacher that saw neither its fold nor the one that is judged.

    Args:
        teacher: its recipe.
        given: what it reads of the battles.
        dealing: of the battles into folds.
    """
    folds = sorted(set(dealing.fold.tolist()))
    result = {judged: np.full((len(dealing.fold), 3), np.nan) for judged in folds}
    for one, other in combinations(folds, 2):
        merged = dealing._replace(fold=np.where(dealing.fold == other, one, dealing.fold))
        found = fitted_out_of_fold(teacher, given, merged, [one], {}).mean(axis=0)
        for judged, number in ((one, other), (other, one)):
            own = dealing.fold == number
            result[judged][own] = found[own]
    return result


def measure_rewards(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return what the teacher and each reward model that learns from it reach on the folds that they have not seen."""
    from rewardmodel import load_recipe
    from rewardmodel.battles import outcomes
    from rewardmodel.config.schema import DataConfig
    from rewardmodel.data.splits import load_battles
    from rewardmodel.evaluation.bootstrap import paired_difference, summarise

    student = load_recipe(options.recipe, options.keys)
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in TEACHER.items()}
    teacher = load_recipe(options.recipe, [*options.keys, *(f"--{name}={value}" for name, value in values.items())])
    battles = load_battles(DataConfig(train=options.train, folds=options.folds, limit=options.limit, seed=seed))
    groups, fold = (np.asarray(battles[name][:]) for name in ("group", "fold"))
    dealing, true = Fold(groups, fold, np.ones(len(fold), bool)), outcomes(battles)

    # what each reads, and what the teachers say
    joint, folds = read(teacher, battles), sorted(set(fold.tolist()))
    found = {"joint teacher": fitted_out_of_fold(teacher, joint, dealing, folds, {}).mean(axis=0)}
    soft = taught(teacher, joint, dealing)
    print(seed, "teachers are fitted", flush=True)

    # students: each fold by what learnt from the others
    for head, changes in REWARD_HEADS.items():
        recipe = replace(student, model=replace(student.model, **changes))
        given = read(recipe, battles)
        for name, share in SHARES_OF_TEACHER.items():
            table = found[f"{head}, {name}"] = np.full((len(fold), 3), np.nan)
            for number in folds:
                mixed = (1 - share) * given.labels + share * np.nan_to_num(soft[number])
                learnt = given._replace(labels=mixed.astype(np.float32))
                own = fold == number
                table[own] = fitted_out_of_fold(recipe, learnt, dealing, [number], {})[0, own]
            print(seed, head, name, rounded(summarise(table, true, groups)["log_loss"]), flush=True)
    pairs = [(f"{head}, {name}", f"{head}, votes") for head in REWARD_HEADS for name in ("both", "teacher")]
    pairs += [(f"{head}, {name}", "joint teacher") for head in REWARD_HEADS for name in SHARES_OF_TEACHER]
    return {
        "battles": len(battles),
        "groups": len(np.unique(groups)),
        "log_loss": {name: rounded(summarise(table, true, groups)["log_loss"]) for name, table in found.items()},
        "accuracy": {name: rounded(summarise(table, true, groups)["accuracy"]) for name, table in found.items()},
        "log_loss_differences": {
            f"{one} - {other}": rounded(paired_difference(found[one], found[other], true, groups))
            for one, other in pairs
        },
    }


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean of each difference over the seeds, and its standard error: held-out parts overlap a little."""
    pairs = runs[0]["log_loss_differences"]
    values = {pair: [run["log_loss_differences"][pair]["value"] for run in runs] for pair in pairs}
    return {
        pair: {
            "mean": round(float(np.mean(found)), 4),
            "standard_error": round(float(np.std(found, ddof=1) / len(found) ** 0.5), 4) if len(found) > 1 else None,
        }
        for pair, found in values.items()
    }


def main() -> None:
    """Parse, train, measure, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", nargs="+", help="labelled battles")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--limit", type=int, help="battles in all, whole prompt groups")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of parts and training")
    parser.add_argument("--reward", action="store_true", help="reward models from a teacher of three classes")
    parser.add_argument("--folds", type=int, default=5, help="of --reward")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options, options.keys = parser.parse_known_args()
    if options.folds < 3:
        parser.error("--folds: at least 3: a teacher of one fold that is not judged on another needs a third")
    runs = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs[seed] = measure_rewards(options, seed) if options.reward else measure(options, Path(folder), seed)
    tell(
        {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "recipe": options.recipe.name,
            "keys": options.keys,
            "mean_differences": over_seeds(list(runs.values())),
            "seeds": runs,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
