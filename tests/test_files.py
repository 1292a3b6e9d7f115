import pytest

from rewardmodel import files
from rewardmodel.files import atomic_path, clear, write_text


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
