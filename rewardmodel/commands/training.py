"""Commands that take a recipe: run, doctor, prepare, train, learning-curve."""

import logging
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from rewardmodel.commands.numbers import read_numbers
from rewardmodel.errors import InputError

if TYPE_CHECKING:
    from rewardmodel.config.schema import Recipe


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


def _doctor(options: Namespace) -> int:
    """Estimate memory, precision and time of a recipe and list incompatible settings; nothing is trained."""
    limit = read_numbers("--hours", options.hours)
    if limit and not limit[0] > 0:
        raise InputError(f"--hours: {limit[0]:g}; give more than 0")
    from rewardmodel.config.loader import load_recipe
    from rewardmodel.distributed import Launch, read_launch
    from rewardmodel.preflight import check_planning

    check_planning(options.device, options.gpus)
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


def _learning_curve(options: Namespace) -> None:
    """Measure log loss by number of training battles, fit a power law, and say what more battles would give."""
    if options.fold not in (None, "all"):
        raise InputError(f"--fold: {options.fold}; give `all`, or choose one fold with --data.fold")
    from rewardmodel.config.loader import load_recipe
    from rewardmodel.preflight import check_curve

    recipe = load_recipe(options.recipe, options.overrides)
    run, sizes = recipe.run_folder, options.sizes or ()
    output = options.output or run.with_name(f"{run.name}_learning_curve")
    check_curve(recipe, sizes, options.draws, output)
    from rewardmodel.learning_curve import measure_learning_curve

    all_folds = options.fold == "all"
    curve = measure_learning_curve(recipe, output, sizes=sizes, draws=options.draws, all_folds=all_folds)
    from rewardmodel.evaluation.learning_curve import format_curve

    print(f"{format_curve(curve)}\n\n{output / 'learning_curve.html'}")


TRAINING = {"run": _run, "doctor": _doctor, "prepare": _prepare, "train": _train, "learning-curve": _learning_curve}
