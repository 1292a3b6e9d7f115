"""Kaggle's mounted inputs -> a run that a notebook trains there, in as many sessions as it takes.

recipes/notebooks/kaggle_train.ipynb calls these functions once it has installed rewardmodel. What is wrong ends the
notebook by SystemExit, of which Jupyter shows the sentence only.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rewardmodel.config.loader import load_recipe
from rewardmodel.errors import InputError
from rewardmodel.exports.kaggle_checks import find_rejected, launcher, read_gpus
from rewardmodel.exports.kaggle_inputs import Match, choose_match, draw_tree, find_battles, list_files
from rewardmodel.exports.kaggle_notebook import COMPETITION
from rewardmodel.files import atomic_path
from rewardmodel.model.weights import PACKAGED
from rewardmodel.run_folder import BACKBONE_FILE, RunFolder, last_checkpoint

LINKS = Path(tempfile.gettempdir(), "kaggle-inputs")
"""Folder of links to the inputs: a recipe that names them by these is the same in every session, wherever they are
mounted, so that its run continues. Kaggle would copy what they point to if they were in the notebook's output."""

STOP_SECONDS = 60.0
"""Seconds that processes get to end after they are told to."""

BACKBONE = "model.model_name_or_path"


ATTACH = {
    "recipe": "Add Input > Datasets, in the data set of rewardmodel's wheel",
    "data.train": f"Add Input > Competitions > {COMPETITION}",
    "data.test": f"Add Input > Competitions > {COMPETITION}",
}
"""What must be attached, and how."""


class Session(NamedTuple):
    """What a notebook trains in this session.

    Attributes:
        recipe: words of a command line: the recipe's file, and the keys that say where its inputs are.
        run: the run folder.
        bundled: options of `export`, like ["--base", "/kaggle/input/models/..."].
        gpus: number of GPUs; 0: there is a CPU only.
    """

    recipe: list[str]
    run: Path
    bundled: list[str]
    gpus: int


def open_session(inputs: Path, recipe: str, keys: Sequence[str] = ()) -> Session:
    """Find a recipe and its inputs, fetch an earlier session's run, and return what to train; print what was found.

    Args:
        inputs: folder that inputs are mounted in.
        recipe: name of the recipe's file among them.
        keys: recipe keys to change, as words of a command line, like ["--data.limit", "20000"]; an input that they
            name is not looked for.

    Raises:
        SystemExit: an input is missing, or the recipe cannot be used.
    """
    files = list_files(inputs)
    named = [path for path in files if path.name == recipe]
    chosen = choose_match(named, {}) if named else Match(None, f"no file is called {recipe}")
    _report(inputs, {"recipe": chosen})
    try:
        content = load_recipe(str(chosen.path), keys)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    backbone = content.model.model_name_or_path
    searches: dict[str, Callable[[], Match]] = {
        "data.train": lambda: find_battles(files, COMPETITION, labelled=True),
        "data.test": lambda: find_battles(files, COMPETITION),
    }
    if backbone not in PACKAGED:
        searches[BACKBONE] = lambda: find_attached(files, backbone)
    given = {word.partition("=")[0] for word in keys}
    found = {key: search() for key, search in searches.items() if f"--{key}" not in given}
    _report(inputs, found)
    words = []
    for key, match in found.items():
        words += [f"--{key}", _link(key, match.path, backbone)] if match.path else []
    print(continue_run(files, content.run_folder), flush=True)
    mounted = found[BACKBONE].path if BACKBONE in found else None
    bundled = ["--base", str(mounted)] if mounted and content.model.use_peft else ["--contents", "merged"]
    return Session([str(chosen.path), *words, *keys], content.run_folder, bundled, len(read_gpus()))


