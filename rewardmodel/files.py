"""Files and folders that are whole or absent: written next to their place, then renamed into it; one writer at a time.

Imports nothing heavy, because commands check with it where they may write before they do anything else.
"""

import errno
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from rewardmodel.errors import InputError

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

FULL = (
    *("No space left", "os error 28", "File too large", "os error 27", "Disk quota exceeded"),
    *("iostream error", "file write failed", "inline_container.cc"),
)
"""What libraries that raise no OSError say of a full disk: safetensors, and torch's zip writer."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder to; on success it takes the place of `path`, else it is removed.

    Raises:
        OSError: it cannot be written; the error names `path`, whatever the library that wrote it said.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing_to(path, partial):
            yield partial
        if path.is_dir():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            try:
                os.replace(partial, path)
            except OSError:
                os.replace(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


@contextmanager
def writing_to(path: Path, partial: Path) -> Iterator[None]:
    """Let what cannot be written to `partial`, which becomes `path`, be an OSError that names `path`."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
        if unnamed or str(error.filename).startswith(str(partial)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        if any(words in str(error) for words in FULL):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


@contextmanager
def whole_or_absent(folder: Path) -> Iterator[None]:
    """Let a library write a folder in its place: if that fails, the folder is removed, and the error names it."""
    try:
        with writing_to(folder, folder):
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_writable(path: Path, name: str) -> None:
    """Raise unless a file or folder can be written, in it or in the closest folder above that exists; nothing remains.

    A small file is written, because neither permissions nor free space say it for every user and file system.

    Args:
        path: the file or folder, which may exist.
        name: of the option or key that it was given by, for the message.

    Raises:
        InputError: the message names `path`, the folder that cannot be written to, and the system's reason.
    """
    places = path.absolute().parents if path.is_file() else (path, *path.absolute().parents)
    folder = next(one for one in places if one.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        where = f"{path}" if folder == path else f"{path}: {folder}"
        what = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name a folder that can be"
        raise InputError(f"{name}: {where} cannot be written to ({error.strerror}); {what}") from error


def check_new_folder(path: Path) -> None:
    """Raise InputError unless a folder to be made, `--output`, is absent or empty."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"--output: {path} already exists; remove it, or name another")


def check_page(output: Path) -> None:
    """Raise InputError unless a page to be written, `--output`, is called one, so that it replaces no other file."""
    if output.suffix not in (".html", ".htm"):
        raise InputError(f"--output: {output} does not end in .html; give a name that does")


def check_replaceable(output: Path) -> None:
    """Raise InputError if a file to be written, `--output`, is there and holds something else than predictions.

    Predictions are replaced, because the same command may be given again; a table of battles is not.
    """
    if not output.is_file():
        return
    try:
        if output.suffix == ".parquet":
            from pyarrow.parquet import read_schema

            ours = "p_model_a" in read_schema(output).names
        else:
            with output.open(encoding="utf-8") as file:
                names = [name.strip('"') for name in file.readline().rstrip().split(",")]
            ours = any(name.startswith("winner") for name in names) and "prompt" not in names
    except ValueError:  # of another kind, by its first bytes
        ours = False
    if not ours:
        raise InputError(f"--output: {output} is there and holds no predictions; remove it, or name another")


def lock_file(output: Path) -> Path:
    """Return the lock file of a file or a folder that is written: `.NAME.lock` next to it."""
    output = output.absolute()
    return output.with_name(f".{output.name}.lock")


@contextmanager
def lock(path: Path, name: str) -> Iterator[None]:
    """Let one process at a time write something; the same process may lock it again.

    The system frees the lock of a process that ends, however it ends, so that a file that was left means nothing. On
    NFS the server keeps locks; where a file system has none, a warning is logged and nothing is locked. Neither is
    anything in a folder that cannot be written to: what is written next fails there.

    Args:
        path: the lock file, with host and process of its holder; its folder is made, and removed if it stays empty.
        name: what is written, for the message.

    Raises:
        InputError: another process has the lock.
    """
    from filelock import FileLock, Timeout

    held = FileLock(path.resolve(), blocking=False, is_singleton=True)
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
        if held.lock_counter == 1:
            path.write_text(f"host {socket.gethostname()}, process {os.getpid()}", encoding="utf-8")
    except Timeout as error:
        if path.is_file():  # else it could not be made
            holder = path.read_text(encoding="utf-8") or "unknown"
            raise InputError(
                f"{name}: another process is writing there ({holder}); wait for it, stop it, or name another"
            ) from error
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            logger.warning("%s: cannot be locked (%s); start no second process that writes there", name, error.strerror)
    try:
        yield
    finally:
        if held.is_locked:
            if held.lock_counter == 1:
                path.unlink(missing_ok=True)  # while it is locked: a file that was unlinked is no lock for others
            held.release()
        for folder in made:
            with suppress(OSError):  # something was written there
                folder.rmdir()


def lock_output(output: Path) -> AbstractContextManager[None]:
    """Let one process at a time write a file or a folder, `--output`, and what is kept next to it meanwhile: `lock`."""
    return lock(lock_file(output), f"--output: {output}")


def clear(folder: Path) -> None:
    """Empty a folder atomically: if the process is killed, the folder has all of its content or none.

    What was not removed by then is in `.NAME.old` next to it, until the next call. A mount point and the working
    directory cannot be renamed, so their content is removed file by file.
    """
    place = folder.resolve()
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if os.path.ismount(place) or Path.cwd().is_relative_to(place):
        old = place
    else:
        os.replace(place, old)
        place.mkdir()
    for path in old.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if old != place:
        old.rmdir()


def cache_folder() -> Path:
    """Return the folder of files that can be computed again: $REWARDMODEL_CACHE, else ~/.cache/rewardmodel."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rewardmodel"
    return Path(os.environ.get("REWARDMODEL_CACHE", default)).expanduser()


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_arrays(folder: Path, pattern: str, names: Sequence[str]) -> Iterator[list["np.ndarray"]]:
    """Yield the named arrays of each .npz file that matches; a file that cannot be read is skipped with a warning."""
    import numpy as np

    for path in sorted(folder.glob(pattern)):
        try:
            with path.open("rb") as opened, np.load(opened) as file:
                arrays = [file[name] for name in names]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            logger.warning("%s cannot be read; its battles are computed again", path)
            continue
        yield arrays


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays to an .npz file, by name, whole or not at all."""
    import numpy as np

    with atomic_path(path) as partial_file, partial_file.open("wb") as file:
        np.savez(file, **arrays)
