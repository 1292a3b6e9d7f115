import json
import shutil
import subprocess
import sys

import pytest
from builders import battle_frame

from rewardmodel import export
from rewardmodel.errors import InputError
from rewardmodel.exports.checks import load_trained_run
from rewardmodel.exports.export import EXPORTS
from rewardmodel.exports.kaggle import Bundle


def test_a_folder_without_its_precision_is_not_a_trained_run(run_folder, tmp_path):
    with pytest.raises(InputError, match=r"no recipe\.yaml"):
        load_trained_run(tmp_path)
    assert load_trained_run(run_folder).dtype == "float32"
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    for content in ("{}", "", json.dumps({"compute": {"dtype": "int3"}})):
        (copy / "environment.json").write_text(content)
        with pytest.raises(InputError, match=r"environment\.json: compute\.dtype: none of"):
            load_trained_run(copy)


def test_an_export_is_not_exported_again(run_folder, tmp_path):
    shutil.copytree(run_folder / "model", tmp_path / "export")
    shutil.copy(run_folder / "recipe.yaml", tmp_path / "export")
    with pytest.raises(InputError, match="export: is an export already; give the run folder that it was exported from"):
        export(tmp_path / "export", tmp_path / "again")


def test_a_hub_that_cannot_be_written_is_reported_before_anything_is_computed(run_folder, tmp_path, monkeypatch):
    class Hub:
        def __init__(self, token=None):
            pass

        def whoami(self):
            raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("rewardmodel.exports.export.EXPORTS", dict.fromkeys(EXPORTS))  # whatever writes would fail
    with pytest.raises(InputError, match=r"--push-to-hub: me/model: the hub cannot be reached \(no network\)"):
        export(run_folder, tmp_path / "export", "adapter", push_to_hub="me/model")
    assert not (tmp_path / "export").exists()


def test_a_backbone_that_moved_is_named_for_the_export(run_folder, tmp_path):
    moved = {"model.model_name_or_path": str(tmp_path / "moved")}
    assert load_trained_run(run_folder, moved).recipe.model.model_name_or_path == str(tmp_path / "moved")
    with pytest.raises(InputError, match=r"no backbone '.*moved'.*say where with --model\.model_name_or_path"):
        export(run_folder, tmp_path / "export", battles=battle_frame(20), overrides=moved)


def test_too_few_battles_compare_nothing(run_folder, tmp_path):
    with pytest.raises(InputError, match="12 battles; give at least 64"):
        export(run_folder, tmp_path / "export", battles=battle_frame(3))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kind": "mergd"}, "did you mean 'merged'"),
        ({"dtype": "int8"}, "no precision 'int8'"),
        ({"kind": "adapter", "dtype": "float32"}, "saved as it was trained"),
        ({"kind": "soup"}, "of several runs"),
        ({"kind": "kaggle"}, "needs --dataset"),
    ],
)
def test_what_does_not_go_together_is_refused(asked, message, run_folder, tmp_path):
    with pytest.raises(InputError, match=message):
        export(run_folder, tmp_path / "export", **asked)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, "--base"),
        ({"contents": "mergd"}, {}, "--contents: no export 'mergd' .did you mean 'merged'"),
        ({"contents": "merged", "base": "/b"}, {}, "--base"),
        ({"contents": "merged"}, {"push_to_hub": "me/model"}, "--push-to-hub: a Kaggle bundle"),
        ({"contents": "merged"}, {}, "--installed: .*cannot be read"),
    ],
)
def test_what_does_not_go_with_a_bundle_is_refused(changes, options, message, run_folder, tmp_path):
    bundle = Bundle("me/my-reward-model", tmp_path / "list", **changes)
    with pytest.raises(InputError, match=message):
        export(run_folder, tmp_path / "bundle", "kaggle", bundle=bundle, **options)
    assert not (tmp_path / "bundle").exists()


def test_a_folder_that_is_there_is_left_alone(run_folder, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="already exists"):
        export(run_folder, tmp_path)
    assert (tmp_path / "mine").read_text() == "x"


def test_a_run_that_was_trained_whole_has_no_adapter(untrained_run, tmp_path):
    with pytest.raises(InputError, match="has no adapter; use --kind merged"):
        export(untrained_run("whole", use_peft=False), tmp_path / "export", "adapter")


WITHOUT_TORCH = """
import sys
from rewardmodel.errors import InputError
from rewardmodel.exports.export import export
run, output, battles = sys.argv[1:]
for given in ({"kind": "mergd"}, {"dtype": "int8"}, {"kind": "soup"}, {"battles": battles}):
    try:
        export(run, output, **given)
    except InputError:
        continue
    raise AssertionError(given)
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_options_and_battles_are_checked_before_torch_is_imported(run_folder, tmp_path):
    (tmp_path / "battles.csv").write_text("id,prompt\n1,x\n")
    command = [sys.executable, "-c", WITHOUT_TORCH, run_folder, tmp_path / "export", tmp_path / "battles.csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


NOT_IMPORTED = """
import sys
from rewardmodel.cli import main
main(["--help"])
assert not {"torch", "rewardmodel.exports.export"} & sys.modules.keys()
"""


@pytest.mark.slow
def test_naming_the_command_imports_no_torch():
    subprocess.run([sys.executable, "-c", NOT_IMPORTED], check=True, capture_output=True)
