"""What `evaluate` found and its predictions in, one self-contained page of HTML out, for people to read.

The page asks nothing of a network and runs no script. Text of battles is escaped by the template, and only there; what
a page leaves out it says in one line.
"""

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from rewardmodel.battles import OUTCOMES, TEXT_COLUMNS
from rewardmodel.evaluation import charts
from rewardmodel.evaluation.charts import Row, legible
from rewardmodel.evaluation.findings import UNIFORM, findings
from rewardmodel.metrics import log_loss_terms
from rewardmodel.predictions import PROBABILITIES, predicted, true_outcomes
from rewardmodel.run_folder import RunFolder, last_checkpoint

Facts = dict[str, Any]

ANCHORS = (
    ("DeBERTa-v3-base, QLoRA", 1.02),
    ("Llama-3-8B, 4-bit LoRA", 0.938),
    ("Gemma-2-9B, QLoRA", 0.93),
    ("Gemma-2-9B, distilled", 0.868),
    ("class prior", 1.097),
    ("length only", 1.064),
    ("TF-IDF", 1.04),
)
"""Log loss that others published on other splits of the competition's 57,477 battles, to be read to ±.01."""

FLOORS = {"prior": "class prior", "length": "length only", "tfidf": "TF-IDF + length"}
"""Names of the floors for people."""

DIMENSIONS = {
    "outcome": "what happened",
    "source": "source",
    "script": "script of the prompt",
    "turns": "turns",
    "length": "longer response, characters",
    "length_gap": "longer by shorter response",
    "prompt_length": "prompt, characters",
}
"""Names of the dimensions of slices for people."""

EXCERPT = 700
"""Characters of a text that the page shows."""

SHOWN = 10
"""Battles of each list."""


def render(facts: Facts, table: pd.DataFrame, run: Path | None) -> str:
    """Return the page of one run, or of predictions that are no run's, the same bytes for the same input.

    Args:
        facts: what `evaluate` returns; any part may be missing or None.
        table: the predictions that were measured, with known outcomes; texts, lengths, names of models and both orders
            are shown where it has them.
        run: the run folder, for its learning curve, recipe and environment.
    """
    training, validation = _learning(run)
    state, sentence = verdict(facts)
    return _page(
        title=run.resolve().name if run else "predictions",
        facts=facts,
        state=state,
        sentence=sentence,
        findings=findings(facts, training),
        floors=FLOORS,
        dimensions=DIMENSIONS,
        parameters=_parameters(facts.get("calibration")),
        charts=_charts(facts, table, training, validation),
        training=training,
        validation=validation,
        best=min(validation, key=_loss, default=None),
        lists=_lists(table),
        files=[(path.name, _text_of(path)) for path in (RunFolder(run).recipe, RunFolder(run).environment)]
        if run
        else [],
    )


def render_comparison(runs: Sequence[Facts]) -> str:
    """Return a page that lays runs side by side.

    Args:
        runs: `name`, `facts` as `evaluate` returns them, and `difference_to_first`: the run's log loss minus the first
            run's on the same battles (value, low, high, p), or None where they are of other battles.
    """
    rows = [_row(run["name"], (run["facts"].get("metrics") or {}).get("log_loss")) for run in runs]
    battles = {run["facts"].get("battles") for run in runs}
    prior = runs[0]["facts"].get("prior") if len(battles) == 1 else None
    if prior is not None:
        rows.append(Row(FLOORS["prior"], prior, kind=charts.FLOOR))
    return _page(
        title=f"{len(runs)} runs compared",
        runs=runs,
        sentence=_comparison(runs),
        same=len(battles) == 1,
        charts={"runs": Markup(charts.intervals(rows, "log loss (lower is better)", "runs"))},
    )


def verdict(facts: Facts) -> tuple[str, str]:
    """Return whether the model beats its floors beyond noise: `good`, `mixed`, `bad` or `unknown`, and a sentence."""
    loss = (facts.get("metrics") or {}).get("log_loss")
    if not loss:
        return "unknown", "The log loss was not measured."
    floors = {name: floor["difference"] for name, floor in (facts.get("floors") or {}).items()}
    if not floors:
        return _verdict_on_prior(loss, facts.get("prior"))
    beaten = [name for name, difference in floors.items() if difference["high"] < 0]
    others = [_against(name, floors[name]) for name in floors if name not in beaten]
    gains = _joined([f"{FLOORS.get(name, name)} by {-floors[name]['value']:.3f}" for name in beaten])
    if not others:
        return "good", f"It beats every floor beyond noise: {gains}."
    if not beaten or ("prior" in floors and "prior" not in beaten):
        rest = f" It does beat {gains}." if beaten else ""
        return "bad", f"It does not beat its floors: it is {_joined(others)}.{rest}"
    return "mixed", f"It beats {gains} beyond noise, but is {_joined(others)}."


