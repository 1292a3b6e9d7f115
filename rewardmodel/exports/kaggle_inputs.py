"""A tree of mounted inputs -> a bundle, battles and a backbone in it, found by content wherever they are mounted.

The source of this module is a cell of every bundle's notebook, which searches before anything is installed; so it has
the standard library alone. Wrong inputs end the notebook by SystemExit, of which Jupyter shows the sentence only.
"""

import csv
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MARKER = "bundle.json"
"""File at the top of a bundle, by which it is found."""

TEXTS = {"id", "prompt", "response_a", "response_b"}
"""Columns of the battles to predict."""

ANSWERS = ["id", "winner_model_a", "winner_model_b", "winner_tie"]
"""Columns of a submission."""

WRITER_KEYS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Keys of a config.json that depend on who saved it and how."""


class Match(NamedTuple):
    """A file or folder that was looked for.

    Attributes:
        path: where it is; None: it was not found.
        why: why this one, or why none, for people.
    """

    path: Path | None
    why: str = ""


def list_files(root: Path) -> list[Path]:
    """Return all files below a folder, sorted; of a bundle its marker alone, and nothing twice through links."""
    files, seen = [], set()
    for place, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        bundled = MARKER in names
        folders[:] = [] if bundled or real in seen else sorted(folders)
        if real not in seen:
            files += [Path(place, name) for name in sorted([MARKER] if bundled else names)]
        seen.add(real)
    return files


def draw_tree(root: Path, most: int = 60) -> str:
    """Return a folder's tree as text: its folders, each with its number of files and the names of the first."""
    if not root.is_dir():
        return f"{root} (no such folder)"
    lines = []
    for place, folders, names in os.walk(root):
        folders.sort()
        depth = len(Path(place).relative_to(root).parts)
        folders[:] = folders if depth < 7 else []
        shown = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
        lines.append(f"{'  ' * depth}{Path(place).name if depth else place}/" + (f"  {shown}" if names else ""))
    return "\n".join(lines[:most] + ([f"... and {len(lines) - most} more folders"] if len(lines) > most else []))


def find_bundle(files: list[Path], wanted: Mapping[str, Any]) -> Match:
    """Return the folder of the bundle that a notebook belongs to.

    Args:
        files: of all inputs.
        wanted: what the notebook knows of its bundle (`kaggle_notebook.describe`).
    """
    ids = {path.parent: _read_json(path).get("id") for path in files if path.name == MARKER}
    right = [folder for folder, found in ids.items() if found == wanted["id"]]
    if right:
        return choose_match(right, {})
    others = "; ".join(
        f"{folder} is of another export ({found}), with its own inference.ipynb" for folder, found in ids.items()
    )
    return Match(None, f"no {MARKER} with id {wanted['id']}{': ' * bool(others)}{others}")


def find_battles(files: list[Path], competition: str, labelled: bool = False) -> Match:
    """Return the file of the battles to predict, or to train on: by its columns, whatever its name and its rows are.

    Args:
        files: of all inputs.
        competition: the competition's name in addresses.
        labelled: whether it has the outcomes as well.
    """
    headers = {path: _read_header(path) for path in files if path.suffix == ".csv"}
    outcomes = set(ANSWERS[1:])
    battles = [
        path
        for path, header in headers.items()
        if set(header) >= TEXTS and (set(header) >= outcomes if labelled else not set(header) & outcomes)
    ]
    samples = {path.parent for path, header in headers.items() if header == ANSWERS}
    name = "train.csv" if labelled else "test.csv"
    reasons: dict[str, Callable[[Path], bool]] = {
        "the competition's folder, not a data set": lambda path: "datasets" not in path.parts,
        "in a folder of the competition's name": lambda path: competition in path.parts,
        "next to a sample submission": lambda path: path.parent in samples,
        f"called {name}": lambda path: path.name == name,
    }
    columns = ", ".join([*sorted(TEXTS), *(ANSWERS[1:] if labelled else [])])
    return choose_match(battles, reasons) if battles else Match(None, f"no .csv with the columns {columns}")


