"""Battles in, tokenised rows out: one a battle, with what its sequences share in it once."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from rewardmodel.battles import OUTCOMES, TEACHER_COLUMNS
from rewardmodel.config.schema import PromptConfig
from rewardmodel.files import cache_folder
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
"""One battle a row: its id; its tokens, the segment of each (1: the first response, 2: the second, 0: neither), how
many of them its sequences share and how many each goes on with, their number; tokens of prompt and responses before and
after truncation; its outcome and a teacher's probabilities (NaN where there is none), and its weight in the loss."""

MODEL_COLUMNS = ("id", "input_ids", "segment_ids", "branches", "length", "labels", "teacher", "weight")
"""Columns that training and prediction read."""

SEQUENCE_TEXTS = {"joint": ((0, 1, 2), (0, 2, 1)), "separate": ((0, 1), (0, 2))}
"""The texts of each sequence of a battle by encoding: 0 is the prompt, 1 and 2 are the responses A and B."""

BATTLES_A_BATCH = 500
"""Battles that are tokenised at a time."""


def tokenize(
    battles: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: PromptConfig,
    num_proc: int | None = None,
    *,
    encoding: str = "joint",
    both_orders: bool = False,
) -> Dataset:
    """Return one row of `TOKEN_ROW_FEATURES` a battle, in the same order; kept in the cache by battles and settings.

    The sequences of a battle begin alike: those tokens are in the row once.

    Args:
        battles: what to tokenise.
        tokenizer: of the backbone.
        config: template, budget and policy.
        num_proc: processes; none: this one, with the tokenizer's own threads.
        encoding: "joint": one sequence a battle; "separate": two, prompt and A, prompt and B.
        both_orders: two joint sequences a battle, A shown first and B shown first.

    Raises:
        InputError: the template is unknown, for the other encoding, or does not fit into `config.max_length`.
    """
    encoder = PromptEncoder(tokenizer, config, encoding)
    orders = SEQUENCE_TEXTS[encoding][: None if both_orders or encoding == "separate" else 1]

    def rows(batch: dict[str, list]) -> dict[str, Any]:
        battles = [
            [encoder.assemble([tuple(texts[text] for text in order) for texts in rounds]) for order in orders]
            for rounds in encoder.tokenize_rounds(batch["prompt"], batch["response_a"], batch["response_b"])
        ]
        merged = [pack_sequences(battle) for battle in battles]
        return {
            "id": batch["id"],
            "input_ids": [row.input_ids for row in merged],
            "segment_ids": [row.segment_ids for row in merged],
            "branches": [row.branches for row in merged],
            "length": [len(row.input_ids) for row in merged],
            "full": [_sizes([one.full for one in battle]) for battle in battles],
            "kept": [_sizes([one.kept for one in battle]) for battle in battles],
            "labels": np.array([batch[name] for name in OUTCOMES], dtype=np.float32).T,
            "teacher": np.array([batch[name] for name in TEACHER_COLUMNS], dtype=np.float32).T,
            "weight": batch["weight"],
        }

    sources = [inspect.getsource(part) for part in (prompt, template, truncation, pack_sequences, _sizes, tokenize)]
    fingerprint = Hasher.hash([battles._fingerprint, encoder.settings(), orders, sources])
    folder = cache_folder() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    return battles.with_format(None).map(
        rows,
        batched=True,
        batch_size=BATTLES_A_BATCH,
        num_proc=num_proc,
        remove_columns=battles.column_names,
        features=TOKEN_ROW_FEATURES,
        new_fingerprint=fingerprint,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        desc="tokenizing",
    )


def _sizes(sequences: Sequence[Sizes]) -> Sizes:
    """Return the tokens of prompt, A and B of a battle's sequences, which are alike in joint ones."""
    if len(sequences[0]) == 3:
        return sequences[0]
    (prompt_a, a), (prompt_b, b) = sequences
    return min(prompt_a, prompt_b), a, b


class PackedRow(NamedTuple):
    """Sequences of one battle in one row: (length,) int32 ids, (length,) int8 segments, and the row's `branches`."""

    input_ids: np.ndarray
    segment_ids: np.ndarray
    branches: list[int]


def pack_sequences(sequences: Sequence[EncodedSequence]) -> PackedRow:
    """Return the tokens with which all sequences begin, once, and then what each goes on with, one token at least."""
    first, *others = sequences
    shared = 0
    if others:
        most = min(len(one.input_ids) for one in sequences) - 1
        differ = [
            (one.input_ids[:most] != first.input_ids[:most]) | (one.segment_ids[:most] != first.segment_ids[:most])
            for one in others
        ]
        anywhere = np.flatnonzero(np.any(differ, axis=0))
        shared = int(anywhere[0]) if len(anywhere) else most
    return PackedRow(
        np.concatenate([first.input_ids[:shared], *(one.input_ids[shared:] for one in sequences)]),
        np.concatenate([first.segment_ids[:shared], *(one.segment_ids[shared:] for one in sequences)]),
        [shared, *(len(one.input_ids) - shared for one in sequences)],
    )


def select_sequence(rows: Dataset, number: int) -> Dataset:
    """Return rows with the columns that models read, and with one of their sequences alone, by its place."""
    rows = rows.select_columns(list(MODEL_COLUMNS))
    return rows.map(_alone, fn_kwargs={"number": number}, features=rows.features, desc="taking orders apart")


def _alone(row: dict[str, Any], number: int) -> dict[str, Any]:
    shared, *lengths = row["branches"]
    start = shared + sum(lengths[:number])
    kept = {
        name: row[name][:shared] + row[name][start : start + lengths[number]] for name in ("input_ids", "segment_ids")
    }
    return {**kept, "branches": [0, shared + lengths[number]], "length": shared + lengths[number]}


def shared_token_fraction(rows: Dataset) -> float:
    """Return the share of all sequences' tokens that rows do without, because sequences of a battle share them."""
    tokens = sum(shared * len(branches) + sum(branches) for shared, *branches in rows["branches"])
    return 1 - sum(rows["length"]) / tokens


def measure_row_retention(rows: Dataset) -> dict[str, float]:
    """Return what truncation left of tokenised battles, as `prompt.truncation.retention` does."""
    return truncation.measure_retention(*(np.array(rows[name][:]) for name in ("full", "kept")))
