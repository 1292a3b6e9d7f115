"""A Jinja template in, the fixed text around the turns out.

A template is rendered with placeholders, then taken apart at them, so that fixed text and turns are tokenised apart:
only turns can be cut, and nothing in a turn can become structure.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from rewardmodel.errors import InputError, nearest

TEMPLATES = {
    # Ends in a fixed question, so that the last token, which the head reads, is never part of a response.
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
`response_b` (or `response`, to encode each response alone); `sep` is the tokenizer's own separator."""

CHAT = "chat"
"""The name of the backbone's own chat template, which encodes each response alone."""

JOINT_RESPONSES, SEPARATE_RESPONSES = ("response_a", "response_b"), ("response",)
"""What a round's responses are called when both stand in one sequence, and when each stands in one of its own."""

ENCODINGS = {
    "joint": (JOINT_RESPONSES, "instruction", "encoder"),
    "separate": (SEPARATE_RESPONSES, CHAT, "encoder_response"),
}
"""For an objective's encoding the responses that a template must have, and the template where a recipe names none: for
a decoder, and for an encoder, whose tokenizer has a separator."""

# Letters of both cases, so that a filter that changes a text shows.
_PLACEHOLDER = re.compile("\ue000Turn (\\d+) tEXT (\\d)\ue001")


RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    RecursionError,
    OverflowError,
)
"""What a template that is wrong raises when it is rendered."""


class TemplateLayout(NamedTuple):
    """Fixed text before each turn, the (round, text number) of each turn, and the fixed text after the last.

    Text number 0 is the prompt, 1 and 2 are the responses.
    """

    before: list[str]
    turns: list[tuple[int, int]]
    after: str


class Template:
    """Fixed text by the number of rounds.

    Args:
        text: a name out of `TEMPLATES`, `chat`, or Jinja.
        tokenizer: of the backbone; its separator and its chat template.

    Raises:
        InputError: no such template, not Jinja, or a template that does not place every turn once, as it is.
    """

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.text = TEMPLATES.get(text, text)
        self.tokenizer = tokenizer
        if text != CHAT and "{{" not in self.text:
            raise InputError(
                f"prompt.template: no template '{text}'{nearest(text, [*TEMPLATES, CHAT]) or ';'} there are: "
                f"{', '.join(TEMPLATES)}, {CHAT}; or give Jinja, or a .jinja file"
            )
        if text == CHAT and not tokenizer.chat_template:
            raise InputError("prompt.template: the backbone has no chat template; set it to response, or give Jinja")
        self.responses = JOINT_RESPONSES if JOINT_RESPONSES[0] in self.text else SEPARATE_RESPONSES
        for rounds in (1, 2):
            self.layout(rounds)

    def layout(self, rounds: int) -> TemplateLayout:
        """Return the fixed text of a conversation of so many rounds."""
        names = ("prompt", *self.responses)
        placeholders = [
            {name: f"\ue000Turn {number} tEXT {text}\ue001" for text, name in enumerate(names)}
            for number in range(rounds)
        ]
        try:
            rendered = (_chat if self.text == CHAT else _jinja)(self.text, self.tokenizer, placeholders)
        except RENDER_ERRORS as error:
            raise InputError(f"prompt.template: {' '.join(str(error).split())}; mend the template") from error
        pieces = _PLACEHOLDER.split(rendered)
        turns = [(int(number), int(text)) for number, text in zip(pieces[1::3], pieces[2::3], strict=True)]
        wanted = [(number, text) for number in range(rounds) for text in range(len(names))]
        if sorted(turns) != wanted:
            wrong = next(turn for turn in wanted if turns.count(turn) != 1)
            raise InputError(
                f"prompt.template: with {rounds} rounds, the {names[wrong[1]]} of round {wrong[0] + 1} stands there "
                f"{turns.count(wrong)} times; a template must place {', '.join(names)} of every round once, unchanged"
            )
        return TemplateLayout(pieces[:-1:3], turns, pieces[-1])


def compile_markers(layout: TemplateLayout, special: list[str], added: Iterable[str] = ()) -> re.Pattern[str]:
    """Return a pattern of the fixed text that tells turns apart, in any case and spacing.

    That is the line directly before each turn and the first one after the last turn, without special tokens, whose
    spelling in a battle is plain text anyhow. Lines that only words make up ("user") are left out: there, special
    tokens tell turns apart.

    Args:
        layout: of several rounds.
        special: the tokenizer's special tokens.
        added: tokens that were added to it and are not special; those that the layout has are markers too.
    """
    split = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
    lines = [_lines(text, split)[-1:] for text in layout.before] + [_lines(layout.after, split)[:1]]
    found = {line for part in lines for line in part if re.search(r"\w", line) and re.search(r"[^\w\s]", line)}
    fixed = " ".join([*layout.before, layout.after])
    found |= {token for token in added if token.strip() and token in fixed}
    spellings = (r"\s*".join(map(re.escape, line.split())) for line in sorted(found, key=len, reverse=True))
    return re.compile("|".join(spellings) or "(?!)", re.IGNORECASE)


def _lines(text: str, special: re.Pattern[str]) -> list[str]:
    return [line.strip() for part in special.split(text) for line in part.splitlines() if line.strip()]


def _jinja(source: str, tokenizer: PreTrainedTokenizerBase, rounds: list[dict[str, str]]) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source).render(rounds=rounds, sep=tokenizer.sep_token or "")


def _chat(_: str, tokenizer: PreTrainedTokenizerBase, rounds: list[dict[str, str]]) -> str:
    roles = {"prompt": "user", "response": "assistant"}
    said = [{"role": roles[name], "content": text} for turns in rounds for name, text in turns.items()]
    return str(tokenizer.apply_chat_template(said, tokenize=False))
