"""Battles in, token sequences out that never exceed a budget, never lose a battle and treat A and B alike.

A template puts fixed text around the turns. Only the turns give way when a battle is too long: older rounds
first, then the longer response of a round, from its middle, with a visible mark.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rewardmodel.config import PromptConfig
from rewardmodel.errors import InputError, nearest


@dataclass(frozen=True)
class Template:
    """Fixed text of a joint sequence: head, then each round's prompt, response A and response B, then the tail.

    `{sep}` stands for the tokenizer's own separator token.
    """

    head: str
    prompt: str
    response_a: str
    response_b: str
    tail: str
    markers: tuple[str, ...]
    """What a battle's own text must not look like, in any case: there it gets a blank inside."""


TEMPLATES = {
    # Ends in a fixed question, so that the last token, which the head reads, is never part of a response.
    "instruction": Template(
        head="",
        prompt="### Prompt:\n",
        response_a="\n\n### Response A:\n",
        response_b="\n\n### Response B:\n",
        tail="\n\n### Which response is better, A or B, or is it a tie?\nAnswer:",
        markers=("### Prompt:", "### Response A:", "### Response B:", "### Which response is better"),
    ),
    "encoder": Template(
        head="",
        prompt="PROMPT: ",
        response_a=" {sep} RESPONSE A: ",
        response_b=" {sep} RESPONSE B: ",
        tail="",
        markers=("RESPONSE A:", "RESPONSE B:"),
    ),
}
"""Templates by the recipe's `prompt.template`."""

MARK = " […] "
"""Stands where text was cut."""

LEAST_ROUND = 48
"""An older round of a conversation is kept only if at least so many tokens are left for its turns."""


class Encoded(NamedTuple):
    """One battle as tokens; for each token 1 in response A, 2 in response B (markers included), else 0.

    `full_length` is the number of tokens that there would be without truncation.
    """

    input_ids: list[int]
    segment_ids: list[int]
    full_length: int


class Round(NamedTuple):
    """The tokens of one prompt turn and its two responses."""

    prompt: list[int]
    response_a: list[int]
    response_b: list[int]


