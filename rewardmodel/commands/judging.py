"""Commands that predict battles and measure predictions: predict, evaluate, report, baseline, benchmark."""

from argparse import Namespace

from rewardmodel.commands.numbers import read_numbers
from rewardmodel.errors import InputError, plural


def _predict(options: Namespace) -> None:
    """Predict the outcomes of battles with a trained run, or with the mean of several."""
    weights, limit = read_numbers("--weights", options.weights), read_numbers("--time-limit", options.time_limit)
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
    from rewardmodel.preflight import check_report

    check_report(options.runs, options.output)
    from rewardmodel.evaluation.report import report

    print(report(options.runs, options.output))


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


JUDGING = {
    "predict": _predict,
    "evaluate": _evaluate,
    "report": _report,
    "baseline": _baseline,
    "benchmark": _benchmark,
}
