import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "rewardmodel").rglob("*.py"))
GROUND = {"errors", "files", "hub", "metrics", "progress", "distributed", "processors"}
TABLES = {"battles", "config", "objectives", "predictions", "run_folder"}

MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "hub": {"errors"},
    "metrics": set(),
    "progress": set(),
    "distributed": {"errors"},
    "processors": set(),
    "logs": {"distributed", "progress"},
    "battles": {"errors", "files"},
    "config": {"errors"},
    "objectives": {"errors"},
    "predictions": {"battles", "errors", "files"},
    "run_folder": {"battles", "config", "distributed", "errors", "files"},
    "prompt": {"battles", "config", "errors", "files", "progress"},
    "data": GROUND | TABLES,
    "evaluation": GROUND | TABLES | {"data"},
    "model": GROUND | TABLES | {"prompt"},
    "training": GROUND | TABLES | {"data", "prompt", "model"},
    "inference": GROUND | TABLES | {"data", "prompt", "model", "evaluation"},
    "benchmarks": GROUND | TABLES | {"data", "prompt", "model", "evaluation", "inference"},
    "exports": GROUND | TABLES | {"data", "prompt", "model", "evaluation", "inference"},
    "serving": GROUND | TABLES | {"data", "prompt", "model", "evaluation", "inference"},
    "planning": GROUND | TABLES | {"data", "prompt", "model", "training"},
}
"""What a package, or a module at the root, may import of the others; those of `WAYS_IN` may import all."""

WAYS_IN = {
    "__init__",
    "__main__",
    "cli",
    "commands",
    "interruption",
    "options",
    "preflight",
    "pipeline",
    "kfold",
    "learning_curve",
}


def room(path: Path) -> str:
    """Return the package, or the module at the root, that a file belongs to."""
    relative = path.relative_to(ROOT / "rewardmodel")
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports_of(path: Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "rewardmodel":
            names += [f"rewardmodel.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("rewardmodel.")}


def test_every_room_has_a_rule():
    assert {room(path) for path in MODULES} == MAY_IMPORT.keys() | WAYS_IN


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    here = room(path)
    if here not in WAYS_IN:
        assert imports_of(path) - {here} <= MAY_IMPORT[here]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_short_and_says_what_it_is_for(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_taken_in_at_once(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            lines = node.end_lineno - first.lineno + 1
            assert lines <= 80, f"{node.name} has {lines} lines under its docstring"


def test_the_top_level_is_fixed():
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    made = {"runs", "build", "dist"} | {name for name in shown if name.endswith(".egg-info")}
    fixed = {"rewardmodel", "recipes", "tests", "scripts", "pyproject.toml", "README.md", "constraints.txt", "LICENSE"}
    assert shown - made == fixed
