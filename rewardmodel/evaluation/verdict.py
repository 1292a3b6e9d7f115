"""An evaluation -> whether the model beats its baselines, and differences of runs -> which is better: in sentences."""

from collections.abc import Sequence

from rewardmodel.evaluation.results import Difference, Evaluation, Interval

BASELINE_NAMES = {"prior": "class prior", "length": "length only", "tfidf": "TF-IDF + length"}
"""Display names of the baselines."""


def judge_baselines(evaluation: Evaluation) -> tuple[str, str]:
    """Return whether the model beats its baselines beyond noise, and a sentence about it.

    The first is `good`, `mixed`, `even`, `bad`, `few` (too few prompts for intervals) or `unknown`.
    """
    loss = (evaluation.metrics or {}).get("log_loss")
    if not loss:
        return "unknown", "The log loss was not measured."
    differences = {name: one.difference for name, one in (evaluation.baselines or {}).items()}
    if not differences:
        return _judge_prior(loss, evaluation.prior)
    beaten = [name for name, difference in differences.items() if difference.below()]
    others = [_describe_loss_to(name, differences[name]) for name in differences if name not in beaten]
    gains = _join([f"{BASELINE_NAMES.get(name, name)} by {-differences[name].value:.3f}" for name in beaten])
    if not others:
        return "good", f"It beats every baseline beyond noise: {gains}."
    if all(difference.low is None for difference in differences.values()):
        return "few", "There are too few prompts to tell whether it beats its baselines."
    if not beaten or ("prior" in differences and "prior" not in beaten):
        rest = f" It does beat {gains}." if beaten else ""
        worse = any(difference.above() for difference in differences.values())
        state = "bad" if worse else "mixed" if beaten else "even"
        return state, f"It does not beat its baselines: it is {_join(others)}.{rest}"
    return "mixed", f"It beats {gains} beyond noise, but is {_join(others)}."


def _judge_prior(loss: Interval, prior: float | None) -> tuple[str, str]:
    if prior is None:
        return "unknown", "No baseline was measured on these battles."
    if loss.low is None:
        return "few", f"There are too few prompts to tell whether it beats the class prior ({prior:.4f})."
    if loss.below(prior):
        return "mixed", f"It beats the class prior ({prior:.4f}) beyond noise. The other baselines were not measured."
    if loss.above(prior):
        return "bad", f"It is worse than the class prior ({prior:.4f}), which ignores its input, beyond noise."
    return "even", f"It is not different, beyond noise, from the class prior ({prior:.4f}), which ignores its input."


def _describe_loss_to(name: str, difference: Difference) -> str:
    baseline = BASELINE_NAMES.get(name, name)
    if difference.low is None:
        return f"on too few prompts to compare with {baseline}"
    if difference.above():
        return f"worse than {baseline} by {difference.value:.3f}, beyond noise"
    return f"within noise of {baseline}"


def _join(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def compare_with_first(first: str, compared: Sequence[tuple[str, Difference]]) -> str:
    """Return which runs are better than the first, and which worse: "Worse than a beyond noise: b, c.".

    Args:
        first: name of the first run.
        compared: name of each other run, and its log loss minus the first's.
    """
    groups = {
        f"Better than {first} beyond noise": [name for name, one in compared if one.below()],
        f"Worse than {first} beyond noise": [name for name, one in compared if one.above()],
        f"Within noise of {first}": [name for name, one in compared if one.judge() == "within noise"],
        f"No different from {first}": [name for name, one in compared if one.judge() == "no difference"],
        f"Too few prompts to compare with {first}": [name for name, one in compared if "too few" in one.judge()],
    }
    return " ".join(f"{words}: {', '.join(names)}." for words, names in groups.items() if names)
