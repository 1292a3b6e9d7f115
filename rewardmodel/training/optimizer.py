"""An optimiser's parameter groups in, the same by learning rate out: the head's own, and LoRA+."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Rates(NamedTuple):
    """Learning rates beside `trainer.learning_rate`.

    Attributes:
        head: of the classification head; none: as everything.
        loraplus_lr_ratio: how many times as fast LoRA's B learns as its A (LoRA+, Hayou, Ghosh & Yu 2024).
    """

    head: float | None = None
    loraplus_lr_ratio: float | None = None

    def of(self, model: torch.nn.Module, heads: list[str], learning_rate: float) -> dict[torch.nn.Parameter, float]:
        """Return the rate of each weight that has one of its own; `heads` are the names of the head's modules."""
        found = {}
        for name, weight in model.named_parameters():
            if self.head is not None and any(f".{head}." in f".{name}" for head in heads):
                found[weight] = self.head
            elif self.loraplus_lr_ratio is not None and ".lora_B." in name:
                found[weight] = self.loraplus_lr_ratio * learning_rate
        return found


EVEN = Rates()
"""Everything learns at `trainer.learning_rate`."""


def split_groups(groups: list[dict[str, Any]], rates: Mapping[torch.nn.Parameter, float]) -> list[dict[str, Any]]:
    """Return an optimiser's parameter groups, those apart whose weights have a rate of their own."""
    result = []
    for group in groups:
        by_rate: dict[float, list[torch.nn.Parameter]] = {}
        for weight in group["params"]:
            by_rate.setdefault(rates.get(weight, group["lr"]), []).append(weight)
        result += [{**group, "params": weights, "lr": rate} for rate, weights in by_rate.items()]
    return result
