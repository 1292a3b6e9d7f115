"""Head outputs and outcome probabilities in, a loss a battle and predicted probabilities out, for each objective.

An objective is one entry of `OBJECTIVES`. Its link turns head outputs into three log-weights, of A, B and a tie, whose
softmax is what the model states; its loss says how that is learnt. Outputs are joint, (n, 3), the log-weights
themselves, or separate, (n, 2, 2): response A, response B; each its reward and the tie parameter t of the battle. d is
the reward of A less that of B. Half precision is computed in float32, float64 stays float64, and everything is finite
up to |d| = 1e4 at least.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from rewardmodel.errors import InputError, nearest

ORDER_COLUMNS = ([0, 1, 2], [1, 0, 2])
"""Outcomes of the sequence that shows A first, and of the one that shows B first, in the words of the other."""


class Settings(Protocol):
    """What losses read of the recipe's `objective` section, where the fields are documented."""

    label_smoothing: float
    margin: float
    center_rewards: float
    temperature: float
    weight_votes: float
    weight_teacher: float
    weight_cosine: float


class HeadShape(NamedTuple):
    """What a classification head reads and states.

    Attributes:
        num_labels: outputs for a sequence: 3 outcomes, or 1 reward.
        responses: how many of them are in a sequence.
        tie: whether it carries the tie parameter besides.
        pairs: whether that depends on both responses of a battle, and is no mere number.
    """

    num_labels: int
    responses: int
    tie: bool
    pairs: bool = False


@dataclass(frozen=True)
class Objective:
    """One way to learn from outcomes.

    Attributes:
        encoding: whether a sequence holds both responses ("joint") or one of them ("separate").
        head: its shape; start a tie parameter at `initial_tie`.
        loss: (outputs, outcomes (n, 3) of A, B, tie, settings, teacher (n, 3) or None) -> (n,) loss of each battle in
            nats; float32 or float64.
        link: head outputs, float32 or float64 -> (n, 3) log-weights of A, B, tie.
        settings: fields of `Settings` that the loss reads.
        teacher: whether the loss reads a teacher's probabilities.
        learns_ties: whether the loss reads ties. If not, it leaves the tie parameter alone: freeze it, and set it to
            `fit_tie` after training.
    """

    encoding: Literal["joint", "separate"]
    head: HeadShape
    loss: Callable[..., Tensor]
    link: Callable[[Tensor], Tensor]
    settings: tuple[str, ...]
    teacher: bool = False
    learns_ties: bool = True

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return probabilities (n, 3) float32 of A, B, tie; rows sum to 1."""
        return self.link(_floats(outputs)).softmax(dim=-1).float()

    def probabilities_by_order(self, logits: Tensor) -> list[Tensor]:
        """Return the probabilities, (n, 3) of A, B, tie, that each order states, A shown first before B shown first.

        Logits are those of the sequences of battles, (n, n_sequences, width). Separate objectives know no order.
        """
        if self.encoding == "separate":
            return [self.probabilities(logits)]
        return [
            self.probabilities(logits[:, number])[:, order]
            for number, order in enumerate(ORDER_COLUMNS[: logits.shape[1]])
        ]

    def battle_losses(
        self, logits: Tensor, labels: Tensor, settings: Settings, teacher: Tensor | None = None
    ) -> Tensor:
        """Return the loss of each battle, (n,), of the logits of its sequences, (n, n_sequences, width).

        Of several orders it is the mean. Labels and the teacher's probabilities are (n, 3) of A, B, tie.
        """
        if self.encoding == "separate":
            return self.loss(logits, labels, settings, teacher)
        losses = []
        for number, order in enumerate(ORDER_COLUMNS[: logits.shape[1]]):
            taught = None if teacher is None else teacher[:, order]
            losses.append(self.loss(logits[:, number], labels[:, order], settings, taught))
        return torch.stack(losses).mean(dim=0)

    def denominators(self, outcomes: Tensor) -> Tensor:
        """Return what each battle adds to the denominator of a mean loss, (n,): 1, or its decided part."""
        return torch.ones_like(outcomes[:, 0]) if self.learns_ties else outcomes[:, :2].sum(dim=1)


def joint_link(logits: Tensor) -> Tensor:
    """Return the log-weights that a joint head states, (n, 3): its logits."""
    return logits


def rao_kupper_link(outputs: Tensor) -> Tensor:
    """Return log-probabilities (n, 3) of outputs (n, 2, 2) (Rao & Kupper 1967).

    P(A) = sigmoid(d - eta), P(B) = sigmoid(-d - eta), P(tie) = (theta^2 - 1) P(A) P(B), which is the rest. As theta =
    exp(eta) = 1 + exp(t), any t will do, eta = softplus(t), and theta^2 - 1 = exp(t) (2 + exp(t)) cancels nothing.
    """
    lead, tie = _lead_and_tie(outputs)
    threshold = -F.logsigmoid(-tie)
    a, b = F.logsigmoid(lead - threshold), F.logsigmoid(-lead - threshold)
    return torch.stack([a, b, a + b + tie + torch.logaddexp(tie, torch.full_like(tie, math.log(2)))], dim=-1)


def davidson_link(outputs: Tensor) -> Tensor:
    """Return log-weights (n, 3) of outputs (n, 2, 2): d/2, -d/2, t (Davidson 1970, with nu = exp(t))."""
    lead, tie = _lead_and_tie(outputs)
    return torch.stack([lead / 2, -lead / 2, tie], dim=-1)


def cross_entropy(outputs: Tensor, outcomes: Tensor, settings: Settings, teacher: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of joint logits with the outcomes."""
    logits = _floats(outputs)
    return F.cross_entropy(logits, outcomes.to(logits), reduction="none", label_smoothing=settings.label_smoothing)


