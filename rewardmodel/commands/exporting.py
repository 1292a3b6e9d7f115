"""The command that writes a run for other machines: export."""

from argparse import Namespace
from typing import TYPE_CHECKING

from rewardmodel.commands.numbers import read_numbers
from rewardmodel.errors import InputError

if TYPE_CHECKING:
    from rewardmodel.exports.kaggle import Bundle


def _export(options: Namespace) -> None:
    """Write a run, or the mean of several, in a form that other machines load, and compare it with the run."""
    names = ("dataset", "installed", "contents", "base", "python", "accelerator", "separate")
    asked = {name: value for name in names if (value := getattr(options, name)) is not None}
    weights, limit = read_numbers("--weights", options.weights), read_numbers("--time-limit", options.time_limit)
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


EXPORTING = {"export": _export}
