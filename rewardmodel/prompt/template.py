"""Prompt templates: turn a Jinja template into the fixed text around the turns of a conversation.

A template is rendered with placeholders and split at them, so that fixed text and turns are tokenised separately: only
turns are ever cut, and no turn can be mistaken for the structure of the template.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from rewardmodel.errors import InputError, nearest

TEMPLATES = {
    # Ends in a fixed question, so that the last token, whose hidden state the head reads, is not part of a response.
    "instruction": (
        "{% for round in rounds %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
        "### Prompt:\n{{ round.prompt }}"
        "\n\n### Response A:\n{{ round.response_a }}"
        "\n\n### Response B:\n{{ round.response_b }}{% endfor %}"
        "{{ '\\n\\n' }}### Which response is better, A or B, or is it a tie?\nAnswer:"
    ),
    "encoder": (
        "{% for round in rounds %}{% if not loop.first %} {{ sep }} {% endif %}"
        "PROMPT: {{ round.prompt }} {{ sep }} RESPONSE A: {{ round.response_a }} {{ sep }} "
        "RESPONSE B: {{ round.response_b }}{% endfor %}"
    ),
    "encoder_response": (
        "{% for round in rounds %}{% if not loop.first %} {{ sep }} {% endif %}"
        "PROMPT: {{ round.prompt }} {{ sep }} RESPONSE: {{ round.response }}{% endfor %}"
    ),
    # For backbones without a chat template.
    "response": (
        "{% for round in rounds %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
        "### Prompt:\n{{ round.prompt }}\n\n### Response:\n{{ round.response }}{% endfor %}"
        "{{ '\n\n' }}### How good is the response?\nAnswer:"
    ),
}
"""Templates by the recipe's `prompt.template`. `rounds` is a list of rounds, each with `prompt`, `response_a` and
`response_b` (or `response`, to encode each response separately); `sep` is the tokenizer's separator token."""

CHAT = "chat"
"""`prompt.template` for the backbone's own chat template, which encodes each response separately."""

JOINT_RESPONSES, SEPARATE_RESPONSES = ("response_a", "response_b"), ("response",)
"""Names of the responses of a round in joint encoding (both in one sequence) and in separate encoding."""

ENCODINGS = {
    "joint": (JOINT_RESPONSES, "instruction", "encoder"),
    "separate": (SEPARATE_RESPONSES, CHAT, "encoder_response"),
}
"""Encoding -> the responses that a template must have, and the default templates: for decoders, and for encoders (whose
tokenizers have a separator token)."""

# Upper and lower case, so that a template that changes the case of a turn (`| lower`) is detected.
_PLACEHOLDER = re.compile("\ue000Turn (\\d+) tEXT (\\d)\ue001")

_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    RecursionError,
)
"""What rendering an invalid template raises."""


class TemplateLayout(NamedTuple):
    """A template rendered for some number of rounds, split into fixed text and turns.

    Attributes:
        before: fixed text before each turn: ["PROMPT: ", " RESPONSE A: ", " RESPONSE B: "].
        turns: (round, text) of each turn, text 0 the prompt, 1 and 2 the responses: [(0, 0), (0, 1), (0, 2)].
        after: fixed text after the last turn.
    """

    before: list[str]
    turns: list[tuple[int, int]]
    after: str


