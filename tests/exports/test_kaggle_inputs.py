import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kaggle_trees import BASE, SLUG, make_backbone_folder, make_bundle, make_competition, run_cells, tree_of

from rewardmodel.exports.kaggle_inputs import (
    check_bundle,
    copy_shards,
    digest_config,
    draw_tree,
    find_backbone,
    find_battles,
    find_bundle,
    find_inputs,
    list_files,
)
from rewardmodel.model.weights import fingerprint

LAYOUTS = {
    "old": {"bundle": "my-reward-model", "competition": SLUG, "backbone": "gemma"},
    "new": {
        "bundle": "datasets/me/my-reward-model",
        "competition": f"competitions/{SLUG}",
        "backbone": f"models/{BASE}",
    },
    "nested": {
        "bundle": "datasets/me/my-reward-model/bundle/upload",
        "competition": f"competitions/{SLUG}/data",
        "backbone": "datasets/other/gemma/models/gemma",
    },
    "renamed": {"bundle": "a/b", "competition": "c", "backbone": "d/e/f"},
}
"""Where the parts are mounted."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Return a bundle of a few small files, and what its notebook knows of it."""
    return make_bundle(tmp_path_factory.mktemp("made"))


@pytest.fixture
def mounted(bundle, tmp_path):
    """Return a function that mounts a bundle, a competition and a backbone in a layout."""

    def mount(layout: str) -> Path:
        root, places = tmp_path / "input", LAYOUTS[layout]
        shutil.copytree(bundle.folder, root / places["bundle"])
        make_competition(root / places["competition"])
        shutil.copytree(bundle.backbone, root / places["backbone"])
        return root

    return mount


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_found_wherever_they_are_mounted(layout, bundle, mounted, capsys):
    root, places = mounted(layout), LAYOUTS[layout]
    found = run_cells(bundle, root)
    assert found["BUNDLE"] == root / places["bundle"]
    assert found["BATTLES"] == root / places["competition"] / "test.csv"
    assert found["SAMPLE"] == root / places["competition"] / "sample_submission.csv"
    assert found["found"]["backbone"] == root / places["backbone"]
    assert found["problems"] == []
    assert "3 battles" in capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("part", "attach"),
    [
        ("bundle", "Add Input > Datasets > me/my-reward-model"),
        ("competition", f"Add Input > Competitions > {SLUG}"),
        ("backbone", f"Add Input > {BASE}"),
    ],
)
def test_what_is_missing_is_named_with_the_tree_that_was_searched(layout, part, attach, bundle, mounted, capsys):
    root = mounted(layout)
    shutil.rmtree(root / LAYOUTS[layout][part])
    with pytest.raises(SystemExit) as stopped:
        run_cells(bundle, root)
    (sentence,) = str(stopped.value).splitlines()
    assert sentence.endswith(attach)
    assert f"searched:\n{root}" in capsys.readouterr().out
    assert not (root.parent / "work" / "submission.csv").exists()


