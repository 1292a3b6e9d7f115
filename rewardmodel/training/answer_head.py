"""Rows of a language model's output layer -> the start of a joint head's last layer.

A joint sequence ends in a question whose answer is A, B, or tie. A head that starts from the output rows of the three
words begins with what the language model would answer, where one of zeros prefers no outcome.
"""

import logging
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rewardmodel.errors import InputError, plural
from rewardmodel.model.backbone import Backbone
from rewardmodel.model.loading import unwrap
from rewardmodel.model.weights import read_rows
from rewardmodel.objectives import Objective, Settings
from rewardmodel.training.head_fit import Examples, total_weight

logger = logging.getLogger(__name__)

ANSWERS = ("A", "B", "tie")
"""Words whose output rows the head starts from, in the order of the outcomes."""

CALIBRATION_BATTLES = 256
"""Battles that the scale and the offsets of the answers are fitted to."""

QUESTION_END = "Answer:"
"""How the text before the answer ends; a word's token depends on what it follows."""


def answer_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the id of the first token by which each of `ANSWERS` differs from the others, after the question.

    Raises:
        InputError: the tokenizer does not tell the answers apart by one token.
    """
    texts = [f"{QUESTION_END} {word}" for word in ANSWERS]
    sequences = tokenizer(texts, add_special_tokens=False).input_ids  # [[Answer, :, _A], [Answer, :, _B], ...]
    ids = next((tokens for tokens in zip(*sequences, strict=False) if len(set(tokens)) > 1), ())
    if len(set(ids)) < len(ANSWERS):
        raise InputError(
            "model.head_init: the tokenizer does not tell the answers A, B and tie apart by one token; set zero or "
            "fitted"
        )
    return list(ids)


def answer_rows(model: Any, tokenizer: PreTrainedTokenizerBase, backbone: Backbone) -> torch.Tensor:
    """Return the output rows of the three answers, (3, hidden size) float32.

    Raises:
        InputError: as `answer_tokens`, or the backbone has no output layer of a language model.
    """
    ids = answer_tokens(tokenizer)
    if backbone.config.get_text_config().tie_word_embeddings:
        return unwrap(model).get_input_embeddings().weight[ids].detach().float()
    rows = read_rows(backbone.folder, "lm_head.weight", ids)
    if rows is None:
        raise InputError(
            "model.head_init: the backbone's weight files have no output layer of a language model (lm_head.weight), "
            "whose rows the head could start from; set zero or fitted"
        )
    return rows.float()


def start_from_answers(
    layer: Any, rows: torch.Tensor, examples: Examples, objective: Objective, settings: Settings
) -> None:
    """Set the last layer of a joint head, in place, to the answers' output rows, scaled and shifted to fit battles.

    The logit of outcome k is s * w_k . h + b_k * (m . h) / (m . m), where w_k is its row, h the hidden state and m the
    mean of h over the battles: a head without a bias has an offset only in the direction of the mean. s and the three
    b_k minimise the loss, which is convex in them.

    Args:
        layer: of `model.heads`, on the device of the examples.
        rows: of `answer_rows`.
        examples: battles, of which `CALIBRATION_BATTLES` are drawn, with the inputs of the layer as features.
        objective: the loss.
        settings: the recipe's `objective` section.
    """
    drawn = np.zeros(len(examples.labels), bool)
    drawn[calibration_sample(len(drawn))] = True
    examples, rows = examples.select(drawn), rows.to(layer.weight.device)
    hidden = rows.shape[1]
    states = examples.features[..., :hidden]  # the state of the last token comes first in every pooling that has it
    mean = states.flatten(0, 1).mean(dim=0)
    direction = mean / mean.square().sum()

    opinions = states @ rows.T
    offsets = (states @ direction)[..., None]
    spread = opinions.std(dim=-1).mean()  # so that a scale of 1 is a first guess for any size of hidden states
    scale = torch.zeros(1, device=rows.device, requires_grad=True)
    shift = torch.zeros(len(ANSWERS), device=rows.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, shift], max_iter=100, line_search_fn="strong_wolfe")
    total = total_weight(examples, objective)

    def loss() -> torch.Tensor:
        logits = scale * opinions / spread + offsets * shift
        return (objective.battle_losses(logits, examples.labels, settings, examples.teacher) * examples.weight).sum()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        mean_loss = loss() / total
        mean_loss.backward()
        return mean_loss

    before = loss().item() / total
    optimizer.step(closure)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, :hidden] = scale / spread * rows + shift[:, None] * direction
        after = loss().item() / total
    words, count = ", ".join(ANSWERS), plural(len(examples.labels), "battle")
    logger.info(
        "the head starts from the backbone's answers %s: loss %.4f, not %.4f, on %s", words, after, before, count
    )


def calibration_sample(battles: int) -> np.ndarray:
    """Return the numbers of the battles that the answers are calibrated on, ascending."""
    drawn = np.random.default_rng(0).permutation(battles)[:CALIBRATION_BATTLES]
    return np.sort(drawn)
