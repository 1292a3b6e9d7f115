r"""What helps a small backbone on real battles, and by how much: paired, on prompts that were not trained on.

    python scripts/bench_quality.py train.csv more_arena.parquet --others judged.parquet other.parquet \
        --json scripts/results/quality.json
    python scripts/bench_quality.py train.csv more_arena.parquet --read --lora prompt.max_length=1024 --json ...
    python scripts/bench_quality.py train.csv more_arena.parquet --seeds 0 --encoder \
        --only "MiniLM, all weights" "MiniLM, LoRA"

The first files, arena battles, are dealt into five folds by prompt group, once for each seed; the others only train,
except those that share a prompt with a held-out battle. The baselines learn from the arena battles of the other folds.
Every lever of levers.py is one change of recipes/arena_small_cpu.yaml, those of --lora of recipes/arena_small_gpu.yaml,
those of --encoder of recipes/seeds/minilm_l6.yaml. Features of the backbone are computed once and kept in the cache,
predictions and runs that train in --work: after a kill, the same command continues.

Figures are log losses of predictions of left-out folds, with 95 % intervals by prompt group, and paired differences, to
the baselines and to the recipe as it is; negative: better. `blended`: with the baseline, by weights fitted on
other groups; `calibrated`: vector scaling fitted on other groups; `flips`: the share of battles whose likeliest outcome
changes with the order, before both are averaged, where there is one.
"""

import argparse
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_battles import tell
from levers import AVERAGES, ENCODER, LEVERS, LORA, READ
from out_of_fold import Fold, fitted_out_of_fold, read, trained_out_of_fold

RECIPES = Path(__file__).parents[1] / "recipes"

OWN = ("others", "consistency", "bags", "beside")
"""Changes that are no keys of a recipe."""


def recipe_of(changes: dict[str, Any], name: str = "arena_small_cpu") -> Any:
    """Return a recipe with a lever's changes."""
    from rewardmodel import load_recipe

    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()}
    words = [f"--{key}={value}" for key, value in values.items() if key not in OWN]
    return load_recipe(RECIPES / f"{name}.yaml", words)


def dealt(options: argparse.Namespace, seed: int) -> Any:
    """Return all battles, grouped and dealt to folds."""
    from rewardmodel.config.schema import DataConfig, Source
    from rewardmodel.data.splits import load_battles

    sources = [Source(path) for path in options.arena]
    sources += [Source(path, validation=False, limit=options.limit) for path in options.others]
    return load_battles(DataConfig(train=sources, folds=5, seed=seed))


def baselines_of(battles: Any, dealing: Fold) -> dict[str, np.ndarray]:
    """Return the baselines' predictions of the arena battles, from the arena battles of the other folds."""
    from rewardmodel.evaluation.baselines import baseline
    from rewardmodel.predictions import PROBABILITIES

    table = baseline(battles.select(np.flatnonzero(dealing.arena)))
    names = ("prior", "length", "tfidf")
    return {name: table[[f"{name}_{column}" for column in PROBABILITIES]].to_numpy(np.float64) for name in names}


def kept(path: Path, make: Any) -> Any:
    """Return an array, or several by name, out of a file, which is made if it is not there."""
    from rewardmodel.files import atomic_path

    if not path.is_file():
        made = make()
        with atomic_path(path) as partial, partial.open("wb") as file:
            np.savez(file, **(made if isinstance(made, dict) else {"predicted": made}))
    with np.load(path) as file:
        return dict(file) if "predicted" not in file else file["predicted"]