def test_nothing_attached_names_every_part(bundle, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_cells(bundle, tmp_path / "input")
    assert [line.split()[1] for line in str(stopped.value).splitlines()] == ["bundle", "battles", "backbone"]
    assert "(no such folder)" in capsys.readouterr().out


def test_the_hidden_battles_are_found_by_their_columns(bundle, mounted, capsys):
    root = mounted("new")
    folder = root / LAYOUTS["new"]["competition"]
    make_competition(folder, rows=40)
    assert run_cells(bundle, root)["ids"] == [str(number) for number in range(40)]
    (folder / "test.csv").rename(folder / "hidden.csv")
    assert run_cells(bundle, root)["BATTLES"] == folder / "hidden.csv"
    assert "has other ids" not in capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labelled_battles_are_found_by_their_columns(layout, mounted):
    root, places = mounted(layout), LAYOUTS[layout]
    assert find_battles(list_files(root), SLUG, labelled=True).why.startswith("no .csv with the columns id, prompt")
    train = root / places["competition"] / "train.csv"
    header = "id,model_a,model_b,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n"
    train.write_text(header)
    make_folder(root / "datasets" / "a" / "other").joinpath("train.csv").write_text(header)
    found = find_battles(list_files(root), SLUG, labelled=True)
    assert found.path == train
    assert "taken because it is the competition's folder, not a data set" in found.why


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_data_set_with_the_same_file_names_confuses_nothing(layout, bundle, mounted, capsys):
    root, places = mounted(layout), LAYOUTS[layout]
    other = root / "datasets" / "a" / SLUG  # sorts before all others
    make_competition(other, rows=5)
    make_competition(other / "labelled", rows=5, labelled=True)
    old_bundle = make_folder(root / "datasets" / "a" / "old-bundle")
    (old_bundle / "bundle.json").write_text(json.dumps({"id": "0123456789abcdef"}))
    similar = make_backbone_folder(root / "datasets" / "a" / "base", seed=1)  # the same configuration, other weights
    assert digest_config(similar / "config.json") == digest_config(bundle.backbone / "config.json")
    found = run_cells(bundle, root)
    assert found["BATTLES"] == root / places["competition"] / "test.csv"
    assert found["BUNDLE"] == root / places["bundle"]
    assert found["found"]["backbone"] == root / places["backbone"]
    printed = capsys.readouterr().out
    assert "one of 2: taken because it is the competition's folder, not a data set" in printed
    assert f"not taken: {other / 'test.csv'}" in printed


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_of_two_equal_matches_the_first_is_taken_and_said_so(bundle, tmp_path):
    for name in ("x", "y"):
        make_competition(tmp_path / name)
    match = find_battles(list_files(tmp_path), SLUG)
    assert match.path == tmp_path / "x" / "test.csv"
    assert match.why.startswith("(one of 2: taken because it is the first by name; not taken: ")


def test_a_bundle_of_another_export_is_named(bundle, tmp_path):
    make_folder(tmp_path / "old").joinpath("bundle.json").write_text(json.dumps({"id": "0123456789abcdef"}))
    make_folder(tmp_path / "broken").joinpath("bundle.json").write_text("{")
    match = find_bundle(list_files(tmp_path), bundle.wanted)
    assert match.path is None
    assert f"{tmp_path / 'old'} is of another export (0123456789abcdef)" in match.why


def test_a_backbone_with_other_weights_is_named(bundle, tmp_path):
    make_backbone_folder(tmp_path / "base", seed=1)
    match = find_backbone(list_files(tmp_path), bundle.wanted["backbones"]["backbone"], fingerprint)
    assert match.path is None
    assert "has its configuration, but other weights" in match.why
    (tmp_path / "base" / "model.safetensors").unlink()
    match = find_backbone(list_files(tmp_path), bundle.wanted["backbones"]["backbone"], fingerprint)
    assert match.why == f"no config.json of it with weights; there are: {tmp_path / 'base'} (llama)"


def test_the_right_weights_with_another_configuration_are_taken_and_said_so(bundle, tmp_path):
    shutil.copytree(bundle.backbone, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "new": 1}))
    match = find_backbone(list_files(tmp_path), bundle.wanted["backbones"]["backbone"], fingerprint)
    assert match == (tmp_path / "base", "its config.json differs from that of training, its weights do not")


def test_who_saved_a_configuration_does_not_matter(tmp_path):
    first, second = make_folder(tmp_path / "a") / "config.json", make_folder(tmp_path / "b") / "config.json"
    first.write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "transformers_version": "5.0.0"}))
    second.write_text(json.dumps({"hidden_size": 8, "model_type": "llama", "dtype": "bfloat16"}, indent=2))
    assert digest_config(first) == digest_config(second)
    second.write_text(json.dumps({"hidden_size": 16, "model_type": "llama"}))
    assert digest_config(first) != digest_config(second)


def test_environment_variables_override_the_search(bundle, mounted, tmp_path, capsys):
    root = mounted("new")
    make_competition(tmp_path / "mine", rows=2)
    given = {"BATTLES": str(tmp_path / "mine" / "test.csv"), "BACKBONE": str(bundle.backbone)}
    found = run_cells(bundle, root, **given)
    assert found["BATTLES"] == tmp_path / "mine" / "test.csv"
    assert found["found"]["backbone"] == bundle.backbone
    assert "given by BATTLES" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nowhere, given by BUNDLE, does not exist"):
        run_cells(bundle, root, BUNDLE="nowhere")


def test_a_whole_model_needs_no_backbone(tmp_path):
    whole = make_bundle(tmp_path / "whole", whole=True)
    make_competition(tmp_path / "input" / SLUG)
    shutil.copytree(whole.folder, tmp_path / "input" / "mine")
    assert "backbone" not in run_cells(whole, tmp_path / "input")["found"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "model" / "adapter_model.safetensors").write_bytes(b"x"), "has 1 bytes, not 2,000"),
        (lambda folder: (folder / "model" / "tokenizer.json").write_text('{"b": 1}'), "is not the file that was exp"),
        (lambda folder: (folder / "rewardmodel" / "cli.py").unlink(), "is missing"),
        (lambda folder: (folder / "bundle.json").write_text(""), "cannot be read or lists no files"),
    ],
    ids=["truncated model", "other tokenizer", "missing source", "empty marker"],
)
def test_a_damaged_bundle_is_one_sentence(damage, sentence, bundle, mounted):
    root = mounted("new")
    folder = root / LAYOUTS["new"]["bundle"]
    damage(folder)
    with pytest.raises(SystemExit) as stopped:
        run_cells(bundle, root, BUNDLE=str(folder))
    (line,) = str(stopped.value).splitlines()
    assert sentence in line
    assert line.endswith("attach that with Add Input")
    assert list((root.parent / "work").iterdir()) == []


