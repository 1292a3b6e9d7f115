"""A prompt and two responses, from flags, files or a terminal -> who wins, how sure, and whether the order matters."""

import sys
from collections.abc import Mapping
from pathlib import Path

from rewardmodel.battles import TEXT_COLUMNS
from rewardmodel.config.schema import Recipe
from rewardmodel.errors import InputError
from rewardmodel.serving.answers import Answer, describe_predictions

TITLES = {"prompt": "prompt", "response_a": "response A", "response_b": "response B"}
"""What the terminal calls the texts."""

END = "."
"""A line that ends a text that is typed."""


def compare_responses(
    run: str | Path, prompt: str, response_a: str, response_b: str, recipe: Recipe | None = None
) -> Answer:
    """Return which of two responses a run prefers, as the server's `/battle` answers.

    Args:
        run: a run folder, or an export.
        prompt: of the user.
        response_a: to the prompt.
        response_b: to the prompt.
        recipe: overrides the run's own.

    Raises:
        InputError: no trained run, or one of several folds.
    """
    from rewardmodel.inference.judge import load_judge  # imports torch

    texts = dict(zip(TEXT_COLUMNS, ([prompt], [response_a], [response_b]), strict=True))
    table = load_judge(run, recipe).predict([{"id": "compared", **texts}])
    return describe_predictions(table)[0]


def read_texts(given: Mapping[str, str | None]) -> dict[str, str]:
    """Return the three texts by column; one that begins with @ names a file, and one that is missing is typed.

    Args:
        given: of each of `TEXT_COLUMNS` what was given on the command line.

    Raises:
        InputError: a file that cannot be read, or a text is missing and there is no terminal to type it in.
    """
    return {name: _read_text(name, given[name]) for name in TEXT_COLUMNS}


def _read_text(name: str, given: str | None) -> str:
    flag = f"--{name.replace('_', '-')}"
    if given is None:
        return _type_text(TITLES[name], flag)
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}: {given[1:]}: cannot be read as a UTF-8 file ({error}); name another") from error


def _type_text(title: str, flag: str) -> str:
    """Return a text that is typed in the terminal."""
    if not sys.stdin.isatty():
        raise InputError(f"{flag}: missing, and there is no terminal to type it in; give a text, or @FILE")
    print(f"{title} (end with a line that has only a dot):", file=sys.stderr)
    lines = []
    for line in sys.stdin:
        if line.rstrip("\n") == END:
            break
        lines.append(line)
    return "".join(lines).rstrip("\n")
