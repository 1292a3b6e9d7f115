r"""What a frozen backbone reads at several depths, in one pass, kept where a recipe of each depth looks for it.

    python scripts/read_depths.py train.csv more_arena.parquet --depths 12 16 20
    python scripts/read_depths.py train.csv more_arena.parquet --depths 8 12 16 \
        --keys model.model_name_or_path=qwen2.5-0.5b-instruct.gguf prompt.max_length=512

A backbone of 12 layers computes what the first 12 of 20 layers do, so that the deepest pass has all of them: hidden
states after each depth go through the backbone's last norm and the pooling, as those of a backbone cut there. Later
runs of `bench_quality.py` with `model.num_hidden_layers` of a depth find the features in the cache.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from out_of_fold import opened
from transformers.modeling_outputs import SequenceClassifierOutput

RECIPE = Path(__file__).parents[1] / "recipes" / "arena_small_cpu.yaml"


class ReadAtDepths(torch.nn.Module):
    """A decoder classifier whose logits are what heads at several depths would read, (n, depths * width) float32."""

    def __init__(self, model: Any, depths: list[int]) -> None:
        super().__init__()
        self.model, self.depths, self.config = model, depths, model.config

    def forward(self, **batch: Any) -> SequenceClassifierOutput:
        """Return the features of the sequences of a batch."""
        from rewardmodel.model.heads import POOLINGS
        from rewardmodel.model.loading import unwrap

        plain, states = unwrap(self.model), {}

        def keep(depth: int) -> Any:
            return lambda _, __, out: states.update({depth: out[0] if isinstance(out, tuple) else out})

        decoder = getattr(plain, plain.base_model_prefix)
        handles = [decoder.layers[depth - 1].register_forward_hook(keep(depth)) for depth in self.depths]
        try:
            self.model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        indices = tuple(batch[name] for name in ("last", "responses", "response_of"))
        pooled = [POOLINGS[plain.pooling](decoder.norm(states[depth]).flatten(0, 1), *indices) for depth in self.depths]
        width = plain.get_submodule(plain.last_layer).in_features
        return SequenceClassifierOutput(logits=torch.cat([part[:, :width] for part in pooled], dim=1).float())


def read_depths(recipe: Any, battles: Any, depths: list[int]) -> int:
    """Write features of battles at several depths into the cache of each; return how many battles were read."""
    from rewardmodel.files import read_arrays, write_arrays
    from rewardmodel.model.backbone import resolve_backbone
    from rewardmodel.model.features import TOKENS_PER_FILE, row_keys
    from rewardmodel.model.forward import split_by_tokens
    from rewardmodel.progress import Progress

    models = [replace(recipe.model, num_hidden_layers=depth, pooling="last_and_responses") for depth in depths]
    caches = [resolve_backbone(model).feature_cache for model in models]
    predictor, rows = opened(replace(recipe, model=models[depths.index(max(depths))]), battles)
    reader = replace(predictor, model=ReadAtDepths(predictor.model, depths).eval())

    keys = row_keys(rows)
    held = [{key for (part,) in read_arrays(cache, "*.npz", ("keys",)) for key in part} for cache in caches]
    missing = np.array([row for row, key in enumerate(keys) if not all(key in found for found in held)], dtype=int)
    if not len(missing):
        return 0
    todo = rows.select(missing)
    costs = np.array(predictor.batching.costs(todo))
    order = np.random.default_rng(0).permutation(len(missing))
    with Progress(len(missing), "reading features", show=True) as progress:
        for part in split_by_tokens(costs, order, TOKENS_PER_FILE):
            names = [keys[row] for row in missing[part]]
            values = reader.logits(todo.select(part), on_batch=progress.update)
            for cache, features in zip(caches, np.split(values, len(depths), axis=2), strict=True):
                write_arrays(cache / f"{names[0]}.npz", keys=np.array(names), features=features)
    return len(missing)


def main() -> None:
    """Parse, read."""
    from rewardmodel import load_recipe
    from rewardmodel.config.schema import DataConfig, Source
    from rewardmodel.data.splits import load_battles

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("battles", nargs="+", help="labelled battles")
    parser.add_argument("--depths", type=int, nargs="+", required=True, help="numbers of layers")
    parser.add_argument("--keys", nargs="*", default=[], metavar="KEY=VALUE", help="of arena_small_cpu.yaml, changed")
    options = parser.parse_args()
    recipe = load_recipe(RECIPE, [f"--{word}" for word in options.keys])
    battles = load_battles(DataConfig(train=[Source(path) for path in options.battles]))
    read = read_depths(recipe, battles, sorted(options.depths))
    print(json.dumps({"battles": len(battles), "read": read, "depths": sorted(options.depths)}))


if __name__ == "__main__":
    main()
