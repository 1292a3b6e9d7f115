import tomllib
from pathlib import Path

import pytest

from rewardmodel.config import recipes
from rewardmodel.config.loader import load_recipe
from rewardmodel.config.recipes import describe_recipe, find_recipe, format_recipes, packaged_recipes
from rewardmodel.errors import InputError

ROOT = Path(__file__).parents[2]


def test_every_recipe_has_a_name_and_launch_configurations_have_none():
    found = {*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "seeds").glob("*.yaml")}
    assert set(packaged_recipes().values()) == found
    assert packaged_recipes()["quickstart"] == ROOT / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml", Path("quickstart")])
def test_a_recipe_is_found_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == ROOT / "recipes" / "quickstart.yaml"
    assert load_recipe(name, {"trainer.max_steps": 3}).trainer["output_dir"] == "runs/quickstart"


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("model: {lora_r: 3}\n")
    assert load_recipe("quickstart").model.lora_r == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "quickstrat",
            r"^quickstrat: no such file, and no recipe of that name \(did you mean 'quickstart'\?\); `rew",
        ),
        ("somewhere/quickstart.yaml", "somewhere/quickstart.yaml: no such file"),
        ("mine.yml", r"did you mean 'mine\.yaml'\?"),
        ("zzzz", r"of that name; `rewardmodel recipes` lists"),
    ],
)
def test_a_near_miss_is_named(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(InputError, match=message):
        load_recipe(name)


def test_an_installed_package_has_its_recipes_inside(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "mine.yaml").write_text("# What it is. And more.\nmodel: {lora_r: 3}\n")
    monkeypatch.setattr(recipes, "FOLDERS", (tmp_path / "inside", ROOT / "recipes"))
    packaged_recipes.cache_clear()
    try:
        assert load_recipe("mine").model.lora_r == 3
        assert format_recipes() == "mine  What it is"
    finally:
        packaged_recipes.cache_clear()


def test_every_recipe_has_a_line_that_fits(tmp_path):
    lines = format_recipes(80).splitlines()
    assert [line.split()[0] for line in lines] == [*packaged_recipes()]
    assert all(len(line) <= 80 and len(line.split()) > 3 for line in lines)
    (tmp_path / "none.yaml").write_text("model: {}\n")
    assert describe_recipe(tmp_path / "none.yaml") == ""


def test_the_wheel_has_every_package_and_the_recipes():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    modules = (ROOT / "rewardmodel").rglob("*.py")
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in modules}
    assert set(setuptools["packages"]) == folders | {"rewardmodel.recipes"}
    assert setuptools["package-dir"] == {"rewardmodel.recipes": "recipes"}
    globs = setuptools["package-data"]["rewardmodel.recipes"]
    taken = {path for glob in globs for path in (ROOT / "recipes").glob(glob)}
    assert taken == {*(ROOT / "recipes").rglob("*.yaml")}
