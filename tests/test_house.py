import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in (ROOT / "rewardmodel").glob("*.py") if path.stem != "__init__"}

LEVELS = [
    {"errors", "files", "trainer_keys", "processes", "guard", "optimizer"},
    {"config", "battles", "metrics", "backbone", "objective", "rows", "texts", "truncation", "template", "charts"}
    | {"attention", "batches", "launches"},
    {"compatibility", "recipe"},
    {"sources", "folds", "predictions", "prompt", "weights", "runs", "head", "calibration", "resampling"}
    | {"placement", "arguments", "budget", "devices", "quantization", "stand_ins", "regression"},
    {"teachers", "saved", "wheels", "checkpoint", "probe", "findings"},
    {"formats", "duplicates", "pairs", "lora", "slices", "floors", "page", "bundle"},
    {"model"},
    {"parts", "audit", "bias", "forward", "memory", "merge"},
    {"shards", "lengths"},
    {"features"},
    {"trainer", "inference", "evaluation", "estimate", "rewards", "soup"},
    {"training", "reports", "doctor", "parity"},
    {"pipeline", "card"},
    {"crossfit", "exports"},
    {"cli"},
]
"""A module imports only from levels above its own, inside functions too."""


def imports_of(name: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rewardmodel."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("rewardmodel.")}
    return found


def test_every_module_has_a_level():
    assert set().union(*LEVELS) == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    above: set[str] = set()
    for level in LEVELS:
        if name in level:
            break
        above |= level
    assert imports_of(name) <= above


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_short_and_says_what_it_is_for(name):
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_taken_in_at_once(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            lines = node.end_lineno - first.lineno + 1
            assert lines <= 40, f"{name}.{node.name} has {lines} lines under its docstring"


def test_the_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    for name in MODULES:
        assert f"`{name}`" in readme or f"`{name}.py`" in readme, name


def test_the_top_level_is_fixed():
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    made = {"runs", "build", "dist"} | {name for name in shown if name.endswith(".egg-info")}
    fixed = {"rewardmodel", "recipes", "tests", "scripts", "pyproject.toml", "README.md", "constraints.txt", "LICENSE"}
    assert shown - made == fixed
