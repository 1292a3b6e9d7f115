"""What bench_quality.py changes of a recipe, one lever at a time, by name.

Keys of the recipe, or one of `others`, `consistency`, `bags`, `beside`.

`others` is the weight of the battles that only train, which are left out else; `consistency` the weight of the squared
difference between what a joint model predicts of a battle in both orders, in the loss; `bags` the number of heads, each
fitted to prompt groups that are drawn with replacement, whose predictions are averaged; `beside` another number of
layers, whose features the head reads next to those of the recipe.
"""

from typing import Any

JOINT = {
    "objective.name": "cross_entropy",
    "model.pair_ties": False,
    "prompt.max_length": 512,
    "data.swap_augmentation": "both",
}
"""Both responses in one sequence: of 512 tokens, about what "256 tokens" leaves of a battle."""

GEMMA = {"model.model_name_or_path": "gemma3-270m", "prompt.template": "response", "prompt.max_length": 256}

LEVERS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "one tie parameter": {"model.pair_ties": False},
    "last token alone": {"model.pooling": "last"},
    "means alone": {"model.pooling": "responses"},
    "Rao-Kupper": {"objective.name": "rao_kupper"},
    "Bradley-Terry, ties fitted after": {"objective.name": "bradley_terry", "model.pair_ties": False},
    "label smoothing 0.05": {"objective.label_smoothing": 0.05},
    "5 heads averaged": {"bags": 5},
    "other sources": {"others": 1.0},
    "other sources, weight 0.3": {"others": 0.3},
    "other sources, weight 0.1": {"others": 0.1},
}
"""Changes of recipes/arena_small_cpu.yaml that leave what the backbone reads as it is, and that it is read."""

READ: dict[str, dict[str, Any]] = {
    "256 tokens": {"prompt.max_length": 256},
    "1024 tokens": {"prompt.max_length": 1024},
    "2048 tokens": {"prompt.max_length": 2048},
    "layer 12": {"model.num_hidden_layers": 12},
    "layer 16": {"model.num_hidden_layers": 16},
    "layer 24": {"model.num_hidden_layers": 24},
    "layer 30": {"model.num_hidden_layers": 30},
    "layers 12 and 20": {"beside": 12},
    "layers 20 and 30": {"beside": 30},
    "Gemma-3-270M, 256 tokens, layer 9": {**GEMMA, "model.num_hidden_layers": 9},
    "Gemma-3-270M, 256 tokens, layer 18": {**GEMMA, "model.num_hidden_layers": 18},
    "Gemma-3-270M, 256 tokens, layers 9 and 18": {**GEMMA, "model.num_hidden_layers": 9, "beside": 18},
    "joint, both orders": JOINT,
    "joint, an order by a coin": {**JOINT, "data.swap_augmentation": "random"},
    "joint, as given": {**JOINT, "data.swap_augmentation": "none"},
    "joint, both orders, consistency 1": {**JOINT, "consistency": 1.0},
}
"""Changes for which the backbone reads all battles again; asked for by --read."""

LORA: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, head from zero at 20 times LoRA's rate": {
        "model.head_init": "zero",
        "trainer.head_learning_rate": 1.0e-3,
    },
    "LoRA, one epoch": {"trainer.num_train_epochs": 1},
    "LoRA, four times the rate": {"trainer.learning_rate": 2.0e-4},
    "LoRA, rank 64": {"model.lora_r": 64, "model.lora_alpha": 128},
    "LoRA, other sources, weight 0.1": {"others": 0.1},
}
"""Changes of recipes/arena_small_gpu.yaml; asked for by --lora, and trained again for each fold."""

AVERAGES: dict[str, tuple[str, ...]] = {
    "layers 16 and 20 averaged": ("recipe", "layer 16"),
    "layers 12, 16 and 20 averaged": ("recipe", "layer 12", "layer 16"),
    "the recipe and Gemma's layer 9 averaged": ("recipe", "Gemma-3-270M, 256 tokens, layer 9"),
    "the recipe and the joint model averaged": ("recipe", "joint, both orders"),
}
"""Means of the predictions of several levers, as `predict RUN1 RUN2` has them; measured where all of them are."""

ENCODER: dict[str, dict[str, Any]] = {
    "MiniLM, all weights": {},
    "MiniLM, LoRA": {"model.use_peft": True, "trainer.learning_rate": 5e-4},
}
"""Changes of recipes/seeds/minilm_l6.yaml, an encoder that is trained; asked for by --encoder."""
