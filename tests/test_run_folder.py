from pathlib import Path

import pytest

from rewardmodel.config.loader import dump_recipe
from rewardmodel.config.schema import DataConfig, InferenceConfig, PromptConfig, Recipe
from rewardmodel.errors import InputError
from rewardmodel.run_folder import (
    RunFolder,
    check_run,
    check_same_inputs,
    is_k_fold,
    last_checkpoint,
    load_run_recipe,
    open_run,
    trained_models,
    write_environment,
)


def recipe_of(folder, **sections):
    return Recipe(**sections, trainer={"output_dir": str(folder)})


def checkpoint(folder, step, state='{"global_step": 1}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text("some")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_last_checkpoint_is_the_one_of_the_highest_step_not_of_the_last_name(tmp_path):
    for step in (5, 1000, 999):
        checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"


@pytest.mark.parametrize("state", [None, "", '{"global_step": 10'], ids=["missing", "empty", "cut"])
def test_last_checkpoint_passes_over_incomplete_ones(tmp_path, state):
    complete = checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 10, state)
    assert last_checkpoint(tmp_path) == complete


def test_last_checkpoint_of_a_folder_without_complete_ones_is_none(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "absent") is None
    checkpoint(tmp_path, 3, state=None)
    assert last_checkpoint(tmp_path) is None


def test_last_checkpoint_passes_over_names_that_are_no_step(tmp_path):
    numbered = checkpoint(tmp_path, 3)
    checkpoint(tmp_path, "best")
    assert last_checkpoint(tmp_path) == numbered


def test_the_lock_of_a_fold_is_not_in_the_folder_of_all_folds_which_may_be_replaced(tmp_path):
    run = RunFolder(tmp_path / "runs" / "one")
    assert run.lock == tmp_path / "runs" / ".one.lock"
    assert run.fold(3).lock == tmp_path / "runs" / ".one.fold-3.lock"


@pytest.mark.parametrize("exists", [False, True])
def test_new_or_empty_folder_gets_the_resolved_recipe(tmp_path, exists):
    folder = tmp_path / "runs" / "one"
    if exists:
        folder.mkdir(parents=True)
    recipe = recipe_of(folder)
    assert open_run(recipe, resume=False, overwrite=False) == folder
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]
    assert RunFolder(folder).recipe.read_text() == dump_recipe(recipe)


def test_resume_of_nothing_starts_a_run(tmp_path):
    folder = open_run(recipe_of(tmp_path / "new"), resume=True, overwrite=False)
    assert RunFolder(folder).recipe.is_file()


def test_folder_with_a_run_is_refused_and_left_as_it_is(tmp_path):
    recipe = recipe_of(tmp_path / "run")
    folder = open_run(recipe, resume=False, overwrite=False)
    checkpoint(folder, 1)
    with pytest.raises(InputError) as caught:
        open_run(recipe, resume=False, overwrite=False)
    message = str(caught.value)
    assert message.startswith(f"trainer.output_dir: {folder} already holds a run; ")
    assert "--resume" in message
    assert "--overwrite" in message
    assert "\n" not in message
    assert last_checkpoint(folder) is not None


def test_overwrite_leaves_nothing_of_the_run_before(tmp_path):
    folder = open_run(recipe_of(tmp_path / "run"), resume=False, overwrite=False)
    checkpoint(folder, 1)
    other = recipe_of(folder, prompt=PromptConfig(max_length=77))
    open_run(other, resume=False, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]
    assert RunFolder(folder).recipe.read_text() == dump_recipe(other)


@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True)])
def test_folder_with_something_else_is_refused_and_never_removed(tmp_path, resume, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"^trainer.output_dir: .* is not a run folder; name another"):
        open_run(recipe_of(tmp_path), resume, overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_in_the_place_of_the_folder_is_refused_and_never_removed(tmp_path, overwrite):
    place = tmp_path / "run"
    place.write_text("a file")
    with pytest.raises(InputError, match=r"is not a run folder"):
        open_run(recipe_of(place), False, overwrite)
    assert place.read_text() == "a file"


def test_folder_that_is_no_run_has_no_recipe(tmp_path):
    with pytest.raises(InputError) as caught:
        load_run_recipe(tmp_path)
    assert str(caught.value) == f"{tmp_path}: no recipe.yaml there; give the folder of a run"


# One test for all that reads a recipe back: it imports trl, which takes seconds.
def test_resume_continues_the_same_recipe_and_refuses_another(tmp_path):
    recipe = recipe_of(tmp_path / "run")
    folder = open_run(recipe, resume=False, overwrite=False)
    kept = checkpoint(folder, 1)
    assert load_run_recipe(folder) == recipe
    assert open_run(recipe, resume=True, overwrite=False) == folder
    with pytest.raises(InputError) as caught:
        open_run(recipe_of(folder, data=DataConfig(seed=1)), resume=True, overwrite=False)
    assert str(caught.value).startswith(f"{folder}: the run there has data.seed: 0, not 1; ")
    assert "\n" not in str(caught.value)
    assert RunFolder(folder).recipe.read_text() == dump_recipe(recipe)
    assert last_checkpoint(folder) == kept


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_recipe_without_a_name_has_a_run_folder_all_the_same():
    assert Recipe().run_folder == Path("runs/unnamed")


@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True)])
def test_check_of_a_new_or_empty_folder_writes_nothing(tmp_path, resume, overwrite):
    check_run(recipe_of(tmp_path / "new"), resume, overwrite)
    assert not (tmp_path / "new").exists()
    check_run(recipe_of(tmp_path), resume, overwrite)
    assert list(tmp_path.iterdir()) == []


