import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rewardmodel.config.schema import ObjectiveConfig
from rewardmodel.errors import InputError
from rewardmodel.model.heads import FloatLinear, PairTieHead, TieHead
from rewardmodel.objectives import OBJECTIVES, initial_tie
from rewardmodel.training import head_fit
from rewardmodel.training.head_fit import Examples, fit_last_layer


def examples_of(features, labels, weight=None):
    count = len(features)
    return Examples(
        torch.from_numpy(np.asarray(features, np.float32)),
        torch.from_numpy(np.asarray(labels, np.float32)),
        torch.full((count, 3), torch.nan),
        torch.ones(count) if weight is None else torch.from_numpy(np.asarray(weight, np.float32)),
    )


def draw(count=400, width=6, seed=0):
    """Return features (count, 2, width) of two responses, and who won by the difference of their first columns."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, 2, width)) * np.arange(1, width + 1) + 3
    lead = 1.5 * (features[:, 0, 0] - features[:, 1, 0])
    wins = random.random(count) < 1 / (1 + np.exp(-lead))
    return features, np.stack([wins, ~wins, np.zeros(count)], axis=1)


def test_bradley_terry_on_features_is_scikit_learns_logistic_regression(monkeypatch):
    features, labels = draw()
    monkeypatch.setattr(head_fit, "PENALTIES", (10.0 / 6,))
    layer = TieHead(6)
    layer.tie.requires_grad_(False)
    torch.nn.init.zeros_(layer.weight)
    groups = np.arange(len(features)) // 2
    fit_last_layer(layer, examples_of(features, labels), groups, OBJECTIVES["bradley_terry"], ObjectiveConfig())
    scale = features.reshape(-1, 6).std(axis=0)
    expected = LogisticRegression(C=1 / 10, fit_intercept=False, tol=1e-8).fit(
        (features[:, 0] - features[:, 1]) / scale, labels[:, 0]
    )
    np.testing.assert_allclose(layer.weight.detach().numpy()[0] * scale, expected.coef_[0], rtol=2e-3, atol=1e-4)


def test_a_layer_with_a_bias_is_scikit_learns_multinomial_regression(monkeypatch):
    random = np.random.default_rng(1)
    features = random.normal(size=(300, 1, 4)) * [1, 10, 0.1, 1] + [0, 5, 2, -3]
    scores = features[:, 0] @ random.normal(size=(4, 3)) / [1, 1, 1]
    labels = np.eye(3)[(scores + random.gumbel(size=scores.shape)).argmax(axis=1)]
    monkeypatch.setattr(head_fit, "PENALTIES", (3.0 / 4,))
    layer = FloatLinear(4, 3, bias=True)
    for weight in layer.parameters():
        torch.nn.init.zeros_(weight)
    objective = OBJECTIVES["cross_entropy"]
    fit_last_layer(layer, examples_of(features, labels), np.arange(300), objective, ObjectiveConfig())
    center, scale = features[:, 0].mean(axis=0), features[:, 0].std(axis=0)
    expected = LogisticRegression(C=1 / 3, tol=1e-8, max_iter=1000).fit(
        (features[:, 0] - center) / scale, labels.argmax(axis=1)
    )
    found = layer(torch.from_numpy(features[:, 0].astype(np.float32))).softmax(dim=-1).detach().numpy()
    np.testing.assert_allclose(found, expected.predict_proba((features[:, 0] - center) / scale), atol=2e-3)


def test_both_orders_teach_a_joint_head_to_know_no_order():
    features, labels = draw(seed=3)
    side_by_side = np.stack([features.reshape(len(features), -1), features[:, ::-1].reshape(len(features), -1)], axis=1)
    layer = FloatLinear(12, 3, bias=True)
    for weight in layer.parameters():
        torch.nn.init.zeros_(weight)
    objective = OBJECTIVES["cross_entropy"]
    examples = examples_of(side_by_side, labels)
    fit_last_layer(layer, examples, np.arange(len(features)), objective, ObjectiveConfig())
    logits = layer(examples.features.flatten(0, 1)).view(len(features), 2, 3)
    as_given, exchanged = (one.detach().numpy() for one in objective.probabilities_by_order(logits))
    np.testing.assert_allclose(as_given, exchanged, atol=5e-3)
    assert (as_given[:, 0] > as_given[:, 1]).mean() == pytest.approx(labels[:, 0].mean(), abs=0.1)


def test_the_penalty_is_the_one_that_predicts_other_groups_best():
    random = np.random.default_rng(5)
    features = random.normal(size=(120, 2, 60))  # nothing to learn from
    labels = np.eye(3)[random.integers(0, 3, 120)]
    layer = TieHead(60)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(layer.tie, initial_tie(1 / 3))
    losses = fit_last_layer(
        layer, examples_of(features, labels), np.arange(120) // 3, OBJECTIVES["davidson"], ObjectiveConfig()
    )
    best = min(losses, key=losses.__getitem__)
    assert best >= 3
    assert losses[best] == pytest.approx(np.log(3), abs=0.02)
    assert losses[min(head_fit.PENALTIES)] > losses[best] + 0.1


def test_weights_count_and_a_battle_of_weight_0_does_not():
    features, labels = draw(count=200, seed=7)
    wrong = labels[:, [1, 0, 2]]
    both = np.concatenate([features, features]), np.concatenate([labels, wrong])
    groups = np.tile(np.arange(200), 2)
    found = []
    for given in (
        examples_of(features, labels),
        examples_of(*both, weight=np.repeat([1.0, 0.0], 200)),
    ):
        layer = TieHead(6)
        torch.nn.init.zeros_(layer.weight)
        count = len(given.labels)
        fit_last_layer(layer, given, groups[:count], OBJECTIVES["rao_kupper"], ObjectiveConfig())
        found.append(layer.weight.detach().numpy())
    np.testing.assert_allclose(*found, rtol=2e-2, atol=2e-3)


def test_ties_of_pairs_are_learnt_from_how_far_responses_are_apart_and_scales_do_not_matter():
    random = np.random.default_rng(9)
    features = random.normal(size=(1500, 2, 3))
    apart = np.abs(features[:, 0, 1] - features[:, 1, 1])
    ties = random.random(1500) < 1 / (1 + np.exp(3 * apart - 2))
    wins = random.random(1500) < 1 / (1 + np.exp(features[:, 1, 0] - features[:, 0, 0]))
    labels = np.stack([wins & ~ties, ~wins & ~ties, ties], axis=1).astype(float)
    found = []
    for scale, shift in ((np.ones(3), np.zeros(3)), (np.array([1e-2, 10, 100]), np.array([5, -30, 1]))):
        layer = PairTieHead(3)
        torch.nn.init.zeros_(layer.weight)
        examples = examples_of(features * scale + shift, labels)
        fit_last_layer(layer, examples, np.arange(1500), OBJECTIVES["davidson"], ObjectiveConfig())
        outputs = layer(examples.features.flatten(0, 1)).view(1500, 2, 2)
        found.append(OBJECTIVES["davidson"].probabilities(outputs).detach().numpy())
    np.testing.assert_allclose(*found, atol=5e-3)
    assert np.corrcoef(found[0][:, 2], apart)[0, 1] < -0.8
    swapped = layer(examples.features.flip(1).flatten(0, 1)).view(1500, 2, 2)
    np.testing.assert_allclose(
        OBJECTIVES["davidson"].probabilities(swapped).detach().numpy(), found[1][:, [1, 0, 2]], atol=1e-5
    )


def test_battles_of_one_prompt_are_refused():
    features, labels = draw(count=10)
    with pytest.raises(
        InputError, match="across prompts, and all battles have the same one; give battles of at least two"
    ):
        fit_last_layer(
            TieHead(6), examples_of(features, labels), np.zeros(10), OBJECTIVES["davidson"], ObjectiveConfig()
        )


def test_what_is_constant_but_for_rounding_does_not_hide_what_is_not():
    pairs, labels = draw(count=300)
    told = pairs[:, :1] - pairs[:, 1:]
    losses = []
    for noise in (0, 1e-7):
        constant = 10 * (1 + noise * np.random.default_rng(0).normal(size=(300, 1, 4)))
        features = np.concatenate([constant, told], axis=2)
        layer = FloatLinear(features.shape[2], 3, bias=False)
        torch.nn.init.zeros_(layer.weight)
        given = examples_of(features, labels)
        losses.append(fit_last_layer(layer, given, np.arange(300), OBJECTIVES["cross_entropy"], ObjectiveConfig()))
    assert min(losses[1].values()) == pytest.approx(min(losses[0].values()), abs=0.02)
