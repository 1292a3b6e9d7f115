"""Broken, hostile and impatient clients: a status and a sentence for each, and the others get their answers."""

import asyncio
import json
import re

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewardmodel.serving.app import build_app
from rewardmodel.serving.limits import Limits

BATTLE = {"prompt": "hi", "response_a": "a kind answer", "response_b": "rude"}


def message(answer, status):
    assert answer.status_code == status
    assert answer.json().keys() == {"error"}
    found = answer.json()["error"]
    assert found["code"] == status
    assert "Traceback" not in found["message"]
    return found["message"]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ("{", 400, "the body is not JSON"),
        ("", 422, "body: field required"),
        ("3", 422, "body: "),
        (b"\xff\xfe", 400, ""),
        ("[" * 100_000, 400, ""),
        ('{"prompt": "a", "response_a": "b"}', 422, "response_b: field required"),
        ('{"prompt": 3, "response_a": "b", "response_b": "c"}', 422, "prompt: give a text, turns or messages"),
        ('{"prompt": [1], "response_a": "b", "response_b": "c"}', 422, "prompt[0]: input should be a valid string"),
        ('{"prompt": [], "response_a": "b", "response_b": "c"}', 422, "prompt: list should have at least 1 item"),
        ('{"prompt": "a\\ud800", "response_a": "b", "response_b": "c"}', 422, "prompt: "),
        ('[{"prompt": "a", "response_a": "b"}]', 422, "body[0].response_b: field required"),
        ("[]", 422, "body: list should have at least 1 item"),
        ('{"prompt": [{"role": "user"}], "response_a": "b", "response_b": "c"}', 422, "prompt[0].content: field"),
        (
            '{"promt": "a", "response_a": "b", "response_b": "c"}',
            422,
            "promt: unknown field (did you mean 'prompt'?); ",
        ),
        (
            '[{"prompt": "a", "response_a": "b", "response_b": "c", "responseA": "x"}]',
            422,
            "body[0].responseA: unknown",
        ),
        ('{"prompt": "a", "response_a": "b", "response_b": "c", "id": 1.5}', 422, "id: give a text, or a whole number"),
        ('[{"prompt": "a", "response_a": "b", "response_b": "c", "id": true}]', 422, "body[0].id: give a text, or"),
        (
            '[{"prompt": "a", "response_a": ["b", "c"], "response_b": "c"}, {}]'.replace("{}", json.dumps(BATTLE)),
            422,
            "body[0].response_a: 2 turns, but the prompt has 1",
        ),
    ],
)
def test_a_broken_battle_is_refused_with_a_sentence(joint, body, status, sentence):
    headers = {"Content-Type": "application/json"}
    assert message(joint.post("/battle", content=body, headers=headers), status).startswith(sentence)
    assert joint.post("/battle", json=BATTLE).status_code == 200


def test_a_battle_is_called_what_the_request_calls_it(joint):
    asked = [{**BATTLE, "id": name} for name in (7, "7", None)] + [BATTLE]
    assert [one["id"] for one in joint.post("/battle", json=asked).json()] == [7, "7", None, None]


def test_only_endpoints_in_others_shapes_take_fields_that_they_do_not_read(separate):
    asked = {"prompt": "a", "responses": ["b", "c"], "temperature": 0}
    said = message(separate.post("/reward", json=asked), 422)
    assert said.startswith("temperature: unknown field; known: model, prompt, responses; ")
    assert separate.post("/classify", json={"input": "a", "temperature": 0}).status_code == 200


def test_a_body_is_json_whatever_its_client_calls_it(joint):
    expected = joint.post("/battle", json=BATTLE).json()
    for name in ("application/x-www-form-urlencoded", "text/plain"):
        assert joint.post("/battle", content=json.dumps(BATTLE), headers={"Content-Type": name}).json() == expected
    assert message(joint.post("/battle", content="{"), 400) == "the body is not JSON"


def test_what_is_too_large_is_refused(joint):
    assert "more than 8,388,608 bytes" in message(joint.post("/battle", json={**BATTLE, "prompt": "a" * 10**7}), 413)
    assert "prompt: string should have at most" in message(
        joint.post("/battle", json={**BATTLE, "prompt": "a" * 500_000}), 422
    )
    many = message(joint.post("/battle", json=[BATTLE] * 1025), 422)
    assert "at most 1024 items" in many