def find_sample(files: list[Path], battles: Path) -> Match:
    """Return the sample submission, by its columns: that in the folder of the battles, or another."""
    samples = [path for path in files if path.suffix == ".csv" and _read_header(path) == ANSWERS]
    near = {"next to the battles": lambda path: path.parent == battles.parent}
    return choose_match(samples, near) if samples else Match(None, f"no .csv with the columns {', '.join(ANSWERS)}")


def find_backbone(files: list[Path], wanted: Mapping[str, Any], fingerprint: Callable[[Path], str]) -> Match:
    """Return the folder of the backbone: by its weights, and first among those of the same configuration.

    Args:
        files: of all inputs.
        wanted: `path`, where it was expected, `config`, a digest of its config.json (`digest_config`), and
            `fingerprint`.
        fingerprint: `model.weights.fingerprint`.
    """
    expected = Path(wanted["path"], "config.json")
    configs = list(dict.fromkeys([expected] * expected.is_file() + [one for one in files if one.name == "config.json"]))
    models = [
        path.parent for path in configs if any(path.parent.glob("*.safetensors")) or any(path.parent.glob("*.bin"))
    ]
    alike = [folder for folder in models if digest_config(folder / "config.json") == wanted["config"]]
    for folders, note in ((alike, ""), (models, "its config.json differs from that of training, its weights do not")):
        right = [folder for folder in folders if fingerprint(folder) == wanted["fingerprint"]]
        if right:
            match = choose_match(right, {"where it was expected": lambda folder: folder == expected.parent})
            return Match(match.path, f"{match.why} {note}".strip())
    if alike:
        return Match(None, f"{alike[0]} has its configuration, but other weights (another variation, or not whole)")
    kinds = [f"{path.parent} ({_read_json(path).get('model_type', 'no model')})" for path in configs]
    return Match(None, f"no config.json of it with weights; there are: {', '.join(kinds[:5]) or 'no models'}")


def digest_config(path: Path) -> str:
    """Return a SHA-256 of what a config.json says of the model, 16 hexadecimal digits; `WRITER_KEYS` are left out."""
    content = {key: value for key, value in _read_json(path).items() if key not in WRITER_KEYS}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def find_inputs(
    root: Path, wanted: Mapping[str, Any], given: Mapping[str, str], fingerprint: Callable[[Path], str]
) -> dict[str, Path | None]:
    """Return the paths of `bundle`, `battles`, `sample` and of each backbone, and print what was found and why.

    Args:
        root: folder that inputs are mounted in.
        wanted: what the notebook knows of its bundle (`kaggle_notebook.describe`).
        given: paths by environment variable: BUNDLE, BATTLES and BACKBONE, or of several backbones BACKBONE_1 and so
            on, are taken as they are.
        fingerprint: `model.weights.fingerprint`.

    Raises:
        SystemExit: something is missing; each is named with what to attach, and the tree is printed.
    """
    files = list_files(root)
    title = wanted["competition"]
    searches: dict[str, Callable[[], Match]] = {
        "bundle": lambda: find_bundle(files, wanted),
        "battles": lambda: find_battles(files, title),
    }
    attach = {"bundle": f"Add Input > Datasets > {wanted['dataset']}", "battles": f"Add Input > Competitions > {title}"}
    for name, base in wanted["backbones"].items():
        searches[name] = lambda base=base: find_backbone(files, base, fingerprint)  # type: ignore[misc]
        attach[name] = f"Add Input > {base['source']}"
    found: dict[str, Path | None] = {}
    missing = []
    for name, search in searches.items():
        match = _take_given(name, given[name.upper()]) if given.get(name.upper()) else search()
        found[name] = match.path
        print(f"{name:<9} {match.path or 'MISSING'}  {match.why}")
        if match.path is None:
            missing.append(f"the {name} is not among the inputs ({match.why}): attach it with {attach[name]}")
    if missing:
        print(f"searched:\n{draw_tree(root)}", flush=True)
        raise SystemExit("\n".join(missing))
    sample = find_sample(files, found["battles"] or root)
    print(f"{'sample':<9} {sample.path or 'none'}  {sample.why}", flush=True)
    return {**found, "sample": sample.path}


