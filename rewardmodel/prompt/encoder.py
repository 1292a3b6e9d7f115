"""Encode battles as token sequences of at most `max_length` tokens, treating both responses alike.

A template puts fixed text around the turns; only turns are cut when a battle is too long, and no battle is dropped.
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
"""A position between two characters that are not white space, where a space breaks a marker."""


class EncodedSequence(NamedTuple):
    """One sequence of tokens.

    Attributes:
        input_ids: (length,) int32.
        segment_ids: (length,) int8: 1 for tokens of response A (or the only response), 2 for response B, with the
            fixed text directly before them; else 0.
        full: tokens of the prompt and of each response over all rounds, before truncation: (21, 460, 631).
        kept: the same after truncation, without marks.
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    full: Sizes
    kept: Sizes


class FixedTokens(NamedTuple):
    """The tokens of a template's fixed text, for some number of rounds.

    Attributes:
        before: ids before each turn: [[2, 106, 12], [9, 31], [9, 32]].
        turns: (round, text) of each turn, text 0 the prompt, 1 and 2 the responses: [(0, 0), (0, 1), (0, 2)].
        after: ids after the last turn.
        length: number of these ids in total.
    """

    before: list[list[int]]
    turns: list[tuple[int, int]]
    after: list[int]
    length: int