def digest(*parts: Any) -> str:
    """Return a digest that identifies a file of predictions."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()


def judged(
    orders: np.ndarray, true: np.ndarray, groups: np.ndarray, baselines: dict[str, np.ndarray], before: np.ndarray
) -> dict[str, Any]:
    """Return the figures of the mean of predictions by order, (orders, n, 3), against the baselines and the recipe."""
    from rewardmodel.evaluation.bootstrap import paired_difference, summarise
    from rewardmodel.evaluation.calibration import BLEND, cross_fit
    from rewardmodel.metrics import log_loss

    predicted, baseline = orders.mean(axis=0), baselines["tfidf"]
    blended = cross_fit(BLEND, np.concatenate([predicted, baseline], axis=1), true, groups)
    calibrated = cross_fit("vector", predicted, true, groups)
    found = summarise(predicted, true, groups)
    return {
        **{name: rounded(found[name]) for name in ("log_loss", "accuracy")},
        "to_baseline": rounded(paired_difference(predicted, baseline, true, groups)),
        "to_prior": rounded(paired_difference(predicted, baselines["prior"], true, groups)),
        "to_lengths": rounded(paired_difference(predicted, baselines["length"], true, groups)),
        "to_recipe": rounded(paired_difference(predicted, before, true, groups)),
        "calibrated": round(log_loss(calibrated, true), 4),
        "blended": round(log_loss(blended, true), 4),
        "blended_to_baseline": rounded(paired_difference(blended, baseline, true, groups)),
        "blended_to_recipe": rounded(paired_difference(blended, before, true, groups)),
        "flips": round(float((orders[0].argmax(axis=1) != orders[1].argmax(axis=1)).mean()), 4)
        if len(orders) > 1
        else None,
    }


def rounded(interval: Any) -> dict[str, float | None]:
    """Return an interval, or a difference, with four decimals; None where too few groups give no bounds."""
    return {name: None if value is None else round(value, 4) for name, value in asdict(interval).items()}


def sliced(battles: Any, predicted: np.ndarray) -> dict[str, Any]:
    """Return the log loss by kind of battle: where it is lost."""
    from rewardmodel import evaluate
    from rewardmodel.predictions import build_predictions

    table = build_predictions(battles, predicted)
    found = evaluate(table).slices
    return {
        kind: {one.name: {"battles": one.battles, **rounded(one.log_loss)} for one in slices}
        for kind, slices in found.items()
        if slices and kind != "source"
    }


def levers(options: argparse.Namespace) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return recipe and changes of every lever that was asked for, by name."""
    given = dict(word.split("=", 1) for word in options.lora or [])
    asked = {name: (recipe_of(changes), changes) for name, changes in LEVERS.items()}
    if options.read:
        asked |= {name: (recipe_of(changes), changes) for name, changes in READ.items()}
    if options.lora is not None:
        asked |= {name: (recipe_of(given | changes, "arena_small_gpu"), changes) for name, changes in LORA.items()}
    if options.encoder:
        asked |= {name: (recipe_of(changes, "seeds/minilm_l6"), changes) for name, changes in ENCODER.items()}
    left_out = set() if options.others else {name for name, (_, changes) in asked.items() if "others" in changes}
    if unknown := set(options.only or ()) - set(asked):
        raise SystemExit(f"--only: {sorted(unknown)} not among {sorted(asked)}")
    wanted = set(options.only or asked) | {"recipe"}
    return {name: lever for name, lever in asked.items() if name in wanted - left_out}