def test_a_truncated_wheel_stops_the_notebook_before_pip(tmp_path):
    wheel = tmp_path / "bundle" / "wheels" / "one-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"wheel")
    whole = make_bundle(tmp_path, whole=True)
    make_competition(tmp_path / "input" / SLUG)
    wheel.write_bytes(b"w")
    with pytest.raises(SystemExit, match=rf"^{wheel} has 1 bytes, not 5: upload the bundle again"):
        run_cells(whole, tmp_path / "input", BUNDLE=str(whole.folder))


def test_inputs_are_only_read(bundle, mounted):
    root = mounted("new")
    before = tree_of(root)
    for path in sorted(root.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert run_cells(bundle, root)["problems"] == []
    finally:
        for path in sorted(root.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert tree_of(root) == before


def test_links_are_followed_once(bundle, mounted):
    root = mounted("new")
    (root / "loop").symlink_to(root)
    files = list_files(root)
    assert len({path.resolve() for path in files}) == len(files)
    assert run_cells(bundle, root)["problems"] == []


def shards_of(root: Path, names=("whole-00000000.npz", "whole-00000007.npz", "budget.json")) -> Path:
    folder = make_folder(root / "notebooks" / "me" / "mine" / "submission.csv.shards" / f"{'a' * 16}-{'b' * 16}")
    for name in (*names, f".{names[0]}.1.partial"):
        (folder / name).write_text(name)
    return folder


def test_what_an_earlier_session_predicted_is_copied(tmp_path):
    folder, target = shards_of(tmp_path / "input"), tmp_path / "work" / "submission.csv.shards"
    (target / folder.name).mkdir(parents=True)
    (target / folder.name / "budget.json").write_text("newer")
    assert copy_shards(list_files(tmp_path / "input"), target).startswith("files of an earlier session: 2; predicting")
    copied = {path.name: path.read_text() for path in (target / folder.name).iterdir()}
    names = ("whole-00000000.npz", "whole-00000007.npz")
    assert copied == {**{name: name for name in names}, "budget.json": "newer"}
    assert copy_shards(list_files(tmp_path / "input"), target) == ""


def test_a_full_disk_leaves_no_half_copied_file(tmp_path, monkeypatch):
    shards_of(tmp_path / "input")

    def fill(source, target):
        Path(target).write_text("ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fill)
    text = copy_shards(list_files(tmp_path / "input"), tmp_path / "work" / "submission.csv.shards")
    assert text.startswith("of an earlier session only 0 of its files could be copied ([Errno 28] No space")
    assert [path for path in (tmp_path / "work").rglob("*") if path.is_file()] == []


def test_a_large_tree_is_drawn_in_part(tmp_path):
    for number in range(80):
        make_folder(tmp_path / f"{number:02}").joinpath("a.csv").touch()
    lines = draw_tree(tmp_path).splitlines()
    assert lines[:2] == [f"{tmp_path}/", "  00/  a.csv"]
    assert lines[-1] == "... and 21 more folders"


def test_files_are_listed_with_their_digests(bundle):
    content = json.loads((bundle.folder / "bundle.json").read_text())
    for name, (size, digest) in content["files"].items():
        data = (bundle.folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
    assert check_bundle(bundle.folder) == []


ISOLATED = """
import sys
source = sys.stdin.read()
names = {}
exec(compile(source, "cells", "exec"), names)
assert names["problems"] == [], names["problems"]
heavy = {"torch", "numpy", "pandas", "packaging", "transformers", "rewardmodel"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_search_and_checks_run_with_the_standard_library_alone(bundle, mounted, tmp_path):
    root = mounted("new")
    (tmp_path / "work").mkdir()
    cells = bundle.script.split("# %%\n")[1:6]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ISOLATED],
        input="\n".join(cells).replace("check_packages(WANTED", "check_packages({**WANTED, 'requires': {}}"),
        cwd=tmp_path / "work",
        env={"INPUTS": str(root), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_find_inputs_needs_no_backbone_where_none_is_wanted(bundle, mounted):
    root = mounted("old")
    found = find_inputs(root, {**bundle.wanted, "backbones": {}}, {}, fingerprint)
    assert set(found) == {"bundle", "battles", "sample"}
