"""What stands out in an evaluation, a sentence each: the same on the page and on a terminal.

A result stands out where it is beyond chance (its 95 % interval excludes what it is compared with) and of a size that
matters; so does skill that is not beyond chance. What was not measured is skipped.
"""

import math
from collections.abc import Iterator, Sequence

from rewardmodel.errors import plural
from rewardmodel.evaluation.bootstrap import FEWEST_GROUPS
from rewardmodel.evaluation.results import Evaluation, Interval
from rewardmodel.metrics import wilson_interval

UNIFORM_LOG_LOSS = math.log(3)
"""Log loss of one third each."""

LARGE_GAP = 0.05
"""Least gap in probability that matters.

So large is a preference for a position, in P(first wins) - P(second wins), that costs 0.002 nats of log loss where A
and B have 35 % each: -0.35 ln(1 - (0.025 / 0.35)^2). One of 0.01 costs 0.0001, and averaging both orders removes it.
"""

MANY_FLIPS = 0.3
"""Least share of flipped verdicts that matters: close battles flip with the order whatever the model."""

MIN_SPREAD = 0.01
"""Standard deviation over battles below which a probability counts as constant."""

MAX_NAMES = 4
"""Names that a sentence or a line lists before "and 3 more"."""


def list_findings(evaluation: Evaluation, training: Sequence[tuple[float, float]] = ()) -> list[str]:
    """Return what a person should look at first, a sentence each; empty where nothing stands out.

    Args:
        evaluation: what `evaluate` or `audit_bias` returns.
        training: steps and their training loss.
    """
    rules = (_skill, _confidence, _shares, _order, _length, _models, _slices)
    found = [sentence for rule in rules for sentence in rule(evaluation)]
    broken = sum(not math.isfinite(loss) for _, loss in training)
    return [*found, f"The training loss was NaN or infinite at {plural(broken, 'logged step')}."] if broken else found


def join_names(names: Sequence[str]) -> str:
    """Return the first `MAX_NAMES` names, and how many more there are: "a, b, c, d and 3 more"."""
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {rest:,} more" if rest > 0 else "")


def _excludes(groups: int, found: Interval, other: float = 0) -> bool:
    """Return whether the interval of an estimate over all battles excludes a value."""
    if found.low is None and groups >= FEWEST_GROUPS:  # the same in every group, up to rounding
        value = found.value
        low, high = wilson_interval(value, groups) if value in (0, 1) else (value - 1e-9, value + 1e-9)
        return not low <= other <= high
    return found.excludes(other)


def _skill(evaluation: Evaluation) -> Iterator[str]:
    metrics, groups = evaluation.metrics or {}, evaluation.groups
    loss, winners = metrics.get("log_loss"), metrics.get("accuracy_decided")
    if loss and loss.value > UNIFORM_LOG_LOSS and _excludes(groups, loss, UNIFORM_LOG_LOSS):
        yield f"The log loss, {loss.value:.4f}, is worse than {UNIFORM_LOG_LOSS:.4f}, that of one third each."
    if evaluation.spread is not None and evaluation.spread < MIN_SPREAD and evaluation.battles > 1:
        yield "All battles get nearly the same prediction: the model ignores its input."
    if winners and not (winners.value > 0.5 and _excludes(groups, winners, 0.5)):
        found = f"{100 * winners.value:.0f} %"
        if winners.low is not None and winners.high is not None:
            found += f" [{100 * winners.low:.0f}, {100 * winners.high:.0f}]"
        yield f"Picking the winner is not shown to be better than chance: {found} of decided battles are right."


def _confidence(evaluation: Evaluation) -> Iterator[str]:
    reliability, hits = evaluation.reliability, (evaluation.metrics or {}).get("accuracy")
    bins = reliability and (reliability.after or reliability.before)
    if not bins or not hits:
        return
    confidence = sum(one.battles * one.confidence for one in bins) / sum(one.battles for one in bins)
    if abs(confidence - hits.value) >= LARGE_GAP and _excludes(evaluation.groups, hits, confidence):
        kind = "overconfident" if confidence > hits.value else "underconfident"
        mean = f"the likeliest outcome gets {100 * confidence:.0f} % on average"
        yield f"The model is {kind}: {mean}, and happens in {100 * hits.value:.0f} % of battles."


