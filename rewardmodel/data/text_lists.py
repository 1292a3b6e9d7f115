"""A text in, the list that it spells out: of turns or messages, in JSON or as Python prints lists.

pandas writes a column of lists to CSV as Python prints them, `['a', 'b']`, and a column of numpy arrays without commas,
`['a' 'b']`, in which the end of a text cannot be told from its content: the first is read, the second is refused.
"""

import ast
import io
import json
import re
import tokenize
import warnings
from itertools import pairwise
from typing import Any

import numpy as np

_JSON = json.JSONDecoder(strict=False)  # once: json.loads makes one a call
_PYTHON_LIST = re.compile(r"\s*\[\s*(['\"{]|None\b)")
_SINGLE_QUOTES = re.compile(r"\s*\[\s*\{?\s*'")
_NUMPY = "it is a list as numpy prints it, without commas, so that its texts cannot be told apart"


def parse_list(text: str) -> Any:
    """Return what a text spells in JSON, or else the list that it is as Python prints it.

    Raises:
        ValueError: neither; the message says what to write if the text looks like a list of numpy's or a cut one.
    """
    try:
        return _JSON.decode(text)
    except (ValueError, RecursionError):
        if not _PYTHON_LIST.match(text):
            raise ValueError("is not a JSON list") from None
    hint = "is not a JSON list"
    if _SINGLE_QUOTES.match(text):
        hint += "; it looks like a list as Python or numpy prints it: write it with json.dumps"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an escape like \d, which Python never prints
            values = ast.literal_eval(text.strip())
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, Warning, tokenize.TokenError):
        raise ValueError(hint) from None
    strings = [kind for kind in kinds if kind not in (tokenize.NL, tokenize.NEWLINE)]
    if any(one == two == tokenize.STRING for one, two in pairwise(strings)):
        raise ValueError(f"is not a JSON list; {_NUMPY}: write it with json.dumps")
    return values


def looks_like_list(text: str) -> bool:
    """Return whether a text is a JSON list, or a list as Python or numpy prints it."""
    if not text.lstrip().startswith("["):
        return False
    try:
        return isinstance(parse_list(text), list)
    except ValueError as error:
        return _NUMPY in str(error)


def looks_like_turns(text: str) -> bool:
    """Return whether a text is a list of texts, some of which may be null, or of unknown texts as numpy prints it."""
    if not text.lstrip().startswith("["):
        return False
    try:
        return all(turn is None or isinstance(turn, str) for turn in parse_list(text))
    except ValueError as error:
        return _NUMPY in str(error)


def looks_like_messages(text: str) -> bool:
    """Return whether a text is a list of messages, or one message; an answer may be JSON too, but of other objects."""
    opening = _MESSAGE.match(text)
    if not opening:
        return False
    try:
        parsed = parse_list(text)
    except ValueError:
        return bool(opening["list"] and opening["key"])  # reported as a broken list by whoever reads it
    return is_message(parsed[0] if isinstance(parsed, list) else parsed)


_MESSAGE = re.compile(r"\s*(?P<list>\[\s*)?\{\s*(?P<key>['\"](role|from|content|value)['\"]\s*:)?")
"""The beginning of messages, [{"role": "user"; or of one, without the bracket."""


_CONTENT = ("content", "value", "text", "tool_calls")


def is_message(value: Any) -> bool:
    """Return whether a value is one message: who said it, and what."""
    if not isinstance(value, dict):
        return False
    return not (value.keys().isdisjoint(("role", "from")) or value.keys().isdisjoint(_CONTENT))


def is_sequence(value: Any) -> bool:
    """Return whether a value is a list, a tuple or an array, as files of different kinds give lists."""
    return isinstance(value, list | tuple | np.ndarray)
