"""An evaluation and the predictions that it measured in, one self-contained HTML page out, for people to read.

The page loads nothing from a network and runs no script. Text of battles is escaped by the template, and only there.
Sections with nothing to show are left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from rewardmodel.battles import OUTCOMES, TEXT_COLUMNS
from rewardmodel.errors import plural
from rewardmodel.evaluation import charts
from rewardmodel.evaluation.charts import ChartRow
from rewardmodel.evaluation.findings import UNIFORM_LOG_LOSS, list_findings
from rewardmodel.evaluation.results import CalibrationResult, Difference, Evaluation, Interval, Slice
from rewardmodel.evaluation.run_facts import Losses, describe_run, learning_curve, read_text
from rewardmodel.evaluation.slices import LENGTH_COLUMNS, response_lengths
from rewardmodel.evaluation.verdict import BASELINE_NAMES, compare_with_first, judge_baselines
from rewardmodel.metrics import log_loss_terms
from rewardmodel.predictions import PROBABILITIES, predicted, true_outcomes
from rewardmodel.run_folder import RunFolder

PUBLISHED_LOG_LOSSES = (
    ("DeBERTa-v3-base, QLoRA", 1.02),
    ("Llama-3-8B, 4-bit LoRA", 0.938),
    ("Gemma-2-9B, QLoRA", 0.93),
    ("Gemma-2-9B, distilled", 0.868),
    ("class prior", 1.097),
    ("length only", 1.064),
    ("TF-IDF", 1.04),
)
"""What others published on other splits of the competition's 57,477 battles, to be read to ±.01."""

ARENA_MODELS = {
    "claude-1",
    "claude-2.0",
    "claude-2.1",
    "claude-instant-1",
    "gpt-3.5-turbo-0314",
    "gpt-3.5-turbo-0613",
    "gpt-3.5-turbo-1106",
    "gpt-4-0125-preview",
    "gpt-4-0314",
    "gpt-4-0613",
    "gpt-4-1106-preview",
    "mistral-medium",
    "mixtral-8x7b-instruct-v0.1",
    "vicuna-13b",
    "vicuna-33b",
}
"""Names of models that most battles of the competition have at least one of."""

SECTIONS = {
    "metrics": "Metrics",
    "calibration": "Calibration",
    "position": "Position",
    "length": "Length",
    "models": "Models",
    "slices": "Slices",
    "learning": "Learning curve",
    "battles": "Battles",
    "run": "Recipe",
}
"""Sections of the page of a run by id, with the names of the links to them."""

DIMENSION_NAMES = {
    "outcome": "true outcome",
    "source": "source",
    "script": "script of the prompt",
    "turns": "turns",
    "length": "longer response, characters",
    "length_gap": "longer by shorter response",
    "prompt_length": "prompt, characters",
}
"""Display names of the dimensions of slices."""


def render_run(evaluation: Evaluation, table: pd.DataFrame, run: Path | None) -> str:
    """Return the page of one run, or of predictions without a run; the same input gives the same bytes.

    Args:
        evaluation: what `evaluate` returns.
        table: the predictions that were measured, with known outcomes; texts, lengths, names of models and both orders
            are shown where it has them.
        run: the run folder, for its learning curve, recipe and environment.
    """
    training, validation = learning_curve(run)
    state, sentence = judge_baselines(evaluation)
    drawn = _charts(evaluation, table, training, validation)
    slices, lists = _informative_slices(evaluation), _list_battles(table)
    files = (
        [(path.name, read_text(path)) for path in (RunFolder(run).recipe, RunFolder(run).environment)] if run else []
    )
    files = [(name, text) for name, text in files if text]
    models = evaluation.models
    content = {
        "metrics": evaluation.metrics or evaluation.confusion,
        "calibration": evaluation.calibration or "reliability_before" in drawn,
        "position": evaluation.position,
        "length": evaluation.verbosity,
        "models": models and (models.families or models.names),
        "slices": slices,
        "learning": "learning" in drawn,
        "battles": len(table),
        "run": files,
    }
    return fill_template(
        title=run.resolve().name if run else "predictions",
        evaluation=evaluation,
        state=state,
        sentence=sentence,
        findings=list_findings(evaluation, training),
        baseline_names=BASELINE_NAMES,
        dimension_names=DIMENSION_NAMES,
        parameters=_parameters(evaluation.calibration),
        charts=drawn,
        shown={name: title for name, title in SECTIONS.items() if content[name]},
        slices=slices,
        arena=is_arena(table),
        about_run=describe_run(run, evaluation) if run else None,
        training=training,
        validation=validation,
        best=min(validation, key=_finite_loss, default=None),
        lists=lists,
        files=files,
    )