def _verdict_on_prior(loss: Facts, prior: float | None) -> tuple[str, str]:
    if prior is None:
        return "unknown", "No floor was measured on these battles."
    if loss["high"] < prior:
        return "mixed", f"It beats the class prior ({prior:.4f}) beyond noise. The other floors were not measured."
    if loss["low"] > prior:
        return "bad", f"It is worse than the class prior ({prior:.4f}), which reads nothing, beyond noise."
    return "bad", f"It cannot be told from the class prior ({prior:.4f}), which reads nothing."


def _against(name: str, difference: Facts) -> str:
    floor = FLOORS.get(name, name)
    if difference["low"] > 0:
        return f"worse than {floor} by {difference['value']:.3f}, beyond noise"
    return f"not to be told from {floor}"


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _charts(facts: Facts, table: pd.DataFrame, training: Sequence[Any], validation: Sequence[Any]) -> dict[str, Markup]:
    """Return the charts by name, as far as there is something to draw."""
    axis = "log loss (lower is better)"
    drawn = {"log_loss": charts.intervals(_headline(facts), axis, "loss", UNIFORM)}
    for name, bins in (facts.get("reliability") or {}).items():
        if bins:
            drawn[f"reliability_{name}"] = charts.reliability(bins, f"reliability-{name}")
    if "ba_p_tie" in table and len(table):
        drawn["orders"] = charts.both_orders(predicted(table, "ab")[:, 0], predicted(table, "ba")[:, 0], "orders")
    if {"response_a_chars", "response_b_chars"} <= set(table) and len(table) >= charts.FEWEST:
        a, b = (1 + table[name].to_numpy(float) for name in ("response_a_chars", "response_b_chars"))
        humans, model = (shares[:, 0] + shares[:, 2] / 2 for shares in (true_outcomes(table), predicted(table)))
        groups = table["group"].to_numpy()
        drawn["lengths"] = charts.by_length(np.log2(a / b), humans, model, groups, "lengths")
    if families := (facts.get("models") or {}).get("families"):
        rows = [_row(one["name"], one["difference"], scale=100) for one in families[:25]]
        drawn["families"] = charts.intervals(rows, "model − people, points", "families", 0.0, digits=1)
    if kinds := _slices(facts):
        drawn["slices"] = charts.intervals(kinds, axis, "slices", _value((facts.get("metrics") or {}).get("log_loss")))
    if training or validation:
        drawn["learning"] = charts.learning_curve(training, validation, facts.get("prior"), "learning")
    return {name: Markup(svg) for name, svg in drawn.items()}


def _headline(facts: Facts) -> list[Row]:
    here, elsewhere = (Row(where, kind=charts.HEADING) for where in ("on these battles", "published, elsewhere"))
    rows = [here, _row("this model", (facts.get("metrics") or {}).get("log_loss"))]
    floors = facts.get("floors") or ({"prior": {"log_loss": facts["prior"]}} if facts.get("prior") else {})
    rows += [_row(FLOORS.get(name, name), floor["log_loss"], charts.FLOOR) for name, floor in floors.items()]
    ranked = sorted(ANCHORS, key=lambda anchor: -anchor[1])
    return [*rows, elsewhere] + [Row(label, value, kind=charts.PUBLISHED) for label, value in ranked]


def _row(label: str, figure: Facts | float | None, kind: str = charts.RUNS, scale: float = 1) -> Row:
    low, high = (figure["low"], figure["high"]) if isinstance(figure, Mapping) else (math.nan, math.nan)
    return Row(label, scale * _value(figure), scale * low, scale * high, kind)


def _slices(facts: Facts) -> list[Row]:
    """Return the slices under headings, but for outcomes and for what is one slice only."""
    rows = []
    for dimension, kinds in (facts.get("slices") or {}).items():
        if dimension != "outcome" and kinds and len(kinds) > 1:
            rows.append(Row(DIMENSIONS.get(dimension, dimension), kind=charts.HEADING))
            rows += [_row(kind["name"], kind["log_loss"]) for kind in kinds[:12]]
    return rows


