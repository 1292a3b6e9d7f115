"""Battles in, token sequences out that never exceed a budget, never lose a battle and treat A and B alike.

A template puts fixed text around the turns; only the turns give way when a battle is too long.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rewardmodel.config.schema import PromptConfig
from rewardmodel.errors import InputError
from rewardmodel.prompt.template import ENCODINGS, Template, compile_markers
from rewardmodel.prompt.truncation import CUT_MARK, MIN_ROUND_TOKENS, TRUNCATIONS, Sizes, count_kept_tokens, keep_rounds

_INSIDE = re.compile(r"(?<=\S)(?=\S)")


class EncodedSequence(NamedTuple):
    """One sequence of tokens: (length,) int32 ids, and (length,) int8 segments.

    A token's segment is 1 in response A (or the only one), 2 in response B, markers included; else 0.
    `full` and `kept` are the tokens of the prompt and of each response, before and after truncation.
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    full: Sizes
    kept: Sizes


class FixedTokens(NamedTuple):
    """The tokens of a layout's fixed text: before each turn, and after the last; and how many there are."""

    before: list[list[int]]
    turns: list[tuple[int, int]]
    after: list[int]
    length: int


class PromptEncoder:
    """Turns texts into token sequences of at most `max_length`.

    Args:
        tokenizer: of the backbone.
        config: template, budget and policy.
        encoding: "joint" or "separate": whether a sequence holds both responses or one of them.

    Attributes:
        responses: names of the responses in one sequence: A and B (joint encoding), or one (separate).

    Raises:
        InputError: no such template, one for the other encoding, or a budget in which the template itself does not fit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig, encoding: str = "joint") -> None:
        self.tokenizer = tokenizer
        self.max_length = config.max_length
        self.truncation = config.truncation
        wanted, decoder, encoder = ENCODINGS[encoding]
        name = config.template or (encoder if tokenizer.sep_token else decoder)
        self.template = Template(name, tokenizer)
        self.responses = self.template.responses
        if self.responses != wanted:
            raise InputError(
                f"prompt.template: '{name}' has {' and '.join(self.responses)}, but the objective needs "
                f"{' and '.join(wanted)}, its encoding is {encoding}; leave prompt.template out, or use another"
            )
        self.mark = self._tokens([CUT_MARK])[0]
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if not token.special]
        self._markers = compile_markers(self.template.layout(2), tokenizer.all_special_tokens, added)
        self._begin, self._end = _special_frame(tokenizer)
        self._layouts: dict[int, FixedTokens] = {}
        least = self.fixed_tokens(1).length + len(self.mark) + MIN_ROUND_TOKENS
        if self.max_length < least:
            raise InputError(
                f"prompt.max_length: {self.max_length} tokens are too few: the template '{name}' and a "
                f"little text of each turn take {least}; set at least that"
            )

    def __call__(self, prompts: Sequence[list[str]], *responses: Sequence[list[str]]) -> Iterator[EncodedSequence]:
        """Yield the tokens of each conversation, in order.

        Args:
            prompts: the prompt turns of each.
            responses: the turns of each response, as many sequences as `self.responses` has names.
        """
        if len(responses) != len(self.responses):
            raise ValueError(f"{len(responses)} responses for a template with {' and '.join(self.responses)}")
        for rounds in self.tokenize_rounds(prompts, *responses):
            yield self.assemble(rounds)

    def tokenize_rounds(
        self, prompts: Sequence[list[str]], *responses: Sequence[list[str]]
    ) -> Iterator[list[tuple[list[int], ...]]]:
        """Yield the tokens of each conversation's rounds: of the prompt turn and of each response to it."""
        conversations = [list(zip(*texts, strict=True)) for texts in zip(prompts, *responses, strict=True)]
        texts = [self._neutral(text) for rounds in conversations for turns in rounds for text in turns]
        tokens = iter(self._tokens(texts))
        for rounds in conversations:
            yield [tuple(next(tokens) for _ in turns) for turns in rounds]

    def fit_rounds(self, rounds: Sequence[Sizes], max_length: int | None = None) -> list[Sizes]:
        """Return how many tokens of each text of the latest rounds stay, marks included."""
        budget = self.max_length if max_length is None else max_length
        share = TRUNCATIONS[self.truncation].share
        return keep_rounds(rounds, lambda count: budget - self.fixed_tokens(count).length, len(self.mark), share)

    def settings(self) -> list:
        """Return all that the tokens depend on, besides the texts and the code."""
        layouts = [self.fixed_tokens(rounds) for rounds in (1, 2, 3)]
        fixed = [
            self.template.text,
            self.tokenizer.chat_template,
            *layouts,
            self.mark,
            self._markers.pattern,
            self.max_length,
            self.truncation,
        ]
        return [*fixed, self.tokenizer.backend_tokenizer.to_str()]

    def assemble(self, rounds: list[tuple[list[int], ...]]) -> EncodedSequence:
        """Return one sequence of the tokens of a conversation's rounds, at most `max_length`."""
        sizes = [tuple(map(len, texts)) for texts in rounds]
        kept_sizes = self.fit_rounds(sizes)
        dropped = len(rounds) - len(kept_sizes)
        fixed = self.fixed_tokens(len(kept_sizes))
        cut = TRUNCATIONS[self.truncation].cut
        input_ids: list[int] = []
        segments, counts = [], []
        for before, (number, text) in zip(fixed.before, fixed.turns, strict=True):
            start = len(input_ids)
            input_ids += before
            if dropped and (number, text) == (0, 0):
                input_ids += self.mark
            input_ids += cut(rounds[dropped + number][text], kept_sizes[number][text], self.mark)
            segments.append(text)
            counts.append(len(input_ids) - start)
        input_ids += fixed.after
        segment_ids = np.repeat(np.array([*segments, 0], np.int8), [*counts, len(fixed.after)])
        return EncodedSequence(
            np.array(input_ids, np.int32), segment_ids, sum_sizes(sizes), self.count_kept(sizes, kept_sizes)
        )

    def count_kept(self, rounds: Sequence[Sizes], kept: Sequence[Sizes]) -> Sizes:
        """Return the tokens of the prompt and of each response that stay, over all rounds, without marks."""
        latest = rounds[len(rounds) - len(kept) :]
        stay = [
            tuple(count_kept_tokens(full, size, len(self.mark)) for full, size in zip(*pair, strict=True))
            for pair in zip(latest, kept, strict=True)
        ]
        return sum_sizes(stay)

    def _neutral(self, text: str) -> str:
        """Return `text` with a blank inside a word of anything that looks like a marker of the template."""
        return self._markers.sub(lambda found: _INSIDE.sub(" ", found[0], count=1), text)

    def fixed_tokens(self, rounds: int) -> FixedTokens:
        """Return the tokens around the turns of a conversation of so many rounds."""
        if rounds not in self._layouts:
            self._layouts[rounds] = self._lay_out(rounds)
        return self._layouts[rounds]

    def _lay_out(self, rounds: int) -> FixedTokens:
        layout = self.template.layout(rounds)
        before = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in layout.before]
        after = self.tokenizer(layout.after, add_special_tokens=False)["input_ids"]
        if before[0][: len(self._begin)] != self._begin:  # some templates write it themselves
            before[0] = self._begin + before[0]
        if self._end and after[-len(self._end) :] != self._end:
            after = after + self._end
        return FixedTokens(before, layout.turns, after, sum(map(len, before)) + len(after))

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of texts, in which the spelling of a special token is text like any other."""
        if not texts:
            return []
        return self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True,
            return_attention_mask=False, return_token_type_ids=False,
        )["input_ids"]  # fmt: skip


def sum_sizes(rounds: Sequence[Sizes]) -> Sizes:
    """Return the tokens of the prompt and of each response over all rounds."""
    return tuple(map(sum, zip(*rounds, strict=True)))


def _special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer itself puts before and after a sequence."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return framed[:start], framed[start + len(bare) :]
