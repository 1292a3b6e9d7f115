"""Log losses by number of training battles in, a power law with its interval out, and what more battles would give.

The law is loss(n) = floor + scale * n ** -exponent (Hestness et al. 2017, arXiv:1712.00409; Rosenfeld et al. 2020,
arXiv:1909.12673), fitted by least squares to the mean loss of each size. Intervals are of a bootstrap that draws prompt
groups of the held-out battles, the same for every size, and the draws of training battles of each size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewardmodel.errors import plural
from rewardmodel.evaluation.bootstrap import FEWEST_GROUPS, draw_groups, interval_of
from rewardmodel.evaluation.results import Interval

FEWEST_SIZES = 4
"""Sizes that a fit needs: the law has three parameters."""

MORE = 10_000
"""Battles more than there are that an extrapolation is made for, beside twice as many."""

EXPONENTS = np.geomspace(0.05, 2, 120)
"""Exponents that a fit chooses from: published ones of learning curves are between 0.07 and 1."""

CURVE_POINTS = 60
"""Points of the fitted curve that are kept for the chart."""


@dataclass(frozen=True)
class SizeResult:
    """What models that were trained on so many battles lose on the held-out battles.

    Attributes:
        battles: training battles, the mean over draws.
        log_loss: mean over draws and held-out battles.
        draws: log loss of each draw.
    """

    battles: float
    log_loss: Interval
    draws: list[float]


@dataclass(frozen=True)
class PowerLaw:
    """loss(n) = floor + scale * n ** -exponent.

    Attributes:
        floor: the loss with endlessly many battles.
        scale: positive where the loss falls.
        exponent: how fast it falls.
        left_out: what a law fitted without the largest size predicts for it, minus what was measured there; None: too
            few sizes for that.
    """

    floor: Interval
    scale: Interval
    exponent: Interval
    left_out: Interval | None


@dataclass(frozen=True)
class Outlook:
    """What the law says of more training battles than there are.

    Attributes:
        battles: so many.
        log_loss: what they would give.
        gain: the law's loss with all battles that there are, minus this one.
        refusal: why the law cannot tell; None: it can.
    """

    battles: int
    log_loss: Interval
    gain: Interval
    refusal: str | None


@dataclass(frozen=True)
class CurvePlace:
    """A place of the fitted curve; `low` and `high` bound its difference to the law's loss with all battles."""

    battles: float
    log_loss: float
    low: float
    high: float


@dataclass(frozen=True)
class LearningCurve:
    """A learning curve over numbers of training battles.

    Attributes:
        recipe: its name.
        held_out: battles that every model is judged on.
        groups: their prompt groups.
        prior: their log loss by the class shares of all training battles.
        sizes: by number of training battles.
        fall: loss with the fewest battles minus that with all.
        law: fitted to the sizes; None: it cannot be fitted.
        outlooks: for twice as many battles, and for `MORE` more.
        curve: the fitted law, from the fewest battles to the last outlook.
        refusal: why there is no extrapolation at all; None: there is.
    """

    recipe: str
    held_out: int
    groups: int
    prior: float
    sizes: list[SizeResult]
    fall: Interval
    law: PowerLaw | None
    outlooks: list[Outlook]
    curve: list[CurvePlace]
    refusal: str | None


