"""The commands, a function each: parsed options in, the function of the package called, what it found printed.

Every command reads and checks the files it is given before it imports what imports torch, so that an error in a file is
reported within seconds.
"""

import json
import logging
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

from rewardmodel.errors import InputError, plural

if TYPE_CHECKING:
    from rewardmodel.config.schema import Recipe
    from rewardmodel.exports.kaggle import Bundle


def _run(options: Namespace) -> None:
    """Train, evaluate on held-out prompts, and predict data.test into submission.csv."""
    from rewardmodel.config.loader import dump_recipe, load_recipe
    from rewardmodel.preflight import check_training

    recipe = load_recipe(options.recipe, options.overrides)
    if options.print_config:
        print(dump_recipe(recipe), end="")
        return
    check_training(recipe, options.resume, options.overwrite)
    from rewardmodel.pipeline import run

    folder, evaluation = run(recipe, resume=options.resume, overwrite=options.overwrite)
    from rewardmodel.evaluation.evaluate import format_metrics
    from rewardmodel.run_folder import RunFolder

    print(f"\nheld-out prompts: {format_metrics(evaluation)}\n\n{RunFolder(folder).report}")
    if recipe.data.test:
        print(RunFolder(folder).submission)


def _prepare(options: Namespace) -> None:
    """Read, group and audit a recipe's battles and assign folds; writes battles.parquet and audit.json."""
    from rewardmodel.config.loader import load_recipe
    from rewardmodel.preflight import check_reading

    recipe = load_recipe(options.recipe, options.overrides)
    check_reading(recipe, options.output)
    from rewardmodel.pipeline import prepare

    facts = prepare(recipe, options.output)
    from rewardmodel.data.audit import format_audit

    print(f"{format_audit(facts)}\n\n{options.output}")


def _doctor(options: Namespace) -> int:
    """Estimate memory, precision and time of a recipe and list incompatible settings; nothing is trained."""
    if options.gpus is not None and options.gpus < 1:
        raise InputError(f"--gpus: {options.gpus}; give at least 1")
    limit = _numbers("--hours", options.hours)
    if limit and not limit[0] > 0:
        raise InputError(f"--hours: {limit[0]:g}; give more than 0")
    from rewardmodel.config.loader import load_recipe
    from rewardmodel.distributed import Launch, read_launch

    recipe = load_recipe(options.recipe, options.overrides)
    logging.getLogger(__name__).info("reading %s …", options.recipe)
    launched = None
    if options.launch:
        launched = read_launch(options.launch, options.gpus)
    elif options.gpus:
        launched = Launch(options.gpus, "ddp" if options.gpus > 1 else "")
    from rewardmodel.planning.diagnosis import format_doctor
    from rewardmodel.planning.doctor import doctor

    diagnosis = doctor(recipe, options.device, launched)
    print(format_doctor(diagnosis))
    if limit and diagnosis.estimate:
        from rewardmodel.planning.prediction_time import describe_training_time

        print(f"\n{describe_training_time(diagnosis, limit[0])}")
    for problem in diagnosis.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if diagnosis.problems else 0


def _train(options: Namespace) -> None:
    """Train a model on labelled battles and save it as a run; --fold trains one model per fold."""
    from rewardmodel.config.loader import load_recipe
    from rewardmodel.preflight import check_training
    from rewardmodel.run_folder import lock_run

    recipe = load_recipe(options.recipe, options.overrides)
    how = {"resume": options.resume, "overwrite": options.overwrite}
    if options.fold is not None:
        _train_folds(recipe, options.fold, how)
        return
    check_training(recipe, **how)
    with lock_run(recipe.run_folder):
        from rewardmodel.data.splits import load_battles, split
        from rewardmodel.pipeline import is_trained

        parts = split(load_battles(recipe.data), recipe.data.fold)
        if not (options.resume and is_trained(recipe, parts)):
            from rewardmodel.training.train import train

            train(recipe, parts=parts, **how)
    print(recipe.run_folder)


def _train_folds(recipe: "Recipe", fold: str, how: dict[str, bool]) -> None:
    if fold != "all" and not fold.isdecimal():
        raise InputError(f"--fold: {fold} is not a fold; give `all`, or a number from 0 to {recipe.data.folds - 1}")
    from rewardmodel.preflight import check_training

    check_training(recipe, **how, fold=fold)
    from rewardmodel.kfold import train_fold, train_folds

    if fold != "all":
        print(train_fold(recipe, int(fold), **how))
        return
    folder, evaluation = train_folds(recipe, **how)
    from rewardmodel.evaluation.evaluate import format_metrics
    from rewardmodel.run_folder import RunFolder

    print(f"\nout of fold: {format_metrics(evaluation)}\n\n{RunFolder(folder).report}")


