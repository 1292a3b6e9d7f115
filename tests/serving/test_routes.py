"""Every endpoint answers what the library computes, in the shape that its consumer reads."""

import numpy as np
import pytest
import torch
from builders import plain_logits

from rewardmodel.inference.predict import predict
from rewardmodel.inference.reward_function import reward_function

TEXTS = ["### Prompt:\nhello\n\n### Response:\na kind answer", "short", "<bos>begins with BOS already, and goes on"]


@pytest.fixture(scope="module")
def expected(separate_judge):
    """Return the reward of each text, of its tokens alone, by transformers' own attention."""
    tokenizer = separate_judge.predictor.tokenizer
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=not text.startswith("<bos>"))["input_ids"]
        assert ids.index(tokenizer.bos_token_id) == 0
        assert ids.count(tokenizer.bos_token_id) == 1
        rows.append({"input_ids": ids, "segment_ids": [0] * len(ids), "branches": [0, len(ids)]})
    with torch.no_grad():
        return plain_logits(separate_judge.predictor.model, rows)[:, 0].tolist()


def rows_of(battles):
    return [{name: row[name] for name in ("id", "prompt", "response_a", "response_b")} for row in battles]


@pytest.mark.parametrize("kind", ["joint", "separate"])
def test_a_battle_gets_what_predict_says(kind, request, battles):
    client, run = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_run")
    battles = battles.select(range(24))
    answers = client.post("/battle", json=rows_of(battles)).json()
    table = predict(run, battles)
    names = [name for name in table if "p_" in name]
    assert len(names) == (9 if kind == "joint" else 6)
    assert [one["id"] for one in answers] == battles["id"][:]
    found = np.array([[one[name] for name in names] for one in answers])
    assert np.abs(found - table[names]).max(axis=None) <= 1e-6
    assert len({one["winner"] for one in answers}) > 1
    for one in answers:
        by_order = [max(("model_a", "model_b", "tie"), key=lambda w, o=o: one[f"{o}_p_{w}"] or 0) for o in ("ab", "ba")]
        assert one["flips"] == (by_order[0] != by_order[1] if kind == "joint" else None)


def test_texts_turns_and_messages_say_the_same(joint):
    battle = {"prompt": "who?", "response_a": "me, kind", "response_b": "you"}
    first = joint.post("/battle", json=battle).json()
    turns = {name: [text] for name, text in battle.items()}
    assert joint.post("/battle", json=turns).json() == pytest.approx(first, abs=1e-6)
    messages = {**battle, "prompt": [{"role": "user", "content": "who?"}]}
    assert joint.post("/battle", json=messages).json() == pytest.approx(first, abs=1e-6)
    wrong = joint.post("/battle", json={**battle, "prompt": ["who?", "and then?"]})
    assert wrong.status_code == 422
    assert "response_a: 1 turn, but the prompt has 2" in wrong.json()["error"]["message"]


def test_rewards_of_many_responses_are_those_of_each(separate, separate_run, separate_judge):
    prompt, responses = "a long question " * 10, [f"answer {number} kind " * number for number in range(1, 9)]
    found = separate.post("/reward", json={"prompt": prompt, "responses": responses}).json()
    alone = reward_function(separate_run)([prompt] * 8, responses)
    assert found["rewards"] == pytest.approx(alone, abs=1e-5)
    assert found["best"] == int(np.argmax(alone))
    (row,) = separate_judge.reward_rows([([prompt], [one]) for one in responses])
    assert len(row["branches"]) == 9
    assert row["branches"][0] > 10  # the prompt, once


CONSUMERS = {
    "vLLM's classify, and verl's": ("/classify", "input", lambda one: [row["probs"][-1] for row in one["data"]]),
    "vLLM's pooling": ("/pooling", "input", lambda one: [row["data"][-1] for row in one["data"]]),
    "verl's of SGLang": ("/v1/embeddings", "input", lambda one: [row["embedding"][-1] for row in one["data"]]),
    "LLaMA-Factory's": ("/v1/score/evaluation", "messages", lambda one: one["scores"]),
    "OpenRLHF's": ("/get_reward", "query", lambda one: one["rewards"]),
    "OpenRLHF's, to the root": ("/", "query", lambda one: one["scores"]),
}
"""Who asks -> where, the key of the texts, and how the rewards are read from the answer."""


@pytest.mark.parametrize("name", CONSUMERS)
def test_finished_texts_are_scored_as_they_are(name, separate, expected):
    path, key, read = CONSUMERS[name]
    found = separate.post(path, json={key: TEXTS, "model": "separate"})
    assert found.status_code == 200
    assert read(found.json()) == pytest.approx(expected, abs=1e-5)


def test_the_shapes_are_those_that_the_consumers_read(separate, expected):
    one = separate.post("/classify", json={"model": "separate", "input": TEXTS[1], "use_activation": False}).json()
    (entry,) = one["data"]
    assert entry == {"index": 0, "label": "reward", "probs": [entry["probs"][0]], "num_classes": 1}
    sigmoid = separate.post("/v1/classify", json={"input": TEXTS[1], "use_activation": True}).json()["data"][0]["probs"]
    assert sigmoid == pytest.approx([1 / (1 + np.exp(-expected[1]))])
    embedding = separate.post("/v1/embeddings", json={"input": TEXTS}).json()
    assert embedding.keys() >= {"object", "data", "model", "usage"}
    evaluation = separate.post("/v1/score/evaluation", json={"model": "separate", "messages": TEXTS}).json()
    assert evaluation.keys() == {"id", "object", "model", "scores"}
    remote = separate.post("/any/path", json={"query": TEXTS, "prompts": ["### Prompt:\nhello"] * 3, "labels": None})
    assert remote.json().keys() == {"rewards", "scores", "extra_logs"}
    assert separate.get("/v1/models").json()["data"][0]["id"] == "separate"