def summarise_curve(
    recipe: str, battles: Sequence[float], losses: Sequence[np.ndarray], groups: np.ndarray, prior: float
) -> LearningCurve:
    """Return the learning curve of measured losses.

    Args:
        recipe: its name.
        battles: number of training battles of each size, ascending.
        losses: for each size (n_draws, n_held_out) float64, the log loss of each held-out battle.
        groups: (n_held_out,) integer labels of prompt groups.
        prior: log loss of the class prior on the held-out battles.
    """
    sizes = np.asarray(battles, np.float64)
    means, count = _bootstrap_means(losses, groups), len(np.unique(groups))
    results = [
        SizeResult(float(size), interval_of(column, count), [float(draw.mean()) for draw in one])
        for size, column, one in zip(sizes, means.T, losses, strict=True)
    ]
    fall = interval_of(means[:, 0] - means[:, -1], count)
    law, outlooks, curve = None, [], []
    if len(sizes) >= FEWEST_SIZES:
        fits = fit_power_law(sizes, means)
        floor, scale, exponent = (interval_of(column, count) for column in fits.T)
        law = PowerLaw(floor, scale, exponent, _leave_out(sizes, means, count))
        targets = [2 * round(sizes[-1]), round(sizes[-1]) + MORE]
        outlooks = [_look_ahead(target, sizes, fits, count, fall) for target in targets]
        curve = _draw_curve(np.geomspace(sizes[0], max(targets), CURVE_POINTS), sizes[-1], fits)
    refusal = _refusal(len(sizes), count, fall, law)
    return LearningCurve(recipe, len(groups), count, prior, results, fall, law, outlooks, curve, refusal)