def distillation(outputs: Tensor, outcomes: Tensor, settings: Settings, teacher: Tensor | None = None) -> Tensor:
    """Return how far joint logits are from the votes and from a teacher.

    weight_votes * cross-entropy + weight_teacher * T^2 * KL(teacher || student), both at temperature T, as T^2 keeps
    the gradient's size (Hinton, Vinyals & Dean 2015), + weight_cosine * (1 - cosine of the two at temperature 1). A
    battle whose row of `teacher` holds NaN has the votes' term alone, one whose outcomes do has the teacher's alone.
    """
    logits, temperature = _floats(outputs), settings.temperature
    votes, voted = _known(outcomes.to(logits))
    losses = settings.weight_votes * cross_entropy(logits, votes, settings) * voted
    if teacher is None:
        return losses
    taught_by, taught = _known(teacher.to(logits))
    soft = (taught_by.log() / temperature).softmax(dim=-1)
    divergence = F.kl_div((logits / temperature).log_softmax(dim=-1), soft, reduction="none").sum(dim=-1)
    cosine = F.cosine_similarity(logits.softmax(dim=-1), taught_by, dim=-1)
    lesson = settings.weight_teacher * temperature**2 * divergence + settings.weight_cosine * (1 - cosine)
    return losses + lesson * taught


