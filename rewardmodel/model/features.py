"""Rows and a classifier in, what the last layer of its head reads of them out, kept in the cache battle by battle.

A feature is known by the backbone, the settings that it depends on, and the tokens: other folds, objectives or sources
of the same battles find it there, and what was killed goes on.
"""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers.modeling_outputs import SequenceClassifierOutput

from rewardmodel.config.schema import ModelConfig
from rewardmodel.distributed import from_main, in_every_process, is_main, joined
from rewardmodel.files import cache_folder, read_arrays, write_arrays
from rewardmodel.model.forward import batching, check_numbers, cut, forward_budget, row_logits
from rewardmodel.model.heads import head_names
from rewardmodel.model.loading import classifier
from rewardmodel.model.weights import fingerprint, resolve

logger = logging.getLogger(__name__)

TOKENS = 2**17
"""About so many tokens of each process are computed between two files."""

FORMAT = 1
"""Raise it where other features are computed of the same settings: those that are kept are then not taken for them."""

SETTINGS = (
    "num_hidden_layers", "pooling", "attn_implementation", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
    "use_bnb_nested_quant", "use_peft",
)  # fmt: skip
"""Fields of the recipe's `model` section that features depend on, beside the backbone."""


class LastLayerInput(torch.nn.Module):
    """A classifier whose forward pass returns what one of its layers reads, (n, width) float32, as logits."""

    def __init__(self, model: Any, layer: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.layer, self.config = model, layer, model.config

    def forward(self, **batch: Any) -> SequenceClassifierOutput:
        """Return the features of the sequences of a batch."""
        read: list[torch.Tensor] = []
        handle = self.layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            self.model(**batch)
        finally:
            handle.remove()
        return SequenceClassifierOutput(logits=read[0].float())


def feature_folder(config: ModelConfig, dtype: torch.dtype) -> Path:
    """Return the folder of the cache for features of a backbone with these settings."""
    settings = {name: value for name, value in asdict(config).items() if name in SETTINGS}
    settings |= {
        "format": FORMAT,
        "dtype": str(dtype),
        "backbone": fingerprint(resolve(config.model_name_or_path, config.model_revision)),
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    return cache_folder() / "features" / digest.hexdigest()


def features(
    model: Any,
    layer: torch.nn.Module,
    rows: Dataset,
    pad_token_id: int,
    dtype: torch.dtype,
    folder: Path,
    budget: int | None = None,
) -> np.ndarray:
    """Return what a layer reads of each sequence of rows, (n_rows, n_sequences, width) float32.

    Args:
        model: a classifier on its device.
        layer: of its head.
        rows: of `prompt.tokenization.ROWS`, all with the same number of sequences.
        pad_token_id: what fills the ends of shorter sequences.
        dtype: precision to compute in.
        folder: where features are read that are there, and those that are not are kept.
        budget: tokens of a batch; none: as many as fit into free memory.

    Raises:
        FloatingPointError: features that are no numbers; nothing is kept of that part.
    """
    keys, folder = row_keys(rows), _with_rest_of_head(folder, model, layer)
    found = _read_by_all(folder, set(keys))
    todo = np.array([number for number, key in enumerate(keys) if key not in found], dtype=np.int64)
    if len(todo) < len(keys):
        logger.info("features of %d of %d battles are in %s", len(keys) - len(todo), len(keys), folder)
    if len(todo):
        reader = LastLayerInput(model, layer).eval()
        missing = rows.select(todo)
        budget = budget or forward_budget(reader, missing, pad_token_id, dtype)
        costs = np.array(batching(reader, pad_token_id).costs(missing))
        order = np.random.default_rng(0).permutation(len(todo))  # rows of any length fill a batch best
        with tqdm(total=len(todo), desc="reading features", unit="battle", disable=not is_main()) as bar:
            for shard in cut(costs, order, TOKENS * joined().num_processes):
                some, names = missing.select(shard), [keys[number] for number in todo[shard]]
                values = row_logits(reader, some, pad_token_id, dtype, budget)
                check_numbers(values, some, "features of {} battles are no numbers")
                if is_main():
                    _write(folder, names, values)
                found |= dict(zip(names, values, strict=True))
                bar.update(len(shard))
    return np.stack([found[key] for key in keys])


def _with_rest_of_head(folder: Path, model: Any, layer: torch.nn.Module) -> Path:
    """Return the folder for a head of more layers than the last: what lies under that may be drawn at random."""
    plain = classifier(model)
    own = {id(weight) for weight in layer.parameters()}
    under = {
        f"{head}.{name}": weight
        for head in head_names(plain)
        for name, weight in plain.get_submodule(head).named_parameters()
        if id(weight) not in own and not name.startswith("original_module.")  # what PEFT keeps of before training
    }
    if not under:
        return folder
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(under):
        digest.update(name.encode() + under[name].detach().float().cpu().numpy().tobytes())
    return folder / digest.hexdigest()


def row_keys(rows: Dataset) -> list[str]:
    """Return by what each row's features are known again: a digest of its tokens, segments and branches."""
    keys = []
    for batch in rows.with_format(None).select_columns(["input_ids", "segment_ids", "branches"]).iter(batch_size=1000):
        for parts in zip(*batch.values(), strict=True):
            digest = hashlib.blake2b(digest_size=16)
            for part in parts:
                digest.update(np.asarray([len(part), *part], dtype=np.int32).tobytes())
            keys.append(digest.hexdigest())
    return keys


def _read_by_all(folder: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Return in every process the features that the main one finds in its cache; it sends them where others lack any.

    What a process has of its own it keeps: of caches of several machines, values may differ in the last digits.
    """
    found = _read(folder, wanted)
    shared = in_every_process(set(found))
    sent = from_main(lambda: {key: row for key, row in found.items() if key not in shared})
    return {key: found[key] for key in shared} | sent


def _read(folder: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for keys, values in read_arrays(folder, "*.npz", ("keys", "features")):
        found |= {key: row for key, row in zip(keys.tolist(), values, strict=True) if key in wanted}
    return found


def _write(folder: Path, keys: list[str], values: np.ndarray) -> None:
    write_arrays(folder / f"{keys[0]}.npz", keys=np.array(keys), features=values)


@torch.no_grad()
def layer_logits(layer: Any, features: np.ndarray) -> np.ndarray:
    """Return what a layer gives for features, both (n_battles, n_sequences, width) float32."""
    read = torch.from_numpy(features).to(layer.weight.device)
    return layer(read.flatten(0, 1)).view(*read.shape[:2], -1).cpu().numpy()