def fit_power_law(battles: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return floor, scale and exponent of the laws that fit losses best, (n_curves, 3) float64.

    Neither floor nor scale is negative: where the loss rises, the scale is 0. For each exponent of `EXPONENTS` the law
    is linear, so that its least squares have a closed form; the exponent with the least squares is taken.

    Args:
        battles: (n_sizes,) float64.
        losses: (n_curves, n_sizes) float64, the mean loss of each size.
    """
    scaled = (battles / battles[-1]) ** -EXPONENTS[:, None]  # (n_exponents, n_sizes), 1 for the most battles
    spread = scaled - scaled.mean(axis=1, keepdims=True)
    scale = (losses @ spread.T / (spread**2).sum(axis=1)).clip(min=0)  # (n_curves, n_exponents)
    floor = losses.mean(axis=1, keepdims=True) - scale * scaled.mean(axis=1)
    through_zero = losses @ scaled.T / (scaled**2).sum(axis=1)
    scale, floor = np.where(floor < 0, through_zero, scale), floor.clip(min=0)
    fitted = floor[..., None] + scale[..., None] * scaled
    best = ((fitted - losses[:, None]) ** 2).sum(axis=2).argmin(axis=1)
    rows = np.arange(len(losses))
    exponent = EXPONENTS[best]
    return np.stack([floor[rows, best], scale[rows, best] * battles[-1] ** exponent, exponent], axis=1)


def law_losses(fits: np.ndarray, battles: np.ndarray | float) -> np.ndarray:
    """Return the losses of laws, (n_curves, n_sizes), of (n_curves, 3) `fit_power_law` for numbers of battles."""
    floor, scale, exponent = (column[:, None] for column in fits.T)
    return floor + scale * np.atleast_1d(battles) ** -exponent


def _bootstrap_means(losses: Sequence[np.ndarray], groups: np.ndarray) -> np.ndarray:
    """Return mean losses, (1 + samples, n_sizes): measured, and with groups and draws drawn with replacement."""
    by_draw = draw_groups(groups).means(np.concatenate(losses).T)
    random = np.random.default_rng(0)
    columns, start = [], 0
    for one in losses:
        own = by_draw[:, start : start + len(one)]
        start += len(one)
        drawn = random.integers(len(one), size=own.shape)
        drawn[0] = np.arange(len(one))
        columns.append(np.take_along_axis(own, drawn, axis=1).mean(axis=1))
    return np.stack(columns, axis=1)


def _leave_out(sizes: np.ndarray, means: np.ndarray, groups: int) -> Interval | None:
    """Return how far a law of all sizes but the largest misses that one."""
    if len(sizes) <= FEWEST_SIZES:
        return None
    found = law_losses(fit_power_law(sizes[:-1], means[:, :-1]), sizes[-1])[:, 0]
    return interval_of(found - means[:, -1], groups)


def _look_ahead(battles: int, sizes: np.ndarray, fits: np.ndarray, groups: int, fall: Interval) -> Outlook:
    """Return what the law says of so many battles, or why it cannot tell."""
    there, here = law_losses(fits, battles)[:, 0], law_losses(fits, sizes[-1])[:, 0]
    gain, refusal = interval_of(here - there, groups), None
    if battles / sizes[-1] > sizes[-1] / sizes[0]:
        refusal = (
            f"{battles / sizes[-1]:.0f} times as many battles as there are, but the sizes measured span only a factor "
            f"of {sizes[-1] / sizes[0]:.0f}"
        )
    elif gain.low is not None and gain.high is not None and gain.high - gain.low > fall.value:
        refusal = f"its interval, {gain.bracket()}, is wider than the whole fall measured, {fall.value:.4f}"
    return Outlook(battles, interval_of(there, groups), gain, refusal)


def _draw_curve(battles: np.ndarray, largest: float, fits: np.ndarray) -> list[CurvePlace]:
    """Return the fitted curve and the bounds of its difference to the law's loss with all battles."""
    here, losses = law_losses(fits, largest), law_losses(fits, battles)
    low, high = np.quantile((losses - here)[1:], [0.025, 0.975], axis=0) + here[0]
    return [CurvePlace(*map(float, one)) for one in zip(battles, losses[0], low, high, strict=True)]


def _refusal(sizes: int, groups: int, fall: Interval, law: PowerLaw | None) -> str | None:
    """Return why nothing can be said of more battles; None: something can."""
    if sizes < FEWEST_SIZES:
        return f"a power law has three parameters and needs {FEWEST_SIZES} sizes; there are {sizes}"
    if groups < FEWEST_GROUPS:
        return f"{plural(groups, 'prompt')} held out; an interval needs {FEWEST_GROUPS}"
    if not fall.above():
        return f"from the fewest battles to all, the loss falls by {fall.value:.4f} {fall.bracket()}: not beyond noise"
    if law and law.left_out and law.left_out.excludes():
        miss = law.left_out
        return f"fitted without the largest size, the law misses it by {miss.value:+.4f} {miss.bracket('+')}"
    return None


def describe_law(law: PowerLaw) -> str:
    """Return a law as a formula: `0.9421 + 0.8120 n^-0.312`."""
    return f"{law.floor.value:.4f} + {law.scale.value:.4g} n^-{law.exponent.value:.3f}"


def format_curve(curve: LearningCurve) -> str:
    """Return a learning curve as lines for a terminal."""
    lines = [
        f"{curve.recipe}: {plural(curve.held_out, 'held-out battle')} of {plural(curve.groups, 'prompt')}; "
        f"class prior {curve.prior:.4f}",
        "",
        f"{'battles':>9}  {'draws':>5}  log loss",
    ]
    lines += [f"{one.battles:>9,.0f}  {len(one.draws):>5}  {one.log_loss}" for one in curve.sizes]
    lines += [f"{'fall':>9}  {'':>5}  {curve.fall}", ""]
    if curve.law:
        lines += [
            f"log loss of n battles = {describe_law(curve.law)}",
            f"  floor     {curve.law.floor}",
            f"  exponent  {curve.law.exponent}",
        ]
        if curve.law.left_out:
            lines.append(f"  without the largest size it misses that by {curve.law.left_out}")
        lines.append("")
    return "\n".join([*lines, *describe_outlooks(curve)])


def describe_outlooks(curve: LearningCurve) -> list[str]:
    """Return what more battles would give, a sentence each, or why that cannot be told."""
    if curve.refusal:
        return [f"What more battles would give cannot be told: {curve.refusal}."]
    here = curve.sizes[-1].battles
    sentences = []
    for one in curve.outlooks:
        more = f"{one.battles:,} battles ({one.battles / here:.1f} times as many)"
        if one.refusal:
            sentences.append(f"{more}: cannot be told: {one.refusal}.")
        else:
            sentences.append(
                f"{more}: a log loss of {one.log_loss.value:.4f} {one.log_loss.bracket()}, which is "
                f"{one.gain.value:.4f} {one.gain.bracket()} below that of the battles that there are."
            )
    if curve.law and curve.law.exponent.value < 1.1 * EXPONENTS[0]:
        sentences.append(
            f"The exponent is about the least that is fitted, {EXPONENTS[0]:g}: each doubling still gains nearly as "
            "much as the one before, and the gains above assume that it goes on so."
        )
    return sentences
