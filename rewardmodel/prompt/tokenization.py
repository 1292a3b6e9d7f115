"""Tokenise battles: one row per battle, in which the tokens that its sequences share are stored once."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from rewardmodel.battles import OUTCOMES, TEACHER_COLUMNS
from rewardmodel.config.schema import PromptConfig
from rewardmodel.files import cache_folder
from rewardmodel.progress import quiet
from rewardmodel.prompt import encoder as prompt
from rewardmodel.prompt import template, truncation
from rewardmodel.prompt.encoder import EncodedSequence, PromptEncoder
from rewardmodel.prompt.truncation import Sizes

TOKEN_ROW_FEATURES = Features(
    {
        "id": Value("string"),
        "input_ids": List(Value("int32")),
        "segment_ids": List(Value("int8")),
        "branches": List(Value("int32")),
        "length": Value("int32"),
        "full": List(Value("int32")),
        "kept": List(Value("int32")),
        "labels": List(Value("float32"), length=3),
        "teacher": List(Value("float32"), length=3),
        "weight": Value("float32"),
    }
)
"""One row per battle:
    input_ids, segment_ids: (length,) of its sequences, packed: their common prefix, then the rest of each; segments
        as in `EncodedSequence`.
    branches: [shared, a, b]: tokens of the common prefix, then of the rest of each sequence. [310, 96, 120] is two
        sequences of 406 and 430 tokens in a row of 526; [0, 512] is one sequence.
    length: of the row.
    full, kept: tokens of prompt, A and B before and after truncation.
    labels, teacher: outcome and teacher's probabilities, NaN where there is none.
    weight: of the battle in the loss."""

MODEL_COLUMNS = ("id", "input_ids", "segment_ids", "branches", "length", "labels", "teacher", "weight")
"""Columns that training and prediction read."""

SEQUENCE_TEXTS = {"joint": ((0, 1, 2), (0, 2, 1)), "separate": ((0, 1), (0, 2))}
"""Encoding -> the texts of each sequence in order, 0 the prompt, 1 and 2 the responses A and B."""


@quiet()
def tokenize(
    battles: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
    num_proc: int | None = None,
    *,
    encoding: str = "joint",
    both_orders: bool = False,
) -> Dataset:
    """Return one row of `TOKEN_ROW_FEATURES` per battle, in the same order, cached by battles and settings.

    Args:
        battles: what to tokenise.
        tokenizer: of the backbone.
        config: the recipe's `prompt` section.
        num_proc: number of processes; default: only this one, with the tokenizer's own threads.
        encoding: "joint": one sequence per battle; "separate": two, prompt with A and prompt with B.
        both_orders: two joint sequences per battle, with A first and with B first.

    Raises:
        InputError: the template is unknown, for the other encoding, or does not fit into `config.max_length`.
    """
    encoder = PromptEncoder(tokenizer, config, encoding)
    orders = choose_orders(encoding, both_orders)

    make_rows = partial(tokenize_columns, encoder=encoder, orders=orders)

    # Cached under a hash of the battles, of all settings, and of the code that makes the rows.
    sources = [
        inspect.getsource(part)
        for part in (prompt, template, truncation, pack_sequences, _battle_sizes, tokenize_columns)
    ]
    fingerprint = Hasher.hash([battles._fingerprint, encoder.settings(), orders, sources])
    folder = cache_folder() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    return battles.with_format(None).map(
        make_rows,
        batched=True,
        batch_size=500,
        num_proc=num_proc,
        remove_columns=battles.column_names,
        features=TOKEN_ROW_FEATURES,
        new_fingerprint=fingerprint,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        desc="tokenizing",
    )


def tokenize_columns(
    batch: Mapping[str, Sequence], encoder: PromptEncoder, orders: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """Return columns of `TOKEN_ROW_FEATURES` of columns of battles.

    Args:
        batch: columns of `BATTLE_FEATURES`: {"id": ["7"], "prompt": [["What is 2 + 2?"]], ...}.
        encoder: of the model.
        orders: the texts of each sequence of a battle, as in `SEQUENCE_TEXTS`.
    """
    # battles: the sequences of each battle; joint encoding in both orders: [[A first, B first], ...]
    battles = [
        [encoder.assemble([tuple(texts[text] for text in order) for texts in rounds]) for order in orders]
        for rounds in encoder.tokenize_rounds(batch["prompt"], batch["response_a"], batch["response_b"])
    ]
    packed = [pack_sequences(battle) for battle in battles]
    return {
        "id": batch["id"],
        "input_ids": [row.input_ids for row in packed],
        "segment_ids": [row.segment_ids for row in packed],
        "branches": [row.branches for row in packed],
        "length": [len(row.input_ids) for row in packed],
        "full": [_battle_sizes([one.full for one in battle]) for battle in battles],
        "kept": [_battle_sizes([one.kept for one in battle]) for battle in battles],
        "labels": np.array([batch[name] for name in OUTCOMES], dtype=np.float32).T,
        "teacher": np.array([batch[name] for name in TEACHER_COLUMNS], dtype=np.float32).T,
        "weight": batch["weight"],
    }


def choose_orders(encoding: str, both_orders: bool) -> tuple[tuple[int, ...], ...]:
    """Return the texts of each sequence of a battle, as in `SEQUENCE_TEXTS`; one joint sequence unless both orders."""
    return SEQUENCE_TEXTS[encoding][: None if both_orders or encoding == "separate" else 1]


def _battle_sizes(sequences: Sequence[Sizes]) -> Sizes:
    """Return the tokens of prompt, A and B; where they are in separate sequences, the prompt's in the shorter one."""
    if len(sequences[0]) == 3:
        return sequences[0]
    (prompt_a, a), (prompt_b, b) = sequences
    return min(prompt_a, prompt_b), a, b


