"""A path, a folder, the id of a hub data set or a table in, its raw rows out; one place for each kind of source.

How a file's content is read, by its ending, is in `data.readers`.
"""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, DatasetDict, load_from_disk

from rewardmodel.config.schema import Source
from rewardmodel.data.raw_rows import RawRows, explain_failures, number_rows
from rewardmodel.data.readers import READERS, ReadRequest, read_file, split_endings
from rewardmodel.data.source_checks import check_source
from rewardmodel.errors import InputError


@contextmanager
def open_rows(source: Source | pd.DataFrame | Dataset, role: str, wanted: Collection[str]) -> Iterator[RawRows]:
    """Yield the raw rows of a source; its files are open only inside the context.

    Args:
        source: a path or hub id with options, a DataFrame or a Dataset.
        role: `train` or `test`: which file of `sample`, of an archive or of a folder, and which split of a data set.
        wanted: columns that will be used; others may be missing from the rows, where leaving them out is cheaper.

    Raises:
        InputError: there is no such file or data set, no reader for it, or it is broken; also while rows are read.
    """
    with ExitStack() as opened:
        yield _open(source, role, wanted, opened)


def _open(source: Source | pd.DataFrame | Dataset, role: str, wanted: Collection[str], opened: ExitStack) -> RawRows:
    if isinstance(source, pd.DataFrame):
        names = list(map(str, source.columns))
        tuples = source.itertuples(index=False, name=None)
        return number_rows((dict(zip(names, row, strict=True)) for row in tuples), "data frame", names)
    if isinstance(source, Dataset):
        return _read_dataset(source, "data set", wanted)
    if source.path == "sample":
        sample = resources.files("rewardmodel.data") / "sample" / f"{role}.csv"
        return _open_file(opened.enter_context(resources.as_file(sample)), role, wanted, opened)
    if os.path.isfile(source.path):
        return _open_file(Path(source.path), role, wanted, opened)
    if os.path.isdir(source.path):
        return _open_folder(source, role, wanted, opened)
    check_source(source)
    return _read_dataset(_load_from_hub(source, role), source.path, wanted)


def _read_dataset(dataset: Dataset, where: str, wanted: Collection[str]) -> RawRows:
    names = dataset.column_names
    rows = dataset.with_format(None).select_columns([name for name in names if name in wanted])
    return number_rows(rows, where, names)


def _open_file(path: Path, role: str, wanted: Collection[str], opened: ExitStack) -> RawRows:
    with explain_failures(str(path), lambda: 0):
        file = opened.enter_context(path.open("rb"))
    return read_file(file, ReadRequest(str(path), role, wanted, opened))


def _load_from_hub(source: Source, role: str) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(source.path, source.subset, split=source.split or role, revision=source.revision)
    except Exception as error:  # from the hub, the network or a builder script: any type
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source.path}: no such file, and the hub gave no data set ({reason}); give the path of a file, or fix "
            "path, subset, split or revision"
        ) from error


_SAVED = ("state.json", "dataset_dict.json")
"""Files by which a folder of `Dataset.save_to_disk`, and one of `DatasetDict.save_to_disk`, is known."""


def _open_folder(source: Source, role: str, wanted: Collection[str], opened: ExitStack) -> RawRows:
    """Return the rows of a folder: of a data set that was saved there, or of its files one after the other."""
    folder = Path(source.path)
    if any((folder / name).is_file() for name in _SAVED):
        with explain_failures(str(folder), lambda: 0):
            saved = load_from_disk(str(folder))
        return _read_dataset(_choose_split(saved, source, role), str(folder), wanted)
    paths = _choose_files(folder, source, role)
    first = _open_file(paths[0], role, wanted, opened)

    def rows() -> Iterator[dict[str, Any]]:
        for path in paths:
            with ExitStack() as own:
                shard = first if path == paths[0] else _open_file(path, role, wanted, own)
                differing = sorted((set(shard.columns) ^ set(first.columns)) & {*wanted})
                if differing:
                    raise InputError(
                        f"{path}: column '{differing[0]}' is in this file or in {paths[0].name}, but not in both; give "
                        "all files of the folder the same columns, or read them as several sources"
                    )
                yield from (values for _, values in shard.rows)

    return number_rows(rows(), str(folder), first.columns, first.notes)


def _choose_split(saved: Dataset | DatasetDict, source: Source, role: str) -> Dataset:
    if isinstance(saved, Dataset):
        return saved
    name = source.split or role
    if name not in saved:
        raise InputError(f"{source.path}: no split '{name}' in it; give one as split: {', '.join(saved)}")
    return saved[name]


_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
"""Names of splits with which files begin: train-00000-of-00002.parquet."""


def _choose_files(folder: Path, source: Source, role: str) -> list[Path]:
    """Return the battles files of a folder in the order of their names, all of one ending, and of one split."""
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] not in "._")
    files = [path for path in found if split_endings(path.name)[1] not in ("", ".zip")]
    names = {path: re.sub(r"[-_.]?\d.*", "", split_endings(path.name)[0]) for path in files}
    wanted = source.split or role
    if wanted in names.values() or source.split:
        files = [path for path in files if names[path] == wanted]
    kinds, left = {split_endings(path.name)[1] for path in files}, {names[path] for path in files}
    if not files or len(kinds) > 1 or (len(left) > 1 and left & _SPLITS):
        shown = ", ".join(path.name for path in found[:8]) or "it is empty"
        raise InputError(
            f"{folder}: a folder, in which it is not clear what to read: {shown}; give a file, a folder that "
            f"save_to_disk wrote, or one with files of one kind whose names begin with one split, like "
            f"{wanted}-00000.parquet; endings: {', '.join(one for one in READERS if one != '.zip')}"
        )
    return files
