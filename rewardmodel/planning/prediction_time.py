"""A recipe and GPUs -> whether training, or predicting many battles, fits into some hours, and what to change."""

import math
from collections.abc import Sequence
from dataclasses import replace

from rewardmodel.config.schema import Recipe
from rewardmodel.distributed import Launch
from rewardmodel.errors import plural
from rewardmodel.planning.diagnosis import Diagnosis, format_duration
from rewardmodel.planning.doctor import doctor
from rewardmodel.planning.estimate import UTILISATION
from rewardmodel.planning.gpus import GIB


def describe_prediction_time(recipes: Sequence[Recipe], device: str, gpus: int, battles: int, limit: float) -> str:
    """Return the estimated time of predicting battles as text, with what to change where it is over a limit.

    Models predict one after the other, so that their times add up.

    Lengths are those of the recipe's own battles, or of the competition's (`planning.workload`).

    Args:
        recipes: of the model, or of each of several.
        device: a name from `planning.gpus.DEVICES`.
        gpus: how many of them, a process each.
        battles: number of battles.
        limit: hours that there are.

    Raises:
        InputError: as `planning.doctor.doctor`.
    """
    where = f"{plural(battles, 'battle')} on {gpus} x {device}"
    found = [_diagnose(recipe, device, gpus) for recipe in recipes]
    for one in found:
        if one.estimate is None:
            return f"{where}: not possible: {'; '.join(one.problems)}"
        if not one.estimate.inference.fits:
            needed = f"{one.estimate.inference.least / GIB:.1f} of {one.device.memory / GIB:.1f} GiB"
            return (
                f"{where}: not possible: prediction needs {needed}; export --contents merged_4bit, or train in 4 bits"
            )
    hours = sum(_prediction_hours(one, battles) for one in found)
    swapped = any(recipe.inference.swap_tta == "both" for recipe in recipes)
    orders = "both orders" if swapped else "one order"
    text = f"{where}: about {hours:.1f} h in {orders}, assuming {UTILISATION['cuda']:.0%} of the GPU's speed"
    if hours <= limit:
        return text
    text += f"; that is over {limit:.1f} h"
    smaller = "prompt.max_length or the backbone must be smaller in training, or the GPU faster"
    smaller += ", or the models fewer" if len(recipes) > 1 else ""
    if not swapped:
        return f"{text}: {smaller}"
    once = [replace(recipe, inference=replace(recipe.inference, swap_tta="none")) for recipe in recipes]
    one_order = sum(_prediction_hours(_diagnose(recipe, device, gpus), battles) for recipe in once)
    if one_order > limit:
        return f"{text}, and so is one order ({one_order:.1f} h): {smaller}"
    share = min(1.0, (limit - one_order) / one_order)
    return (
        f"{text}: one order takes {one_order:.1f} h, which leaves time for {share:.0%} of the other; for all, {smaller}"
    )


def describe_training_time(found: Diagnosis, limit: float) -> str:
    """Return as text whether a recipe's training fits into a number of hours, and else what to change.

    Args:
        found: what `planning.doctor.doctor` says of the recipe, with an estimate.
        limit: hours that there are for training, its evaluations and the prediction of the validation battles.
    """
    if found.estimate is None:
        raise ValueError("no estimate: settings are incompatible")
    total, workload = found.estimate.hours.total, found.estimate.workload
    if total <= limit:
        return f"limit      fits: about {format_duration(total)} of {limit:.1f} h"
    battles = (workload.training + workload.validation) * limit / total
    rounded = math.floor(battles / 10 ** (digits := max(0, int(math.log10(battles)) - 1))) * 10**digits
    return (
        f"limit      too long: about {total:.1f} h, and there are {limit:.1f}; continue it with --resume, in "
        f"{math.ceil(total / limit)} sessions, or train on fewer battles: data.limit {rounded}"
    )


def _diagnose(recipe: Recipe, device: str, gpus: int) -> Diagnosis:
    """Return what `doctor` says of a recipe, with the trainer's defaults, because training does not matter here."""
    launch = Launch(gpus, "ddp" if gpus > 1 else "")
    return doctor(replace(recipe, trainer=Recipe().trainer), device, launch, others=False)


def _prediction_hours(found: Diagnosis, battles: int) -> float:
    """Return the hours of predicting a number of battles, of the same lengths as the validation battles."""
    if found.estimate is None:
        raise ValueError("no estimate: settings are incompatible")
    return found.estimate.hours.prediction * battles / found.estimate.workload.validation
