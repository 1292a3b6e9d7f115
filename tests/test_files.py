import errno
import logging
import os
import resource
import signal
from contextlib import nullcontext

import filelock
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from rewardmodel import files
from rewardmodel.errors import InputError
from rewardmodel.files import (
    atomic_path,
    check_new_folder,
    check_replaceable,
    check_writable,
    clear,
    lock,
    lock_file,
    lock_output,
    whole_or_absent,
    write_arrays,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_takes_its_place_only_after_the_block(tmp_path):
    target = tmp_path / "out.txt"
    with atomic_path(target) as partial:
        partial.write_text("new")
        assert not target.exists()
        assert partial.parent == tmp_path  # a rename across file systems would not be atomic
    assert target.read_text() == "new"
    assert names(tmp_path) == ["out.txt"]


def test_missing_parents_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "out.txt", "text")
    assert (tmp_path / "a" / "b" / "out.txt").read_text() == "text"


def test_write_text_is_utf8_and_replaces(tmp_path):
    write_text(tmp_path / "out.txt", "old and longer")
    write_text(tmp_path / "out.txt", "für 猫\n")
    assert (tmp_path / "out.txt").read_bytes() == "für 猫\n".encode()
    assert names(tmp_path) == ["out.txt"]


def test_folder_replaces_a_folder_whole(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale").write_text("old")
    with atomic_path(target) as partial:
        partial.mkdir()
        (partial / "fresh").write_text("new")
        assert names(target) == ["stale"]
    assert names(target) == ["fresh"]
    assert names(tmp_path) == ["model"]


def half_a_file(partial):
    partial.write_text("half")


def half_a_folder(partial):
    partial.mkdir()
    (partial / "weights").write_text("half")


def break_off(target, write, error=RuntimeError):
    with atomic_path(target) as partial:
        write(partial)
        raise error("broken off")


@pytest.mark.parametrize("write", [half_a_file, half_a_folder, lambda partial: None])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_is_passed_on_and_leaves_nothing_where_nothing_was(tmp_path, error, write):
    with pytest.raises(error, match="broken off"):
        break_off(tmp_path / "out", write, error)
    assert names(tmp_path) == []


def test_exception_keeps_the_old_file(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError):
        break_off(target, half_a_file)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["out.txt"]


def test_exception_keeps_the_old_folder(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    with pytest.raises(RuntimeError):
        break_off(target, half_a_folder)
    assert (target / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_failed_replacement_keeps_the_old_folder(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(target):
        pass  # nothing was written
    assert (target / "weights").read_text() == "old"


def test_a_folder_is_emptied_and_stays(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "weights").write_text("old")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    clear(tmp_path / "run")
    assert names(tmp_path / "run") == []
    assert names(tmp_path / "elsewhere") == ["kept"]
    assert names(tmp_path) == ["elsewhere", "run"]


def test_a_link_to_a_folder_stays_one_and_the_folder_is_emptied(tmp_path):
    (tmp_path / "large" / "run").mkdir(parents=True)
    (tmp_path / "large" / "run" / "weights").write_text("old")
    (tmp_path / "run").symlink_to(tmp_path / "large" / "run")
    clear(tmp_path / "run")
    assert (tmp_path / "run").is_symlink()
    assert names(tmp_path / "run") == []
    assert names(tmp_path / "large") == ["run"]


def test_a_folder_whose_emptying_is_killed_is_empty_and_the_next_time_takes_what_was_left(tmp_path, monkeypatch):
    def filled():
        (tmp_path / "run" / "model").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "recipe.yaml").write_text("old")

    def killed(path, **_):
        if path.exists():
            raise KeyboardInterrupt

    filled()
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            clear(tmp_path / "run")
    assert names(tmp_path / "run") == []
    assert names(tmp_path) == [".run.old", "run"]
    filled()
    clear(tmp_path / "run")
    assert names(tmp_path / "run") == []
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("inside", [".", "model"])
def test_the_working_directory_is_emptied_where_it_is(inside, tmp_path, monkeypatch):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("old")
    before = (tmp_path / "run").stat().st_ino
    monkeypatch.chdir(tmp_path / "run" / inside)
    clear(tmp_path / "run")
    assert (tmp_path / "run").stat().st_ino == before
    assert names(tmp_path / "run") == []
    assert names(tmp_path) == ["run"]


@pytest.fixture
def full_disk():
    """Let no file of this process grow beyond 8 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def write_weights(path):
    with atomic_path(path) as partial:
        partial.mkdir()
        save_file({"weight": torch.zeros(100_000)}, partial / "model.safetensors")


def write_state(path):
    with atomic_path(path) as partial:
        torch.save(torch.zeros(100_000), partial)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 100_000),
        lambda path: write_arrays(path, features=np.zeros(100_000)),
        write_weights,
        write_state,
    ],
    ids=["text", "arrays", "safetensors", "torch"],
)
def test_a_full_disk_names_the_file_that_was_asked_for_and_leaves_nothing(write, tmp_path, full_disk):
    with pytest.raises(OSError, match="out") as caught:
        write(tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out")
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert names(tmp_path) == []


def test_a_folder_that_a_library_cannot_write_whole_is_removed(tmp_path):
    folder = tmp_path / "checkpoint-4"

    def write_half():
        folder.mkdir()
        (folder / "weights").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="checkpoint-4") as caught, whole_or_absent(folder):
        write_half()
    assert caught.value.filename == str(folder)
    assert names(tmp_path) == []
    with whole_or_absent(folder):
        folder.mkdir()
    assert names(tmp_path) == ["checkpoint-4"]


def test_other_errors_stay_as_they_are(tmp_path):
    for error in (ValueError("no file"), FileNotFoundError(errno.ENOENT, "gone", "other")):
        with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "out"):
            raise error
        assert caught.value is error


def test_a_folder_is_checked_by_writing_and_nothing_remains(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b", "--output")
    assert names(tmp_path) == []

    def refuse(dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError) as caught:
        check_writable(tmp_path / "a", "--output")
    expected = f"--output: {tmp_path / 'a'}: {tmp_path} cannot be written to (No space left on device); free some space"
    assert str(caught.value) == expected


def test_a_new_folder_is_absent_or_empty(tmp_path):
    check_new_folder(tmp_path / "new")
    check_new_folder(tmp_path)
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match=r"^--output: .* already exists"):
            check_new_folder(path)


@pytest.mark.parametrize(
    ("name", "content", "replaced"),
    [
        ("s.csv", b"id,winner_model_a,winner_model_b,winner_tie\n1,.2,.3,.5\n", True),
        ("s.csv", b'"id","winner"\n1,tie\n', True),
        ("train.csv", b"id,prompt,response_a,response_b,winner_model_a\n1,a,b,c,1\n", False),
        ("notes.csv", b"a,b\n", False),
        ("bytes.csv", b"\xff\xfe\x00", False),
        ("empty.csv", b"", False),
        ("text.parquet", b"id,p_model_a", False),
    ],
)
def test_only_predictions_are_replaced(name, content, replaced, tmp_path):
    (tmp_path / name).write_bytes(content)
    if replaced:
        check_replaceable(tmp_path / name)
        return
    with pytest.raises(InputError, match=rf"^--output: .*{name} is there and holds no predictions; remove it, or name"):
        check_replaceable(tmp_path / name)


@pytest.mark.parametrize(("column", "replaced"), [("p_model_a", True), ("prompt", False)])
def test_only_tables_of_predictions_are_replaced(column, replaced, tmp_path):
    pd.DataFrame({column: ["1"]}).to_parquet(tmp_path / "x.parquet")
    with nullcontext() if replaced else pytest.raises(InputError, match="holds no predictions"):
        check_replaceable(tmp_path / "x.parquet")


def test_a_lock_names_its_holder_and_is_gone_afterwards(tmp_path):
    path = lock_file(tmp_path / "runs" / "one")
    assert path == tmp_path / "runs" / ".one.lock"
    with lock(path, "--output: one"):
        assert path.read_text().endswith(f", process {os.getpid()}")
        with lock(path, "--output: one"):  # the same process
            pass
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(path, blocking=False).acquire()
    assert not path.parent.exists()
    with lock_output(tmp_path / "runs" / "one"):
        (path.parent / "one").touch()
    assert names(path.parent) == ["one"]


@pytest.mark.parametrize(("number", "said"), [(errno.ENOLCK, True), (errno.EACCES, False)])
def test_where_nothing_can_be_locked_work_goes_on(number, said, tmp_path, monkeypatch, caplog):
    def refuse(self):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING), lock(tmp_path / ".one.lock", "--output: one"):
        pass
    assert ("cannot be locked" in caplog.text) == said
