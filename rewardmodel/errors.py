"""The one error for wrong input, whose message the command line prints with exit code 2; and words of messages."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something given cannot be used; the message is one line: what is wrong, where, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\r", "\\r").replace("\n", "\\n"))


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return `" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string below `cutoff`."""
    close = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean '{close[0]}'?)" if close else ""


def plural(number: int, noun: str) -> str:
    """Return a number with its noun: `1 battle`, `2,000 battles`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
