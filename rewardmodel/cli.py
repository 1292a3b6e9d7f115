"""The command line: parse, call the function of the same name, print; exit code 2 for wrong input.

Every command reads and checks the files it is given before it imports what imports torch, so that an error in a file is
reported within seconds.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rewardmodel.distributed import is_main
from rewardmodel.errors import InputError, nearest, plural

if TYPE_CHECKING:
    from rewardmodel.config.schema import Recipe
    from rewardmodel.data.splits import Parts
    from rewardmodel.exports.kaggle import Bundle


def _run(options: Namespace) -> None:
    """Train, evaluate on held-out prompts, and predict data.test into submission.csv."""
    from rewardmodel.config.loader import dump_recipe, load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.print_config:
        print(dump_recipe(recipe), end="")
        return
    parts = _read_parts(recipe, options)
    from rewardmodel.pipeline import run

    folder, evaluation = run(recipe, parts=parts, resume=options.resume, overwrite=options.overwrite)
    from rewardmodel.evaluation.evaluate import format_metrics
    from rewardmodel.run_folder import RunFolder

    print(f"\nheld-out prompts: {format_metrics(evaluation)}\n\n{RunFolder(folder).report}")
    if recipe.data.test:
        print(RunFolder(folder).submission)


def _prepare(options: Namespace) -> None:
    """Read, group and audit a recipe's battles and assign folds; writes battles.parquet and audit.json."""
    from rewardmodel.config.loader import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    options.output.mkdir(parents=True, exist_ok=True)  # an error here comes before the work
    from rewardmodel.pipeline import prepare

    facts = prepare(recipe, options.output)
    from rewardmodel.data.audit import format_audit

    print(f"{format_audit(facts)}\n\n{options.output}")


def _doctor(options: Namespace) -> int:
    """Estimate memory, precision and time of a recipe and list incompatible settings; nothing is trained."""
    if options.gpus is not None and options.gpus < 1:
        raise InputError(f"--gpus: {options.gpus}; give at least 1")
    from rewardmodel.config.loader import load_recipe
    from rewardmodel.distributed import Launch, read_launch

    recipe = load_recipe(options.recipe, options.overrides)
    launched = None
    if options.launch:
        launched = read_launch(options.launch, options.gpus)
    elif options.gpus:
        launched = Launch(options.gpus, "ddp" if options.gpus > 1 else "")
    from rewardmodel.planning.doctor import doctor, format_doctor

    diagnosis = doctor(recipe, options.device, launched)
    print(format_doctor(diagnosis))
    for problem in diagnosis.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if diagnosis.problems else 0


def _train(options: Namespace) -> None:
    """Train a model on labelled battles and save it as a run; --fold trains one model per fold."""
    from rewardmodel.config.loader import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    how = {"resume": options.resume, "overwrite": options.overwrite}
    if options.fold is not None:
        _train_folds(recipe, options.fold, how)
        return
    parts = _read_parts(recipe, options)
    from rewardmodel.training.train import train

    folder, _ = train(recipe, parts=parts, **how)
    print(folder)


def _train_folds(recipe: "Recipe", fold: str, how: dict[str, bool]) -> None:
    if fold != "all" and not fold.isdecimal():
        raise InputError(f"--fold: {fold} is not a fold; give `all`, or a number from 0 to {recipe.data.folds - 1}")
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
    given = [options.predictions, *([options.against] if options.against else [])]
    if options.overrides and not options.data:
        raise InputError(f"{options.overrides[0]}: only with --data, whose battles are predicted; leave it out")
    if options.data:
        from rewardmodel.battles import is_labelled
        from rewardmodel.inference.battles import battles_to_predict
        from rewardmodel.run_folder import load_run_recipe, trained_models

        for run in given:
            trained_models(run)
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
    from rewardmodel.evaluation.report import report

    print(report(options.runs, options.output))


def _export(options: Namespace) -> None:
    """Write a run, or the mean of several, in a form that other machines load, and compare it with the run."""
    names = ("dataset", "installed", "contents", "base", "python", "accelerator")
    asked = {name: value for name in names if (value := getattr(options, name)) is not None}
    if seconds := _numbers("--time-limit", options.time_limit):
        asked["time_limit"] = seconds[0]
    if asked and not {"dataset", "installed"} <= asked.keys():
        name = next(iter(asked)).replace("_", "-")
        raise InputError(f"--{name}: only for --kind kaggle, which needs --dataset and --installed")
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
    from rewardmodel.exports.checks import load_trained_runs
    from rewardmodel.exports.export import EXPORTS
    from rewardmodel.exports.kaggle import ACCELERATORS, HIDDEN_BATTLES
    from rewardmodel.planning.prediction_time import describe_prediction_time

    recipe = EXPORTS[bundle.contents].adapt_recipe(load_trained_runs(options.runs)[0].recipe)
    machine = ACCELERATORS[bundle.accelerator]
    try:
        hours = bundle.time_limit / 3600
        print(describe_prediction_time(recipe, machine.device, machine.gpus, HIDDEN_BATTLES, hours))
    except (InputError, OSError) as error:
        print(f"time on {machine.menu}: not estimated ({error})")


def _baseline(options: Namespace) -> None:
    """Measure baselines without a language model, out of fold: class prior, lengths, TF-IDF."""
    if options.output and options.output.suffix != ".parquet":
        raise InputError(f"--output: {options.output} does not end in .parquet; give a name that does")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)  # an error here comes before the work
    from rewardmodel.config.schema import DataConfig
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
    "recipes": _recipes,
    "schema": _schema,
}
"""Commands by name; each docstring is the command's help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 2 for wrong input; 1 for NaN or infinite predictions; 130 if interrupted.
    """
    from rewardmodel.options import build_parser, parse, reorder

    arguments = reorder(sys.argv[1:] if arguments is None else arguments)
    completing = "_ARGCOMPLETE" in os.environ
    parser = build_parser(
        {name: command.__doc__ or "" for name, command in VERBS.items()},
        with_keys=completing or not {"-h", "--help"}.isdisjoint(arguments[1:]),
    )
    if completing:
        import argcomplete

        argcomplete.autocomplete(parser, always_complete_options=False)
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    try:
        if arguments[0] not in (*VERBS, "--version"):
            known = ", ".join(VERBS)
            raise InputError(f"rewardmodel: no command '{arguments[0]}'{nearest(arguments[0], VERBS)}; known: {known}")
        options = parse(parser, arguments)
        from rewardmodel.logs import set_up_logging, traced

        # oneDNN keeps a kernel for each shape it has seen, and every batch has another: gigabytes, and no faster.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
        set_up_logging(options.quiet, options.verbose)
        with (
            traced(options.verbose),
            contextlib.nullcontext() if is_main() else contextlib.redirect_stdout(io.StringIO()),
        ):
            return VERBS[options.command](options) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {' '.join(str(error).split())}; fix the path or its permissions", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; a run continues from its last checkpoint with --resume", file=sys.stderr)
        return 130


def _numbers(name: str, words: list[str] | None) -> list[float] | None:
    try:
        return None if words is None else [float(word) for word in words]
    except ValueError as error:
        raise InputError(f"{name}: {' '.join(words or ())}: not all are numbers; give numbers") from error


def _read_parts(recipe: "Recipe", options: Namespace) -> "Parts":
    """Check that the run may be written, then read and split the recipe's battles."""
    from rewardmodel.data.splits import load_battles, split
    from rewardmodel.run_folder import check_run

    check_run(recipe, options.resume, options.overwrite)
    return split(load_battles(recipe.data), recipe.data.fold)


if __name__ == "__main__":
    sys.exit(main())
