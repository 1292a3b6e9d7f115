"""Objectives: what a head's outputs mean (the link), and how they are learnt from outcomes (the loss).

Each entry of `OBJECTIVES` has a link, which turns head outputs into log-weights of A, B and tie, whose softmax is the
prediction, and a loss per battle. Two kinds of head outputs:
- joint, (n, 3): the log-weights themselves, from one sequence with both responses;
- separate, (n, 2, 2): for response A and response B, each (reward, tie parameter t of the battle).
Below, d is the reward of A minus the reward of B. Half precision is computed in float32, float64 stays float64, and
losses, gradients and probabilities are finite at least up to |d| = 1e4.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from rewardmodel.errors import InputError, nearest

ORDER_COLUMNS = ([0, 1, 2], [1, 0, 2])
"""Outcome columns for the sequence that shows A first, and for the one that shows B first. Where B is first, "A wins"
is the second column of the head's outputs: `outputs[:, ORDER_COLUMNS[1]]` has the battle's own A, B, tie."""


class Settings(Protocol):
    """The fields of the recipe's `objective` section that losses read; documented in `config.schema`."""

    label_smoothing: float
    margin: float
    center_rewards: float
    temperature: float
    weight_votes: float
    weight_teacher: float
    weight_cosine: float


class HeadShape(NamedTuple):
    """The outputs of a classification head.

    Attributes:
        num_labels: outputs per sequence: 3 outcomes, or 1 reward.
        responses: responses per sequence.
        tie: whether the head also outputs the tie parameter.
        pairs: whether the tie parameter is computed from both responses of a battle, instead of being one number.
    """

    num_labels: int
    responses: int
    tie: bool
    pairs: bool = False


@dataclass(frozen=True)
class Objective:
    """One way to learn from outcomes.

    Attributes:
        encoding: whether a sequence has both responses ("joint") or one of them ("separate").
        head: the head's outputs; initialise a tie parameter with `initial_tie`.
        loss: (outputs, outcomes (n, 3) of A, B, tie, settings, teacher (n, 3) or None) -> (n,) loss of each battle in
            nats; float32 or float64.
        link: head outputs, float32 or float64 -> (n, 3) log-weights of A, B, tie.
        settings: fields of `Settings` that the loss reads.
        teacher: whether the loss reads a teacher's probabilities.
        learns_ties: whether the loss depends on ties. If not, the tie parameter has no gradient: freeze it, and set it
            to `fit_tie` after training.
    """

    encoding: Literal["joint", "separate"]
    head: HeadShape
    loss: Callable[..., Tensor]
    link: Callable[[Tensor], Tensor]
    settings: tuple[str, ...]
    teacher: bool = False
    learns_ties: bool = True

    @property
    def mixes_teacher(self) -> bool:
        """Whether votes and teacher of a battle are mixed into one outcome before training, by `MIXING`."""
        return self.encoding == "separate"

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return probabilities (n, 3) float32 of A, B, tie; rows sum to 1."""
        return self.link(_floats(outputs)).softmax(dim=-1).float()

    def probabilities_by_order(self, logits: Tensor) -> list[Tensor]:
        """Return the predictions of each order of the responses, (n, 3) of the battle's own A, B, tie each.

        Args:
            logits: (n, n_sequences, width) of the sequences of each battle; in joint encoding first the one that shows
                A first, then, if there are two, the one that shows B first.

        Returns:
            One array per order; separate encoding has no order, so one array.
        """
        if self.encoding == "separate":
            return [self.probabilities(logits)]
        return [
            in_order(self.probabilities(logits[:, number]), order)
            for number, order in enumerate(ORDER_COLUMNS[: logits.shape[1]])
        ]

    def battle_losses(
        self, logits: Tensor, labels: Tensor, settings: Settings, teacher: Tensor | None = None
    ) -> Tensor:
        """Return the loss of each battle, (n,); with both orders, the mean of their losses.

        Args:
            logits: (n, n_sequences, width), as for `probabilities_by_order`.
            labels: (n, 3) probabilities of A, B, tie.
            settings: the recipe's `objective` section.
            teacher: (n, 3) probabilities of A, B, tie, NaN where unknown, or None.
        """
        if self.encoding == "separate":
            return self.loss(logits, labels, settings, teacher)
        losses = []
        for number, order in enumerate(ORDER_COLUMNS[: logits.shape[1]]):
            soft = None if teacher is None else in_order(teacher, order)
            losses.append(self.loss(logits[:, number], in_order(labels, order), settings, soft))
        return torch.stack(losses).mean(dim=0)

    def denominators(self, outcomes: Tensor) -> Tensor:
        """Return each battle's share in the denominator of the mean loss, (n,): 1, or P(A wins) + P(B wins)."""
        return torch.ones_like(outcomes[:, 0]) if self.learns_ties else outcomes[:, :2].sum(dim=1)