def measure(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the figures of every lever for one dealing of folds."""
    from rewardmodel.battles import data_fingerprint, outcomes
    from rewardmodel.model.backbone import resolve_backbone

    battles = dealt(options, seed)
    sources = np.asarray(battles["source"][:])
    held_out = np.asarray(battles["fold"][:]) >= 0
    arena = np.isin(sources, np.unique(sources[held_out]))
    work = options.work / f"{seed}-{data_fingerprint(battles)}"
    dealing = Fold(np.asarray(battles["group"][:]), np.asarray(battles["fold"][:]), arena)
    file = work / f"baselines-{digest(dealing.fold.tobytes(), arena.tobytes())}.npz"
    baselines = kept(file, lambda: baselines_of(battles, dealing))
    asked = np.isin(dealing.fold[arena], options.folds)
    baselines = {name: predicted[asked] for name, predicted in baselines.items()}
    true, groups = outcomes(battles)[arena][asked], dealing.group[arena][asked]
    found: dict[str, Any] = {}
    means: dict[str, np.ndarray] = {}
    before = None
    for name, (recipe, changes) in levers(options).items():
        features = resolve_backbone(recipe.model).feature_cache.name
        key = digest(asdict(recipe), changes, dealing.fold.tobytes(), arena.tobytes(), features)
        folder = work / f"{name.replace(' ', '_')}-{key}"
        file = folder.with_name(f"{folder.name}-{''.join(map(str, options.folds))}.npz")
        orders = kept(file, partial(predictions, recipe, changes, battles, dealing, options.folds, folder))[:, asked]
        means[name] = orders.mean(axis=0)
        before = means[name] if before is None else before
        found[name] = judged(orders, true, groups, baselines, before)
        print(f"seed {seed}, {name}: {found[name]}", flush=True)
    for name, members in AVERAGES.items():
        if set(members) <= set(means):
            mean = np.mean([means[member] for member in members], axis=0)
            found[name] = judged(mean[None], true, groups, baselines, before)
            print(f"seed {seed}, {name}: {found[name]}", flush=True)
    return {
        "battles": len(true),
        "others": int((~arena).sum()),
        "groups": len(np.unique(groups)),
        "baselines": {name: judged_baseline(baselines[name], true, groups) for name in baselines},
        "levers": found,
        "where": sliced(battles.select(np.flatnonzero(arena)[asked]), before),
    }


def predictions(
    recipe: Any, changes: dict[str, Any], battles: Any, dealing: Fold, folds: list[int], folder: Path
) -> np.ndarray:
    """Return a lever's predictions of the arena battles by order, (orders, n_arena, 3)."""
    from rewardmodel.battles import with_column

    if "others" not in changes:
        battles = battles.select(np.flatnonzero(dealing.arena))
        dealing = Fold(*(part[dealing.arena] for part in dealing))
    share = np.where(dealing.arena, 1, np.float32(changes.get("others", 1)))
    weight = (np.asarray(battles["weight"][:], np.float32) * share).astype(np.float32)
    if recipe.model.freeze_backbone:
        given = read(recipe, battles)
        if "beside" in changes:
            model = replace(recipe.model, num_hidden_layers=changes["beside"])
            more = read(replace(recipe, model=model), battles).features
            given = given._replace(features=np.concatenate([given.features, more], axis=2))
        return fitted_out_of_fold(recipe, given._replace(weight=weight), dealing, folds, changes)
    weighted = with_column(battles, "weight", weight)
    return trained_out_of_fold(recipe, weighted, dealing, folds, folder)


def judged_baseline(predicted: np.ndarray, true: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Return a baseline's log loss."""
    from rewardmodel.evaluation.bootstrap import summarise

    return rounded(summarise(predicted, true, groups)["log_loss"])


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean over seeds of each lever's log loss, alone and blended, and of its difference to the recipe."""
    names = [name for name in runs[0]["levers"] if all(name in run["levers"] for run in runs)]

    def mean(name: str, *keys: str) -> float:
        values = []
        for run in runs:
            value = run["levers"][name]
            for key in keys:
                value = value[key]
            values.append(value)
        return round(float(np.mean(values)), 4)

    return {
        name: {
            "log_loss": mean(name, "log_loss", "value"),
            "to_baseline": mean(name, "to_baseline", "value"),
            "to_recipe": mean(name, "to_recipe", "value"),
            "blended": mean(name, "blended"),
        }
        for name in names
    }


def main() -> None:
    """Parse, measure, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arena", nargs="+", help="labelled arena battles: they are judged")
    parser.add_argument("--others", nargs="*", default=[], help="labelled battles that only train")
    parser.add_argument("--limit", type=int, help="at most about so many battles of each of the others")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the dealing into folds")
    parser.add_argument("--folds", type=int, nargs="+", default=[*range(5)], help="that are judged; all of them learn")
    parser.add_argument("--read", action="store_true", help="levers too for which the backbone reads everything again")
    parser.add_argument(
        "--lora", nargs="*", metavar="KEY=VALUE", help="LoRA too, with these keys of its recipe changed"
    )
    parser.add_argument("--encoder", action="store_true", help="an encoder of 22 million weights too, trained")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="of all these levers those alone")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where predictions are kept")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    options.folds.sort()
    runs = {seed: measure(options, seed) for seed in options.seeds}
    tell(
        {
            "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            "asked": {
                **{name: [Path(path).name for path in getattr(options, name)] for name in ("arena", "others")},
                **{name: getattr(options, name) for name in ("limit", "folds", "read", "lora", "only")},
            },
            "mean": over_seeds(list(runs.values())),
            "seeds": runs,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
