r"""What helps a small frozen backbone on real battles, and by how much: paired, on prompts that were not trained on.

    python scripts/bench_quality.py train.csv more_arena.parquet --others judged.parquet other.parquet \
        --json scripts/results/quality.json

The first files, arena battles, are dealt into five folds by prompt group, once for each seed; the others only train,
and what of them shares a prompt with a held-out battle is left out. The floors learn from the arena battles of the
other folds. Every lever is one change of recipes/arena_small_cpu.yaml. What a backbone reads of a battle is computed
once and kept in the cache, predictions are kept in --work: killed, the same command goes on.

Figures are log losses of predictions of left-out folds, with 95 % intervals by prompt group, and paired differences, to
the TF-IDF floor and to the recipe as it is; negative: better. `blended`: with the floor, by weights fitted on other
groups; `calibrated`: vector scaling fitted on other groups.
"""

import argparse
import hashlib
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_battles import tell

RECIPE = Path(__file__).parents[1] / "recipes" / "arena_small_cpu.yaml"

LEVERS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "one tie parameter": {"model.pair_ties": False},
    "last token alone": {"model.pooling": "last"},
    "means alone": {"model.pooling": "responses"},
    "Rao-Kupper": {"objective.name": "rao_kupper"},
    "Bradley-Terry, ties fitted after": {"objective.name": "bradley_terry", "model.pair_ties": False},
    "label smoothing 0.05": {"objective.label_smoothing": 0.05},
    "other sources": {"others": 1.0},
    "other sources, weight 0.3": {"others": 0.3},
    "other sources, weight 0.1": {"others": 0.1},
}
"""Keys of the recipe that are changed; `others` is the weight of the battles that only train, else left out."""

MORE: dict[str, dict[str, Any]] = {
    "12 layers": {"model.num_hidden_layers": 12},
    "16 layers": {"model.num_hidden_layers": 16},
    "24 layers": {"model.num_hidden_layers": 24},
    "256 tokens": {"prompt.max_length": 256},
}
"""Levers for which the backbone reads the battles again; asked for by --more."""


class Read(NamedTuple):
    """Battles as a backbone reads them: features (n, 2, width), labels (n, 3), weights (n,)."""

    features: np.ndarray
    labels: np.ndarray
    weight: np.ndarray


class Fold(NamedTuple):
    """Who learns and who is judged: groups, folds and whether a battle is of the arena, each (n,)."""

    group: np.ndarray
    fold: np.ndarray
    arena: np.ndarray


def recipe_of(changes: dict[str, Any]) -> Any:
    """Return the recipe with a lever's changes."""
    from rewardmodel import load_recipe

    words = [f"--{key}={str(value).lower()}" for key, value in changes.items() if "." in key]
    return load_recipe(RECIPE, words)


def dealt(options: argparse.Namespace, seed: int) -> Any:
    """Return all battles, grouped and dealt to folds."""
    from rewardmodel.config import DataConfig, Source
    from rewardmodel.parts import load_battles

    sources = [Source(path) for path in options.arena]
    sources += [Source(path, validation=False, limit=options.limit) for path in options.others]
    return load_battles(DataConfig(train=sources, folds=5, seed=seed))


def read(recipe: Any, battles: Any) -> Read:
    """Return what the backbone of a recipe reads of battles, out of the cache where it is there."""
    from rewardmodel.features import feature_folder, features
    from rewardmodel.model import build_model, trained_layer
    from rewardmodel.objective import find_objective
    from rewardmodel.pairs import tokenize
    from rewardmodel.placement import placement
    from rewardmodel.weights import resolve

    # Both poolings are columns of this one.
    config = replace(recipe.model, pooling="last_and_responses")
    objective = find_objective(recipe.objective)
    model, tokenizer = build_model(config, objective.head, 0)
    dtype = placement(config, resolve(config.model_name_or_path))[1]
    rows = tokenize(battles, tokenizer, recipe.prompt, encoding=objective.encoding)
    folder = feature_folder(config, dtype)
    found = features(
        model, trained_layer(model), rows, tokenizer.pad_token_id, dtype, folder, recipe.inference.batch_tokens
    )
    half = found.shape[2] // 2
    columns = {"last": slice(0, half), "responses": slice(half, None), "last_and_responses": slice(None)}
    labels, weight = (np.asarray(rows[name][:], np.float32) for name in ("labels", "weight"))
    return Read(np.ascontiguousarray(found[..., columns[recipe.model.pooling]]), labels, weight)


def out_of_fold(recipe: Any, given: Read, dealing: Fold) -> np.ndarray:
    """Return predictions of the arena battles, (n_arena, 3), each by a head fitted to the other folds."""
    from rewardmodel.folds import trains
    from rewardmodel.head import PairTieHead, TieHead
    from rewardmodel.objective import find_objective, fit_tie
    from rewardmodel.probe import Examples, fit_last_layer, layer_logits

    objective = find_objective(recipe.objective)
    result = np.full((len(given.labels), 3), np.nan)
    for number in range(5):
        training = trains(dealing.fold, number) & (given.weight > 0)
        own = dealing.arena & (dealing.fold == number)
        examples = Examples(
            *map(torch.from_numpy, (given.features[training], given.labels[training])),
            torch.full((int(training.sum()), 3), torch.nan),
            torch.from_numpy(given.weight[training]),
        )
        layer = (PairTieHead if recipe.model.pair_ties else TieHead)(given.features.shape[2])
        torch.nn.init.zeros_(layer.weight)
        fit_last_layer(layer, examples, dealing.group[training], objective, recipe.objective)
        if not objective.learns_ties:  # on the training battles: the fold's own are for judging
            rewards = layer_logits(layer, given.features[training])[..., 0]
            torch.nn.init.constant_(layer.tie, fit_tie(rewards, given.labels[training], objective.link))
        logits = torch.from_numpy(layer_logits(layer, given.features[own]))
        result[own] = objective.probabilities(logits).numpy()
    return result[dealing.arena]


