from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, softmax

from rewardmodel.config.schema import ObjectiveConfig
from rewardmodel.errors import InputError
from rewardmodel.objectives import (
    OBJECTIVES,
    HeadShape,
    davidson_link,
    find_objective,
    fit_tie,
    initial_tie,
    rao_kupper_link,
)

PLAIN = ObjectiveConfig()
BUSY = ObjectiveConfig("", 0.15, 0.4, 0.03, 1.7, 0.6, 0.8, 0.5)
SEPARATE = [name for name, objective in OBJECTIVES.items() if objective.encoding == "separate"]
LINKS = {"rao_kupper": rao_kupper_link, "davidson": davidson_link}
A, B, TIE = torch.eye(3, dtype=torch.float64)[:, None]

each_objective = pytest.mark.parametrize("name", OBJECTIVES)
each_separate = pytest.mark.parametrize("name", SEPARATE)
rewards = st.floats(-1e4, 1e4)


def outputs_of(name, count=7, seed=0):
    """Return head outputs, soft outcomes and a teacher, float64; the tie parameter is .3 in every row."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3) if OBJECTIVES[name].encoding == "joint" else (count, 2, 2)
    outputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    if OBJECTIVES[name].head.tie:
        outputs[..., 1] = 0.3
    soft = torch.randn((2, count, 3), generator=generator, dtype=torch.float64).softmax(dim=-1)
    return outputs, *soft


def separate(first, second, tie, dtype=torch.float32):
    """Return outputs (1, 2, 2) of two rewards and a tie parameter."""
    return torch.tensor([[[first, tie], [second, tie]]], dtype=dtype)


# Independent formulas, in NumPy, straight from the papers: strengths pi = exp(reward), no logarithms till the end.


def numpy_rao_kupper(outputs):
    pi, theta = np.exp(outputs[..., 0]), 1 + np.exp(outputs[:, 0, 1])
    a, b = pi[:, 0] / (pi[:, 0] + theta * pi[:, 1]), pi[:, 1] / (theta * pi[:, 0] + pi[:, 1])
    return np.stack([a, b, 1 - a - b], axis=1)


def numpy_davidson(outputs):
    pi, nu = np.exp(outputs[..., 0]), np.exp(outputs[:, 0, 1])
    weights = np.stack([pi[:, 0], pi[:, 1], nu * np.sqrt(pi[:, 0] * pi[:, 1])], axis=1)
    return weights / weights.sum(axis=1, keepdims=True)


def numpy_softmax(outputs):
    return softmax(outputs, axis=1)


STATED = {
    "cross_entropy": numpy_softmax,
    "distillation": numpy_softmax,
    "rao_kupper": numpy_rao_kupper,
    "davidson": numpy_davidson,
    "bradley_terry": numpy_davidson,
}


def smooth_cross_entropy(stated, outcomes, section):
    return -(((1 - section.label_smoothing) * outcomes + section.label_smoothing / 3) * np.log(stated)).sum(axis=1)


def numpy_distillation(outputs, outcomes, section, teacher):
    student = softmax(outputs, axis=1)
    hot = teacher ** (1 / section.temperature)
    hot /= hot.sum(axis=1, keepdims=True)
    divergence = (hot * (np.log(hot) - log_softmax(outputs / section.temperature, axis=1))).sum(axis=1)
    lengths = np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)
    cosine = (student * teacher).sum(axis=1) / lengths
    return (
        section.weight_votes * smooth_cross_entropy(student, outcomes, section)
        + section.weight_teacher * section.temperature**2 * divergence
        + section.weight_cosine * (1 - cosine)
    )


def numpy_bradley_terry(outputs, outcomes, section, teacher):
    lead, decided = outputs[:, 0, 0] - outputs[:, 1, 0], outcomes[:, :2].sum(axis=1)
    a, b = ((1 - section.label_smoothing) * outcomes[:, k] + section.label_smoothing * decided / 2 for k in (0, 1))
    loss = -a * np.log(expit(lead - section.margin)) - b * np.log(expit(-lead - section.margin))
    return loss + decided * section.center_rewards * outputs[..., 0].sum(axis=1) ** 2


def numpy_tie_model(stated):
    def loss(outputs, outcomes, section, teacher):
        centring = section.center_rewards * (outputs[:, 0, 0] + outputs[:, 1, 0]) ** 2
        return smooth_cross_entropy(stated(outputs), outcomes, section) + centring

    return loss


LOSSES = {
    "cross_entropy": lambda outputs, outcomes, section, _: smooth_cross_entropy(
        softmax(outputs, axis=1), outcomes, section
    ),
    "distillation": numpy_distillation,
    "rao_kupper": numpy_tie_model(numpy_rao_kupper),
    "davidson": numpy_tie_model(numpy_davidson),
    "bradley_terry": numpy_bradley_terry,
}


@each_objective
def test_losses_are_those_of_an_independent_formula(name):
    given_ = outputs_of(name)
    outputs, outcomes, teacher = (tensor.numpy() for tensor in given_)
    for section in (PLAIN, BUSY):
        loss = OBJECTIVES[name].loss(*given_[:2], section, given_[2])
        np.testing.assert_allclose(loss.numpy(), LOSSES[name](outputs, outcomes, section, teacher), rtol=1e-12)


@each_objective
def test_probabilities_are_those_of_an_independent_formula(name):
    outputs, _, _ = outputs_of(name)
    stated = OBJECTIVES[name].probabilities(outputs)
    assert stated.dtype == torch.float32
    np.testing.assert_allclose(stated.numpy(), STATED[name](outputs.numpy()), atol=1e-7)


@each_objective
def test_gradients_are_those_of_the_loss(name):
    outputs, outcomes, teacher = outputs_of(name, count=4)
    for section in (PLAIN, BUSY):
        assert torch.autograd.gradcheck(
            lambda outputs, section=section: OBJECTIVES[name].loss(outputs, outcomes, section, teacher),
            outputs.requires_grad_(),
        )


@each_objective
def test_entries_say_what_the_head_must_be(name):
    objective = OBJECTIVES[name]
    assert (objective.encoding, objective.head) in {
        ("joint", HeadShape(3, 2, tie=False)),
        ("separate", HeadShape(1, 1, tie=True)),
    }
    assert objective.teacher == ("weight_teacher" in objective.settings)


@each_objective
def test_a_loss_reads_its_settings_and_no_other(name):
    outputs, outcomes, teacher = outputs_of(name)
    before = OBJECTIVES[name].loss(outputs, outcomes, PLAIN, teacher)
    changed = set()
    for key in ("label_smoothing", "margin", "center_rewards", "temperature", "weight_votes", "weight_teacher"):
        after = OBJECTIVES[name].loss(outputs, outcomes, replace(PLAIN, **{key: 0.37}), teacher)
        changed |= {key} if not torch.equal(before, after) else set()
    assert changed == set(OBJECTIVES[name].settings) - {"weight_cosine"}


@each_objective
def test_half_precision_is_computed_in_float32(name):
    outputs, outcomes, teacher = outputs_of(name)
    for dtype in (torch.bfloat16, torch.float16):
        low = outputs.to(dtype)
        loss = OBJECTIVES[name].loss(low, outcomes, BUSY, teacher)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, OBJECTIVES[name].loss(low.float(), outcomes, BUSY, teacher))
        assert torch.equal(OBJECTIVES[name].probabilities(low), OBJECTIVES[name].probabilities(low.float()))


@each_objective
@pytest.mark.parametrize("far", [1e4, -1e4])
def test_far_apart_all_is_finite(name, far):
    objective = OBJECTIVES[name]
    for outcome in (A, B, TIE):
        joint = objective.encoding == "joint"
        outputs = torch.tensor([[far / 2, -far / 2, 0.0]]) if joint else separate(far / 2, -far / 2, 0.3)
        outputs.requires_grad_()
        loss = objective.loss(outputs, outcome, BUSY, torch.tensor([[0.0, 1.0, 0.0]]))
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(outputs.grad).all()
        np.testing.assert_allclose(objective.probabilities(outputs.detach())[0, :2], [far > 0, far < 0], atol=1e-6)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(sorted(OBJECTIVES)), rewards, rewards, st.floats(-20, 20))
def test_probabilities_sum_to_one(name, first, second, third):
    joint = OBJECTIVES[name].encoding == "joint"
    outputs = torch.tensor([[first, second, third]]) if joint else separate(first / 2, second / 2, third)
    stated = OBJECTIVES[name].probabilities(outputs)
    assert stated.isfinite().all()
    assert (stated >= 0).all()
    assert abs(stated.double().sum() - 1) <= 1e-6


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(SEPARATE), rewards, rewards, st.floats(-20, 20))
def test_a_swap_of_rewards_swaps_probabilities_and_loss(name, first, second, tie):
    objective, outcomes = OBJECTIVES[name], torch.tensor([[0.6, 0.1, 0.3]])
    outputs = separate(first, second, tie)
    swapped = objective.probabilities(outputs.flip(1))[:, [1, 0, 2]]
    assert torch.allclose(objective.probabilities(outputs), swapped, rtol=0, atol=1e-6)
    losses = [objective.loss(outputs, outcomes, BUSY), objective.loss(outputs.flip(1), outcomes[:, [1, 0, 2]], BUSY)]
    assert torch.allclose(*losses, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(SEPARATE), rewards, st.floats(-20, 20))
def test_equal_rewards_have_equal_chances(name, reward, tie):
    stated = OBJECTIVES[name].probabilities(separate(reward, reward, tie))
    assert stated[0, 0] == stated[0, 1]


@each_separate
def test_the_likelier_winner_has_the_higher_reward(name):
    leads = torch.linspace(-4, 4, 21)
    outputs = torch.stack([torch.stack([leads, torch.zeros(21)], 1), torch.full((21, 2), 0.3)], dim=-1)
    stated = OBJECTIVES[name].probabilities(outputs)
    assert (stated[:, 0].diff() > 0).all()
    assert (stated[:, 1].diff() < 0).all()
    assert stated[:, 2].argmax() == 10


@each_objective
def test_the_loss_of_a_soft_outcome_is_the_expectation_over_hard_ones(name):
    outputs, outcomes, _ = outputs_of(name)
    for section in (PLAIN, BUSY):
        soft = OBJECTIVES[name].loss(outputs, outcomes, section)
        hard = [OBJECTIVES[name].loss(outputs, one.expand(7, 3), section) for one in (A, B, TIE)]
        assert torch.allclose(soft, (torch.stack(hard, dim=1) * outcomes).sum(dim=1), rtol=1e-12)


def test_known_losses():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    loss = OBJECTIVES["cross_entropy"].loss(logits, A, PLAIN)
    assert loss.item() == pytest.approx(np.log(2))
    loss = OBJECTIVES["bradley_terry"].loss(separate(np.log(3), 0, 9), A, PLAIN)
    assert loss.item() == pytest.approx(-np.log(0.75))
    # theta = 2: P(A) = 4 / (4 + 2), P(B) = 1 / (2 * 4 + 1)
    stated = OBJECTIVES["rao_kupper"].probabilities(separate(np.log(4), 0, 0))
    np.testing.assert_allclose(stated, [[2 / 3, 1 / 9, 2 / 9]], atol=1e-7)
    # nu = 1: 4, 1 and sqrt(4) of 7
    stated = OBJECTIVES["davidson"].probabilities(separate(np.log(4), 0, 0))
    np.testing.assert_allclose(stated, [[4 / 7, 1 / 7, 2 / 7]], atol=1e-7)


# Ties that teach nothing


def test_bradley_terry_leaves_ties_out_of_loss_gradient_and_mean():
    objective = OBJECTIVES["bradley_terry"]
    outputs, outcomes, _ = outputs_of("bradley_terry", count=3)
    outcomes = torch.stack([outcomes[0], TIE[0], A[0]])
    loss = objective.loss(outputs.requires_grad_(), outcomes, BUSY)
    loss.sum().backward()
    assert loss[1] == 0
    assert (outputs.grad[1] == 0).all()
    assert (outputs.grad[..., 1] == 0).all()
    assert torch.equal(objective.denominators(outcomes), outcomes[:, 0] + outcomes[:, 1])


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if objective.learns_ties])
def test_others_count_every_battle_once(name):
    assert OBJECTIVES[name].denominators(torch.cat([A, TIE])).tolist() == [1, 1]
    outputs, _, _ = outputs_of(name, count=1)
    OBJECTIVES[name].loss(outputs.requires_grad_(), TIE, PLAIN).sum().backward()
    assert (outputs.grad != 0).any()


# Distillation


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn_from_it():
    section = replace(BUSY, weight_votes=0.0)
    teacher = outputs_of("distillation")[2]
    logits = (teacher.log() + 5).requires_grad_()
    loss = OBJECTIVES["distillation"].loss(logits, teacher, section, teacher)
    loss.sum().backward()
    assert loss.detach().abs().max() < 1e-12
    assert logits.grad.abs().max() < 1e-12


def test_at_temperature_1_a_teacher_alone_is_a_soft_vote():
    logits, votes, teacher = outputs_of("distillation")
    section = replace(PLAIN, weight_votes=0.0)
    loss = OBJECTIVES["distillation"].loss(logits, votes, section, teacher)
    entropy = -(teacher * teacher.log()).sum(dim=1)
    assert torch.allclose(loss + entropy, OBJECTIVES["cross_entropy"].loss(logits, teacher, PLAIN))


def test_battles_without_teacher_or_votes_learn_from_the_other_alone():
    logits, votes, teacher = outputs_of("distillation", count=4)
    whole = OBJECTIVES["distillation"].loss
    nothing = float("nan")
    some_votes, some_teacher = votes.clone(), teacher.clone()
    some_votes[[1, 3]], some_teacher[[2, 3]] = nothing, nothing
    loss = whole(logits.requires_grad_(), some_votes, BUSY, some_teacher)
    loss.sum().backward()
    by_teacher = whole(logits, votes, replace(BUSY, weight_votes=0.0), teacher)
    by_votes = whole(logits, votes, BUSY, None)
    expected = torch.stack([(by_votes + by_teacher)[0], by_teacher[1], by_votes[2], torch.tensor(0.0)])
    assert torch.allclose(loss, expected)
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:3].abs().sum(dim=1) > 0).all()
    assert (logits.grad[3] == 0).all()


def test_a_hard_teacher_is_finite():
    logits = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True)
    loss = OBJECTIVES["distillation"].loss(logits, A, replace(PLAIN, weight_votes=0.0, temperature=2.0), A)
    assert loss.item() == pytest.approx(4 * np.log(3), rel=1e-6)
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


# The tie parameter


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("share", [0.01, 0.2, 0.309, 0.5, 0.9])
def test_training_starts_at_the_share_of_ties(link, share):
    stated = LINKS[link](separate(1.5, 1.5, initial_tie(share), torch.float64)).softmax(dim=-1)
    assert stated[0, 2].item() == pytest.approx(share, rel=1e-12)


def test_initial_tie_of_known_shares():
    assert initial_tie(1 / 3) == pytest.approx(0)  # theta = 2, nu = 1
    assert initial_tie(0.5) == pytest.approx(np.log(2))
    assert initial_tie(0) == initial_tie(1e-9) == pytest.approx(np.log(2e-4), abs=1e-3)
    assert initial_tie(1) == initial_tie(1 - 1e-9) == pytest.approx(np.log(2e4), abs=1e-3)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="share of ties"):
            initial_tie(share)


def drawn(link, count=20_000, items=6, tie=0.4):
    """Return planted strengths (items,), pairs (count, 2) and outcomes (count, 3) drawn by a link."""
    generator = torch.Generator().manual_seed(3)
    strengths = torch.linspace(-1.6, 1.6, items, dtype=torch.float64)
    pairs = torch.stack([torch.randperm(items, generator=generator)[:2] for _ in range(count)])
    return strengths, pairs, draw(link(heads(strengths, pairs, torch.tensor(tie))), generator)


def draw(weights, generator):
    drawn_ = torch.multinomial(weights.softmax(dim=-1), 1, generator=generator)[:, 0]
    return torch.eye(3, dtype=torch.float64)[drawn_]


def heads(strengths, pairs, tie):
    return torch.stack([strengths[pairs], tie.to(strengths).expand(pairs.shape)], dim=-1)


def fitted(objective, pairs, outcomes, items=6):
    """Return the strengths, centred, and the tie parameter that a full-batch fit of the loss finds."""
    strengths = torch.zeros(items, dtype=torch.float64, requires_grad=True)
    tie = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([strengths, tie], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (
            objective.loss(heads(strengths, pairs, tie), outcomes, PLAIN).sum() / objective.denominators(outcomes).sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return (strengths - strengths.mean()).detach(), tie.detach()


@pytest.mark.parametrize("name", LINKS)
def test_planted_rewards_and_tie_parameter_are_found(name):
    planted, pairs, outcomes = drawn(LINKS[name])
    strengths, tie = fitted(OBJECTIVES[name], pairs, outcomes)
    assert torch.linalg.vector_norm(strengths - planted) < 0.05 * torch.linalg.vector_norm(planted)
    assert tie.exp().item() == pytest.approx(np.exp(0.4), rel=0.05)


def test_bradley_terry_finds_planted_rewards_among_ties():
    planted, pairs, outcomes = drawn(davidson_link)  # in which decided battles are Bradley's and Terry's
    strengths, tie = fitted(OBJECTIVES["bradley_terry"], pairs, outcomes)
    assert torch.linalg.vector_norm(strengths - planted) < 0.05 * torch.linalg.vector_norm(planted)
    assert tie == 0  # where it began
    rewards_ = strengths[pairs].numpy()
    assert np.exp(fit_tie(rewards_, outcomes.numpy(), davidson_link)) == pytest.approx(np.exp(0.4), rel=0.05)


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("scale", [1, 20])
def test_a_planted_tie_parameter_is_fitted_at_given_rewards(name, scale):
    strengths, pairs, _ = drawn(LINKS[name], count=20_000)
    planted = torch.tensor(0.4 + scale - 1.0)
    outcomes = draw(LINKS[name](heads(scale * strengths, pairs, planted)), torch.Generator().manual_seed(5))
    tie = fit_tie((scale * strengths[pairs]).numpy(), outcomes.numpy(), LINKS[name])
    assert tie == pytest.approx(planted.item(), abs=0.05 if scale == 1 else 0.5)


def test_fit_tie_is_the_least_of_a_grid_of_the_stated_log_loss():
    planted, pairs, outcomes = drawn(rao_kupper_link, count=500)
    rewards_ = planted[pairs].numpy()
    found = fit_tie(rewards_, outcomes.numpy(), rao_kupper_link)
    grid = np.linspace(-3, 3, 6001)
    losses = []
    for tie in grid:
        stated = numpy_rao_kupper(np.stack([rewards_, np.full_like(rewards_, tie)], axis=-1))
        losses.append(-(outcomes.numpy() * np.log(stated)).sum(axis=1).mean())
    assert found == pytest.approx(grid[np.argmin(losses)], abs=2e-3)


def test_without_ties_and_with_ties_alone_the_fit_is_finite():
    rewards_ = np.array([[0.5, -0.5], [300.0, 0.0], [0.0, 1e4]])
    for outcome, share in ((0, 0.0), (1, 0.0), (2, 1.0)):
        tie = fit_tie(rewards_, np.eye(3)[[outcome] * 3])
        stated = OBJECTIVES["bradley_terry"].probabilities(separate(0.5, -0.5, tie))
        assert np.isfinite(tie)
        assert stated.isfinite().all()
        assert stated[0, 2].item() == pytest.approx(share, abs=1e-3)


def test_fit_tie_refuses_what_it_cannot_fit():
    good = np.zeros((2, 2)), np.full((2, 3), 1 / 3)
    for bad in ((good[0][:0], good[1][:0]), (good[0][:, :1], good[1]), (good[0], good[1][:1]), (good[0][0], good[1])):
        with pytest.raises(InputError, match="of the same battles"):
            fit_tie(*bad)
    with pytest.raises(InputError, match="some are NaN or infinite"):
        fit_tie(good[0] + np.nan, good[1])


# The recipe's section


@each_objective
def test_an_objective_is_found_with_every_setting_that_it_reads(name):
    given_ = {key: getattr(BUSY, key) for key in OBJECTIVES[name].settings}
    assert find_objective(ObjectiveConfig(name, **given_)) is OBJECTIVES[name]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (ObjectiveConfig("crossentropy"), "did you mean 'cross_entropy'"),
        (
            ObjectiveConfig("rao_kupper", margin=0.5),
            r"objective\.margin: only for bradley_terry; leave it out with rao_kupper",
        ),
        (ObjectiveConfig(center_rewards=0.1), "only for rao_kupper and davidson and bradley_terry"),
        (ObjectiveConfig("davidson", temperature=2.0), r"objective\.temperature: only for distillation"),
        (ObjectiveConfig("distillation", temperature=0.0), r"objective\.temperature: 0\.0; give at least 0\.01"),
        (
            ObjectiveConfig(label_smoothing=1.0),
            r"objective\.label_smoothing: 1\.0; give at least 0\.0 and less than 1\.0",
        ),
        (ObjectiveConfig("distillation", weight_votes=float("nan")), r"objective\.weight_votes: nan"),
    ],
)
def test_a_setting_that_would_do_nothing_or_harm_is_refused(section, message):
    with pytest.raises(InputError, match=message):
        find_objective(section)