def test_pairs_of_texts_are_joined_as_they_are(separate):
    query, documents = "### Prompt:\nhello\n\n### Response:\n", ["a kind answer", "no", "a rude one"]
    whole = separate.post("/classify", json={"input": [query + one for one in documents]}).json()["data"]
    whole = [one["probs"][0] for one in whole]
    for body in (
        {"text_1": query, "text_2": documents},
        {"queries": [query] * 3, "documents": documents},
    ):
        score = separate.post("/score", json=body).json()
        assert [one["index"] for one in score["data"]] == [0, 1, 2]
        assert [one["score"] for one in score["data"]] == pytest.approx(whole, abs=1e-5)
    asked = {"model": "separate", "query": query, "documents": documents, "top_n": 2, "return_documents": True}
    results = separate.post("/v1/rerank", json=asked).json()["results"]
    order = np.argsort(whole)[::-1][:2].tolist()
    assert [one["index"] for one in results] == order
    assert [one["relevance_score"] for one in results] == pytest.approx(sorted(whole)[:0:-1], abs=1e-5)
    assert [one["document"]["text"] for one in results] == [documents[index] for index in order]
    assert "give text_1 and text_2" in separate.post("/score", json={"text_1": "a"}).json()["error"]["message"]
    few = separate.post("/score", json={"text_1": ["a", "b"], "text_2": ["c"]}).json()["error"]["message"]
    assert few.startswith("2 texts for 1")


def test_a_text_that_is_too_long_is_refused_or_cut_where_that_is_asked(separate, separate_judge):
    text = "word " * 400
    refused = separate.post("/classify", json={"input": text})
    assert refused.status_code == 422
    assert "tokens; at most 160 are scored: shorten it, or serve with --max-tokens" in refused.text
    cut = separate.post("/v1/score/evaluation", json={"messages": [text], "max_length": 50}).json()["scores"]
    (row,) = separate_judge.verbatim_rows([text], 50, shared=False)
    assert row["length"] == 50
    logits = separate_judge.predictor.compute([row])
    assert cut == pytest.approx([float(logits[0, 0])], abs=1e-5)


ASKING_FOR_REWARDS = {
    "/reward": {"prompt": "a", "responses": ["b"]},
    "/classify": {"input": "a"},
    "/pooling": {"input": "a"},
    "/v1/embeddings": {"input": "a"},
    "/score": {"text_1": "a", "text_2": "b"},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/v1/score/evaluation": {"messages": ["a"]},
    "/get_reward": {"query": ["a"]},
}


@pytest.mark.parametrize("path", ASKING_FOR_REWARDS)
def test_a_model_with_a_tie_class_does_not_pass_for_a_reward(path, joint, separate):
    refused = joint.post(path, json=ASKING_FOR_REWARDS[path])
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert "objective cross_entropy compares two responses and gives no reward" in message
    assert "train with rao_kupper, davidson or bradley_terry; or ask /battle" in message
    assert separate.post(path, json=ASKING_FOR_REWARDS[path]).status_code == 200


@pytest.mark.parametrize("path", [*ASKING_FOR_REWARDS, "/battle"])
def test_a_model_that_is_not_served_is_named(path, separate):
    body = {**ASKING_FOR_REWARDS.get(path, {"prompt": "a", "response_a": "b", "response_b": "c"}), "model": "gpt"}
    if path == "/get_reward":  # OpenRLHF names no model
        return
    answer = separate.post(path, json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "model: there is no 'gpt' here; this is 'separate'"


def test_health_and_metrics_say_what_is_served_and_how_much(separate):
    health = separate.get("/health").json()
    assert (health["model"], health["dtype"], health["rewards"], health["waiting"]) == ("separate", "float32", True, 0)
    separate.post("/reward", json={"prompt": "a", "responses": ["b", "c"]})
    lines = dict(line.rsplit(" ", 1) for line in separate.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(lines['rewardmodel_requests_total{path="/reward",status="200"}']) >= 1
    assert float(lines["rewardmodel_sequences_total"]) > float(lines["rewardmodel_rows_total"]) > 0
    assert float(lines["rewardmodel_tokens_total"]) > 0


def test_special_tokens_in_texts_are_plain_text_as_in_training_unless_the_text_is_finished(separate_judge):
    tokenizer = separate_judge.predictor.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token
    (row,) = separate_judge.reward_rows([(["hello"], [f"a {eos} b"])])
    assert (np.asarray(row["input_ids"]) == tokenizer.eos_token_id).sum() == 0
    (row,) = separate_judge.verbatim_rows([f"a {eos} b"], None, shared=False)
    assert (row["input_ids"] == tokenizer.eos_token_id).sum() == 1
    (row,) = separate_judge.verbatim_rows([f"{tokenizer.bos_token}a"], None, shared=False)
    assert (row["input_ids"] == bos).sum() == 1