def link_backbones(wanted: Mapping[str, Any], found: Mapping[str, Path]) -> None:
    """Make the links by which the recipes in a bundle name their backbones.

    Args:
        wanted: what the notebook knows of its bundle.
        found: as `find_inputs` returns it.

    Raises:
        SystemExit: a link cannot be made.
    """
    for name, base in wanted["backbones"].items():
        link = Path(base["link"])
        partial = link.with_name(f".{link.name}.{os.getpid()}")
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            partial.symlink_to(found[name].absolute())
            os.replace(partial, link)
        except OSError as error:
            raise SystemExit(
                f"{link}, a link to {found[name]}, cannot be made ({error}): remove what is there"
            ) from error


def check_bundle(folder: Path) -> list[str]:
    """Return a sentence for each file of a bundle that is missing or not as it was exported."""
    again = "upload the bundle again as a new version of the data set, and attach that with Add Input"
    files = _read_json(folder / MARKER).get("files")
    if not files:
        return [f"{folder / MARKER} cannot be read or lists no files: {again}"]
    problems = []
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing: {again}")
        elif path.stat().st_size != size:
            problems.append(f"{path} has {path.stat().st_size:,} bytes, not {size:,}: {again}")
        elif digest_file(path) != digest:
            problems.append(f"{path} is not the file that was exported: {again}")
    return problems


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_ids(path: Path) -> list[str]:
    """Return the column `id` of a CSV file.

    Raises:
        SystemExit: it cannot be read.
    """
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [row["id"] for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise SystemExit(f"{path} cannot be read as a table with a column id ({error}): attach it again") from error


def copy_shards(files: list[Path], target: Path) -> str:
    """Copy what an earlier session had predicted to where `predict` continues from, and return what was copied as text.

    Args:
        files: of all inputs, with an earlier output of the notebook among them or not.
        target: the folder of shards, like submission.csv.shards.
    """
    copied = 0
    try:
        for path in files:
            place = target / path.parent.name / path.name
            if path.parent.parent.name != target.name or path.name.startswith(".") or place.exists():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_name(f".{place.name}.partial")
            try:
                shutil.copyfile(path, partial)
                os.replace(partial, place)
            finally:
                partial.unlink(missing_ok=True)
            copied += 1
    except OSError as error:
        return f"of an earlier session only {copied} of its files could be copied ({error})"
    return f"files of an earlier session: {copied}; predicting continues from them" if copied else ""


def _take_given(name: str, path: str) -> Match:
    """Return a path that an environment variable gives, if it is there."""
    why = f"given by {name.upper()}"
    return Match(Path(path), why) if os.path.exists(path) else Match(None, f"{path}, {why}, does not exist")


def choose_match(paths: list[Path], reasons: Mapping[str, Callable[[Path], bool]]) -> Match:
    """Return the best of several paths, and why: the first reason counts most, then the shorter path, then its name."""
    rank: Callable[[Path], Any] = lambda path: (  # noqa: E731
        [not holds(path) for holds in reasons.values()],
        len(path.parts),
        str(path),
    )
    best, *others = sorted(paths, key=rank)
    if not others:
        return Match(best)
    why = [name for name, holds in reasons.items() if holds(best) and not holds(others[0])]
    why += ["the shorter path"] * (len(best.parts) < len(others[0].parts)) + ["the first by name"]
    return Match(best, f"(one of {len(paths)}: taken because it is {why[0]}; not taken: {', '.join(map(str, others))})")


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_header(path: Path) -> list[str]:
    """Return the column names of a CSV file; none if it cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error):
        return []