def _shares(evaluation: Evaluation) -> Iterator[str]:
    """Yield outcomes whose mean probability is not their share of the battles, by Wilson's interval."""
    confusion, means = evaluation.confusion or [], evaluation.mean_probabilities or []
    names = ("A wins", "B wins", "tie")
    for outcome, (name, row, mean) in enumerate(zip(names, confusion, means, strict=False)):
        share = sum(row) / evaluation.battles
        low, high = wilson_interval(share, evaluation.groups)
        if abs(mean - share) >= LARGE_GAP and not low <= mean <= high:
            never = "" if any(one[outcome] for one in confusion) else "; it is never the likeliest outcome"
            yield f"P({name}) is {100 * mean:.0f} % on average, but it happens in {100 * share:.0f} %{never}."


def _order(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.position is None:
        return
    flips, preference = evaluation.position.flip_rate, evaluation.position.preference
    if flips.value > MANY_FLIPS and _excludes(evaluation.groups, flips, MANY_FLIPS):
        yield f"The verdict flips with the order of the responses in {100 * flips.value:.0f} % of battles."
    if abs(preference.value) >= LARGE_GAP and _excludes(evaluation.groups, preference):
        place, points = "first" if preference.value > 0 else "second", 100 * abs(preference.value)
        yield f"The model favours the response that stands {place}, by {points:.0f} points of probability."


def _length(evaluation: Evaluation) -> Iterator[str]:
    difference = evaluation.verbosity and evaluation.verbosity.difference
    if not difference:
        return
    # what twice the length adds between otherwise even responses: expit(s) - expit(-s), s = slope ln 2
    gap = math.tanh(difference.value * math.log(2) / 2)
    if abs(gap) >= LARGE_GAP and _excludes(evaluation.groups, difference):
        more, points = "more" if gap > 0 else "less", 100 * abs(gap)
        yield f"The model favours longer responses {more} than people do: one twice as long by {points:.0f} points."


def _models(evaluation: Evaluation) -> Iterator[str]:
    """Yield whose win rates are predicted wrong: families, or models where no families are."""
    if evaluation.models is None:
        return
    for what, rows in (("families", evaluation.models.families), ("models", evaluation.models.names)):
        off = [row for row in rows if row.difference.excludes()]
        named = [f"{row.name} {_points(gap)}" for row in off if abs(gap := row.difference.value) >= LARGE_GAP]
        # 5 % of the intervals exclude 0 by chance; that and two standard deviations more do not
        if named and len(off) > 0.05 * len(rows) + 2 * (0.05 * 0.95 * len(rows)) ** 0.5:
            yield f"The predicted win rate of {len(named)} of {len(rows)} {what} is off: {join_names(named)}."
            return


def _points(gap: float) -> str:
    return f"{100 * abs(gap):.0f} points too {'high' if gap > 0 else 'low'}"


def _slices(evaluation: Evaluation) -> Iterator[str]:
    """Yield kinds of battles on which the model is worse than constant outcome shares, whatever the gap.

    Where it is worse on all battles together, its kinds are not what stands out.
    """
    for dimension, rows in (evaluation.slices or {}).items():
        gaps = [(row, row.log_loss, row.prior_all) for row in rows or [] if row.prior_all is not None]
        if dimension == "outcome" or sum(row.battles * (loss.value - prior) for row, loss, prior in gaps) >= 0:
            continue
        named = [
            f"{row.name} (log loss {loss.value:.4f} against {prior:.4f})"
            for row, loss, prior in gaps
            if loss.value > prior and loss.excludes(prior)
        ]
        if named:
            by = dimension.replace("_", " ")
            yield f"By {by}, the model is worse than the outcome shares of all battles on: {join_names(named)}."
