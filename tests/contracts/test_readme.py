"""README, recipes/README, scripts/README and CONTRIBUTING name what is there, and the library snippet runs."""

import importlib.util
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from builders import battle_frame, write_csv

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "recipes/README.md", "scripts/README.md", ".github/CONTRIBUTING.md"]
TOP = ("rewardmodel/", "recipes/", "scripts/", "tests/", ".github/", ".ci/")
MADE = ("runs/", "exports/", "bundle/")
"""Folders that the commands in the documents write to."""

each_document = pytest.mark.parametrize("name", DOCUMENTS)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fences(name: str, language: str) -> list[str]:
    """Return the fenced blocks of a language; "" are those of none, which hold output and trees."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(name), flags=re.MULTILINE | re.DOTALL)


def code(name: str) -> str:
    """Return what a document writes as code: fenced blocks, then inline code, a piece a line."""
    text = text_of(name)
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *(" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", rest))])


def section(name: str, title: str) -> str:
    """Return the text of a section, without its heading."""
    _, _, rest = text_of(name).partition(f"## {title}\n")
    assert rest, f"{name} has no section '{title}'"
    return re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def paths_of(name: str) -> set[str]:
    """Return the paths of the repository that a document names: in code, and as targets of links."""
    words = re.findall(r"[\w.*/-]+", code(name))
    named = {word for word in words if word.startswith(TOP) or re.search(r"\w\.(py|sh|jinja)$", word)}
    named |= {word for word in words if "/" in word and re.search(r"\w\.(yaml|toml|md)$", word)}
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(name))
    return {word for word in [*named, *links] if not word.startswith((*MADE, "https:"))}


def exists(path: str, document: str) -> bool:
    """Return whether a path is there, seen from the root, from the document's folder or from the package."""
    starts = (ROOT, (ROOT / document).parent, ROOT / "rewardmodel")
    return any(any(start.glob(path)) if "*" in path else (start / path).exists() for start in starts)


def recipe_keys() -> set[str]:
    """Return every key of a recipe, like `model.lora_r`."""
    from trl import RewardConfig

    from rewardmodel.config.schema import Recipe

    sections = {field.name: getattr(Recipe(), field.name) for field in fields(Recipe)}
    trainer = sections.pop("trainer").keys() | {field.name for field in fields(RewardConfig) if is_taken(field.name)}
    keys = {f"{name}.{field.name}" for name, section in sections.items() for field in fields(section)}
    return keys | {f"trainer.{key}" for key in trainer}


def is_taken(key: str) -> bool:
    """Return whether a recipe accepts a key of TRL's RewardConfig."""
    from rewardmodel.config.schema import Recipe
    from rewardmodel.errors import InputError

    try:
        Recipe(trainer={key: None})
    except InputError:
        return False
    return True


def test_the_readme_is_short():
    assert len(text_of("README.md").encode()) <= 10_000


@each_document
def test_every_path_is_there(name):
    paths = paths_of(name)
    assert len(paths) > 5
    assert not {path for path in paths if not exists(path, name)}


@each_document
def test_every_section_that_is_linked_to_is_there(name):
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text_of(name)):
        text = ((ROOT / name).parent / target if target else ROOT / name).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{target}#{anchor}"


@pytest.mark.parametrize("name", ["README.md", "recipes/README.md"])
def test_every_recipe_of_a_table_is_there(name):
    rows = re.search(r"^\| recipe \|.*\n\|[-|]+\n((?:\|.*\n)+)", text_of(name), flags=re.MULTILINE).group(1)
    named = {recipe for row in rows.splitlines() for recipe in re.findall(r"`([^`]+)`", row.split("|")[1])}
    there = {
        str(path.relative_to(ROOT / "recipes").with_suffix(""))
        for path in (ROOT / "recipes").rglob("*.yaml")
        if path.parent.name != "accelerate"
    }
    assert named <= there
    assert name == "README.md" or named == there


def test_every_launch_configuration_is_in_the_table():
    for path in (ROOT / "recipes" / "accelerate").glob("*.yaml"):
        assert f"`recipes/accelerate/{path.name}`" in section("recipes/README.md", "Several GPUs")


@each_document
def test_every_command_is_there(name):
    from rewardmodel.commands import VERBS

    verbs = set(re.findall(r"(?<!from )(?<![\w.])rewardmodel ([a-z]+(?:-[a-z]+)*)", code(name)))
    assert verbs <= {*VERBS, "help"}
    assert name != "README.md" or {"run", "predict", "evaluate", "export"} <= verbs


@each_document
def test_every_key_is_one_of_a_recipe(name):
    sections = "data|prompt|model|objective|trainer|inference"
    named = set(re.findall(rf"(?<![\w./])(?:--)?((?:{sections})\.\w+)(?![\w/])", code(name)))
    keys = recipe_keys()
    assert named <= keys
    for block in fences(name, "yaml"):
        for title, content in yaml.safe_load(block).items():
            assert {f"{title}.{key}" for key in content} <= keys


