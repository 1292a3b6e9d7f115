"""A head that starts from what the language model would answer."""

import dataclasses

import numpy as np
import pytest
import torch
from builders import make_backbone, rows_of, small_recipe
from transformers import AutoModelForCausalLM

from rewardmodel.config.schema import ObjectiveConfig
from rewardmodel.errors import InputError
from rewardmodel.inference.predict import predict
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.loading import build_model, load_tokenizer, trained_layer
from rewardmodel.objectives import OBJECTIVES, find_objective
from rewardmodel.predictions import predicted
from rewardmodel.training import answer_head
from rewardmodel.training.answer_head import answer_rows, answer_tokens, start_from_answers
from rewardmodel.training.head_fit import Examples
from rewardmodel.training.train import train


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def language_model(request, tmp_path_factory):
    """A tiny Llama whose output layer is, or is not, its input embedding."""
    return make_backbone("llama", tmp_path_factory.mktemp("llama"), tie_word_embeddings=request.param)


def read_last_tokens(folder, count=24):
    """Return hidden states (n, 1, width) of the last tokens of joint sequences, and logits of the next (n, vocab)."""
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    states, logits = [], []
    for row in rows_of(tokenizer, count):
        with torch.no_grad():
            found = model(torch.tensor([row["input_ids"]]), output_hidden_states=True)
        states.append(found.hidden_states[-1][:, -1])
        logits.append(found.logits[0, -1])
    return torch.stack(states), torch.stack(logits)


def labelled(states, seed=0):
    labels = torch.eye(3)[torch.from_numpy(np.random.default_rng(seed).integers(0, 3, len(states)))]
    return Examples(states, labels, torch.full_like(labels, torch.nan), torch.ones(len(labels)))


def test_the_head_computes_the_language_models_answer_scaled_and_shifted(language_model):
    recipe = small_recipe(language_model, language_model)
    backbone = resolve_backbone(recipe.model)
    model, tokenizer = build_model(backbone, find_objective(recipe.objective).head, 0)
    states, logits = read_last_tokens(language_model)
    examples = labelled(states)
    rows, layer = answer_rows(model, tokenizer, backbone), trained_layer(model)
    start_from_answers(layer, rows, examples, OBJECTIVES["cross_entropy"], ObjectiveConfig())
    found = layer(states[:, 0]).detach()
    ids = answer_tokens(tokenizer)
    assert [tokenizer.decode([token]).strip() for token in ids[:2]] == ["A", "B"]

    # logits = scale * (the answers' next-token logits) + offsets along the mean state, and nothing else
    mean = states[:, 0].mean(dim=0)
    along = states[:, 0] @ mean / mean.square().sum()
    for outcome in range(3):
        regressors = torch.stack([logits[:, ids[outcome]], along], dim=1)
        solution = torch.linalg.lstsq(regressors, found[:, outcome, None]).solution
        np.testing.assert_allclose(regressors @ solution, found[:, outcome, None], atol=1e-4)
    # no scale and no offset would fit these battles better
    loss = torch.nn.functional.cross_entropy(found, examples.labels).item()
    for scale in (0.9, 1.1):
        assert loss <= torch.nn.functional.cross_entropy(found * scale, examples.labels).item() + 1e-6
    for shift in 0.1 * torch.cat([torch.eye(3), -torch.eye(3)]):
        assert loss <= torch.nn.functional.cross_entropy(found + along[:, None] * shift, examples.labels).item() + 1e-6


def test_training_starts_from_it_and_a_frozen_head_is_pulled_towards_it(language_model, tmp_path, monkeypatch):
    recipe = small_recipe(language_model, tmp_path)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, head_init="answer"))
    still = dataclasses.replace(recipe, trainer=recipe.trainer | {"learning_rate": 1e-12, "max_steps": 1})
    run, parts = train(still)
    start = predicted(predict(run, parts.validation))
    assert np.ptp(start, axis=0).min() > 1e-3  # it has an opinion, and not of all battles the same

    model = dataclasses.replace(recipe.model, freeze_backbone=True, lora_first_layer=0)
    monkeypatch.setattr("rewardmodel.training.head_fit.PENALTIES", (1e6,))
    run, _ = train(dataclasses.replace(recipe, model=model), parts=parts, overwrite=True)
    np.testing.assert_allclose(predicted(predict(run, parts.validation)), start, atol=1e-3)


@pytest.mark.parametrize(
    ("objective", "keys", "message"),
    [
        (
            "davidson",
            {},
            "model.head_init: davidson reads one response at a time, to which A, B and tie are no answers",
        ),
        ("cross_entropy", {"pooling": "responses"}, "model.head_init: .* does not read the token before the answer"),
        ("cross_entropy", {"num_hidden_layers": 1}, "model.head_init: the language model answers from its last layer"),
        ("cross_entropy", {"keep_head": True}, "model.head_init: keep_head starts from the head that is there"),
    ],
)
def test_what_has_no_answer_is_refused_before_anything_is_written(backbone, tmp_path, objective, keys, message):
    recipe = small_recipe(backbone("llama"), tmp_path, objective=ObjectiveConfig(objective))
    model = dataclasses.replace(recipe.model, head_init="answer", **keys)
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(recipe, model=model))
    assert not recipe.run_folder.exists()


def test_a_backbone_without_an_output_layer_says_so(tmp_path):
    folder = make_backbone("llama", tmp_path / "classifier", num_labels=3, tie_word_embeddings=False)
    recipe = small_recipe(folder, tmp_path)
    model = dataclasses.replace(recipe.model, head_init="answer")
    with pytest.raises(InputError, match="no output layer of a language model"):
        train(dataclasses.replace(recipe, model=model))


def test_answers_that_one_token_does_not_tell_apart_are_refused(monkeypatch, backbone):
    monkeypatch.setattr(answer_head, "ANSWERS", ("A", "A", "tie"))
    with pytest.raises(InputError, match="does not tell the answers A, B and tie apart"):
        answer_tokens(load_tokenizer(backbone("llama")))