def in_order(values: Tensor, order: Sequence[int]) -> Tensor:
    """Return `values[:, order]`, (n, len(order)), without sending the order to a GPU, which would be waited for."""
    return torch.stack([values[:, column] for column in order], dim=1)


def joint_link(logits: Tensor) -> Tensor:
    """Return the log-weights of joint outputs, (n, 3): the logits themselves."""
    return logits


def rao_kupper_link(outputs: Tensor) -> Tensor:
    """Return log-probabilities (n, 3) of separate outputs (n, 2, 2) (Rao & Kupper 1967).

    P(A) = sigmoid(d - eta), P(B) = sigmoid(-d - eta), P(tie) = 1 - P(A) - P(B) = (theta^2 - 1) P(A) P(B), with
    theta = exp(eta) = 1 + exp(t): every t is valid, eta = softplus(t), and theta^2 - 1 = exp(t) (2 + exp(t)) is
    computed without cancellation.
    """
    lead, tie = _lead_and_tie(outputs)
    threshold = -F.logsigmoid(-tie)
    a, b = F.logsigmoid(lead - threshold), F.logsigmoid(-lead - threshold)
    return torch.stack([a, b, a + b + tie + torch.logaddexp(tie, torch.full_like(tie, math.log(2)))], dim=-1)


def davidson_link(outputs: Tensor) -> Tensor:
    """Return log-weights (n, 3) of separate outputs (n, 2, 2): d/2, -d/2, t (Davidson 1970, with nu = exp(t))."""
    lead, tie = _lead_and_tie(outputs)
    return torch.stack([lead / 2, -lead / 2, tie], dim=-1)


