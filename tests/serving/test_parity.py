import json
import urllib.error
import urllib.request
from io import BytesIO

import pytest
from builders import battle_frame, write_csv

from rewardmodel.cli import main
from rewardmodel.errors import InputError
from rewardmodel.serving import parity as module
from rewardmodel.serving.parity import ServedParity, format_served_parity, parity


@pytest.fixture
def through(monkeypatch, separate_judge):
    """Return a function that lets requests go to a server in this process: through(client)."""
    monkeypatch.setattr("rewardmodel.inference.predict.load_predictor", lambda *_: separate_judge.predictor)
    monkeypatch.setattr("rewardmodel.inference.reward_function.load_predictor", lambda *_: separate_judge.predictor)

    def connect(client, change=lambda answer: answer):
        def ask(request, timeout):
            path = "/" + request.full_url.split("/", 3)[3]
            if request.data is None:
                answer = client.get(path)
            else:
                answer = client.post(path, content=request.data, headers=dict(request.header_items()))
            if answer.status_code != 200:
                raise urllib.error.HTTPError(
                    request.full_url, answer.status_code, "", answer.headers, BytesIO(answer.content)
                )
            return BytesIO(json.dumps(change(answer.json())).encode())

        monkeypatch.setattr(urllib.request, "urlopen", ask)

    return connect


def test_served_scores_are_the_runs(separate_run, separate, through, tmp_path, capsys):
    through(separate)
    file = write_csv(battle_frame(16), tmp_path / "battles.csv")
    assert main(["parity", str(separate_run), "--url", "http://here:1/", "--battles", str(file)]) == 0
    out = capsys.readouterr().out
    assert "64 battles served in float32; limit 1e-05" in out
    assert "max |dr|, /reward" in out
    assert out.endswith("the served scores are the run's\n")


def test_other_scores_are_told_apart(separate_run, separate, through, battles, monkeypatch, capsys):
    def change(answer):
        return {**answer, "p_tie": answer["p_tie"] + 3e-5} if "p_tie" in answer else answer

    through(separate, change)
    found = parity(separate_run, "http://here:1", battles)
    assert found.battles == 80
    assert found.probabilities == pytest.approx(3e-5, abs=1e-6)
    assert found.rewards <= 1e-5
    assert not found.holds
    assert format_served_parity(found).endswith("the served scores are NOT the run's")
    assert ServedParity(64, "bfloat16", 1e-2, None, module.ROUNDED_LIMIT).holds
    monkeypatch.setattr(module, "parity", lambda *_, **__: found)
    assert main(["parity", str(separate_run), "--url", "http://here:1"]) == 1


def test_a_server_that_cannot_be_asked_is_named(separate_run, battles, separate, through, monkeypatch):
    with pytest.raises(InputError, match="--battles: 3 battles; give at least 64"):
        parity(separate_run, "http://127.0.0.1:9", battles.select(range(3)))
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/health: cannot be asked .*; is the server running"):
        parity(separate_run, "http://127.0.0.1:9", battles)
    through(separate, lambda answer: {"other": 1})
    with pytest.raises(InputError, match="no server of rewardmodel; start one with rewardmodel serve"):
        parity(separate_run, "http://here:1", battles)


def test_a_busy_server_is_asked_again(separate, through, monkeypatch):
    waits, busy = [], [429, 429]
    through(separate)
    ask = urllib.request.urlopen

    def sometimes(request, timeout):
        if busy:
            headers = {"Retry-After": "2"}
            raise urllib.error.HTTPError(request.full_url, busy.pop(), "", headers, BytesIO(b"busy"))
        return ask(request, timeout)

    monkeypatch.setattr(urllib.request, "urlopen", sometimes)
    monkeypatch.setattr(module.time, "sleep", waits.append)
    assert module._ask("http://here:1/health")["status"] == "ok"
    assert waits == [2, 2]
    busy[:] = [401]
    with pytest.raises(InputError, match="set REWARDMODEL_API_KEY to the server's key"):
        module._ask("http://here:1/health")
