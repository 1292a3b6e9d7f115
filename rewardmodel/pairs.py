"""Battles in, tokenised rows and padded batches out."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from rewardmodel import prompt, template, truncation
from rewardmodel.battles import OUTCOMES
from rewardmodel.config import PromptConfig
from rewardmodel.errors import InputError
from rewardmodel.files import cache_folder
from rewardmodel.prompt import PromptEncoder

ROWS = Features(
    {
        "input_ids": List(Value("int32")),
        "segment_ids": List(Value("int8")),
        "length": Value("int32"),
        "full": List(Value("int32")),
        "kept": List(Value("int32")),
        "labels": List(Value("float32"), length=3),
        "weight": Value("float32"),
    }
)
"""One battle a row: its tokens, the segment of each (1: response A, 2: response B, 0: neither), their number; tokens of
prompt and responses before and after truncation; its outcome (NaN if unlabelled) and its weight in the loss."""

MODEL_COLUMNS = ("input_ids", "segment_ids", "length", "labels", "weight")
"""Columns that the collator and the length-grouped sampler read."""

MODEL_INPUTS = ("input_ids", "attention_mask", "segment_ids")
"""Tensors of a batch that the model's forward pass takes."""

BATTLES_A_BATCH = 500
"""Battles that are tokenised at a time."""

Batch = dict[str, torch.Tensor]


def tokenize(
    battles: Dataset, tokenizer: PreTrainedTokenizerBase, config: PromptConfig, num_proc: int | None = None
) -> Dataset:
    """Return one row of `ROWS` a battle, in the same order; kept in the cache by battles and settings.

    Args:
        battles: what to tokenise.
        tokenizer: of the backbone.
        config: template, budget and policy.
        num_proc: processes; none: this one, with the tokenizer's own threads.

    Raises:
        InputError: the template is unknown, or does not fit into `config.max_length`.
    """
    encoder = PromptEncoder(tokenizer, config)
    if encoder.responses != template.JOINT:
        raise InputError(
            f"prompt.template: '{config.template}' encodes each response alone, but the objective compares both in one "
            f"sequence; use one with response_a and response_b, like: {', '.join(template.TEMPLATES)}"
        )

    def rows(batch: dict[str, list]) -> dict[str, Any]:
        encoded = list(encoder(batch["prompt"], batch["response_a"], batch["response_b"]))
        return {
            "input_ids": [row.input_ids for row in encoded],
            "segment_ids": [row.segment_ids for row in encoded],
            "length": [len(row.input_ids) for row in encoded],
            "full": [row.full for row in encoded],
            "kept": [row.kept for row in encoded],
            "labels": np.array([batch[name] for name in OUTCOMES], dtype=np.float32).T,
            "weight": batch["weight"],
        }

    sources = [inspect.getsource(part) for part in (prompt, template, truncation, tokenize)]
    fingerprint = Hasher.hash([battles._fingerprint, encoder.settings(), sources])
    folder = cache_folder() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    return battles.with_format(None).map(
        rows,
        batched=True,
        batch_size=BATTLES_A_BATCH,
        num_proc=num_proc,
        remove_columns=battles.column_names,
        features=ROWS,
        new_fingerprint=fingerprint,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        desc="tokenizing",
    )


def retention(rows: Dataset) -> dict[str, float]:
    """Return what truncation left of tokenised battles, as `rewardmodel.truncation.retention` does."""
    return truncation.retention(*(np.array(rows[name][:]) for name in ("full", "kept")))


@dataclass(frozen=True)
class PadCollator:
    """Pads rows on the right to the longest of the batch.

    Attributes:
        pad_token_id: any id; padding is told by the attention mask, never by this.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Return `MODEL_INPUTS` (n, longest) int64, labels (n, 3) float32 and weight (n,) float32."""
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        segments = [torch.as_tensor(row["segment_ids"], dtype=torch.int64) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "segment_ids": pad_sequence(segments, batch_first=True),
            "labels": torch.tensor([row["labels"] for row in rows], dtype=torch.float32),
            "weight": torch.tensor([row["weight"] for row in rows], dtype=torch.float32),
        }


def length_sorted_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Yield row numbers of batches, the longest rows first, each of at most `batch_tokens` padded tokens.

    Every row is in exactly one batch; a row longer than the budget has a batch of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + rows]
        start += rows