def _predict(options: Namespace) -> None:
    """Predict the outcomes of battles with a trained run, or with the mean of several."""
    weights, limit = _numbers("--weights", options.weights), _numbers("--time-limit", options.time_limit)
    from rewardmodel.inference.to_file import predict_to_file

    table = predict_to_file(
        options.runs,
        options.battles,
        options.output,
        overrides=options.overrides,
        weights=weights,
        sample_submission=options.sample_submission,
        time_limit=limit[0] if limit else None,
    )
    print(f"{plural(len(table), 'battle')}: {options.output}")


def _evaluate(options: Namespace) -> None:
    """Measure predictions of battles whose outcomes are known, or compare two of them."""
    from rewardmodel.preflight import check_predictions

    given = [options.predictions, *([options.against] if options.against else [])]
    check_predictions(given, options.data)
    if options.overrides and not options.data:
        raise InputError(f"{options.overrides[0]}: only with --data, whose battles are predicted; leave it out")
    if options.data:
        from rewardmodel.battles import is_labelled
        from rewardmodel.inference.battles import battles_to_predict
        from rewardmodel.run_folder import load_run_recipe

        recipes = [load_run_recipe(run, options.overrides) for run in given]
        battles = battles_to_predict(given[0], options.data)
        if not is_labelled(battles):
            raise InputError(f"--data: {options.data}: the outcomes of these battles are not known; label them all")
        from rewardmodel.inference.predict import predict

        given = [predict(run, battles, recipe) for run, recipe in zip(given, recipes, strict=True)]
    from rewardmodel.evaluation.evaluate import (
        compare,
        evaluate,
        evaluate_run,
        format_difference,
        format_evaluation,
    )

    if options.against:
        print(format_difference(compare(*given)))
    elif not options.data and options.predictions.is_dir():
        print(format_evaluation(evaluate_run(options.predictions)))
    else:
        print(format_evaluation(evaluate(given[0])))


def _report(options: Namespace) -> None:
    """Write a run's report.html, or a page that compares several runs."""
    from rewardmodel.preflight import check_predictions

    check_predictions(options.runs)
    from rewardmodel.evaluation.report import report

    print(report(options.runs, options.output))


def _export(options: Namespace) -> None:
    """Write a run, or the mean of several, in a form that other machines load, and compare it with the run."""
    names = ("dataset", "installed", "contents", "base", "python", "accelerator", "separate")
    asked = {name: value for name in names if (value := getattr(options, name)) is not None}
    weights, limit = _numbers("--weights", options.weights), _numbers("--time-limit", options.time_limit)
    asked |= ({"weights": weights} if weights else {}) | ({"time_limit": limit[0]} if limit else {})
    if asked and not {"dataset", "installed"} <= asked.keys():
        name = next(iter(asked)).replace("_", "-")
        raise InputError(f"--{name}: only for --kind kaggle, which needs --dataset and --installed")
    from rewardmodel.preflight import check_export

    check_export(options.runs, options.output)
    from rewardmodel.exports.export import export
    from rewardmodel.exports.kaggle import Bundle

    bundle = Bundle(**asked) if asked else None
    parity = export(
        options.runs,
        options.output,
        options.kind,
        dtype=options.dtype,
        battles=options.battles,
        rewardmodel_only=options.rewardmodel_only,
        push_to_hub=options.push_to_hub,
        bundle=bundle,
        overrides=options.overrides,
    )
    from rewardmodel.exports.parity import format_parity  # after the checks of export, because it imports torch

    print(f"{format_parity(parity)}\n\n{options.output}")
    if bundle:
        _print_kaggle_time(options, bundle)