class PackedRow(NamedTuple):
    """The sequences of one battle in one row; its fields are the columns of `TOKEN_ROW_FEATURES` with these names."""

    input_ids: np.ndarray
    segment_ids: np.ndarray
    branches: list[int]


def pack_sequences(sequences: Sequence[EncodedSequence]) -> PackedRow:
    """Return the common prefix of all sequences once, then the rest of each, which is at least one token."""
    first, *others = sequences
    shared = 0
    if others:
        # the common prefix ends at the first token or segment that differs
        most = min(len(one.input_ids) for one in sequences) - 1
        differ = [
            (one.input_ids[:most] != first.input_ids[:most]) | (one.segment_ids[:most] != first.segment_ids[:most])
            for one in others
        ]
        different = np.flatnonzero(np.any(differ, axis=0))
        shared = int(different[0]) if len(different) else most
    return PackedRow(
        np.concatenate([first.input_ids[:shared], *(one.input_ids[shared:] for one in sequences)]),
        np.concatenate([first.segment_ids[:shared], *(one.segment_ids[shared:] for one in sequences)]),
        [shared, *(len(one.input_ids) - shared for one in sequences)],
    )


@quiet()
def select_sequence(rows: Dataset, number: int) -> Dataset:
    """Return rows with one of their sequences only, by its index, and with the columns that models read."""
    rows = rows.select_columns(list(MODEL_COLUMNS))
    return rows.map(_take_sequence, fn_kwargs={"number": number}, features=rows.features, desc="selecting sequences")


def _take_sequence(row: dict[str, Any], number: int) -> dict[str, Any]:
    shared, *lengths = row["branches"]
    start = shared + sum(lengths[:number])
    kept = {
        name: row[name][:shared] + row[name][start : start + lengths[number]] for name in ("input_ids", "segment_ids")
    }
    return {**kept, "branches": [0, shared + lengths[number]], "length": shared + lengths[number]}


def shared_token_fraction(rows: Dataset) -> float:
    """Return the share of the sequences' tokens that packing saves: 1 - tokens in rows / tokens in sequences."""
    tokens = sum(shared * len(branches) + sum(branches) for shared, *branches in rows["branches"])
    return 1 - sum(rows["length"]) / tokens


def measure_row_retention(rows: Dataset) -> dict[str, float]:
    """Return how much of the texts truncation kept in tokenised battles; see `truncation.measure_retention`."""
    return truncation.measure_retention(*(np.array(rows[name][:]) for name in ("full", "kept")))