def cross_entropy(outputs: Tensor, outcomes: Tensor, settings: Settings, teacher: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of joint logits and outcomes, (n,), with label smoothing."""
    logits = _floats(outputs)
    return F.cross_entropy(logits, outcomes.to(logits), reduction="none", label_smoothing=settings.label_smoothing)


def distillation(outputs: Tensor, outcomes: Tensor, settings: Settings, teacher: Tensor | None = None) -> Tensor:
    """Return the loss of joint logits against the votes and a teacher, (n,).

    weight_votes * cross-entropy + weight_teacher * T^2 * KL(teacher || student), both at temperature T (T^2 keeps the
    size of the gradient; Hinton, Vinyals & Dean 2015), + weight_cosine * (1 - cosine similarity of the probabilities
    at temperature 1). A battle without a teacher (NaN) has the first term only, one without votes the other two.
    """
    logits, temperature = _floats(outputs), settings.temperature
    votes, has_votes = _fill_unknown(outcomes.to(logits))
    losses = settings.weight_votes * cross_entropy(logits, votes, settings) * has_votes
    if teacher is None:
        return losses
    soft_labels, has_teacher = _fill_unknown(teacher.to(logits))
    softened = (soft_labels.log() / temperature).softmax(dim=-1)
    divergence = F.kl_div((logits / temperature).log_softmax(dim=-1), softened, reduction="none").sum(dim=-1)
    cosine = F.cosine_similarity(logits.softmax(dim=-1), soft_labels, dim=-1)
    teacher_losses = settings.weight_teacher * temperature**2 * divergence + settings.weight_cosine * (1 - cosine)
    return losses + teacher_losses * has_teacher


def rao_kupper(outputs: Tensor, outcomes: Tensor, settings: Settings, teacher: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of Rao & Kupper's probabilities and the outcomes, (n,), plus the centring penalty."""
    outputs = _floats(outputs)
    return cross_entropy(rao_kupper_link(outputs), outcomes, settings) + _centring_penalty(outputs, settings)


def davidson(outputs: Tensor, outcomes: Tensor, settings: Settings, teacher: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of Davidson's probabilities and the outcomes, (n,), plus the centring penalty."""
    outputs = _floats(outputs)
    return cross_entropy(davidson_link(outputs), outcomes, settings) + _centring_penalty(outputs, settings)


def bradley_terry(outputs: Tensor, outcomes: Tensor, settings: Settings, teacher: Tensor | None = None) -> Tensor:
    """Return -log sigmoid(d - margin) where A won, -log sigmoid(-d - margin) where B won (Bradley & Terry 1952).

    Ties have loss 0: everything, the centring penalty included, is multiplied by P(A wins) + P(B wins). Label smoothing
    is over A and B. The link is Davidson's, for which P(A) / P(B) = exp(d), as learnt. The margin is that of Llama 2
    (Touvron et al. 2023, eq. 2), the same for all battles; other objectives have none, because Rao & Kupper's threshold
    is a learnt margin already.
    """
    outputs = _floats(outputs)
    lead, _ = _lead_and_tie(outputs)
    votes = outcomes.to(outputs)[:, :2]
    decided = votes.sum(dim=1)
    targets = torch.lerp(votes, decided[:, None] / 2, settings.label_smoothing)
    logs = F.logsigmoid(torch.stack([lead, -lead], dim=-1) - settings.margin)
    return -(targets * logs).sum(dim=-1) + _centring_penalty(outputs, settings) * decided


JOINT_HEAD = HeadShape(num_labels=3, responses=2, tie=False)
SEPARATE_HEAD = HeadShape(num_labels=1, responses=1, tie=True)

OBJECTIVES = {
    "cross_entropy": Objective("joint", JOINT_HEAD, cross_entropy, joint_link, ("label_smoothing",)),
    "distillation": Objective(
        "joint",
        JOINT_HEAD,
        distillation,
        joint_link,
        ("label_smoothing", "temperature", "weight_votes", "weight_teacher", "weight_cosine"),
        teacher=True,
    ),
    "rao_kupper": Objective(
        "separate", SEPARATE_HEAD, rao_kupper, rao_kupper_link, ("label_smoothing", "center_rewards")
    ),
    "davidson": Objective("separate", SEPARATE_HEAD, davidson, davidson_link, ("label_smoothing", "center_rewards")),
    "bradley_terry": Objective(
        "separate",
        SEPARATE_HEAD,
        bradley_terry,
        davidson_link,
        ("label_smoothing", "margin", "center_rewards"),
        learns_ties=False,
    ),
}
"""Objectives by the recipe's `objective.name`."""

MIXING = ("weight_votes", "weight_teacher")
"""Settings by which separate objectives mix a battle's votes and its teacher's probabilities (`data.teacher`)."""

_SETTING_RANGES = dict.fromkeys(Settings.__annotations__, (0.0, math.inf))
_SETTING_RANGES |= {"label_smoothing": (0.0, 1.0), "temperature": (0.01, math.inf)}
"""Setting -> its least value (inclusive) and its upper bound (exclusive)."""


def find_objective(config: Any) -> Objective:
    """Return the objective that the recipe's `objective` section names.

    Args:
        config: a dataclass with a `name` and the fields of `Settings`.

    Raises:
        InputError: an unknown name, a setting out of range, or a setting that is not at its default and that the
            objective does not read.
    """
    name = config.name
    if name not in OBJECTIVES:
        raise InputError(
            f"objective.name: no objective '{name}'{nearest(name, OBJECTIVES)}; known: {', '.join(OBJECTIVES)}"
        )
    defaults = {field.name: field.default for field in fields(config) if field.name in _SETTING_RANGES}
    for key, default in defaults.items():
        value, (least, below) = getattr(config, key), _SETTING_RANGES[key]
        if not least <= value < below:
            raise InputError(f"objective.{key}: {value}; give at least {least} and less than {below}")
        readers = [
            reader
            for reader, objective in OBJECTIVES.items()
            if key in objective.settings or (objective.mixes_teacher and key in MIXING)
        ]
        if value != default and name not in readers:
            raise InputError(f"objective.{key}: only for {' and '.join(readers)}; leave it out with {name}")
    return OBJECTIVES[name]


def initial_tie(share: float) -> float:
    """Return the tie parameter t for which equal rewards give P(tie) = share: log(2 share / (1 - share)).

    It holds for both links: at d = 0, P(tie) is tanh(eta / 2) for Rao & Kupper and nu / (2 + nu) for Davidson. Shares
    are clipped to [1e-4, 1 - 1e-4].

    Raises:
        InputError: `share` is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share of ties: {share}; give one from 0 to 1")
    share = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(2 * share / (1 - share))


def fit_tie(
    rewards: np.ndarray, outcomes: np.ndarray, link: Callable[[Tensor], Tensor] = OBJECTIVES["bradley_terry"].link
) -> float:
    """Return the tie parameter that minimises the log loss for given rewards.

    The log loss is convex in eta (Davidson: in t), so a bounded search finds the minimum. Without any tie that is the
    lower bound, `initial_tie(0)`; with nothing but ties, a finite value at which P(tie) is almost 1.

    Args:
        rewards: (n, 2) of response A, response B, finite.
        outcomes: (n, 3) probabilities of A, B, tie.
        link: of the objective.

    Raises:
        InputError: no battles, wrong shapes, or values that are NaN or infinite.
    """
    values, true = (torch.from_numpy(np.asarray(array, dtype=np.float64)) for array in (rewards, outcomes))
    shapes = tuple(values.shape), tuple(true.shape)
    if not values.numel() or shapes != ((len(values), 2), (len(values), 3)):
        raise InputError(f"rewards and outcomes of shapes {shapes}: give (n, 2) and (n, 3) of the same battles")
    if not (values.isfinite().all() and true.isfinite().all()):
        raise InputError("rewards or outcomes: some are NaN or infinite; leave out battles without them")

    def log_loss(tie: float) -> float:
        outputs = torch.stack([values, torch.full_like(values, tie)], dim=-1)
        return F.cross_entropy(link(outputs), true).item()

    bounds = (initial_tie(0), initial_tie(1) + values.diff().abs().max().item())
    return float(minimize_scalar(log_loss, bounds=bounds, method="bounded").x)


def _floats(outputs: Tensor) -> Tensor:
    """Return outputs in float32, or in float64 if they are that."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _lead_and_tie(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return d and t of separate outputs, (n,) each; both responses carry the same t up to rounding."""
    return outputs[:, 0, 0] - outputs[:, 1, 0], outputs[..., 1].mean(dim=1)


def _centring_penalty(outputs: Tensor, settings: Settings) -> Tensor:
    """Return center_rewards * (reward of A + reward of B)^2, (n,) (Eisenstein et al. 2023)."""
    return settings.center_rewards * outputs[..., 0].sum(dim=1) ** 2


def _fill_unknown(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Replace rows with NaN by 1/3 each, so that gradients are finite; also return which rows were known, (n,) bool."""
    known = ~probabilities.isnan().any(dim=-1)
    return probabilities.where(known[:, None], torch.full_like(probabilities, 1 / 3)), known