def find_attached(files: list[Path], name: str) -> Match:
    """Return the folder of the only backbone among the inputs, or of the only one of a recipe's name.

    Args:
        files: of all inputs.
        name: `model.model_name_or_path`, like google/gemma-2-2b-it, which is fetched from the hub if none is attached.

    Raises:
        SystemExit: there are several.
    """
    folders = [
        path.parent
        for path in files
        if path.name == "config.json"
        and not (path.parent / BACKBONE_FILE).exists()  # not a model that an earlier session saved
        and (any(path.parent.glob("*.safetensors")) or any(path.parent.glob("*.bin")))
    ]
    folders = [path for path in folders if Path(name).name.lower() in str(path).lower()] or folders
    if len(folders) > 1:
        raise SystemExit(f"there are several backbones, give one by --{BACKBONE}: {', '.join(map(str, folders))}")
    return Match(folders[0]) if folders else Match(None, f"no backbone is attached: {name} is fetched from the hub")


def continue_run(files: list[Path], run: Path) -> str:
    """Copy an earlier session's run, the most advanced of the same name, to this one's; return what it did as text.

    Args:
        files: of all inputs, with an earlier output of the notebook among them or not.
        run: the run folder; one that exists is left as it is.

    Raises:
        SystemExit: it cannot be copied; nothing is left of it then.
    """
    folders = [
        path.parent for path in files if path.name == RunFolder(run).recipe.name and path.parent.name == run.name
    ]
    if run.exists() or not folders:
        return f"{run} continues" if run.exists() else "no earlier session to continue"
    best = max(folders, key=lambda folder: (RunFolder(folder).model.is_dir(), _steps(folder)))
    try:
        with atomic_path(run) as partial:
            shutil.copytree(best, partial)
    except (OSError, shutil.Error) as error:
        raise SystemExit(f"{best} cannot be copied to {run.absolute()} ({error}): make room there") from error
    done = "has finished training" if RunFolder(run).model.is_dir() else f"continues from step {_steps(run)}"
    return f"{run} {done}, as it is in {best}"


def run_command(words: Sequence[str], gpus: int = 0, seconds: float | None = None) -> bool:
    """Run a command of rewardmodel, with a process a GPU; return whether it ended before it was stopped.

    Args:
        words: the command, like ["doctor", "recipe.yaml"].
        gpus: for which it is started; 0 or 1: one process.
        seconds: after which it is stopped by SIGTERM.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, *launcher(gpus), "-m", "rewardmodel.cli", *words]
    environment = {"NCCL_P2P_DISABLE": "1", **os.environ}  # processes exchange little, and some containers block it
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            print(f"{words[0]}: the time is over", flush=True)  # after the traceback of a launcher that is stopped
            return False
        finally:
            _stop(process)
    if code:
        raise SystemExit(f"rewardmodel {words[0]} ended with exit code {code}: the reason is printed above")
    return True


def remove_rejected() -> None:
    """Uninstall, for this session, a torchao that PEFT rejects."""
    if rejected := find_rejected({}):
        print(f"uninstalling for this session what PEFT rejects: {rejected}", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "--quiet", "uninstall", "--yes", *rejected], check=True)


def _report(inputs: Path, found: dict[str, Match]) -> None:
    """Print what was found; raise SystemExit, after the tree was printed, if something of `ATTACH` is missing."""
    for name, match in found.items():
        print(f"{name:<25} {match.path or ''}  {match.why}", flush=True)
    missing = [
        f"{name} is not among the inputs ({match.why}): attach it with {ATTACH[name]}"
        for name, match in found.items()
        if match.path is None and name in ATTACH
    ]
    if missing:
        print(f"searched:\n{draw_tree(inputs)}", flush=True)
        raise SystemExit("\n".join(missing))


def _link(key: str, target: Path, backbone: str) -> str:
    """Return a link to an input, of a name that does not depend on where that is mounted."""
    name = Path(backbone).name if key == BACKBONE else f"{key.partition('.')[2]}{target.suffix}"
    link = LINKS / name
    LINKS.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target.absolute())
    return str(link)


def _steps(folder: Path) -> int:
    """Return the steps of a run's last complete checkpoint; 0: it has none."""
    checkpoint = last_checkpoint(folder)
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a process and those that it started, if they still run."""
    for name, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, name)
                process.wait(seconds)
