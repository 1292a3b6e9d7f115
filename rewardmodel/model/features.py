"""A classifier and rows -> what the last layer of its head reads, cached battle by battle.

A feature is identified by the backbone, the settings that it depends on, and the tokens of the row: other folds,
objectives or data sources with the same battles find it in the cache, and an interrupted pass continues.
"""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.modeling_outputs import SequenceClassifierOutput

from rewardmodel.distributed import common_to_all, from_main, is_main, process_state
from rewardmodel.files import read_arrays, write_arrays
from rewardmodel.model.forward import Predictor, check_finite, split_by_tokens
from rewardmodel.model.heads import head_names
from rewardmodel.model.loading import trained_layer, unwrap
from rewardmodel.progress import Progress

logger = logging.getLogger(__name__)

TOKENS_PER_FILE, FIRST_TOKENS = 2**17, 2**13
"""About how many tokens each process computes before the next file of the cache is written, and before the first."""


class LastLayerInput(torch.nn.Module):
    """A classifier whose forward pass returns the input of one of its layers, (n, width) float32, as logits."""

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


def read_features(predictor: Predictor, rows: Dataset) -> np.ndarray:
    """Return what the head's last layer reads of each sequence of rows, (n_rows, n_sequences, width) float32.

    Args:
        predictor: with a `feature_cache`: features that it holds are read from there, the others are written to it.
        rows: of `prompt.tokenization.TOKEN_ROW_FEATURES`, all with the same number of sequences.

    Raises:
        FloatingPointError: features that are NaN or infinite; that part is not written.
    """
    layer = trained_layer(predictor.model)
    keys, folder = row_keys(rows), _feature_folder(predictor, layer)

    # features that the cache holds
    found = _read_by_all(folder, set(keys))
    missing = np.array([number for number, key in enumerate(keys) if key not in found], dtype=np.int64)
    if len(missing) < len(keys):
        logger.info("features of %d of %d battles are in %s", len(keys) - len(missing), len(keys), folder)

    # the others are computed in parts, each written to a file
    if len(missing):
        reader = replace(predictor, model=LastLayerInput(predictor.model, layer).eval())
        todo = rows.select(missing)
        reader = replace(reader, budget=reader.find_budget(todo))
        costs = np.array(reader.batching.costs(todo))
        order = np.random.default_rng(0).permutation(len(missing))  # rows of mixed lengths fill batches best
        with Progress(len(missing), "reading features", show=is_main()) as progress:
            done = 0
            processes = process_state().num_processes
            for part in split_by_tokens(costs, order, TOKENS_PER_FILE * processes, FIRST_TOKENS * processes):
                part_rows, names = todo.select(part), [keys[number] for number in missing[part]]
                values = reader.logits(part_rows, on_batch=progress.update)
                check_finite(values, part_rows["id"], "NaN or infinite features of {}")
                if is_main():
                    write_arrays(folder / f"{names[0]}.npz", keys=np.array(names), features=values)
                found |= dict(zip(names, values, strict=True))
                done += len(part)
                progress.move_to(done)  # including rows of other processes
    return np.stack([found[key] for key in keys])


@torch.no_grad()
def layer_logits(layer: Any, features: np.ndarray) -> np.ndarray:
    """Return the outputs of a layer, (n_battles, n_sequences, n_logits) float32, of features (..., width) float32."""
    inputs = torch.from_numpy(features).to(layer.weight.device)
    return layer(inputs.flatten(0, 1)).view(*inputs.shape[:2], -1).cpu().numpy()


def _feature_folder(predictor: Predictor, layer: torch.nn.Module) -> Path:
    """Return the cache folder of the features that a layer of the head reads.

    If the head has layers below it, which may be initialised at random, it is a sub-folder named by their weights.
    """
    if predictor.feature_cache is None:
        raise ValueError("a predictor without a feature_cache reads no features; load it with one")
    plain = unwrap(predictor.model)
    own = {id(weight) for weight in layer.parameters()}
    below = {
        f"{head}.{name}": weight
        for head in head_names(plain)
        for name, weight in plain.get_submodule(head).named_parameters()
        if id(weight) not in own and not name.startswith("original_module.")  # PEFT's copy from before training
    }
    if not below:
        return predictor.feature_cache
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(below):
        digest.update(name.encode() + below[name].detach().float().cpu().numpy().tobytes())
    return predictor.feature_cache / digest.hexdigest()


def row_keys(rows: Dataset) -> list[str]:
    """Return the key of each row's features in the cache: a digest of its tokens, segments and branches."""
    keys = []
    for batch in rows.with_format(None).select_columns(["input_ids", "segment_ids", "branches"]).iter(batch_size=1000):
        for parts in zip(*batch.values(), strict=True):
            digest = hashlib.blake2b(digest_size=16)
            for part in parts:
                digest.update(np.asarray([len(part), *part], dtype=np.int32).tobytes())
            keys.append(digest.hexdigest())
    return keys


def _read_by_all(folder: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Return in every process, by key, the features that the main process finds in its cache.

    The main process sends those that another process lacks. Of those that all have, each keeps its own: the caches of
    several machines may differ in the last digits.
    """
    found = _read_cache(folder, wanted)
    shared = common_to_all(set(found))
    sent = from_main(lambda: {key: row for key, row in found.items() if key not in shared})
    return {key: found[key] for key in shared} | sent


def _read_cache(folder: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for keys, values in read_arrays(folder, "*.npz", ("keys", "features")):
        found |= {key: row for key, row in zip(keys.tolist(), values, strict=True) if key in wanted}
    return found