class PromptEncoder:
    """Turns texts into token sequences of at most `max_length`.

    Args:
        tokenizer: of the backbone.
        config: template and budget.

    Raises:
        InputError: no such template, or a budget in which the template itself does not fit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> None:
        if config.template not in TEMPLATES:
            raise InputError(
                f"prompt.template: no template '{config.template}'{nearest(config.template, TEMPLATES)}"
                f" There are: {', '.join(TEMPLATES)}"
            )
        self.tokenizer = tokenizer
        self.max_length = config.max_length
        template = TEMPLATES[config.template]
        spellings = (re.escape(marker).replace(r"\ ", r"\s+") for marker in template.markers)
        self._markers = re.compile("|".join(spellings), re.IGNORECASE)
        begin, end = _special_frame(tokenizer)
        self.head = begin + self._fixed(template.head)
        self.tail = self._fixed(template.tail) + end
        self.before = Round(*(self._fixed(getattr(template, name)) for name in Round._fields))
        self.mark = self._tokens([MARK])[0]
        self.overhead = sum(map(len, self.before))
        least = len(self.head) + len(self.tail) + len(self.mark) + self.overhead + LEAST_ROUND
        if self.max_length < least:
            raise InputError(
                f"prompt.max_length: {self.max_length} tokens are too few: the template '{config.template}' and a "
                f"little text of each turn take {least}; set at least that"
            )

    def __call__(
        self, prompts: Sequence[list[str]], responses_a: Sequence[list[str]], responses_b: Sequence[list[str]]
    ) -> Iterator[Encoded]:
        """Yield the tokens of each battle, in order; the arguments are lists of turns."""
        texts = [
            turn for battle in zip(prompts, responses_a, responses_b, strict=True) for turns in battle for turn in turns
        ]
        tokens = iter(self._tokens([self._neutral(text) for text in texts]))
        for prompt in prompts:
            prompt_turns, a_turns, b_turns = ([next(tokens) for _ in prompt] for _ in range(3))
            yield self._assemble([Round(*turns) for turns in zip(prompt_turns, a_turns, b_turns, strict=True)])

    def settings(self) -> list:
        """Return all that the tokens depend on, besides the texts and this module's code."""
        fixed = [self.head, self.tail, list(self.before), self.mark, self._markers.pattern, self.max_length]
        return [*fixed, self.tokenizer.backend_tokenizer.to_str()]

    def _assemble(self, rounds: list[Round]) -> Encoded:
        fixed = len(self.head) + len(self.tail)
        full_length = fixed + sum(self.overhead + sum(map(len, turns)) for turns in rounds)
        sizes = keep_rounds(
            [tuple(map(len, turns)) for turns in rounds],
            self.max_length - fixed,
            self.overhead,
            len(self.mark),
        )
        pieces = [(0, self.head)]
        if len(sizes) < len(rounds):
            pieces.append((0, self.mark))
        for turns, kept in zip(rounds[len(rounds) - len(sizes) :], sizes, strict=True):
            for segment, (before, ids, size) in enumerate(zip(self.before, turns, kept, strict=True)):
                pieces.append((segment, before + cut_middle(ids, size, self.mark)))
        pieces.append((0, self.tail))
        input_ids = [token for _, ids in pieces for token in ids]
        segment_ids = [segment for segment, ids in pieces for _ in ids]
        return Encoded(input_ids, segment_ids, full_length)

    def _neutral(self, text: str) -> str:
        """Return `text` with a blank inside anything that looks like a marker of the template."""
        return self._markers.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _fixed(self, text: str) -> list[int]:
        separator = self.tokenizer.sep_token or ""
        return self.tokenizer(text.replace("{sep}", separator), add_special_tokens=False)["input_ids"]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of texts, in which the spelling of a special token is text like any other."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def keep_rounds(rounds: Sequence[tuple[int, ...]], budget: int, overhead: int, mark: int) -> list[tuple[int, int, int]]:
    """Return how many tokens of (prompt, response A, response B) stay, for the latest rounds that fit.

    Exchanging A and B in `rounds` exchanges them in the answer and changes nothing else.

    Args:
        rounds: tokens of each round, in the order of the conversation.
        budget: tokens for all rounds together, markers included.
        overhead: tokens of one round's markers.
        mark: tokens of the mark that stands for left-out rounds.
    """
    if sum(overhead + sum(turns) for turns in rounds) <= budget:
        return [(prompt, a, b) for prompt, a, b in rounds]
    left = budget - (mark if len(rounds) > 1 else 0)
    kept: list[tuple[int, int, int]] = []
    for prompt, a, b in reversed(rounds):
        left -= overhead
        if kept and left < min(LEAST_ROUND, prompt + a + b):
            break
        kept.append(share_budget(prompt, a, b, left))
        left -= sum(kept[-1])
    return kept[::-1]


def share_budget(prompt: int, response_a: int, response_b: int, budget: int) -> tuple[int, int, int]:
    """Return how many tokens of each stay: a quarter is the prompt's to claim, then the longer response gives way."""
    floor = min(prompt, budget // 4)
    kept_a = min(response_a, max(budget - floor - response_b, (budget - floor) // 2))
    kept_b = min(response_b, max(budget - floor - response_a, (budget - floor) // 2))
    return min(prompt, budget - kept_a - kept_b), kept_a, kept_b


def cut_middle(ids: list[int], size: int, mark: list[int]) -> list[int]:
    """Return at most `size` of the tokens: all, or head and tail around the mark (the head alone if it is tiny)."""
    if len(ids) <= size:
        return ids
    rest = size - len(mark)
    if rest < 2:
        return ids[:size]
    return ids[: rest - rest // 2] + mark + ids[-(rest // 2) :]


def _special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer itself puts before and after a sequence."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return framed[:start], framed[start + len(bare) :]
