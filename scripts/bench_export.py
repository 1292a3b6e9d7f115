"""Time and memory of merging an adapter into a backbone of Llama-3.2-1B's shape with random weights, on the CPU.

    python scripts/bench_export.py --json scripts/results/export.json

Each merge runs in a separate process. Memory is the peak of anonymous pages (what the process itself allocates) minus
those after the imports; `beyond_gib` is that minus the largest tensor in float32 and the largest output shard. Pages of
the memory-mapped input files are not counted. Takes about 10 GB of disk.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench_battles import Memory, answer, measured, tell

SHAPE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
"""Configuration of the backbone."""

RUNS = {"4-bit": {"load_in_4bit": True}, "8-bit": {"load_in_8bit": True}, "16-bit": {}}
"""The recipe's quantisation of each run."""

RANK = 16


def make_backbone(folder: Path) -> None:
    """Write the backbone in bfloat16, a tensor at a time, and its tokenizer."""
    import torch
    from bench_models import unlettered_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    from rewardmodel.exports.weight_files import write_shards

    config = AutoConfig.for_model(**SHAPE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]

    def drawn() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in model.named_parameters():
            yield name, torch.randn(weight.shape, dtype=torch.bfloat16) * 0.02

    folder.mkdir()
    write_shards(drawn(), folder, 10**12)
    config.save_pretrained(folder)
    unlettered_tokenizer().save_pretrained(folder)


def make_run(folder: Path, backbone: Path, how: str) -> None:
    """Write a run as training leaves it: recipe, environment, and an adapter of random weights on all linear layers."""
    import torch
    from bench_models import LORA, unlettered_tokenizer
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from rewardmodel.config.loader import dump_recipe
    from rewardmodel.config.schema import ModelConfig, Recipe
    from rewardmodel.model.weights import fingerprint

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE))
    weights = {"base_model.model.score.weight": torch.randn(3, SHAPE["hidden_size"])}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LORA["target_modules"]:
            weights[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, module.in_features) * 0.02
            weights[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, RANK) * 0.02
    (folder / "model").mkdir(parents=True)
    save_file(weights, folder / "model" / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **LORA).save_pretrained(folder / "model")
    unlettered_tokenizer().save_pretrained(folder / "model")
    about = {
        "model_name_or_path": str(backbone),
        "model_revision": "main",
        "fingerprint": fingerprint(backbone),
        "head": {"num_labels": 3, "responses": 2, "tie": False},
    }
    (folder / "model" / "backbone.json").write_text(json.dumps(about))
    (folder / "environment.json").write_text(json.dumps({"compute": {"dtype": "bfloat16"}}))
    recipe = Recipe(model=ModelConfig(str(backbone), device="cpu", **RUNS[how]))
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))


def merge_one(run: str, how: str, target: str) -> dict:
    """Merge a run and return seconds and memory."""
    import torch

    from rewardmodel.exports.checks import load_trained_run
    from rewardmodel.exports.merge import merge_run

    loaded = load_trained_run(Path(run))
    begin, memory, start = anonymous_gib(), Memory(), time.perf_counter()
    merge_run(loaded, Path(target), torch.bfloat16)
    seconds = time.perf_counter() - start
    largest = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 4 / 2**30
    shards = [file.stat().st_size for file in Path(target).glob("*.safetensors")]
    peak = memory.anonymous - begin
    return {
        "seconds": round(seconds, 1),
        "written_gib": round(sum(shards) / 2**30, 2),
        "largest_tensor_float32_gib": round(largest, 2),
        "largest_shard_gib": round(max(shards) / 2**30, 2),
        "peak_gib": round(peak, 2),
        "beyond_gib": round(peak - largest - max(shards) / 2**30, 2),
    }


def anonymous_gib() -> float:
    """Return the anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def main() -> None:
    """Make the backbone and the runs, merge each in a separate process, write JSON."""
    if answer({"merge": merge_one}):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    figures: dict = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "merge": {}}
    with tempfile.TemporaryDirectory() as work:
        backbone = Path(work) / "backbone"
        make_backbone(backbone)
        for how in RUNS:
            run, target = Path(work) / f"run-{how}", Path(work) / f"merged-{how}"
            make_run(run, backbone, how)
            figures["merge"][how] = measured(__file__, "merge", str(run), how, str(target))
    tell(figures, options.json)


if __name__ == "__main__":
    main()