def _lists(table: pd.DataFrame) -> list[Facts]:
    """Return the battles that the model gets most wrong, and those that it is least sure of."""
    probabilities, true = predicted(table), true_outcomes(table)
    losses, entropy = log_loss_terms(probabilities, true), log_loss_terms(probabilities, probabilities)
    return [
        {"title": title, "lead": lead, "battles": [_battle(table, row, losses[row]) for row in order[:SHOWN].tolist()]}
        for title, lead, order in (
            ("Worst", "highest log loss", np.argsort(-losses, kind="stable")),
            ("Most contested", "predictions nearest to one third each", np.argsort(-entropy, kind="stable")),
        )
    ]


def _battle(table: pd.DataFrame, row: int, loss: float) -> Facts:
    battle = table.iloc[row]
    true = [float(battle[name]) for name in OUTCOMES]
    soft = ", ".join(f"{name} {share:.2f}" for name, share in zip(("A", "B", "tie"), true, strict=True))
    return {
        "id": battle["id"],
        "loss": float(loss),
        "outcome": ("A won", "B won", "tie")[true.index(1)] if 1 in true else soft,
        "probabilities": [float(battle[name]) for name in PROBABILITIES],
        "models": [_words(battle.get(name)) for name in ("model_a", "model_b")],
        "texts": [
            (label, words[:EXCERPT], max(battle.get(f"{name}_chars", 0), len(words)))
            for label, name in zip(("prompt", "response A", "response B"), TEXT_COLUMNS, strict=True)
            if (words := _words(battle.get(name)))
        ],
    }


def _words(value: Any) -> str:
    """Return a cell of the table as text: nothing is empty, turns are paragraphs."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return "\n\n".join(map(_words, value))
    return "" if pd.isna(value) else str(value)


def _learning(run: Path | None) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return step and training loss, and step and validation log loss, as the run's trainer logged them."""
    for folder in filter(None, (last_checkpoint(run), run) if run else ()):
        try:
            log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, KeyError):
            continue
        training, validation = (
            [(one["step"], float(one[key])) for one in log if key in one] for key in ("loss", "eval_log_loss")
        )
        return training, validation
    return [], []


def _loss(entry: tuple[float, float]) -> float:
    return entry[1] if math.isfinite(entry[1]) else math.inf


def _parameters(calibration: Facts | None) -> list[tuple[str, float]]:
    """Return what a calibrator's parameters are called and what they are, a temperature as such."""
    parameters = (calibration or {}).get("parameters") or []
    if isinstance(parameters, Mapping):
        return list(parameters.items())
    method = (calibration or {}).get("method")
    temperature, mass = "temperature", "added to the logarithm of P(tie)"
    names = {"temperature": [temperature], "tie_mass": [mass], "vector": [temperature, "temperature of the tie", mass]}
    names["blend"] = ["weight of the model", "weight of the floor", mass]
    known = names.get(str(method), [f"parameter {number + 1}" for number in range(len(parameters))])
    return [(name, math.exp(-x) if temperature in name else x) for name, x in zip(known, parameters, strict=True)]


def _run_files(run: Path | None) -> list[tuple[str, str | None]]:
    paths = [RunFolder(run).recipe, RunFolder(run).environment] if run else []
    return [(path.name, _text_of(path)) for path in paths]


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _comparison(runs: Sequence[Facts]) -> str:
    told = [run for run in runs[1:] if run.get("difference_to_first")]
    better = [run["name"] for run in told if run["difference_to_first"]["high"] < 0]
    worse = [run["name"] for run in told if run["difference_to_first"]["low"] > 0]
    level = [run["name"] for run in told if run["name"] not in better + worse]
    first = runs[0]["name"]
    groups = {
        f"Better than {first} beyond noise": better,
        f"Worse than {first} beyond noise": worse,
        f"Not to be told from {first}": level,
    }
    return " ".join(f"{words}: {', '.join(names)}." for words, names in groups.items() if names)


def _value(figure: Facts | float | None) -> float:
    found = figure["value"] if isinstance(figure, Mapping) else figure
    return math.nan if found is None else float(found)


def number(value: Any, digits: int = 4, scale: float = 1, sign: str = "") -> str:
    """Return a figure for people: decimals, a true minus, `sign` `+` for one always, a dash where there is none."""
    if isinstance(value, Mapping):
        value = value.get("value")
    if not isinstance(value, Real) or not math.isfinite(value):
        return "–"
    return f"{float(value) * scale:{sign},.{digits}f}".replace("-", "−")


def _page(**content: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return legible(environment.get_template("page.html.jinja").render(**content))
