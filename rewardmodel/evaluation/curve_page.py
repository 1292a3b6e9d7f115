"""A learning curve in, one self-contained HTML page out, in the style of a run's report."""

from markupsafe import Markup

from rewardmodel.evaluation import charts
from rewardmodel.evaluation.learning_curve import LearningCurve, describe_law, describe_outlooks
from rewardmodel.evaluation.page import fill_template


def render_curve(curve: LearningCurve) -> str:
    """Return the page; the same curve gives the same bytes."""
    return fill_template(
        title=f"{curve.recipe}: learning curve",
        curve=curve,
        formula=describe_law(curve.law) if curve.law else None,
        outlooks=describe_outlooks(curve),
        drawn=Markup(draw_curve(curve)),
    )


def draw_curve(curve: LearningCurve) -> str:
    """Return the chart: each draw, the mean of each size, the fitted law as far as it can tell, the class prior."""
    draws = [(one.battles, draw) for one in curve.sizes for draw in one.draws]
    means = [(one.battles, one.log_loss.value) for one in curve.sizes]
    told = [] if curve.refusal else [one.battles for one in curve.outlooks if not one.refusal]
    end = max(told, default=curve.sizes[-1].battles) * (1 + 1e-9)
    law = [(one.battles, one.log_loss, one.low, one.high) for one in curve.curve if one.battles <= end]
    return charts.draw_power_law(draws, means, law, curve.prior, "curve")