def _print_kaggle_time(options: Namespace, bundle: "Bundle") -> None:
    """Print how long the notebook of a bundle takes; the export is complete without it."""
    from rewardmodel.exports.checks import plan_parts
    from rewardmodel.exports.export import EXPORTS
    from rewardmodel.exports.kaggle import ACCELERATORS, HIDDEN_BATTLES
    from rewardmodel.planning.prediction_time import describe_prediction_time

    form, machine, hours = EXPORTS[bundle.contents], ACCELERATORS[bundle.accelerator], bundle.time_limit / 3600
    recipes = [form.adapt_recipe(part.runs[0].recipe) for part in plan_parts(options.runs, bundle)]
    try:
        print(describe_prediction_time(recipes, machine.device, machine.gpus, HIDDEN_BATTLES, hours))
    except (InputError, OSError) as error:
        print(f"time on {machine.menu}: not estimated ({error})")


def _baseline(options: Namespace) -> None:
    """Measure baselines without a language model, out of fold: class prior, lengths, TF-IDF."""
    from rewardmodel.config.schema import DataConfig
    from rewardmodel.preflight import check_baseline

    check_baseline(options.battles, options.output)
    from rewardmodel.data.splits import load_battles

    battles = load_battles(DataConfig(train=options.battles, folds=options.folds, seed=options.seed))
    from rewardmodel.evaluation.baselines import baseline, format_baseline, measure_baselines
    from rewardmodel.predictions import write_predictions

    table = baseline(battles)
    if options.output:
        write_predictions(table, options.output)
    print(format_baseline(measure_baselines(table)))


def _benchmark(options: Namespace) -> None:
    """Score a run on a published benchmark, or two runs on the same rows, with intervals and baselines."""
    from rewardmodel.benchmarks.benchmark import benchmark
    from rewardmodel.benchmarks.results import format_benchmark
    from rewardmodel.run_folder import RunFolder

    result = benchmark(options.name, options.runs, options.data, options.output, overrides=options.overrides)
    print(f"{format_benchmark(result)}\n\n{options.output or RunFolder(options.runs[0]).benchmark(options.name)}")


def _serve(options: Namespace) -> None:
    """Answer HTTP requests with a trained run: battles, rewards, finished texts, and a page to try it on."""
    from rewardmodel.serving.limits import Limits
    from rewardmodel.serving.serve import serve

    serve(
        options.run,
        host=options.host,
        port=options.port,
        name=options.name,
        limits=Limits(options.max_waiting, options.max_tokens, options.max_body, options.timeout),
        overrides=options.overrides,
        log_texts=options.log_texts,
    )


def _compare(options: Namespace) -> None:
    """Ask a trained run which of two responses to a prompt is better."""
    from rewardmodel.inference.battles import single_model
    from rewardmodel.run_folder import load_run_recipe
    from rewardmodel.serving.compare import compare_responses, read_texts

    single_model(options.run)
    recipe = load_run_recipe(options.run, options.overrides)
    texts = read_texts(vars(options))
    answer = compare_responses(options.run, **texts, recipe=recipe)
    from rewardmodel.serving.answers import format_answer

    print(json.dumps(answer, indent=2) if options.json else format_answer(answer))


def _parity(options: Namespace) -> int:
    """Ask a server of a trained run for scores, with many clients at once, and compare them with the run's."""
    from rewardmodel.serving.parity import format_served_parity, parity

    found = parity(options.run, options.url, options.battles, overrides=options.overrides)
    print(format_served_parity(found))
    return 0 if found.holds else 1


def _recipes(options: Namespace) -> None:
    """List the recipes of the package, which every command takes by name: rewardmodel run quickstart."""
    from rewardmodel.config.recipes import format_recipes

    print(format_recipes(shutil.get_terminal_size().columns))


def _schema(options: Namespace) -> None:
    """Print the JSON schema of a recipe, with which editors complete and check recipes."""
    from rewardmodel.config.json_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


VERBS: dict[str, Callable[[Namespace], int | None]] = {
    "run": _run,
    "doctor": _doctor,
    "prepare": _prepare,
    "train": _train,
    "predict": _predict,
    "evaluate": _evaluate,
    "report": _report,
    "export": _export,
    "baseline": _baseline,
    "benchmark": _benchmark,
    "serve": _serve,
    "compare": _compare,
    "parity": _parity,
    "recipes": _recipes,
    "schema": _schema,
}
"""Commands by name; each docstring is the command's help."""


def _numbers(name: str, words: list[str] | None) -> list[float] | None:
    try:
        return None if words is None else [float(word) for word in words]
    except ValueError as error:
        raise InputError(f"{name}: {' '.join(words or ())}: not all are numbers; give numbers") from error
