import subprocess
import sys

import pytest
from builders import small_recipe, with_trainer

from rewardmodel.benchmarks.benchmark import benchmark
from rewardmodel.config.loader import dump_recipe
from rewardmodel.errors import InputError
from rewardmodel.pipeline import prepare
from rewardmodel.preflight import check_baseline, check_export, check_predictions, check_reading, check_training
from rewardmodel.run_folder import RunFolder


@pytest.fixture
def recipe(tmp_path):
    return small_recipe(tmp_path / "backbone", tmp_path)


@pytest.fixture
def run(recipe):
    """Return a folder that looks like a finished run until it is read."""
    RunFolder(recipe.run_folder).model.mkdir(parents=True)
    RunFolder(recipe.run_folder).recipe.write_text(dump_recipe(recipe))
    RunFolder(recipe.run_folder).validation.touch()
    return recipe.run_folder


def test_a_run_that_can_be_written_and_read_passes_and_leaves_nothing(recipe):
    before = set(recipe.run_folder.parent.iterdir())
    for fold in (None, "all", "1"):
        check_training(recipe, fold=fold)
    assert set(recipe.run_folder.parent.iterdir()) == before


def test_a_run_that_is_there_is_refused_unless_it_is_to_be_replaced_or_continued(recipe, run):
    with pytest.raises(InputError, match="already holds a run"):
        check_training(recipe)
    check_training(recipe, resume=True)
    check_training(recipe, overwrite=True)


def test_a_fold_that_is_there_is_refused_and_another_is_not(recipe):
    fold = RunFolder(recipe.run_folder).fold(1).path
    fold.mkdir(parents=True)
    (fold / "recipe.yaml").write_text(dump_recipe(recipe))
    with pytest.raises(InputError, match="fold-1 already holds a run"):
        check_training(recipe, fold="1")
    check_training(recipe, fold="0")
    check_training(recipe, fold="1", overwrite=True)


# /proc takes no new files, not even of the superuser
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_folder_that_cannot_be_written_is_named_as_it_was_given(recipe, run):
    place = "/proc/rewardmodel/run"
    with pytest.raises(InputError, match=rf"^trainer\.output_dir: {place}: /proc cannot be written to \(.+\); name"):
        check_training(with_trainer(recipe, output_dir=place))
    for check in (
        lambda: check_export([run], RunFolder(run).path.joinpath("/proc/rewardmodel/export")),
        lambda: check_baseline("sample", RunFolder(run).path.joinpath("/proc/rewardmodel/x.parquet")),
        lambda: check_reading(recipe, RunFolder(run).path.joinpath("/proc/rewardmodel")),
    ):
        with pytest.raises(InputError, match=r"^--output: /proc/?.*cannot be written to"):
            check()


def test_predictions_that_are_not_there_are_refused(run, tmp_path):
    check_predictions([run])
    for path in (tmp_path, tmp_path / "nowhere.parquet"):
        with pytest.raises(InputError, match=r"cannot be read as predictions \(no such file\)"):
            check_predictions([run, path])
    with pytest.raises(InputError, match=r"nowhere\.csv: no such file"):
        check_predictions([run], "nowhere.csv")
    with pytest.raises(InputError, match="no recipe"):
        check_predictions([tmp_path], "sample")
    check_predictions([run], "validation")


HOLD = """
import sys
from pathlib import Path
from rewardmodel.files import lock_output
from rewardmodel.run_folder import lock_run
with lock_run(Path(sys.argv[1])), lock_output(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_while_another_process_writes_a_run_or_an_output_it_is_refused_and_afterwards_not(recipe, run, tmp_path):
    output, other = tmp_path / "out", with_trainer(recipe, output_dir=str(tmp_path / "other"))
    command = [sys.executable, "-c", HOLD, str(other.run_folder), str(output)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    refused = rf"another process is writing there \(host .+, process {holder.pid}\)"
    try:
        assert holder.stdout.readline() == "held\n"
        for how in ({}, {"resume": True}, {"overwrite": True}, {"fold": "all"}):
            with pytest.raises(InputError, match=rf"^trainer\.output_dir: .*other: {refused}"):
                check_training(other, **how)
        check_training(other, fold="1")  # another folder
        for write in (
            lambda: check_export([run], output),
            lambda: check_reading(recipe, output),
            lambda: prepare(recipe, output),
            lambda: benchmark("preferences", run, "sample", output),
        ):
            with pytest.raises(InputError, match=rf"^--output: .*out: {refused}"):
                write()
    finally:
        holder.kill()  # leaves its files
        holder.communicate()
    assert RunFolder(other.run_folder).lock.is_file()
    check_training(other)
    check_reading(recipe, output)
    assert not [*tmp_path.glob(".*.lock")]


def test_what_is_checked_leaves_no_folder(recipe, run, tmp_path):
    before = set(tmp_path.rglob("*"))
    check_reading(recipe, tmp_path / "a" / "b" / "prepared")
    check_export([run], tmp_path / "a" / "b" / "exported")
    assert set(tmp_path.rglob("*")) == before
