"""A run folder -> what its page says of the run: its learning curve, and what was trained on what, where and when."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from rewardmodel.errors import plural
from rewardmodel.evaluation.results import Evaluation
from rewardmodel.run_folder import RunFolder, last_checkpoint

Losses = list[tuple[float, float]]
"""Steps and their loss: [(10, 1.1), (20, 1.0)]."""


def describe_run(run: Path, evaluation: Evaluation) -> str:
    """Return a run in one line, as far as its recipe.yaml and environment.json say.

    For example: `smollm2-135m-instruct on train.csv: trained on 800 battles, judged on 200 battles of 180 prompts; 27
    November 2026, in 12 minutes, on x86_64 in float32`.
    """
    recipe, environment = _read_yaml(RunFolder(run).recipe), _read_yaml(RunFolder(run).environment)
    model, data = recipe.get("model") or {}, recipe.get("data") or {}
    backbone = (environment.get("backbone") or {}).get("name") or model.get("model_name_or_path")
    layers = f" (lowest {plural(layers, 'layer')})" if (layers := model.get("num_hidden_layers")) else ""
    compute, training = environment.get("compute") or {}, environment.get("training") or {}
    if "device" not in compute:  # of a k-fold run: {"fold-0": {"device": ...}, ...}
        compute = next((one for one in compute.values() if isinstance(one, dict)), {})
    trained = f"trained on {plural(training['battles'], 'battle')}, " if "battles" in training else ""
    judged = f"judged on {plural(evaluation.battles, 'battle')} of {plural(evaluation.groups, 'prompt')}"
    what = f"{backbone}{layers} on {_name_data(data.get('train', 'sample'))}" if backbone else ""
    how = [_format_start(training.get("started")), _format_seconds(training.get("seconds"))]
    if "device" in compute:
        processes = f"{compute.get('processes', 1)} × " if compute.get("processes", 1) > 1 else ""
        how.append(f"on {processes}{compute['device']} in {compute.get('dtype', 'unknown precision')}")
    said = f"{what}: {trained}{judged}" if what else f"{trained}{judged}"
    return "; ".join(filter(None, [said, ", ".join(filter(None, how))]))


def _name_data(train: Any) -> str:
    """Return the names of the files, or hub data sets, of `data.train`: `a.csv, b.csv`."""
    sources = train if isinstance(train, list) else [train]
    paths = [str(one.get("path") if isinstance(one, dict) else one) for one in sources]
    return ", ".join(path if path.count("/") == 1 and not path.startswith("/") else Path(path).name for path in paths)


def _format_start(started: Any) -> str:
    try:
        return f"{datetime.fromisoformat(str(started)):%d %B %Y}".lstrip("0")
    except ValueError:
        return ""


def _format_seconds(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return ""
    if seconds < 90:
        return f"in {plural(round(seconds), 'second')}"
    return f"in {plural(round(seconds / 60), 'minute')}" if seconds < 5400 else f"in {seconds / 3600:.1f} hours"


def _read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a YAML or JSON file; empty where it cannot be read."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def learning_curve(run: Path | None) -> tuple[Losses, Losses]:
    """Return the training loss and the validation log loss by step, as the run's trainer logged them."""
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


def read_text(path: Path) -> str | None:
    """Return the text of a file, broken characters replaced; None: there is no such file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
