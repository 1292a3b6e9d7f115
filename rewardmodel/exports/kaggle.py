"""An exported model -> a folder that is ready to be a Kaggle data set: its settings, the source, and the wheels.

What is written next to them, the notebook and the metadata, is made by `kaggle_notebook`.
"""

import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import rewardmodel
from rewardmodel.errors import InputError, nearest
from rewardmodel.exports.wheels import download_wheels, find_machines

INPUTS = "/kaggle/input"
"""Folder of all inputs of a Kaggle notebook."""

HIDDEN_BATTLES = 25_000
"""Battles that the competition scores a notebook on, about."""

RUN_SECONDS = 9 * 3600
"""Seconds after which Kaggle ends a notebook."""

LINKS = "/tmp/kaggle-backbones"
"""Folder of links to backbones, by which the recipes in a bundle name them wherever they are mounted."""


class Accelerator(NamedTuple):
    """GPUs that a Kaggle notebook can have.

    Attributes:
        menu: what Kaggle's menu calls them.
        machine_shape: what kernel-metadata.json calls them.
        device: one of them in `planning.gpus.DEVICES`.
        gpus: how many.
    """

    menu: str
    machine_shape: str
    device: str
    gpus: int


ACCELERATORS = {
    "t4x2": Accelerator("GPU T4 x2", "NvidiaTeslaT4", "T4", 2),
    "rtx-pro-6000": Accelerator("RTX PRO 6000", "NvidiaRtxPro6000", "RTX-PRO-6000", 1),
}
"""Accelerators by name. Machine shapes are those of docs/kernels.md in Kaggle's command line: NvidiaTeslaT4 is two T4s.
For a shape that it does not have, Kaggle silently takes another GPU, which the notebook's checks then name."""


class Base(NamedTuple):
    """A backbone on Kaggle.

    Attributes:
        given: a Kaggle model, a data set, or a folder, as in `Bundle.base`.
    """

    given: str

    @property
    def source(self) -> str | None:
        """Its name on Kaggle, like google/gemma-2/transformers/gemma-2-9b-it/2; None: not known."""
        name = self.given.rstrip("/")
        for kind in ("models", "datasets"):
            name = name.removeprefix(f"{INPUTS}/{kind}/")
        return name if name.count("/") in (1, 4) and all(name.split("/")) else None

    @property
    def folder(self) -> str:
        """Where it is expected to be mounted."""
        source = self.source
        if source is None:
            return self.given
        return f"{INPUTS}/{'models' if source.count('/') == 4 else 'datasets'}/{source}"


@dataclass(frozen=True)
class Bundle:
    """Settings of a Kaggle bundle: the data set that it becomes, and the machine that it runs on.

    Attributes:
        dataset: owner/name of the Kaggle data set.
        installed: a file with what is installed there, as `wheels.read_installed` takes it; or several.
        contents: the model inside, a name from `exports.export.EXPORTS`.
        base: the backbone there, for an adapter: a Kaggle model, owner/model/framework/variation/version, a data set,
            owner/name, or the folder where it is mounted; or that of each run.
        python: the version there, or that of each file; default: the first line of each file says it.
        accelerator: a name from `ACCELERATORS`.
        time_limit: seconds of the notebook in which battles are still predicted in the second order of A and B.
        separate: of several runs, bundle each one's model, and average their probabilities as `predict` does; default:
            one model, the mean of their adapters.
        weights: of each run in the mean of probabilities; default: equal.

    Raises:
        InputError: a name that Kaggle does not accept, a time limit beyond that of Kaggle, or weights of one model.
    """

    dataset: str
    installed: Path | Sequence[Path]
    contents: str = "adapter"
    base: str | Sequence[str] | None = None
    python: str | Sequence[str] = ()
    accelerator: str = "t4x2"
    time_limit: float = 8.5 * 3600
    separate: bool = False
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9-]+/[a-z0-9-]{6,50}", self.dataset):
            raise InputError(
                f"--dataset: '{self.dataset}'; give owner/name, the name 6 to 50 small letters, digits and hyphens"
            )
        if self.accelerator not in ACCELERATORS:
            hint = nearest(self.accelerator, ACCELERATORS)
            raise InputError(f"--accelerator: no '{self.accelerator}'{hint}; known: {', '.join(ACCELERATORS)}")
        if not 0 < self.time_limit < RUN_SECONDS:
            raise InputError(f"--time-limit: {self.time_limit:g}; give seconds below {RUN_SECONDS}, Kaggle's own limit")
        if self.weights is not None and not self.separate:
            raise InputError("--weights: of the models of several runs, which only --separate bundles; leave them out")

    @property
    def bases(self) -> list["Base"]:
        """The backbones there: none, one for all runs, or one for each."""
        return [Base(one) for one in ([self.base] if isinstance(self.base, str) else self.base or [])]

    @property
    def name(self) -> str:
        """The data set's name without its owner."""
        return self.dataset.partition("/")[2]

    @property
    def title(self) -> str:
        """The data set's title."""
        return self.name.replace("-", " ")

    @property
    def machines(self) -> dict[str, Path]:
        """The files of `installed` by version of Python, as of `wheels.find_machines`."""
        lists = [self.installed] if isinstance(self.installed, Path) else self.installed
        return find_machines(lists, [self.python] if isinstance(self.python, str) else self.python)


def backbone_link(fingerprint: str) -> str:
    """Return the path by which the recipes in a bundle name the backbone of a fingerprint; the notebook makes it."""
    return f"{LINKS}/{fingerprint}"


def write_bundle(bundle: Bundle, unneeded: Collection[str], folder: Path) -> None:
    """Write source and wheels of a bundle.

    Args:
        bundle: its settings.
        unneeded: packages that the model's prediction does not import, as of `wheels.unneeded_packages`.
        folder: its folder.

    Raises:
        InputError: as `wheels.find_machines` and `wheels.download_wheels`.
    """
    copy_source(folder)
    download_wheels(bundle.machines, unneeded, folder / "wheels")


def copy_source(folder: Path) -> None:
    """Copy the package that is running, installed or from a source tree, into a folder, which then can be imported."""
    package = Path(rewardmodel.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