@dataclass(frozen=True)
class ComparedRun:
    """A run of a comparison.

    Attributes:
        name: of the run.
        evaluation: what `evaluate` returns.
        difference: its log loss minus the first run's on the same battles; None for the first.
        about: what it is, in one line.
    """

    name: str
    evaluation: Evaluation
    difference: Difference | None
    about: str = ""


def render_comparison(runs: Sequence[ComparedRun]) -> str:
    """Return a page that lays runs side by side."""
    rows = [_interval_row(run.name, (run.evaluation.metrics or {}).get("log_loss")) for run in runs]
    same = len({run.evaluation.battles for run in runs}) == 1
    prior = runs[0].evaluation.prior
    if same and prior is not None:
        rows.append(ChartRow(BASELINE_NAMES["prior"], prior, kind="baseline"))
    return fill_template(
        title=f"{len(runs)} runs compared",
        runs=runs,
        sentence=compare_with_first(runs[0].name, [(run.name, run.difference) for run in runs[1:] if run.difference]),
        same=same,
        charts={"runs": Markup(charts.draw_intervals(rows, "log loss (lower is better)", "runs"))},
    )


def _charts(evaluation: Evaluation, table: pd.DataFrame, training: Losses, validation: Losses) -> dict[str, Markup]:
    """Return the charts by name, as far as there is something to draw."""
    axis, loss = "log loss (lower is better)", (evaluation.metrics or {}).get("log_loss")
    drawn = {
        "log_loss": charts.draw_intervals(_headline_rows(evaluation, is_arena(table)), axis, "loss", UNIFORM_LOG_LOSS)
    }
    if evaluation.reliability:
        for name, bins in (("before", evaluation.reliability.before), ("after", evaluation.reliability.after)):
            if bins:
                drawn[f"reliability_{name}"] = charts.draw_reliability(bins, f"reliability-{name}")
    if "ba_p_tie" in table and len(table):
        drawn["orders"] = charts.draw_orders(predicted(table, "ab")[:, 0], predicted(table, "ba")[:, 0], "orders")
    if set(LENGTH_COLUMNS) <= set(table) and len(table) >= charts.MIN_LENGTH_BATTLES:
        a, b = response_lengths(table).T
        humans, model = (shares[:, 0] + shares[:, 2] / 2 for shares in (true_outcomes(table), predicted(table)))
        groups = table["group"].to_numpy()
        drawn["lengths"] = charts.draw_win_rates(np.log2(a / b), humans, model, groups, "lengths")
    if named := evaluation.models and (evaluation.models.families or evaluation.models.names):
        rows = [_interval_row(one.name, one.difference, scale=100) for one in named[:25]]
        drawn["families"] = charts.draw_intervals(rows, "model − people, points", "families", 0.0, digits=1)
    if rows := _slice_rows(evaluation):
        drawn["slices"] = charts.draw_intervals(rows, axis, "slices", loss.value if loss else math.nan)
    if training or validation:
        drawn["learning"] = charts.draw_learning_curve(training, validation, evaluation.prior, "learning")
    return {name: Markup(svg) for name, svg in drawn.items()}


def is_arena(table: pd.DataFrame) -> bool:
    """Return whether battles are the competition's, as the names of their models say: half of them have a known one."""
    if not {"model_a", "model_b"} <= set(table) or not len(table):
        return False
    return bool((table["model_a"].isin(ARENA_MODELS) | table["model_b"].isin(ARENA_MODELS)).mean() >= 0.5)


def _headline_rows(evaluation: Evaluation, arena: bool) -> list[ChartRow]:
    """Return the model and its baselines; of the arena's battles also what others published."""
    here, elsewhere = (ChartRow(where, kind="heading") for where in ("on these battles", "published, elsewhere"))
    rows = [here] if arena else []
    rows += [_interval_row("this model", (evaluation.metrics or {}).get("log_loss"))]
    if evaluation.baselines:
        for name, one in evaluation.baselines.items():
            rows.append(_interval_row(BASELINE_NAMES.get(name, name), one.log_loss, "baseline"))
    elif evaluation.prior is not None:
        rows.append(ChartRow(BASELINE_NAMES["prior"], evaluation.prior, kind="baseline"))
    if not arena:
        return rows
    ranked = sorted(PUBLISHED_LOG_LOSSES, key=lambda one: -one[1])
    return [*rows, elsewhere, *(ChartRow(label, value, kind="published") for label, value in ranked)]


def _interval_row(label: str, found: Interval | None, kind: charts.RowKind = "run", scale: float = 1) -> ChartRow:
    if found is None:
        return ChartRow(label, kind=kind)
    low, high = (math.nan if end is None else scale * end for end in (found.low, found.high))
    return ChartRow(label, scale * found.value, low, high, kind)