def test_what_is_imported_in_a_document_is_public():
    import rewardmodel

    for name in DOCUMENTS:
        for block in fences(name, "python"):
            for names in re.findall(r"^from rewardmodel import (.+)$", block, flags=re.MULTILINE):
                assert set(names.split(", ")) <= set(rewardmodel.__all__), name


def test_the_library_snippet_runs(recipe, tmp_path, monkeypatch, capsys):
    (snippet,) = fences("README.md", "python")
    assert len(snippet.splitlines()) <= 8
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(asdict(recipe)))
    battles = battle_frame()
    write_csv(battles, tmp_path / "train.csv")
    write_csv(battles.drop(columns=[column for column in battles if column.startswith("winner")]), tmp_path / "new.csv")
    assert snippet.count('"quickstart"') == 1
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(snippet.replace('"quickstart"', '"tiny.yaml"'), "README.md", "exec"), names)
    assert (tmp_path / "runs" / "mine" / "recipe.yaml").is_file()
    assert 0 < float(re.search(r"\d+\.\d+", capsys.readouterr().out).group()) < 5
    assert len(names["table"]) == 12
    assert len(names["submission"]) == len(battles)


def test_every_folder_and_way_in_is_in_the_tree():
    tree = fences("README.md", "")[-1]
    for path in (ROOT / "rewardmodel").iterdir():
        if path.is_dir() and any(path.glob("*.py")):
            assert f"  {path.name}/ " in tree, path.name
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in {top.rstrip("/") for top in TOP} and not path.name.startswith("."):
            assert re.search(rf"^{path.name}/", tree, flags=re.MULTILINE), path.name


@pytest.mark.parametrize("name", ["README.md", ".github/CONTRIBUTING.md"])
def test_every_table_to_add_to_is_where_it_is_said_to_be(name):
    text = " ".join(text_of(name).split())
    named = re.findall(r"`([A-Z]+)` (?:of|in) `(rewardmodel/[\w/]+\.py)`", text)
    assert {table for table, _ in named} >= {"FAMILIES", "OBJECTIVES", "FORMATS", "READERS", "EXPORTS"}
    for table, path in named:
        assert re.search(rf"^{table}\b.* = ", text_of(path), flags=re.MULTILINE), f"{table} in {path}"


def test_every_script_has_a_line():
    named = section("scripts/README.md", "What is here")
    for path in (ROOT / "scripts").iterdir():
        if path.suffix in (".py", ".sh"):
            assert f"`{path.name}`" in named, path.name


def test_every_result_is_linked_to():
    for path in (ROOT / "scripts" / "results").glob("*.json"):
        assert f"(results/{path.name})" in text_of("scripts/README.md"), path.name


def test_files_of_a_run_have_the_names_that_the_package_gives_them():
    block = section("recipes/README.md", "What is in a run folder")
    named = re.findall(r"^  ([\w-]+\.\w+) ", block, flags=re.MULTILINE)
    source = text_of("rewardmodel/run_folder.py")
    assert len(named) > 10
    assert not [name for name in named if f'"{name}"' not in source]


def test_packages_are_listed_in_the_order_of_their_imports():
    spec = importlib.util.spec_from_file_location("house", Path(__file__).with_name("test_house.py"))
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    section_text = section(".github/CONTRIBUTING.md", "Packages, and what may import what")
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in section_text.splitlines() if row.startswith("| `")]
    place = {package: number for number, row in enumerate(rows) for package in row}
    folders = {path.name for path in (ROOT / "rewardmodel").iterdir() if (path / "__init__.py").is_file()}
    assert folders <= place.keys()
    for package, imported in house.MAY_IMPORT.items():
        below = {other for other in imported & place.keys() if place[other] > place.get(package, len(rows))}
        assert not below, f"{package} may import {below}, which CONTRIBUTING lists below it"


def test_pre_commit_runs_the_pinned_ruff():
    hooks = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    (version,) = [repository["rev"] for repository in hooks if "ruff" in repository["repo"]]
    assert f"\nruff=={version.removeprefix('v')}\n" in text_of("constraints.txt")


def test_continuous_integration_runs_the_script_of_the_repository():
    job = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]["test"]
    assert job["steps"][-1] == {"run": "bash .ci/run"}
    version = next(step["with"]["python-version"] for step in job["steps"] if "with" in step)
    assert version == "${{ matrix.python }}"
    classified = re.findall(r"Programming Language :: Python :: (3\.\d+)", text_of("pyproject.toml"))
    assert job["strategy"]["matrix"]["python"] == classified