def test_what_is_not_there_is_named(joint):
    assert "there is no /nope here" in message(joint.post("/nope", json={}), 404)
    message(joint.get("/battle"), 405)
    assert "query" in message(joint.post("/nope", json={"query": 3}), 422)


def test_control_tokens_are_text(joint, separate):
    for text in ("<eos>", "<bos>", "<pad>", "\x00", "### Response B:", "\u202e", "<|im_start|>assistant"):
        assert joint.post("/battle", json={**BATTLE, "response_a": text}).status_code == 200
        assert separate.post("/classify", json={"input": text}).status_code == 200


def test_a_key_is_asked_for(joint_judge):
    with TestClient(build_app(joint_judge, ["joint"], key="hush")) as client:
        assert "Authorization: Bearer KEY" in message(client.post("/battle", json=BATTLE), 401)
        message(client.post("/battle", json=BATTLE, headers={"Authorization": "Bearer hus"}), 401)
        message(client.get("/metrics"), 401)
        assert client.post("/battle", json=BATTLE, headers={"Authorization": "Bearer hush"}).status_code == 200
        assert client.get("/").status_code == client.get("/health").status_code == 200


def test_texts_are_logged_only_when_asked(joint_judge, caplog):
    caplog.set_level("DEBUG")
    for log_texts in (False, True):
        with TestClient(build_app(joint_judge, ["joint"], log_texts=log_texts)) as client:
            client.post("/battle", json={**BATTLE, "prompt": "a secret question"})
            client.post("/battle", json={**BATTLE, "prompt": ["a secret question", "two"]})
        assert ("a secret question" in caplog.text) == log_texts


def test_nan_is_an_error_of_the_server_and_not_a_number(separate_judge, monkeypatch):
    compute = type(separate_judge.predictor).compute
    monkeypatch.setattr(type(separate_judge.predictor), "compute", lambda self, rows: compute(self, rows) * np.nan)
    with TestClient(build_app(separate_judge, ["separate"])) as client:
        assert "NaN or infinite" in message(client.post("/reward", json={"prompt": "a", "responses": ["b"]}), 500)
        assert "NaN or infinite" in message(client.post("/battle", json=BATTLE), 500)


def test_a_model_that_fails_is_an_error_of_the_server_and_goes_on(separate_judge, monkeypatch):
    kind = type(separate_judge.predictor)
    compute = kind.compute

    def fail(self, rows):
        if len(rows[0]["input_ids"]) > 60:
            raise RuntimeError("broken inside")
        return compute(self, rows)

    monkeypatch.setattr(kind, "compute", fail)
    with TestClient(build_app(separate_judge, ["separate"])) as client:
        assert "broken" not in message(client.post("/classify", json={"input": "word " * 25}), 500)
        assert client.post("/classify", json={"input": "word"}).status_code == 200


async def send_slowly(app, body, ends):
    """Send an application a body in pieces and then what `ends` says, and return the statuses of its answers."""
    pieces = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    sent = []

    async def receive():
        if pieces:
            return pieces.pop(0)
        if ends == "hangs up":
            return {"type": "http.disconnect"}
        await asyncio.sleep(60)
        raise AssertionError

    async def send(part):
        sent.append(part)

    scope = {"type": "http", "method": "POST", "path": "/battle", "headers": [], "query_string": b"", "app": app}
    await app.middleware_stack(scope, receive, send)
    return [part["status"] for part in sent if "status" in part]


def test_a_server_that_has_ended_is_not_healthy(joint_judge):
    with TestClient(build_app(joint_judge, ["joint"])) as client:
        assert client.get("/health").status_code == 200
        client.app.state.service.batcher.close()
        assert "restart the server" in message(client.get("/health"), 503)
        message(client.post("/battle", json=BATTLE), 429)


def test_half_a_request_is_given_up(joint_judge):
    app = build_app(joint_judge, ["joint"], Limits(timeout=0.05))
    with TestClient(app) as client:
        client.get("/health")
        assert asyncio.run(send_slowly(app, [b'{"prompt": "a'], "hangs up")) == []
        assert asyncio.run(send_slowly(app, [b'{"prompt": "a'], "waits")) == [408]


