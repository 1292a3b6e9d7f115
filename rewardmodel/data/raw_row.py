"""One raw row of a battles file: typed values, errors that name row and column, and a count of what was repaired."""

import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from rewardmodel.config.schema import Source
from rewardmodel.data.raw_rows import Note
from rewardmodel.data.text_lists import is_message, is_sequence, looks_like_messages, parse_list
from rewardmodel.errors import InputError


@dataclass(frozen=True, slots=True)
class RawRow:
    """One raw row of a file.

    Attributes:
        where: the name of the file, for error messages.
        number: of the row, from 1, without the header.
        values: by column name.
        notes: counts of repairs, by noun and words, shared by all rows of the file:
            {("null turn", "read as empty"): 3}.
        json_texts: whether texts that are strings hold lists of turns, in JSON or as Python prints them.
        seed: decides which response is A in preference data.
        source: how the file is read: the names of its columns, what its outcomes mean, which answers are paired.
    """

    where: str
    number: int
    values: dict[str, Any]
    notes: Counter[Note]
    json_texts: bool
    seed: int
    source: Source = field(default_factory=lambda: Source(""))

    def error(self, column: str, reason: str) -> InputError:
        """Return an error about a value of this row, to raise; it names the file's column."""
        name = self.source.columns.get(column) or column
        return InputError(f"{self.where}: row {self.number}, column '{name}': {reason}")

    def read_text(self, column: str) -> str:
        """Return a short text such as a name, stripped; empty if it is missing.

        A whole number is one without decimals (1003.0 -> "1003": integers with gaps are floats in a table), and names
        in a list are joined by commas.
        """
        value = self.values.get(column)
        if isinstance(value, str):
            return self.repair(value.strip())
        if is_sequence(value):
            value = ", ".join(str(one) for one in value)  # type: ignore[union-attr]
        elif isinstance(value, float | np.floating) and float(value).is_integer():
            value = int(value)
        return "" if is_missing(value) else self.repair(str(value).strip())

    def read_number(self, column: str, hint: str = "give 1, 0 or a probability") -> float | None:
        """Return a number, or None if it is missing; true is 1 and false is 0, in texts too.

        Raises:
            InputError: not a number; `hint` says what to write instead.
        """
        value = self.values.get(column)
        if is_missing(value) or (isinstance(value, str) and not value.strip()):
            return None
        if isinstance(value, str):
            value = _TRUTHS.get(value.strip().lower(), value)
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            raise self.error(column, f"{shorten(value)} is not a number; {hint}") from None

    def read_turns(self, column: str) -> list[str]:
        """Return the turns of a text: `["What is 2 + 2?", "And 3 + 3?"]`; a null turn is read as an empty one.

        Raises:
            InputError: neither a list of texts nor, where texts are lists, a text that spells one.
        """
        value = self.values.get(column)
        if isinstance(value, str) and not self.json_texts:
            return [self.repair(value)]
        turns = self.read_list(column, 'write a list of turns, like ["..."]')
        texts = []
        for turn in turns:
            empty = turn is None or turn is pd.NA
            if empty:
                self.notes["null turn", "read as empty"] += 1
            elif not isinstance(turn, str):
                raise self.error(column, f"the turn {shorten(turn)} is not text; put it in quotes, or write null")
            texts.append("" if empty else self.repair(turn))
        return texts

    def read_dialogue(self, column: str, speaker: str) -> list[tuple[str, str]]:
        """Return the messages of a conversation: `[("user", "What is 2 + 2?"), ("assistant", "4")]`.

        Roles are user, assistant and system. `Human:`/`Assistant:` transcripts are split into messages; any other plain
        text is one message of `speaker`.

        Raises:
            InputError: a message without a known role, or whose content is not text.
        """
        return self.read_messages(column, self.values.get(column), speaker)

    def read_messages(self, column: str, value: Any, speaker: str) -> list[tuple[str, str]]:
        """Return the messages of a value in a column, as `read_dialogue`; one message needs no list around it."""
        # plain text
        if isinstance(value, str) and not looks_like_messages(value):
            pieces = _TRANSCRIPT_ROLE.split(value)  # ["", "Human", " What is 2 + 2?", "Assistant", " 4"]
            if pieces[0] or len(pieces) == 1:
                return [(speaker, self.repair(value))]
            return [
                (_ROLES[role.lower()], self.repair(text.strip()))
                for role, text in zip(pieces[1::2], pieces[2::2], strict=True)
            ]

        # messages, or a text that spells them
        if is_message(value):
            value = [value]
        messages = self.to_list(column, value, 'write a text, or messages like [{"role": "user", "content": "..."}]')
        if len(messages) == 1 and isinstance(messages[0], str):
            return [(speaker, self.repair(messages[0]))]
        if (
            messages
            and isinstance(messages[0], dict)
            and "type" in messages[0]
            and {"role", "from"}.isdisjoint(messages[0])
        ):
            messages = [{"role": speaker, "content": messages}]  # the parts of one message
        return [self._read_message(column, message) for message in messages]

    def has_messages(self, column: str) -> bool:
        """Return whether a column holds messages, or one, rather than a text or a list of turns."""
        value = self.values.get(column)
        if isinstance(value, str):
            return looks_like_messages(value)
        return is_message(value[0] if is_sequence(value) and len(value) else value)  # type: ignore[index,arg-type]

    def _read_message(self, column: str, message: Any) -> tuple[str, str]:
        if not isinstance(message, dict):
            raise self.error(
                column, f"{shorten(message)} is not a message; give one text, or objects with role and content"
            )
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise self.error(column, f"the role {shorten(role)} is unknown; known: {', '.join(_ROLES)}")
        keys = [key for key in _CONTENT_KEYS if key in message]
        calls = _tool_calls(message)
        if not keys and not calls:
            raise self.error(column, f"the message {shorten(message)} has no text; give it as 'content'")
        thoughts = next((message[key] for key in _REASONING_KEYS if message.get(key)), None)
        texts = [] if thoughts is None else [f"<think>\n{thoughts}\n</think>"]
        content = message[keys[0]] if keys else None
        texts += [] if calls and is_missing(content) else self._read_content(column, content)
        texts += [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
        if not texts and not is_missing(content) and _ROLES[role.lower()] == "assistant":
            raise self.error(column, f"the answer {shorten(message)} has no text; leave the row out")
        return _ROLES[role.lower()], "\n\n".join(self.repair(text) for text in texts if text)

    def _read_content(self, column: str, content: Any) -> list[str]:
        """Return the texts of a message's content: of one text, or of parts like `{"type": "text", "text": "4"}`."""
        if is_missing(content):
            self.notes["message", "without content (null), read as empty"] += 1
            return []
        texts = []
        for part in content if isinstance(content, list | tuple | np.ndarray) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if is_missing(text):
                kind = part.get("type", "no type") if isinstance(part, dict) else "null"
                self.notes["part", f"of messages, not text ({kind}), left out"] += 1
            elif not isinstance(text, str):
                raise self.error(column, f"the content {shorten(text)} is not text; put it in quotes")
            else:
                texts.append(text)
        return texts

    def read_list(self, column: str, hint: str) -> list[Any]:
        """Return a list, given as one or as the text that spells it; empty if the value is missing.

        Raises:
            InputError: anything else; `hint` says what to write instead.
        """
        return self.to_list(column, self.values.get(column), hint)

    def to_list(self, column: str, value: Any, hint: str) -> list[Any]:
        """Return the list that a value in a column is, as `read_list`."""
        if is_missing(value) or (isinstance(value, str) and not value.strip()):
            return []
        if isinstance(value, str):
            try:
                value = parse_list(value)
            except ValueError as error:
                raise self.error(column, f"{shorten(value)} {error}; {hint}") from None
            value = [value] if is_message(value) else value
        if value is None:
            return []
        if not is_sequence(value):
            raise self.error(column, f"{shorten(value)} is not a list; {hint}")
        return list(value)

    def repair(self, text: str) -> str:
        """Return `text` as valid Unicode: surrogate pairs from JSON are joined, lone surrogates replaced."""
        if text.isascii():  # known without a look at it
            return text
        try:
            text.encode()
        except UnicodeEncodeError:
            self.notes["turn", "with broken characters, replaced by �"] += 1
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text


_TRUTHS = {"true": 1, "false": 0}
"""Booleans as CSV has them."""

_ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "user",
    "function": "user",
    "observation": "user",
    "ipython": "user",
}
"""Roles of messages by the names that data sets use for them; the result of a tool is context, like a question."""

_CONTENT_KEYS = ("content", "value", "text")
"""Names of a message's text in data sets, in the order in which they are looked for."""

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of what a model wrote before its answer."""


def _tool_calls(message: dict[str, Any]) -> list[str]:
    """Return the calls of tools in a message as JSON: `['{"name": "lookup", "arguments": {"topic": "tea"}}']`."""
    calls = message.get("tool_calls")
    listed = [*calls] if isinstance(calls, list | tuple | np.ndarray) else []
    listed += [message["function_call"]] if message.get("function_call") else []
    texts = []
    for call in listed:
        function = call.get("function", call) if isinstance(call, dict) else {"name": call}
        arguments = function.get("arguments")
        with suppress(ValueError):  # arguments that are no JSON are kept as the text that they are
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        named = {"name": function.get("name"), "arguments": arguments}
        texts.append(json.dumps(named, ensure_ascii=False, default=str))
    return texts


_TRANSCRIPT_ROLE = re.compile(r"\n\n(Human|Assistant):")


def is_missing(value: Any) -> bool:
    """Return whether a table has no value there: None, NaN, or pandas' NA and NaT."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and np.isnan(value))


def shorten(value: Any) -> str:
    """Return the repr of a value for an error message, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