def rao_kupper(outputs: Tensor, outcomes: Tensor, settings: Settings, teacher: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of Rao & Kupper's probabilities with the outcomes, centred."""
    outputs = _floats(outputs)
    return cross_entropy(rao_kupper_link(outputs), outcomes, settings) + _centring(outputs, settings)


def davidson(outputs: Tensor, outcomes: Tensor, settings: Settings, teacher: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of Davidson's probabilities with the outcomes, centred."""
    outputs = _floats(outputs)
    return cross_entropy(davidson_link(outputs), outcomes, settings) + _centring(outputs, settings)


def bradley_terry(outputs: Tensor, outcomes: Tensor, settings: Settings, teacher: Tensor | None = None) -> Tensor:
    """Return -log sigmoid(d - margin) for A, of -d for B, by their outcomes (Bradley & Terry 1952).

    Its link is Davidson's, at which P(A) / P(B) stays exp(d), as it was learnt.

    The margin is that of Llama 2 (Touvron et al. 2023, eq. 2), the same for all battles. Only here: Rao & Kupper's
    threshold is such a margin already, a learnt one that makes room for ties. A tie's loss is 0; smoothing is over A
    and B. Everything is times the decided part of the outcome, centring too.
    """
    outputs = _floats(outputs)
    lead, _ = _lead_and_tie(outputs)
    votes = outcomes.to(outputs)[:, :2]
    decided = votes.sum(dim=1)
    targets = torch.lerp(votes, decided[:, None] / 2, settings.label_smoothing)
    logs = F.logsigmoid(torch.stack([lead, -lead], dim=-1) - settings.margin)
    return -(targets * logs).sum(dim=-1) + _centring(outputs, settings) * decided


JOINT_HEAD, SEPARATE_HEAD = HeadShape(3, 2, tie=False), HeadShape(1, 1, tie=True)

OBJECTIVES = {
    "cross_entropy": Objective("joint", JOINT_HEAD, cross_entropy, joint_link, ("label_smoothing",)),
    "distillation": Objective(
        "joint", JOINT_HEAD, distillation, joint_link,
        ("label_smoothing", "temperature", "weight_votes", "weight_teacher", "weight_cosine"), teacher=True,
    ),
    "rao_kupper": Objective(
        "separate", SEPARATE_HEAD, rao_kupper, rao_kupper_link, ("label_smoothing", "center_rewards")
    ),
    "davidson": Objective("separate", SEPARATE_HEAD, davidson, davidson_link, ("label_smoothing", "center_rewards")),
    "bradley_terry": Objective(
        "separate", SEPARATE_HEAD, bradley_terry, davidson_link, ("label_smoothing", "margin", "center_rewards"),
        learns_ties=False,
    ),
}  # fmt: skip
"""Objectives by the recipe's `objective.name`."""

RANGES = dict.fromkeys(Settings.__annotations__, (0.0, math.inf))
RANGES |= {"label_smoothing": (0.0, 1.0), "temperature": (0.01, math.inf)}
"""The least value of each setting, and what it stays below."""


def find_objective(config: Any) -> Objective:
    """Return the objective that the recipe's `objective` section asks for, a dataclass with a `name` and `Settings`.

    Raises:
        InputError: an unknown name, a setting out of its range, or one that is set and that this objective never reads.
    """
    name = config.name
    if name not in OBJECTIVES:
        raise InputError(f"objective.name: no objective '{name}'{nearest(name, OBJECTIVES)}")
    defaults = {field.name: field.default for field in fields(config) if field.name in RANGES}
    for key, default in defaults.items():
        value, (least, below) = getattr(config, key), RANGES[key]
        if not least <= value < below:
            raise InputError(f"objective.{key}: {value}; give at least {least} and less than {below}")
        readers = [reader for reader, objective in OBJECTIVES.items() if key in objective.settings]
        if value != default and name not in readers:
            raise InputError(f"objective.{key}: only for {' and '.join(readers)}; leave it out with {name}")
    return OBJECTIVES[name]


def initial_tie(share: float) -> float:
    """Return the tie parameter at which equal rewards give P(tie) = share: log(2 share / (1 - share)), for either link.

    At d = 0, Rao & Kupper's is tanh(eta / 2), Davidson's nu / (2 + nu). Shares are clipped to 1e-4 and 1 - 1e-4.

    Raises:
        InputError: `share` is not within 0 and 1.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share of ties: {share}; give one from 0 to 1")
    share = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(2 * share / (1 - share))


def fit_tie(
    rewards: np.ndarray, outcomes: np.ndarray, link: Callable[[Tensor], Tensor] = OBJECTIVES["bradley_terry"].link
) -> float:
    """Return the tie parameter with the least log loss at given rewards.

    It is convex in eta (Davidson: in t), so bounded search finds the least. Without a tie that is the lower bound,
    `initial_tie(0)`; with ties alone, a finite value at which each is almost sure.

    Args:
        rewards: (n, 2) of response A, response B, finite.
        outcomes: (n, 3) probabilities of A, B, tie.
        link: of the objective.

    Raises:
        InputError: no battles, other shapes, or values that are not finite.
    """
    values, true = (torch.from_numpy(np.asarray(array, dtype=np.float64)) for array in (rewards, outcomes))
    shapes = tuple(values.shape), tuple(true.shape)
    if not values.numel() or shapes != ((len(values), 2), (len(values), 3)):
        raise InputError(f"rewards and outcomes of shapes {shapes}: give (n, 2) and (n, 3) of the same battles")
    if not (values.isfinite().all() and true.isfinite().all()):
        raise InputError("rewards or outcomes: not all are finite; leave battles without either out")

    def log_loss(tie: float) -> float:
        outputs = torch.stack([values, torch.full_like(values, tie)], dim=-1)
        return F.cross_entropy(link(outputs), true).item()

    bounds = (initial_tie(0), initial_tie(1) + values.diff().abs().max().item())
    return float(minimize_scalar(log_loss, bounds=bounds, method="bounded").x)


def _floats(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _lead_and_tie(outputs: Tensor) -> tuple[Tensor, Tensor]:
    return outputs[:, 0, 0] - outputs[:, 1, 0], outputs[..., 1].mean(dim=1)


def _centring(outputs: Tensor, settings: Settings) -> Tensor:
    """Return center_rewards times the squared sum of a battle's rewards, (n,) (Eisenstein et al. 2023)."""
    return settings.center_rewards * outputs[..., 0].sum(dim=1) ** 2


def _known(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows with any that holds NaN made even, so that no gradient is NaN, and whether a row is known."""
    known = ~probabilities.isnan().any(dim=-1)
    return probabilities.where(known[:, None], torch.full_like(probabilities, 1 / 3)), known