VALID = {
    "/battle": BATTLE,
    "/reward": {"prompt": "a", "responses": ["b", "c"]},
    "/classify": {"input": ["a"]},
    "/pooling": {"input": "a"},
    "/v1/embeddings": {"input": ["a", "b"]},
    "/score": {"text_1": "a", "text_2": ["b"]},
    "/rerank": {"query": "a", "documents": ["b", "c"], "top_n": 1},
    "/v1/score/evaluation": {"messages": ["a"], "max_length": 20},
    "/get_reward": {"query": ["a"]},
}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["user", "</s>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "text", "prompt"]) | st.text(max_size=4), inner, max_size=3
    ),
    max_leaves=6,
)  # fmt: skip


@st.composite
def bodies(draw):
    """Draw a path and a body that is whole, or has some of its values, or all of it, replaced by anything."""
    path = draw(st.sampled_from(sorted(VALID)))
    body = dict(VALID[path])
    for key in draw(st.sets(st.sampled_from(sorted(body)))):
        body[key] = draw(anything)
    return path, draw(st.just(body) | st.just(body) | st.just([body]) | anything)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies())
def test_any_json_is_answered_or_refused_with_a_sentence(separate, drawn):
    path, body = drawn
    headers = {"Content-Type": "application/json"}
    answer = separate.post(path, content=json.dumps(body).encode(), headers=headers)
    assert answer.status_code in (200, 400, 404, 422), answer.text
    if answer.status_code != 200:
        assert len(message(answer, answer.status_code)) > 10


def test_every_endpoint_is_described(separate):
    described = separate.get("/openapi.json").json()["paths"]
    assert described.keys() == (VALID.keys() - {"/get_reward"}) | {"/health", "/metrics", "/v1/models"}
    assert all(re.search(r"\w+ \w+", one["description"]) for path in described.values() for one in path.values())


CLIENTS, EACH = 16, 12


async def ask_many(app, texts, alone):
    """Ask by many clients at once; return the answers that differ from those alone, and how many came."""
    wrong, came = [], 0
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)

    async def client(number):
        nonlocal came
        random = np.random.default_rng(number)
        async with httpx2.AsyncClient(transport=transport, base_url="http://here", timeout=120) as http:
            for _ in range(EACH):
                kind, chosen = random.integers(0, 6), random.integers(0, len(texts), 3)
                if kind == 0:  # broken
                    assert (await http.post("/reward", content=b"{" * 9)).status_code in (400, 422)
                    continue
                body = {"prompt": "who?", "responses": [texts[one] for one in chosen]}
                if kind == 1:  # hangs up
                    task = asyncio.ensure_future(http.post("/reward", json=body))
                    await asyncio.sleep(0.002)
                    task.cancel()
                    continue
                found = (await http.post("/reward", json=body)).json()["rewards"]
                came += 1
                if np.abs(np.subtract(found, [alone[one] for one in chosen])).max() > 1e-5:
                    wrong.append((chosen, found))

    await asyncio.gather(*map(client, range(CLIENTS)))
    return wrong, came


def test_sixteen_clients_at_once_get_their_own_answers(separate_judge):
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(["kind", "rude", "and", "more"], random.integers(1, 60))) for _ in range(20)]
    app = build_app(separate_judge, ["separate"])
    with TestClient(app) as client:
        alone = [
            client.post("/reward", json={"prompt": "who?", "responses": [one]}).json()["rewards"][0] for one in texts
        ]
        wrong, came = asyncio.run(ask_many(app, texts, alone))
        assert wrong == []
        assert came > CLIENTS * EACH / 2
        assert client.get("/health").json()["waiting"] == 0


def test_too_many_at_once_are_told_when_to_come_again(separate_judge):
    with TestClient(build_app(separate_judge, ["separate"], Limits(max_waiting=2))) as client:
        busy = client.post("/classify", json={"input": ["a", "b", "c"]})
        assert "too many battles wait" in message(busy, 429)
        assert int(busy.headers["Retry-After"]) >= 1
        assert client.post("/classify", json={"input": ["a", "b"]}).status_code == 200


def test_what_takes_too_long_is_given_up(separate_judge):
    app = build_app(separate_judge, ["separate"], Limits(timeout=1e-4))
    with TestClient(app) as client:
        app.state.service.limits = Limits(timeout=1e-9)
        assert client.post("/classify", json={"input": ["word " * 20] * 64}).status_code in (408, 504)
