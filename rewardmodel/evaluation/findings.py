"""What was measured of predictions in, a sentence for each thing that stands out: the same on a page and a terminal.

A thing stands out where it is beyond chance (its 95 % interval leaves out what it is held against) and of a size that
matters; so does skill that is not beyond chance. What was not measured is passed over.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rewardmodel.evaluation.bootstrap import apart
from rewardmodel.metrics import wilson_interval

Facts = dict[str, Any]

UNIFORM = math.log(3)
"""Log loss of one third each."""

LARGE = 0.05
"""Least gap in probability that matters.

So large is a preference for a place, in P(first wins) - P(second wins), that costs 0.002 nats of log loss where A and B
have 35 % each: -0.35 ln(1 - (0.025 / 0.35)^2). One of 0.01 costs 0.0001, which averaging both orders takes out, too.
"""

MANY_FLIPS = 0.3
"""Least share of flipped verdicts that matters: close battles flip with the order whatever the model."""

NO_SPREAD = 0.01
"""Standard deviation over battles below which a probability counts as constant."""

ALIKE = 10
"""Least groups that tell something where all are alike and an interval is a point."""

MOST = 4
"""Names that a sentence or a line shows."""


def findings(facts: Facts, training: Sequence[tuple[float, float]] = ()) -> list[str]:
    """Return what a person should look at first, a sentence each; empty where nothing stands out.

    Args:
        facts: what `evaluate` or `audit_bias` returns; any part may be missing or None.
        training: steps and their training loss.
    """
    rules = (_skill, _confidence, _shares, _order, _length, _models, _slices)
    found = [sentence for rule in rules for sentence in rule(facts)]
    strange = sum(not math.isfinite(loss) for _, loss in training)
    return [*found, f"The training loss was no number at {strange} logged steps."] if strange else found


def some_of(names: Sequence[str]) -> str:
    """Return the first `MOST` of some names, and how many more there are."""
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST:,} more" if len(names) > MOST else "")


def _beyond(facts: Facts, found: Facts, other: float = 0) -> bool:
    """Return whether a figure of all battles is beyond chance off another."""
    if found["high"] - found["low"] < 1e-9:  # what is the same in every group, up to rounding
        groups, value = facts.get("groups", 0), found["value"]
        low, high = wilson_interval(value, groups) if value in (0, 1) and groups else (value - 1e-9, value + 1e-9)
        return groups >= ALIKE and not low <= other <= high
    return apart(found, other)


def _skill(facts: Facts) -> Iterator[str]:
    metrics, spread = facts.get("metrics") or {}, facts.get("spread")
    loss, winners = metrics.get("log_loss"), metrics.get("accuracy_decided")
    if loss and loss["value"] > UNIFORM and _beyond(facts, loss, UNIFORM):
        yield f"The log loss, {loss['value']:.4f}, is above {UNIFORM:.4f}: saying one third each would be better."
    if spread is not None and spread < NO_SPREAD and facts["battles"] > 1:
        yield "All battles get nearly the same prediction: the model reads nothing from them."
    if winners and not (winners["value"] > 0.5 and _beyond(facts, winners, 0.5)):
        share, low, high = (100 * winners[name] for name in ("value", "low", "high"))
        found = f"it finds {share:.0f} % of the winners [{low:.0f}, {high:.0f}], a coin 50 %"
        yield f"That the model tells winner from loser is not shown: {found}."


def _confidence(facts: Facts) -> Iterator[str]:
    reliability, hits = facts.get("reliability") or {}, (facts.get("metrics") or {}).get("accuracy")
    bins = reliability.get("after") or reliability.get("before")
    if not bins or not hits:
        return
    says = sum(one["battles"] * one["confidence"] for one in bins) / sum(one["battles"] for one in bins)
    if abs(says - hits["value"]) >= LARGE and _beyond(facts, hits, says):
        sure = "sure" if says > hits["value"] else "unsure"
        mean = f"it gives the likeliest outcome {100 * says:.0f} % on average"
        yield f"The model is too {sure}: {mean}, which happens in {100 * hits['value']:.0f} %."


def _shares(facts: Facts) -> Iterator[str]:
    """Yield outcomes that get another share of probability than they have of the battles, by Wilson's interval."""
    confusion, stated = facts.get("confusion") or [], facts.get("stated") or []
    names = ("a win of A", "a win of B", "a tie")
    for outcome, (name, row, says) in enumerate(zip(names, confusion, stated, strict=False)):
        happens = sum(row) / facts["battles"]
        low, high = wilson_interval(happens, facts["groups"])
        if abs(says - happens) >= LARGE and not low <= says <= high:
            never = "" if any(one[outcome] for one in confusion) else ", and never finds it likeliest"
            given = f"{100 * says:.0f} % on average, which happens in {100 * happens:.0f} %"
            yield f"The model gives {name} {given}{never}."