def floors_of(battles: Any, dealing: Fold) -> dict[str, np.ndarray]:
    """Return the floors' predictions of the arena battles, from the arena battles of the other folds."""
    from rewardmodel.floors import baseline
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
    """Return by what a file of predictions is known again."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()


def judged(
    predicted: np.ndarray, true: np.ndarray, groups: np.ndarray, floor: np.ndarray, before: np.ndarray
) -> dict[str, Any]:
    """Return the figures of predictions beside the floor's and the recipe's as it is."""
    from rewardmodel.calibration import BLEND, cross_fit
    from rewardmodel.metrics import log_loss, paired_difference, summary

    blended = cross_fit(BLEND, np.concatenate([predicted, floor], axis=1), true, groups)
    calibrated = cross_fit("vector", predicted, true, groups)
    found = summary(predicted, true, groups)
    return {
        **{name: rounded(found[name]) for name in ("log_loss", "accuracy")},
        "to_floor": rounded(paired_difference(predicted, floor, true, groups)),
        "to_recipe": rounded(paired_difference(predicted, before, true, groups)),
        "calibrated": round(log_loss(calibrated, true), 4),
        "blended": round(log_loss(blended, true), 4),
        "blended_to_floor": rounded(paired_difference(blended, floor, true, groups)),
        "blended_to_recipe": rounded(paired_difference(blended, before, true, groups)),
    }


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """Return figures with four decimals."""
    return {name: round(value, 4) for name, value in figures.items()}


def sliced(battles: Any, dealing: Fold, predicted: np.ndarray) -> dict[str, Any]:
    """Return the log loss by kind of battle: where it is lost."""
    from rewardmodel import evaluate
    from rewardmodel.predictions import predictions_table

    table = predictions_table(battles.select(np.flatnonzero(dealing.arena)), predicted)
    found = evaluate(table)["slices"]
    return {
        kind: {one["name"]: {"battles": one["battles"], **rounded(one["log_loss"])} for one in slices}
        for kind, slices in found.items()
        if slices and kind != "source"
    }


def measure(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the figures of every lever for one dealing of folds."""
    from rewardmodel.battles import outcomes
    from rewardmodel.runs import data_fingerprint

    battles = dealt(options, seed)
    sources = np.asarray(battles["source"][:])
    held_out = np.asarray(battles["fold"][:]) >= 0
    arena = np.isin(sources, np.unique(sources[held_out]))
    work = options.work / f"{seed}-{data_fingerprint(battles)}"
    dealing = Fold(np.asarray(battles["group"][:]), np.asarray(battles["fold"][:]), arena)
    floors = kept(
        work / f"floors-{digest(dealing.fold.tobytes(), arena.tobytes())}.npz", lambda: floors_of(battles, dealing)
    )
    found: dict[str, Any] = {}
    true, before = outcomes(battles)[arena], None
    for name, changes in {**LEVERS, **(MORE if options.more else {})}.items():
        if "others" in changes and not options.others:
            continue
        recipe, begun = recipe_of(changes), time.monotonic()

        def predict(recipe: Any = recipe, changes: dict[str, Any] = changes) -> np.ndarray:
            wanted = battles if "others" in changes else battles.select(np.flatnonzero(arena))
            some = dealing if "others" in changes else Fold(*(part[arena] for part in dealing))
            given = read(recipe, wanted)
            weight = given.weight * np.where(some.arena, 1, np.float32(changes.get("others", 1)))
            return out_of_fold(recipe, given._replace(weight=weight.astype(np.float32)), some)

        key = digest(asdict(recipe), changes, dealing.fold.tobytes(), arena.tobytes())
        predicted = kept(work / f"{name.replace(' ', '_')}-{key}.npz", predict)
        before = predicted if before is None else before
        found[name] = judged(predicted, true, dealing.group[arena], floors["tfidf"], before)
        found[name]["seconds"] = round(time.monotonic() - begun)
        print(f"seed {seed}, {name}: {found[name]}", flush=True)
    return {
        "battles": int(arena.sum()), "others": int((~arena).sum()), "groups": len(np.unique(dealing.group[arena])),
        "floors": {name: judged_floor(floors[name], true, dealing.group[arena]) for name in floors},
        "levers": found, "where": sliced(battles, dealing, before),
    }  # fmt: skip


def judged_floor(predicted: np.ndarray, true: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Return a floor's log loss."""
    from rewardmodel.metrics import summary

    return rounded(summary(predicted, true, groups)["log_loss"])


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
            "to_floor": mean(name, "to_floor", "value"),
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
    parser.add_argument("--more", action="store_true", help="levers that make the backbone read everything again, too")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where predictions are kept")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    begun = time.monotonic()
    runs = {seed: measure(options, seed) for seed in options.seeds}
    tell(
        {
            "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            "minutes": round((time.monotonic() - begun) / 60, 1),
            "mean": over_seeds(list(runs.values())),
            "seeds": runs,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
