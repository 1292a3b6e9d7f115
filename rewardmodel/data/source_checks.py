"""The sources of battles that a recipe or a command names -> whether they can be there; imports nothing heavy."""

import logging
import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from rewardmodel.config.schema import DataConfig, Source
from rewardmodel.errors import InputError, nearest
from rewardmodel.files import cache_folder, check_writable

logger = logging.getLogger(__name__)

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".zip")
"""Endings of the files that `data.readers.READERS` reads."""

COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
"""Endings that may follow, of `data.readers.COMPRESSIONS`."""

OWN_PARTS = ("validation", "calibration", "holdout")
"""Parts of a run's own battles, which `predict` takes by name."""

MOST_NAMES = 1_000
"""Files of a folder among which that with the nearest name is looked for."""


def is_on_hub(path: str) -> bool:
    """Return whether something that is no file here can be the id of a data set on the hub."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED_ENDINGS:
        suffixes.pop()
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)) and not {*suffixes[-1:]} & {*ENDINGS}


def check_source(source: str | Source) -> None:
    """Raise unless a source is `sample`, a file or folder, or can be a data set on the hub; its teacher must be a file.

    Raises:
        InputError: there is no such file.
    """
    path, teacher = (source.path, source.teacher) if isinstance(source, Source) else (source, None)
    if not (path == "sample" or os.path.exists(path) or is_on_hub(path)):
        here = islice(Path(path).parent.glob("*"), MOST_NAMES)
        close = nearest(Path(path).name, (one.name for one in here), 0.8)  # an ending that they share is alike already
        raise InputError(f"{path}: no such file{close}; give the path of a battles file, a hub id, or 'sample'")
    if teacher and not os.path.isfile(teacher):
        raise InputError(f"{teacher}: no such file; give the predictions of a teacher")


def check_sources(data: DataConfig) -> list[str]:
    """Return the paths of everything that a recipe reads battles from; raise unless it can be there.

    Raises:
        InputError: there is no such file.
    """
    given = [*(data.train if isinstance(data.train, list) else [data.train]), *([data.test] if data.test else [])]
    for source in given:
        check_source(source)
    if data.test and data.sample_submission and not os.path.isfile(data.sample_submission):
        raise InputError(f"{data.sample_submission}: no such file; give the data.sample_submission")
    return [source.path if isinstance(source, Source) else source for source in given]


def announce(sources: Sequence[str | Path]) -> None:
    """Say what is read, once the cache, which it is written to, is known to be writable.

    Raises:
        InputError: the cache cannot be written to.
    """
    check_writable(cache_folder(), "REWARDMODEL_CACHE")
    logger.info("reading %s …", ", ".join(dict.fromkeys(map(str, sources))))