def _order(facts: Facts) -> Iterator[str]:
    position = facts.get("position") or {}
    flips, preference = position.get("flip_rate"), position.get("preference")
    if flips and flips["value"] > MANY_FLIPS and _beyond(facts, flips, MANY_FLIPS):
        yield f"The verdict flips with the order of the responses in {100 * flips['value']:.0f} % of battles."
    if preference and abs(preference["value"]) >= LARGE and _beyond(facts, preference):
        place, points = "first" if preference["value"] > 0 else "second", 100 * abs(preference["value"])
        yield f"The model favours what stands {place}, by {points:.0f} points of probability."


def _length(facts: Facts) -> Iterator[str]:
    difference = (facts.get("verbosity") or {}).get("difference") or {"value": 0, "low": 0, "high": 0}
    # what twice the length adds where two responses are even but for it: expit(s) - expit(-s), s = slope ln 2
    gap = math.tanh(difference["value"] * math.log(2) / 2)
    if abs(gap) >= LARGE and _beyond(facts, difference):
        more, points = "more" if gap > 0 else "less", 100 * abs(gap)
        yield f"The model favours longer responses {more} than people do: one twice as long by {points:.0f} points."


def _models(facts: Facts) -> Iterator[str]:
    """Yield whose responses are predicted wrong: families, or models where no families are."""
    models = facts.get("models") or {}
    for kind, what in (("families", "families"), ("names", "models")):
        rows = models.get(kind) or []
        off = [row for row in rows if apart(row["difference"])]
        named = [f"{row['name']} {_points(gap)}" for row in off if abs(gap := row["difference"]["value"]) >= LARGE]
        # 5 % of the intervals miss 0 by chance; two standard deviations more do not
        if named and len(off) > 0.05 * len(rows) + 2 * (0.05 * 0.95 * len(rows)) ** 0.5:
            said = f"Predicted to win more or less often than people let them, {len(named)} of {len(rows)} {what}"
            yield f"{said}: {some_of(named)}."
            return


def _points(gap: float) -> str:
    return f"{100 * abs(gap):.0f} points {'more' if gap > 0 else 'less'}"


def _slices(facts: Facts) -> Iterator[str]:
    """Yield kinds of battles on which the model is worse than what reads nothing, which matters whatever the gap.

    Where it is so on all battles together, its kinds are not what stands out.
    """
    for dimension, rows in (facts.get("slices") or {}).items():
        gaps = [row["battles"] * (row["log_loss"]["value"] - row["prior_all"]) for row in rows or []]
        if dimension == "outcome" or sum(gaps) >= 0:
            continue
        named = [
            f"{row['name']} (log loss {row['log_loss']['value']:.4f} against {row['prior_all']:.4f})"
            for row, gap in zip(rows, gaps, strict=True)
            if gap > 0 and apart(row["log_loss"], row["prior_all"])
        ]
        if named:
            by = dimension.replace("_", " ")
            yield f"By {by}, the model is worse than the outcome shares of all battles on: {some_of(named)}."