def test_check_of_a_run_touches_nothing_whatever_it_finds(tmp_path):
    recipe = recipe_of(tmp_path / "run")
    folder = open_run(recipe, resume=False, overwrite=False)
    checkpoint(folder, 1)
    before = tree(folder)
    check_run(recipe, resume=True, overwrite=False)
    check_run(recipe, resume=False, overwrite=True)
    check_run(recipe_of(folder, data=DataConfig(seed=1)), resume=False, overwrite=True)
    with pytest.raises(InputError, match=r"^trainer\.output_dir: .* already holds a run"):
        check_run(recipe, resume=False, overwrite=False)
    with pytest.raises(InputError, match=r"the run there has data\."):
        check_run(recipe_of(folder, data=DataConfig(seed=1)), resume=True, overwrite=False)
    assert tree(folder) == before


@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True)])
def test_check_refuses_a_folder_with_something_else(tmp_path, resume, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"^trainer.output_dir: .* is not a run folder; name another"):
        check_run(recipe_of(tmp_path), resume, overwrite)
    with pytest.raises(InputError, match=r"^trainer.output_dir: .* is not a run folder; name another"):
        check_run(recipe_of(tmp_path / "thesis.tex"), resume, overwrite)


@pytest.mark.parametrize("keys", [{"test": "test.csv"}, {"test": "test.csv", "sample_submission": "sample.csv"}])
def test_resume_may_add_a_test_file_and_a_sample_submission(tmp_path, keys):
    folder = open_run(recipe_of(tmp_path / "run"), resume=False, overwrite=False)
    kept = checkpoint(folder, 1)
    wider = recipe_of(folder, data=DataConfig(**keys), inference=InferenceConfig(swap_tta="none"))
    assert open_run(wider, resume=True, overwrite=False) == folder
    assert load_run_recipe(folder) == wider
    assert last_checkpoint(folder) == kept


@pytest.mark.parametrize("keys", [{"train": "other.csv"}, {"folds": 7}, {"fold": 1}, {"limit": 10}])
def test_resume_may_change_no_other_key_of_the_data(tmp_path, keys):
    folder = open_run(recipe_of(tmp_path / "run"), resume=False, overwrite=False)
    with pytest.raises(InputError, match=r"the run there has data\."):
        check_run(recipe_of(folder, data=DataConfig(test="test.csv", **keys)), resume=True, overwrite=False)


FACTS = {
    "backbone": {"name": "tiny", "fingerprint": "b0"},
    "data": {"training": "d0", "validation": "d1"},
    "compute": {"device": "x86_64", "dtype": "float32"},
}


def test_the_same_inputs_may_be_resumed_on_another_machine(tmp_path):
    check_same_inputs(tmp_path, FACTS)  # nothing is known of a run that has not begun
    write_environment(tmp_path, FACTS)
    check_same_inputs(tmp_path, FACTS)
    check_same_inputs(tmp_path, FACTS | {"compute": {"device": "another", "dtype": "bfloat16"}})


@pytest.mark.parametrize(
    ("section", "key"), [("backbone", "fingerprint"), ("data", "training"), ("data", "validation")]
)
def test_inputs_of_another_fingerprint_are_refused(tmp_path, section, key):
    write_environment(tmp_path, FACTS)
    before = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        check_same_inputs(tmp_path, FACTS | {section: FACTS[section] | {key: "changed"}})
    assert str(caught.value).startswith(f"{tmp_path}: the run there was started with another {section}; ")
    assert "--overwrite" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_resume_knows_a_folder_by_any_spelling_and_a_key_at_its_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = open_run(recipe_of(Path("run")), resume=False, overwrite=False)
    here = Recipe(trainer={**recipe_of(tmp_path / "run").trainer, "weight_decay": 0.0})
    assert open_run(here, resume=True, overwrite=False) == tmp_path / folder


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is not a folder; name another"):
        open_run(recipe_of(tmp_path / "file" / "run"), resume=False, overwrite=False)


def test_a_folder_of_folds_is_no_run_of_one(tmp_path):
    recipe = recipe_of(tmp_path / "run")
    open_run(recipe_of(RunFolder(recipe.run_folder).fold(1).path), resume=False, overwrite=False)
    assert is_k_fold(recipe.run_folder)
    check_run(recipe, resume=True, overwrite=False, all_folds=True)
    for resume in (True, False):
        with pytest.raises(InputError, match="exists and is not a run folder; name another"):
            check_run(recipe, resume=resume, overwrite=False)
    with pytest.raises(InputError, match="its folds are not gathered"):
        trained_models(recipe.run_folder)


def test_what_a_kill_left_half_written_makes_no_folder_one_of_something_else(tmp_path):
    (tmp_path / ".recipe.yaml.17.partial").write_text("data:")
    check_run(recipe_of(tmp_path), resume=True, overwrite=False)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not a run folder"):
        check_run(recipe_of(tmp_path), resume=True, overwrite=False)
