"""A benchmark and one or two runs in, their scores with intervals and baselines out, on a terminal and in files."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset

from rewardmodel.battles import is_labelled
from rewardmodel.benchmarks.figures import Figure, compare_figures, draw_values, fewest_groups
from rewardmodel.benchmarks.page import render_benchmark
from rewardmodel.benchmarks.pairs import number_groups, pair_battles, score_lengths, score_questions
from rewardmodel.benchmarks.probabilities import model_figures, probability_baselines
from rewardmodel.benchmarks.questions import Question, question_sources, read_questions
from rewardmodel.benchmarks.results import BaselineScore, BenchmarkResult, RunScores, Score, leaderboard_entry
from rewardmodel.benchmarks.scoring import Scored, Terms
from rewardmodel.benchmarks.table import Benchmark, Scoring, find_benchmark
from rewardmodel.config.schema import Recipe
from rewardmodel.data.splits import find_seen_battles
from rewardmodel.distributed import is_main
from rewardmodel.errors import InputError, plural
from rewardmodel.evaluation.bootstrap import Draws, draw_groups, interval_of
from rewardmodel.files import lock_output, write_json, write_text
from rewardmodel.inference.battles import battles_to_predict
from rewardmodel.predictions import SEEN_COLUMN, write_predictions
from rewardmodel.run_folder import RunFolder, load_run_recipe, trained_models

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """What was measured of one run, before intervals.

    Attributes:
        recipe: of the run.
        how: how it was scored, in words.
        seen: rows whose prompt or responses it trained on; None: unknown.
        figures: of the run.
        baselines: the same figures of baselines, by name; some may lack some of them.
        rows: a table with one line a row of the benchmark.
        groups: (n_rows,) labels of the prompts.
    """

    recipe: Recipe
    how: str
    seen: int | None
    figures: list[Figure]
    baselines: dict[str, list[Figure]]
    rows: pd.DataFrame
    groups: np.ndarray


def benchmark(
    name: str,
    runs: str | Path | Sequence[str | Path],
    data: str | Path | None = None,
    output: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
) -> BenchmarkResult:
    """Score one run, or two on the same rows, on a benchmark, and write what was found to a folder.

    The folder gets results.json (every figure), rows.parquet (every row's scores), leaderboard/RUN.json (in the form
    of RewardBench's leaderboard) and page.html. Everything given is checked before torch is imported. Responses that
    are scored are kept in the folder until the end, so that the same call continues after a kill.

    Args:
        name: a key of `benchmarks.table.BENCHMARKS`.
        runs: one or two run folders or exports.
        data: a file, or the id of a data set on the hub; default: the benchmark's own on the hub. Of `preferences`
            labelled battles, as for `predict`.
        output: the folder to write to; default: benchmarks/NAME in the (first) run.
        overrides: keys of the runs' recipes for this call, as typed: `["--inference.batch_tokens", "2048"]`.

    Raises:
        InputError: something given cannot be used; file, row and column are named. Or another process writes there.
        FloatingPointError: a score that is NaN or infinite; the questions are named.
    """
    chosen = find_benchmark(name)
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(one) for one in runs]
    if len(folders) not in (1, 2):
        raise InputError(f"benchmark: {plural(len(folders), 'run')}; give one, or two to compare")
    for folder in folders:
        trained_models(folder)
    recipes = [load_run_recipe(folder, overrides) for folder in folders]
    target = Path(output) if output else RunFolder(folders[0]).benchmark(name)
    if target.exists() and not target.is_dir():
        raise InputError(f"--output: {target} is a file; give the name of a folder")
    with lock_output(target) if is_main() else nullcontext():
        given = _read(name, chosen, folders[0], data)
        target.mkdir(parents=True, exist_ok=True)
        measured = [
            _measure_probabilities(folder, recipe, given, target)
            if isinstance(given, Dataset)
            else _measure_responses(folder, recipe, given, chosen, target)
            for folder, recipe in zip(folders, recipes, strict=True)
        ]
        names = _run_names(folders)
        result = _summarise(chosen.title, str(data or (chosen.hub and chosen.hub.path)), folders, names, measured)
        if is_main():
            _write(target, result, names, measured)
    return result


def _read(name: str, chosen: Benchmark, run: Path, data: str | Path | None) -> list[Question] | Dataset:
    """Return the questions of a benchmark, or the labelled battles of `preferences`."""
    if chosen.scoring is not None and chosen.hub is not None:
        sources = question_sources(data, chosen.hub, chosen.splits)
        return read_questions(sources, chosen.scoring.columns, chosen.scoring.parse, chosen.scoring.names)
    if data is None:
        raise InputError(f"benchmark {name}: --data is missing; give labelled battles: a file or a hub data set")
    battles = battles_to_predict(run, str(data))
    if not is_labelled(battles):
        raise InputError(f"--data: {data}: the outcomes of these battles are not known; label them all")
    return battles


def _run_names(folders: Sequence[Path]) -> list[str]:
    """Return the names of the runs: of their folders, numbered where these are equal."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [f"{name}-{place}" for place, name in enumerate(names, start=1)]


def _measure_responses(
    run: Path, recipe: Recipe, questions: list[Question], chosen: Benchmark, target: Path
) -> Measured:
    """Score the responses of questions with a run, and measure it and the baselines."""
    scoring: Scoring = chosen.scoring  # type: ignore[assignment]  # of a benchmark with questions
    pairs = pair_battles(questions, scoring.across, chosen.title)
    from rewardmodel.benchmarks.play import play  # imports torch
    from rewardmodel.inference.shards import remove_shards

    work = target / "shards"
    scored = play(run, recipe, questions, pairs, scoring.across, work)
    if is_main():
        remove_shards(work)

    # the same terms and figures of the run and of the baselines
    terms = scoring.terms(questions, scored)
    baselines: dict[str, Terms] = {
        "random": scoring.chance(questions),
        "longer": scoring.terms(questions, score_lengths(questions)),
    }
    if (tfidf := _predict_tfidf(run, pairs)) is not None:
        lead = tfidf[:, 0] - tfidf[:, 1]  # the same in both orders
        baselines["TF-IDF"] = scoring.terms(questions, score_questions(questions, scoring.across, lead, lead))
    return Measured(
        recipe,
        _describe_scoring(recipe, sum(len(one.responses) for one in questions), len(pairs)),
        _count_seen(run, questions, pairs),
        scoring.figures(questions, terms),
        {name: scoring.figures(questions, values) for name, values in baselines.items()},
        _question_table(questions, scored, terms),
        number_groups(questions),
    )


def _describe_scoring(recipe: Recipe, responses: int, pairs: int) -> str:
    from rewardmodel.objectives import find_objective

    if find_objective(recipe.objective).encoding == "separate":
        return f"scores each response alone: {responses:,} responses, each once"
    return f"compares two responses: {plural(pairs, 'pair')}, each in both orders, averaged where not said otherwise"


def _predict_tfidf(run: Path, battles: Dataset) -> np.ndarray | None:
    """Return what the run's TF-IDF baseline predicts, (n, 3), the mean over its folds; None: it has none."""
    files = [RunFolder(folder).blend_baseline for folder in trained_models(run)]
    if not all(path.is_file() for path in files):
        return None
    from rewardmodel.evaluation.text_regression import load_regression, predict_each

    mean: np.ndarray = predict_each([load_regression(path) for path in files], battles).mean(axis=0)
    return mean


def _count_seen(run: Path, questions: list[Question], pairs: Dataset) -> int | None:
    """Return how many questions share a prompt or responses with training battles of all of a run's models."""
    seen = find_seen_battles(trained_models(run), pairs)
    if seen is None:
        return None
    return len({name.partition(":")[0] for name in pairs.select(np.flatnonzero(seen.all(axis=0)))["id"]})


def _question_table(questions: list[Question], scored: list[Scored], terms: Terms) -> pd.DataFrame:
    """Return one line a question: row, id, subset, which responses are right, their scores, and the terms."""
    columns: dict[str, Any] = {name: [getattr(one, name) for one in questions] for name in ("row", "id", "subset")}
    columns |= {"correct": [one.correct for one in questions], "scores": [one.scores for one in scored], **terms}
    return pd.DataFrame(columns)


def _measure_probabilities(run: Path, recipe: Recipe, battles: Dataset, target: Path) -> Measured:
    """Predict labelled battles with a run, and measure the probabilities and those of the baselines."""
    from rewardmodel.inference.predict import predict  # imports torch
    from rewardmodel.inference.shards import remove_shards

    work = target / "shards"
    table = predict(run, battles, recipe, work=work)
    if is_main():
        remove_shards(work)
    seen = int(table[SEEN_COLUMN].sum()) if SEEN_COLUMN in table else None
    texts = [name for name in ("prompt", "response_a", "response_b") if name in table]
    return Measured(
        recipe,
        f"predicts {plural(len(table), 'battle')}, as `rewardmodel predict` does",
        seen,
        model_figures(table),
        probability_baselines(table, _predict_tfidf(run, battles)),
        table.drop(columns=texts),
        table["group"].to_numpy(),
    )


def _summarise(
    title: str, data: str, folders: Sequence[Path], names: Sequence[str], measured: Sequence[Measured]
) -> BenchmarkResult:
    """Return the result with intervals; all runs share the bootstrap samples of the prompts."""
    from rewardmodel.benchmarks.play import template_name
    from rewardmodel.objectives import find_objective

    draws = draw_groups(measured[0].groups)
    values = [draw_values(one.figures, draws) for one in measured]
    runs = []
    for folder, name, one, own in zip(folders, names, measured, values, strict=True):
        separate = find_objective(one.recipe.objective).encoding == "separate"
        kind = "Seq. Classifier" if separate else "Custom Classifier"
        template = template_name(folder, one.recipe)
        runs.append(RunScores(name, kind, template, one.how, one.seen, _scores(one, own, draws)))
    compared = compare_figures(measured[0].figures, values[0], values[1], draws) if len(measured) == 2 else []
    return BenchmarkResult(title, data, len(measured[0].groups), draws.groups, runs, compared)


def _scores(measured: Measured, values: Sequence[np.ndarray], draws: Draws) -> list[Score]:
    """Return the figures of a run with intervals, and beside them those of the baselines."""
    beside = {
        name: {one.name: drawn for one, drawn in zip(figures, draw_values(figures, draws), strict=True)}
        for name, figures in measured.baselines.items()
    }
    scores = []
    for figure, own in zip(measured.figures, values, strict=True):
        groups = fewest_groups(figure, draws)
        baselines = {
            name: BaselineScore(float(drawn[figure.name][0]), interval_of(own - drawn[figure.name], groups))
            for name, drawn in beside.items()
            if figure.name in drawn
        }
        counts = int(figure.rows.sum()), draws.groups_of(figure.rows)
        found = interval_of(own, groups)
        scores.append(Score(figure.name, *counts, figure.summary, figure.percent, found, baselines))
    return scores


def _write(target: Path, result: BenchmarkResult, names: Sequence[str], measured: Sequence[Measured]) -> None:
    write_json(target / "results.json", asdict(result))
    tables = [one.rows.assign(run=name) for name, one in zip(names, measured, strict=True)]
    write_predictions(pd.concat(tables, ignore_index=True), target / "rows.parquet")
    for run in result.runs:
        write_json(target / "leaderboard" / f"{run.run}.json", leaderboard_entry(run))
    write_text(target / "page.html", render_benchmark(result))
