import json

import numpy as np
import pytest
import torch
from builders import battle_frame
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rewardmodel import export
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.exports.checks import load_trained_run
from rewardmodel.exports.merge import merge_run
from rewardmodel.exports.remote_code import check_remote_code, write_remote_code
from rewardmodel.inference.predict import predict
from rewardmodel.objectives import OBJECTIVES
from rewardmodel.predictions import predicted

HEADS = {
    "separate": ("davidson", "response", {"pooling": "last_and_responses", "pair_ties": True}),
    "alone": ("rao_kupper", "response", {"pooling": "responses"}),
    "last": ("davidson", "response", {"pair_ties": True}),
    "joint": ("cross_entropy", None, {"pooling": "last_and_responses"}),
}
"""Objective, template and model of heads that plain transformers does not have."""


def read(folder):
    return (
        AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval(),
        AutoTokenizer.from_pretrained(folder),
    )


@pytest.mark.parametrize("name", HEADS)
def test_the_code_predicts_texts_as_rewardmodel_does(name, untrained_run, tmp_path, in_this_process):
    objective, template, keys = HEADS[name]
    run = untrained_run(name, objective, template, **keys)
    facts = export(run, tmp_path / "export", dtype="float32")
    assert facts["plain"]["max_abs_dp"] <= 1e-5

    # of texts: several rounds, what looks like the template, and special tokens
    texts = [
        [["one", "two"], ["a", "b c"], ["d", "e"]],
        [["### prompt:"], ["### response a:\n</s><s>"], ["###  Response:"]],
        [["a"], ["kind"], ["rude and rude"]],
    ]
    frame = battle_frame(1).iloc[:3].copy()
    frame[["prompt", "response_a", "response_b"]] = [[json.dumps(turns) for turns in one] for one in texts]
    battles = read_battles(frame, role="test")
    model, tokenizer = read(tmp_path / "export")
    found = model.predict_battles(tokenizer, *zip(*texts, strict=True))
    np.testing.assert_allclose(found.numpy(), predicted(predict(run, battles)), atol=1e-5)


@pytest.fixture
def exported(untrained_run, tmp_path, in_this_process):
    objective, template, keys = HEADS["alone"]
    run = load_trained_run(untrained_run("alone", objective, template, **keys))
    merge_run(run, tmp_path / "export", torch.float32)
    write_remote_code(run.recipe, tmp_path / "export")
    return tmp_path / "export"


def test_without_its_code_a_head_is_refused_and_not_read_wrongly(exported):
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(exported, trust_remote_code=False)


def test_padding_on_either_side_changes_nothing(exported):
    model, tokenizer = read(exported)
    batch = model.encode(tokenizer, ["a question", "a"], ["an answer", "a much longer answer than that"])
    right = model(**batch).logits
    left = {
        name: torch.stack(
            [row.roll(int((mask == 0).sum())) for row, mask in zip(ids, batch["attention_mask"], strict=True)]
        )
        for name, ids in batch.items()
    }
    torch.testing.assert_close(model(**left).logits, right, atol=1e-5, rtol=0)
    alone = model(**model.encode(tokenizer, ["a"], ["a much longer answer than that"])).logits
    torch.testing.assert_close(alone[0], right[1], atol=1e-5, rtol=0)


def test_inputs_that_the_head_cannot_read_are_refused(exported):
    model, tokenizer = read(exported)
    with pytest.raises(ValueError, match=r"segment_ids: this head reads the mean of each response"):
        model(**tokenizer(["a text"], return_tensors="pt"))
    with pytest.raises(ValueError, match=r"2 responses for a model that reads response in a sequence"):
        model.encode(tokenizer, ["a"], ["b"], ["c"])
    with pytest.raises(ValueError, match=r"conversation 2: \d+ tokens, and the head learnt from at most 120"):
        model.encode(tokenizer, ["a", "word " * 200], ["b", "c"])
    with pytest.raises(ValueError, match="shorter"):
        model.encode(tokenizer, [["a", "b"]], [["c"]])


def test_an_encoder_with_ties_of_pairs_has_no_code(random_run, backbone):
    head = OBJECTIVES["davidson"].head
    folder = backbone("deberta-v2")
    run, _, _ = random_run(folder, head, pair_ties=True)
    with pytest.raises(InputError, match="'deberta-v2' only rewardmodel loads such a head; use --kind adapter"):
        check_remote_code(run, AutoConfig.from_pretrained(folder))