class Template:
    """A prompt template, rendered for any number of rounds.

    Args:
        text: a name in `TEMPLATES`, `chat`, or Jinja source.
        tokenizer: of the backbone, for its separator token and its chat template.

    Attributes:
        responses: names of the responses of a round.

    Raises:
        InputError: there is no such template, it is not valid Jinja, or it does not have every turn exactly once and
            unchanged.
    """

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.text = TEMPLATES.get(text, text)
        self.tokenizer = tokenizer
        if text != CHAT and "{{" not in self.text:
            raise InputError(
                f"prompt.template: no template '{text}'{nearest(text, [*TEMPLATES, CHAT])}; known: "
                f"{', '.join(TEMPLATES)}, {CHAT}; or give Jinja source, or a .jinja file"
            )
        if text == CHAT and not tokenizer.chat_template:
            raise InputError(
                "prompt.template: the backbone has no chat template; set it to response, or give Jinja source"
            )
        self.responses = JOINT_RESPONSES if JOINT_RESPONSES[0] in self.text else SEPARATE_RESPONSES
        for rounds in (1, 2):
            self.render(rounds)

    def render(self, rounds: int) -> TemplateLayout:
        """Return the template rendered for a conversation of `rounds` rounds.

        Raises:
            InputError: as for the class.
        """
        names = ("prompt", *self.responses)
        placeholders = [
            {name: f"\ue000Turn {number} tEXT {text}\ue001" for text, name in enumerate(names)}
            for number in range(rounds)
        ]
        try:
            rendered = (_render_chat if self.text == CHAT else _render_jinja)(self.text, self.tokenizer, placeholders)
        except _RENDER_ERRORS as error:
            raise InputError(f"prompt.template: {' '.join(str(error).split())}; fix the template") from error
        # ["PROMPT: ", "0", "0", " RESPONSE A: ", "0", "1", ..., ""]: text, then round and text number of a turn
        pieces = _PLACEHOLDER.split(rendered)
        turns = [(int(number), int(text)) for number, text in zip(pieces[1::3], pieces[2::3], strict=True)]
        wanted = [(number, text) for number in range(rounds) for text in range(len(names))]
        if sorted(turns) != wanted:
            wrong = next(turn for turn in wanted if turns.count(turn) != 1)
            raise InputError(
                f"prompt.template: with {rounds} rounds, the {names[wrong[1]]} of round {wrong[0] + 1} occurs "
                f"{turns.count(wrong)} times; a template must have {', '.join(names)} of every round once, unchanged"
            )
        return TemplateLayout(pieces[:-1:3], turns, pieces[-1])


def compile_markers(layout: TemplateLayout, special: list[str], added: Iterable[str] = ()) -> re.Pattern[str]:
    """Return a pattern that matches the markers of a template in any case and spacing, to neutralise them in turns.

    Markers are the line directly before each turn and the first line after the last turn, without special tokens (whose
    spelling in a turn is tokenised as plain text anyway). Lines of words alone ("user") are not markers: where a
    template has those, its special tokens separate the turns.

    Args:
        layout: of several rounds.
        special: the tokenizer's special tokens.
        added: tokens added to the tokenizer that are not special; those in the layout are markers too.
    """
    split = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
    lines = [_split_lines(text, split)[-1:] for text in layout.before] + [_split_lines(layout.after, split)[:1]]
    found = {line for part in lines for line in part if re.search(r"\w", line) and re.search(r"[^\w\s]", line)}
    fixed = " ".join([*layout.before, layout.after])
    found |= {token for token in added if token.strip() and token in fixed}
    spellings = (r"\s*".join(map(re.escape, line.split())) for line in sorted(found, key=len, reverse=True))
    return re.compile("|".join(spellings) or "(?!)", re.IGNORECASE)


def _split_lines(text: str, special: re.Pattern[str]) -> list[str]:
    """Return the lines of a text that are not blank; a special token ends a line."""
    return [line.strip() for part in special.split(text) for line in part.splitlines() if line.strip()]


def _render_jinja(source: str, tokenizer: PreTrainedTokenizerBase, rounds: list[dict[str, str]]) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source).render(rounds=rounds, sep=tokenizer.sep_token or "")


def _render_chat(_: str, tokenizer: PreTrainedTokenizerBase, rounds: list[dict[str, str]]) -> str:
    roles = {"prompt": "user", "response": "assistant"}
    messages = [{"role": roles[name], "content": text} for turns in rounds for name, text in turns.items()]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))