class PromptEncoder:
    """Encodes conversations as token sequences of at most `max_length` tokens.

    Args:
        tokenizer: of the backbone.
        config: the recipe's `prompt` section: template, budget and policy.
        encoding: "joint" or "separate": whether a sequence has both responses or one of them.

    Attributes:
        responses: names of the responses in one sequence.
        mark: ids of `CUT_MARK`, which replace text that was cut.
        markers: matches what looks like the template in a turn.

    Raises:
        InputError: there is no such template, it is for the other encoding, or it does not fit into `max_length`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig, encoding: str = "joint") -> None:
        self.tokenizer = tokenizer
        self.max_length = config.max_length
        self.truncation = config.truncation

        # the template, with the responses that the encoding needs
        wanted, decoder, encoder = ENCODINGS[encoding]
        name = config.template or (encoder if tokenizer.sep_token else decoder)
        self.template = Template(name, tokenizer)
        self.responses = self.template.responses
        if self.responses != wanted:
            raise InputError(
                f"prompt.template: '{name}' has {' and '.join(self.responses)}, but the objective needs "
                f"{' and '.join(wanted)} ({encoding} encoding); leave prompt.template out, or name another"
            )

        # its fixed tokens, and the texts in turns that would look like them
        self.mark = self._tokenize([CUT_MARK])[0]
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if not token.special]
        self.markers = compile_markers(self.template.render(2), tokenizer.all_special_tokens, added)
        self._begin, self._end = _special_frame(tokenizer)
        self._fixed_tokens: dict[int, FixedTokens] = {}
        least = self.fixed_tokens(1).length + len(self.mark) + MIN_ROUND_TOKENS
        if self.max_length < least:
            raise InputError(
                f"prompt.max_length: {self.max_length} is too few tokens: the template '{name}' and a "
                f"little text of each turn take {least}; set at least that"
            )

    def __call__(self, prompts: Sequence[list[str]], *responses: Sequence[list[str]]) -> Iterator[EncodedSequence]:
        """Yield one sequence per conversation, in order.

        Args:
            prompts: the prompt turns of each conversation.
            responses: the turns of each response; one argument for each name in `self.responses`.
        """
        if len(responses) != len(self.responses):
            raise ValueError(f"{len(responses)} responses for a template with {' and '.join(self.responses)}")
        for rounds in self.tokenize_rounds(prompts, *responses):
            yield self.assemble(rounds)

    def tokenize_rounds(
        self, prompts: Sequence[list[str]], *responses: Sequence[list[str]]
    ) -> Iterator[list[tuple[list[int], ...]]]:
        """Yield the ids of each conversation's turns by round: `[([5, 9], [7, 7, 3], [4]), ...]`, the prompt first."""
        conversations = [list(zip(*texts, strict=True)) for texts in zip(prompts, *responses, strict=True)]
        texts = [self._neutralise(text) for rounds in conversations for turns in rounds for text in turns]
        tokens = iter(self._tokenize(texts))
        for rounds in conversations:
            yield [tuple(next(tokens) for _ in turns) for turns in rounds]

    def fit_rounds(self, rounds: Sequence[Sizes], max_length: int | None = None) -> list[Sizes]:
        """Return the sizes to cut the texts to, marks included: [(9, 120, 333)] if only the last round is kept.

        Args:
            rounds: sizes of each round: [(12, 340, 298), (9, 120, 333)].
            max_length: tokens of the sequence; default: that of the recipe.
        """
        budget = self.max_length if max_length is None else max_length
        share = TRUNCATIONS[self.truncation].share
        return keep_rounds(rounds, lambda count: budget - self.fixed_tokens(count).length, len(self.mark), share)

    def settings(self) -> list:
        """Return all that the tokens depend on apart from the texts and the code, as a key for caches."""
        return [
            self.template.text,
            self.tokenizer.chat_template,
            *(self.fixed_tokens(rounds) for rounds in (1, 2, 3)),
            self.mark,
            self.markers.pattern,
            self.max_length,
            self.truncation,
            self.tokenizer.backend_tokenizer.to_str(),
        ]

    def assemble(self, rounds: list[tuple[list[int], ...]]) -> EncodedSequence:
        """Return the sequence of a conversation, cut to `max_length`.

        Args:
            rounds: the ids of the turns by round, as `tokenize_rounds` yields them.
        """
        sizes = [tuple(map(len, texts)) for texts in rounds]
        kept_sizes = self.fit_rounds(sizes)
        dropped = len(rounds) - len(kept_sizes)

        # Fixed text and cut turns, alternating; the mark of dropped rounds goes before the first prompt turn.
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
        """Return how many tokens of the prompt and of each response are kept over all rounds, without marks.

        Args:
            rounds: sizes of each round before truncation.
            kept: what `fit_rounds` returns for them.
        """
        latest = rounds[len(rounds) - len(kept) :]
        counts = [
            tuple(count_kept_tokens(full, size, len(self.mark)) for full, size in zip(*pair, strict=True))
            for pair in zip(latest, kept, strict=True)
        ]
        return sum_sizes(counts)

    def _neutralise(self, text: str) -> str:
        """Return `text` with a space inside everything that looks like a marker: `# ## Response A:`."""
        return self.markers.sub(lambda found: _INSIDE.sub(" ", found[0], count=1), text)

    def fixed_tokens(self, rounds: int) -> FixedTokens:
        """Return the ids of the fixed text for a conversation of `rounds` rounds."""
        if rounds not in self._fixed_tokens:
            self._fixed_tokens[rounds] = self._tokenize_fixed(rounds)
        return self._fixed_tokens[rounds]

    def _tokenize_fixed(self, rounds: int) -> FixedTokens:
        layout = self.template.render(rounds)
        before = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in layout.before]
        after = self.tokenizer(layout.after, add_special_tokens=False)["input_ids"]
        before[0], after = self._with_begin(before[0]), self._with_end(after)
        return FixedTokens(before, layout.turns, after, sum(map(len, before)) + len(after))

    def encode_verbatim(self, text: str, max_length: int | None = None) -> np.ndarray:
        """Return the ids of a finished text, (length,) int32: no template, one BOS (and the end that encoders have).

        Special tokens that the text spells are special tokens here, as its own chat template means them.

        Args:
            text: with its chat template, with or without BOS.
            max_length: tokens to cut it to, from the left on; None: it is not cut.
        """
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        ids = self._with_begin(ids)
        if max_length is not None:
            ids = ids[: max_length - len(self._end)]
        return np.array(self._with_end(ids), np.int32)

    def _with_begin(self, ids: list[int]) -> list[int]:
        """Return ids that begin as the tokenizer begins a sequence; chat templates may include that."""
        return ids if ids[: len(self._begin)] == self._begin else self._begin + ids

    def _with_end(self, ids: list[int]) -> list[int]:
        return ids if not self._end or ids[-len(self._end) :] == self._end else ids + self._end

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text; spellings of special tokens in it are tokenised as plain text."""
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]


def sum_sizes(rounds: Sequence[Sizes]) -> Sizes:
    """Return the tokens of the prompt and of each response, summed over rounds."""
    return tuple(map(sum, zip(*rounds, strict=True)))


def _special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer itself puts before and after a sequence, such as [CLS] and [SEP]."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return framed[:start], framed[start + len(bare) :]
