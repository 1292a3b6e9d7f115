"""The types of an evaluation, which metrics.json holds by these names; `read_evaluation` reads it back.

Any part of an `Evaluation` may be None: it was not measured, or cannot be estimated on these battles.
"""

import json
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from rewardmodel.errors import InputError


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % confidence interval.

    `low` and `high` are None where there is no interval: too few prompt groups (`bootstrap.FEWEST_GROUPS`), or the same
    value in all samples.
    """

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """Return it as a cell of a table on a terminal."""
        return f"{self.value:>7.4f}   {'' if self.low is None else '95 % '}{self.bracket()}"

    def bracket(self, sign: str = "") -> str:
        """Return the interval as text; `sign` is + to show the sign of positive numbers too."""
        if self.low is None:
            return "no interval"
        return f"[{self.low:{sign}.4f}, {self.high:{sign}.4f}]"

    def below(self, other: float = 0) -> bool:
        """Return whether the whole interval is below `other`; none is below nothing."""
        return self.high is not None and self.high < other

    def above(self, other: float = 0) -> bool:
        """Return whether the whole interval is above `other`."""
        return self.low is not None and self.low > other

    def excludes(self, other: float = 0) -> bool:
        """Return whether `other` is outside the interval."""
        return self.below(other) or self.above(other)


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference in log loss, negative where the first model is better, and its two-sided p-value.

    `p` is None where there is no interval.
    """

    p: float | None

    def describe(self) -> str:
        """Return it as the change that a method makes."""
        return f"changes the log loss by {self.value:+.4f} {self.bracket('+')}"

    def judge(self) -> str:
        """Return whether it is noise, in words."""
        if self.low is None:
            return "no difference" if self.value == 0 else "too few prompts to tell"
        return "beyond noise" if self.excludes() else "within noise"


@dataclass(frozen=True)
class BaselineResult:
    """A baseline on the same battles: its log loss, and that of the model minus it."""

    log_loss: Interval
    difference: Difference


@dataclass(frozen=True)
class CalibrationResult:
    """The calibrator that was chosen for a run, and what was tried."""

    method: str | None
    """None: probabilities stay as the model gives them."""
    parameters: list[float]
    applied: bool
    fitted_on: str
    tried: dict[str, Difference]
    """By method: cross-fitted log loss minus that of the uncalibrated predictions."""
    verdict: str
    blended: Difference | None
    """Cross-fitted log loss of the blend with a baseline minus that of the best choice without it."""
    before: dict[str, float]
    """Metrics of the uncalibrated predictions."""
    gain: Difference | None
    """Log loss after calibration minus before; None: not applied."""


@dataclass(frozen=True)
class ReliabilityBin:
    """Battles whose likeliest outcome has a probability from `low` to `high`."""

    low: float
    high: float
    battles: int
    confidence: float
    """Mean probability of the likeliest outcome."""
    hit_rate: float
    """Share of the battles in which it happened; `hit_low` and `hit_high` are its Wilson interval (95 %)."""
    hit_low: float
    hit_high: float


@dataclass(frozen=True)
class Reliability:
    """Reliability diagrams of the predictions before calibration and, where it was applied, after."""

    before: list[ReliabilityBin]
    after: list[ReliabilityBin] | None = None


@dataclass(frozen=True)
class PositionBias:
    """How predictions depend on which response stands first, over battles that were predicted in both orders."""

    flip_rate: Interval
    """Share of battles whose likeliest outcome differs between the orders."""
    mean_abs_difference: Interval
    """Of the probabilities."""
    preference: Interval
    """Mean over battles and orders of P(first wins) - P(second wins); 0 without position bias."""
    log_loss: dict[str, Interval]
    """Of `ab` (A first), `ba` (B first) and their `average`."""
    gain: Interval
    """Mean log loss of the two orders minus that of their average."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """How good predictions are on some of the battles."""

    name: str = ""
    battles: int
    log_loss: Interval
    accuracy: Interval
    accuracy_decided: Interval | None
    prior: float
    """Log loss of the slice's own outcome shares."""
    prior_all: float | None = None
    """Log loss on the slice of the outcome shares of all battles."""


@dataclass(frozen=True)
class VerbosityBias:
    """How much people and the model prefer longer responses: slopes of the log-odds on the log length ratio."""

    battles: int
    """That were won, by the longer response or the shorter one: slopes and `longer_wins` are estimated on them."""
    humans: Interval | None
    """None: no finite slope."""
    model: Interval | None
    difference: Interval | None
    """Slope of the model minus that of people."""
    verdict: str
    longer_wins: dict[str, Interval] | None
    """How often the longer response wins: `humans`, `model` (mean probability), `model_picks` (it is the likelier)."""
    matched: Slice | None
    """Battles whose lengths differ by less than 10 %."""


@dataclass(frozen=True)
class WinRate:
    """Win rate of a model, a family or a model against another; a tie is half a win."""

    name: str
    battles: int
    human: float
    predicted: float
    difference: Interval
    """Predicted minus human."""
    against: str | None = None


@dataclass(frozen=True)
class ModelBias:
    """Win rates as predicted and by people, the largest differences first; empty where names are unknown."""

    families: list[WinRate]
    names: list[WinRate]
    pairs: list[WinRate]


@dataclass(frozen=True)
class Evaluation:
    """Everything that is measured of predictions with known outcomes."""

    battles: int
    groups: int
    """Prompt groups; intervals are clustered by them."""
    metrics: dict[str, Interval] | None = None
    """By the names of `metrics.METRICS`."""
    prior: float | None = None
    """Log loss of these battles' own outcome shares."""
    baselines: dict[str, BaselineResult] | None = None
    """By name, the worst first."""
    calibration: CalibrationResult | None = None
    reliability: Reliability | None = None
    spread: float | None = None
    """The largest standard deviation over battles of a probability."""
    mean_probabilities: list[float] | None = None
    """Of A, B and tie."""
    confusion: list[list[int]] | None = None
    """Confusion matrix, battles: true outcome (row) by likeliest outcome (column)."""
    position: PositionBias | None = None
    verbosity: VerbosityBias | None = None
    models: ModelBias | None = None
    slices: dict[str, list[Slice] | None] | None = None
    """By dimension, e.g. {"source": [Slice("arena", ...)], "turns": None}; None where the table lacks its column."""


def read_evaluation(path: Path) -> Evaluation:
    """Return the evaluation of a metrics.json, also of a run that an earlier release evaluated.

    Raises:
        InputError: no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for old, new in {"floors": "baselines", "stated": "mean_probabilities"}.items():
            if old in content:
                content[new] = content.pop(old)
        return _parse(Evaluation, content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: cannot read an evaluation; run `rewardmodel evaluate` on the run again") from error


def _parse(kind: Any, value: Any) -> Any:
    """Return a JSON value as the type that a field is annotated with, e.g. dict[str, Interval] | None."""
    if value is None:
        return None
    if isinstance(kind, UnionType):  # X | None
        return _parse(get_args(kind)[0], value)
    if is_dataclass(kind):
        fields: dict[str, Any] = {name: one for name, one in get_type_hints(kind).items() if name in value}
        build: Any = kind
        return build(**{name: _parse(one, value[name]) for name, one in fields.items()})
    if get_origin(kind) is list:
        return [_parse(get_args(kind)[0], one) for one in value]
    if get_origin(kind) is dict:
        return {name: _parse(get_args(kind)[1], one) for name, one in value.items()}
    return value