def _informative_slices(evaluation: Evaluation) -> dict[str, list[Slice]]:
    """Return the slices by dimension, without dimensions of one slice only, which is all battles."""
    return {name: rows for name, rows in (evaluation.slices or {}).items() if rows and len(rows) > 1}


def _slice_rows(evaluation: Evaluation) -> list[ChartRow]:
    """Return the slices under headings, without the true outcomes."""
    rows = []
    for dimension, slices in _informative_slices(evaluation).items():
        if dimension != "outcome":
            rows.append(ChartRow(DIMENSION_NAMES.get(dimension, dimension), kind="heading"))
            rows += [_interval_row(one.name, one.log_loss) for one in slices[:12]]
    return rows


def _list_battles(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the ten battles that the model gets most wrong, and the ten that it is least sure of."""
    probabilities, true = predicted(table), true_outcomes(table)
    losses, entropy = log_loss_terms(probabilities, true), log_loss_terms(probabilities, probabilities)
    return [
        {
            "title": title,
            "lead": lead,
            "battles": [_show_battle(table, row, losses[row]) for row in order[:10].tolist()],
        }
        for title, lead, order in (
            ("Worst", "highest log loss", np.argsort(-losses, kind="stable")),
            ("Most contested", "predictions nearest to one third each", np.argsort(-entropy, kind="stable")),
        )
    ]


def _show_battle(table: pd.DataFrame, row: int, loss: float) -> dict[str, Any]:
    """Return what the page shows of a battle; of each text the label, its first 700 characters, and its length."""
    battle = table.iloc[row]
    true = [float(battle[name]) for name in OUTCOMES]
    soft = ", ".join(f"{name} {share:.2f}" for name, share in zip(("A", "B", "tie"), true, strict=True))
    return {
        "id": battle["id"],
        "opening": _shorten(_join_turns(battle.get("prompt"))),
        "loss": float(loss),
        "outcome": ("A won", "B won", "tie")[true.index(1)] if 1 in true else soft,
        "probabilities": [float(battle[name]) for name in PROBABILITIES],
        "models": [_join_turns(battle.get(name)) for name in ("model_a", "model_b")],
        "texts": [
            (label, text[:700], max(battle.get(f"{name}_chars", 0), len(text)))
            for label, name in zip(("prompt", "response A", "response B"), TEXT_COLUMNS, strict=True)
            if (text := _join_turns(battle.get(name)))
        ],
    }


def _shorten(text: str, length: int = 90) -> str:
    """Return the first words of a text, on one line; of a text without spaces its first characters."""
    line = " ".join(text[: 2 * length].split())
    return line if len(line) <= length else f"{line[:length].rpartition(' ')[0] or line[:length]} …"


def _join_turns(value: Any) -> str:
    """Return a cell of the table as text, turns as paragraphs; an empty string for a missing value."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return "\n\n".join(map(_join_turns, value))
    return "" if pd.isna(value) else str(value)


def _finite_loss(entry: tuple[float, float]) -> float:
    return entry[1] if math.isfinite(entry[1]) else math.inf


def _parameters(calibration: CalibrationResult | None) -> list[tuple[str, float]]:
    """Return a calibrator's parameters with their display names; a temperature is not shown as its logarithm."""
    if calibration is None:
        return []
    temperature, mass = "temperature", "added to the logarithm of P(tie)"
    names = {
        "temperature": [temperature],
        "tie_mass": [mass],
        "vector": [temperature, "temperature of the tie", mass],
        "blend": ["weight of the model", "weight of the baseline", mass],
    }.get(str(calibration.method), [])
    return [
        (name, math.exp(-value) if temperature in name else value)
        for name, value in zip(names, calibration.parameters, strict=True)
    ]


def format_number(value: Any, digits: int = 4, scale: float = 1, sign: str = "") -> str:
    """Return a number as the page shows it, with a typographic minus; a dash for None and NaN.

    Args:
        value: a number, or an interval, whose value is shown.
        digits: decimals.
        scale: factor, for instance 100 for percent.
        sign: `+` to show the sign of positive numbers too.
    """
    if isinstance(value, Interval):
        value = value.value
    if not isinstance(value, Real) or not math.isfinite(value):
        return "–"
    return f"{float(value) * scale:{sign},.{digits}f}".replace("-", "−")


def fill_template(**content: Any) -> str:
    """Return the page of some content; text is escaped by the template."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = format_number
    environment.filters["count"] = plural
    return charts.make_legible(environment.get_template("page.html.jinja").render(**content))
