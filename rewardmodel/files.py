"""Files and folders that are whole or absent: written next to their place, then renamed into it."""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

logger = logging.getLogger(__name__)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder to; on success it takes the place of `path`, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
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


def read_arrays(folder: Path, pattern: str, names: Sequence[str]) -> Iterator[list[np.ndarray]]:
    """Yield the named arrays of each .npz file that matches; a file that cannot be read is skipped with a warning."""
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
    with atomic_path(path) as partial_file, partial_file.open("wb") as file:
        np.savez(file, **arrays)
