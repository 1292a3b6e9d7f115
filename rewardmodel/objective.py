"""Logits and outcome probabilities in, a loss a battle and predicted probabilities out, for each objective.

An objective is one entry of `OBJECTIVES`: how wide the head is, its loss and its link.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Objective:
    """One way to learn from outcomes.

    Attributes:
        head_width: outputs of the classification head.
        loss: (logits (n, head_width) float32, outcomes (n, 3) float32, label_smoothing) -> (n,) loss a battle.
        probabilities: logits (n, head_width) -> (n, 3) float32: A, B, tie; rows sum to 1.
    """

    head_width: int
    loss: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    probabilities: Callable[[torch.Tensor], torch.Tensor]


def cross_entropy(logits: torch.Tensor, outcomes: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the cross-entropy of each battle in nats, (n,); outcomes may be soft."""
    return F.cross_entropy(logits, outcomes, reduction="none", label_smoothing=label_smoothing)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return probabilities (n, 3) float32 of joint logits (n, 3), finite for any finite logit."""
    return logits.float().softmax(dim=-1)


OBJECTIVES = {
    "cross_entropy": Objective(3, cross_entropy, softmax),
}
"""Objectives by the recipe's `objective.name`."""
