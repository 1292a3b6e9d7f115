"""The command line: parse, call the function of the same name, print; exit code 2 for what a person can mend."""

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rewardmodel.distributed import is_main
from rewardmodel.errors import InputError

if TYPE_CHECKING:
    from rewardmodel.config.schema import Recipe


def _run(arguments: list[str]) -> None:
    """Train, judge on held-out prompts, predict data.test into submission.csv."""
    parser = _parser("run", _run)
    _add_recipe(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    options, overrides = _parse_with_recipe(parser, arguments)
    from rewardmodel.config.loader import dump_recipe, load_recipe

    recipe = load_recipe(options.recipe, overrides)
    if options.print_config:
        print(dump_recipe(recipe), end="")
        return
    from rewardmodel.evaluation.evaluate import format_metrics
    from rewardmodel.pipeline import run
    from rewardmodel.run_folder import RunFolder

    folder, evaluation = run(recipe, resume=options.resume, overwrite=options.overwrite)
    print(f"\nheld-out prompts: {format_metrics(evaluation)}\n\n{RunFolder(folder).report}")
    if recipe.data.test:
        print(RunFolder(folder).submission)


def _prepare(arguments: list[str]) -> None:
    """Read, group, deal and audit a recipe's battles: writes battles.parquet and audit.json."""
    parser = _parser("prepare", _prepare)
    parser.add_argument("recipe", help="YAML file of the recipe")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.epilog = OVERRIDES
    options, overrides = _parse_with_recipe(parser, arguments)
    from rewardmodel.config.loader import load_recipe

    recipe = load_recipe(options.recipe, overrides)
    from rewardmodel.data.audit import format_audit
    from rewardmodel.pipeline import prepare

    print(f"{format_audit(prepare(recipe, options.output))}\n\n{options.output}")


def _doctor(arguments: list[str]) -> int:
    """Tell memory, precision, time and what cannot work of a recipe, before anything is loaded."""
    parser = _parser("doctor", _doctor)
    parser.add_argument("recipe", help="YAML file of the recipe")
    parser.add_argument("--device", help="cpu, or a GPU by name, like T4, A100-80GB, H100; none: the machine at hand")
    parser.add_argument("--gpus", type=int, help="how many of them, a process each; none: one, or as --launch says")
    parser.add_argument("--launch", type=Path, help="a configuration of accelerate, like recipes/accelerate/fsdp2.yaml")
    parser.epilog = OVERRIDES
    options, overrides = _parse_with_recipe(parser, arguments)
    if options.gpus is not None and options.gpus < 1:
        raise InputError(f"--gpus: {options.gpus}; give at least 1")
    from rewardmodel.config.loader import load_recipe
    from rewardmodel.distributed import Launch, read_launch
    from rewardmodel.planning.doctor import doctor, format_doctor

    recipe = load_recipe(options.recipe, overrides)
    launched = None
    if options.launch:
        launched = read_launch(options.launch, options.gpus)
    elif options.gpus:
        launched = Launch(options.gpus, "ddp" if options.gpus > 1 else "")
    facts = doctor(recipe, options.device, launched)
    print(format_doctor(facts))
    for problem in facts["problems"]:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if facts["problems"] else 0


def _train(arguments: list[str]) -> None:
    """Train a model on labelled battles and save it as a run; --fold trains one model a fold."""
    parser = _parser("train", _train)
    _add_recipe(parser)
    parser.add_argument(
        "--fold",
        help="a fold to train into its own folder of the run, or `all`: then every battle is predicted out of fold",
    )
    options, overrides = _parse_with_recipe(parser, arguments)
    from rewardmodel.config.loader import load_recipe

    recipe, how = load_recipe(options.recipe, overrides), {"resume": options.resume, "overwrite": options.overwrite}
    if options.fold is not None:
        _train_folds(recipe, options.fold, how)
        return
    from rewardmodel.training.train import train

    folder, _ = train(recipe, **how)
    print(folder)


def _train_folds(recipe: "Recipe", fold: str, how: dict[str, bool]) -> None:
    if fold != "all" and not fold.isdecimal():
        raise InputError(f"--fold: {fold} is no fold; give `all`, or a number from 0 to {recipe.data.folds - 1}")
    from rewardmodel.kfold import train_fold, train_folds

    if fold != "all":
        print(train_fold(recipe, int(fold), **how))
        return
    from rewardmodel.evaluation.evaluate import format_metrics
    from rewardmodel.run_folder import RunFolder

    folder, evaluation = train_folds(recipe, **how)
    print(f"\nout of fold: {format_metrics(evaluation)}\n\n{RunFolder(folder).report}")


def _predict(arguments: list[str]) -> None:
    """Predict the outcomes of battles with a trained run, or with several, averaged."""
    parser = _parser("predict", _predict)
    parser.epilog = "--inference.KEY VALUE, --model.device and --model.dtype overrule the run's recipe for this time"
    parser.add_argument("runs", metavar="run", type=Path, nargs="+", help="folder of a trained run, or several")
    parser.add_argument(
        "battles", help="a file, a hub data set, 'sample', or the (first) run's own validation, calibration or holdout"
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write: .parquet, or .csv for a submission")
    parser.add_argument("--sample-submission", type=Path, help="a submission whose columns and ids must be repeated")
    parser.add_argument("--weights", nargs="+", metavar="WEIGHT", help="of each run in the mean; none: all alike")
    parser.add_argument("--time-limit", nargs=1, metavar="SECONDS", help="one order of all, then the other in time")
    options, overrides = parser.parse_known_args(arguments)
    for word in overrides:
        if word.startswith("--") and not word.startswith(("--inference.", "--model.device", "--model.dtype")):
            raise InputError(f"rewardmodel predict: unknown option {word}; see rewardmodel predict --help")
    if options.output.suffix not in (".parquet", ".csv"):
        raise InputError(f"--output: {options.output} ends in neither .parquet nor .csv; give one of them")
    if options.sample_submission and options.output.suffix != ".csv":
        raise InputError(f"--sample-submission: {options.output} is no submission; let --output end in .csv")
    weights, limit = _numbers("--weights", options.weights), _numbers("--time-limit", options.time_limit)
    _make_parent(options.output)
    from rewardmodel.config.loader import load_recipe
    from rewardmodel.inference.predict import battles_to_predict, predict
    from rewardmodel.inference.shards import remove_shards
    from rewardmodel.predictions import check_sample, write_predictions, write_submission
    from rewardmodel.run_folder import RunFolder, trained_models

    for run in options.runs:
        trained_models(run)
    battles = battles_to_predict(options.runs[0], options.battles)
    if options.sample_submission:
        check_sample(options.sample_submission, battles["id"])
    recipes = [load_recipe(RunFolder(run).recipe, overrides) for run in options.runs]
    work = options.output.with_name(f"{options.output.name}.shards")
    table = predict(options.runs, battles, recipes, weights, work=work, time_limit=limit[0] if limit else None)
    if is_main():
        write = write_submission if options.output.suffix == ".csv" else write_predictions
        write(table, options.output)
        remove_shards(work)
    print(f"{len(table)} battles: {options.output}")


def _evaluate(arguments: list[str]) -> None:
    """Measure predictions of battles whose outcomes are known, or compare two of them."""
    parser = _parser("evaluate", _evaluate)
    parser.add_argument("predictions", type=Path, help="a run folder (its held-out fold), or a predictions.parquet")
    parser.add_argument("--data", help="labelled battles to predict with the run and to measure, like RewardBench's")
    parser.add_argument("--against", type=Path, help="another run or predictions.parquet of the same battles")
    options = parser.parse_args(arguments)
    from rewardmodel.evaluation.evaluate import (
        compare,
        evaluate,
        evaluate_run,
        format_difference,
        format_evaluation,
    )

    given = [options.predictions, *([options.against] if options.against else [])]
    if options.data:
        from rewardmodel.inference.predict import predict

        given = [predict(run, options.data) for run in given]
    if options.against:
        print(format_difference(compare(*given)))
    elif not options.data and options.predictions.is_dir():
        print(format_evaluation(evaluate_run(options.predictions)))
    else:
        print(format_evaluation(evaluate(given[0])))


def _report(arguments: list[str]) -> None:
    """Write a run's report.html, or a page that compares several runs."""
    parser = _parser("report", _report)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; several are compared with the first")
    parser.add_argument("--output", type=Path, help="the HTML file to write; none: in the (first) run")
    options = parser.parse_args(arguments)
    from rewardmodel.evaluation.report import report

    print(report(options.runs, options.output))


def _export(arguments: list[str]) -> None:
    """Write a run, or the mean of several, in a form that other machines load, and check it beside the run."""
    parser = _parser("export", _export)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or a folder of fold-0, fold-1, ...")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    kinds = "adapter, merged, merged_4bit, merged_8bit, soup, kaggle"
    parser.add_argument("--kind", default="merged", help=f"{kinds} (merged)")
    parser.add_argument("--dtype", help="of merged weights: bfloat16, float16, float32 (bfloat16)")
    parser.add_argument("--battles", help="to compare on, 64 at least; none: the run's held-out ones, or 'sample'")
    parser.add_argument("--rewardmodel-only", action="store_true", help="accept what plain transformers reads wrongly")
    parser.add_argument("--push-to-hub", help="owner/name of a model repository, made private if it is not there")
    kaggle = parser.add_argument_group("--kind kaggle")
    kaggle.add_argument("--dataset", help="owner/name of the Kaggle data set")
    kaggle.add_argument("--installed", type=Path, help="what is installed there, as pip freeze prints it")
    kaggle.add_argument("--contents", help="the model inside, another of the kinds (adapter)")
    kaggle.add_argument("--base", help="where the adapter's backbone is mounted there")
    kaggle.add_argument("--python", help="version there (3.12)")
    options = vars(parser.parse_args(arguments))
    asked = {name: options.pop(name) for name in ("dataset", "installed", "contents", "base", "python")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked and not {"dataset", "installed"} <= asked.keys():
        raise InputError(f"--{next(iter(asked))}: only for --kind kaggle, which needs --dataset and --installed")
    from rewardmodel.exports.export import export
    from rewardmodel.exports.kaggle import Bundle
    from rewardmodel.exports.parity import format_parity

    facts = export(**options, bundle=Bundle(**asked) if asked else None)
    print(f"{format_parity(facts)}\n\n{options['output']}")


def _baseline(arguments: list[str]) -> None:
    """Measure what needs no language model: class prior, lengths, TF-IDF; out of fold."""
    parser = _parser("baseline", _baseline)
    parser.add_argument("battles", help="labelled battles: a file, a hub data set, or 'sample'")
    parser.add_argument("--folds", type=int, default=5, help="folds by prompt group (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the folds (0)")
    parser.add_argument("--output", type=Path, help="a .parquet file for the predictions")
    options = parser.parse_args(arguments)
    if options.output and options.output.suffix != ".parquet":
        raise InputError(f"--output: {options.output} does not end in .parquet; let it")
    _make_parent(options.output)
    from rewardmodel.config.schema import DataConfig
    from rewardmodel.data.splits import load_battles
    from rewardmodel.evaluation.baselines import baseline, format_baseline, measure_baselines
    from rewardmodel.predictions import write_predictions

    table = baseline(load_battles(DataConfig(train=options.battles, folds=options.folds, seed=options.seed)))
    if options.output:
        write_predictions(table, options.output)
    print(format_baseline(measure_baselines(table)))


OVERRIDES = "any key of the recipe can be overruled: --SECTION.KEY VALUE"

VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "run": _run,
    "doctor": _doctor,
    "prepare": _prepare,
    "train": _train,
    "predict": _predict,
    "evaluate": _evaluate,
    "report": _report,
    "export": _export,
    "baseline": _baseline,
}
"""Commands by name; the first line of each docstring is its help."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0; 2 for what a person can mend; 1 for numbers gone wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: rewardmodel COMMAND ...    (rewardmodel COMMAND --help tells more)\n")
        print("\n".join(f"  {name:<10}{verb.__doc__}" for name, verb in VERBS.items()))
        return 0
    try:
        if arguments[0] not in VERBS:
            raise InputError(f"rewardmodel: no command '{arguments[0]}'; there are: {', '.join(VERBS)}")
        _bound_cpu_memory()
        _set_up_logging()
        with contextlib.nullcontext() if is_main() else contextlib.redirect_stdout(io.StringIO()):
            return VERBS[arguments[0]](arguments[1:]) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {' '.join(str(error).split())}; mend the path or its permissions", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; a run continues from its last checkpoint with --resume", file=sys.stderr)
        return 130


def _parser(name: str, verb: Callable) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(f"rewardmodel {name}", description=verb.__doc__, allow_abbrev=False)


def _numbers(name: str, words: list[str] | None) -> list[float] | None:
    try:
        return None if words is None else [float(word) for word in words]
    except ValueError as error:
        raise InputError(f"{name}: {' '.join(words or ())}: not all are numbers; give numbers") from error


def _make_parent(path: Path | None) -> None:
    """Make the folder of a file to write, so that one that cannot be is told before the work."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file of the recipe")
    parser.add_argument("--resume", action="store_true", help="continue the run in trainer.output_dir")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in trainer.output_dir")
    parser.epilog = OVERRIDES


def _parse_with_recipe(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the command's own options, and the overrides of recipe keys; `--help` prints both kinds."""
    if "-h" in arguments or "--help" in arguments:
        from rewardmodel.config.loader import recipe_parser

        parser.print_help()
        keys = recipe_parser(parser.prog)
        keys.usage = argparse.SUPPRESS
        keys.print_help()
        raise SystemExit(0)
    if arguments and arguments[0].startswith("-"):
        raise InputError(f"{parser.prog}: the recipe comes first: {parser.prog} RECIPE [--section.key VALUE ...]")
    return parser.parse_known_args(arguments)


def _bound_cpu_memory() -> None:
    # oneDNN keeps a kernel for each shape it has seen, and every batch has another length: gigabytes, and no faster.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")


def _set_up_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("rewardmodel")
    ours.setLevel(logging.INFO if is_main() else logging.WARNING)
    ours.handlers = [handler]
    ours.propagate = False
    # Noise that a person can do nothing about: an optional kernel, and an old name that peft asks transformers by.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
