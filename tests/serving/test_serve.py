"""The server as it is started and stopped: refusals before torch, and a stop that finishes what was begun."""

import json
import logging
import os
import signal
import socket
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest

from rewardmodel.errors import InputError
from rewardmodel.model.forward import Predictor
from rewardmodel.serving import serve as module
from rewardmodel.serving.limits import Limits
from rewardmodel.serving.serve import serve


@pytest.fixture
def loaded(separate_judge, monkeypatch):
    """Serve the model in memory instead of loading it again."""
    monkeypatch.setattr("rewardmodel.inference.judge.load_judge", lambda run, recipe: separate_judge)


def test_a_stop_finishes_what_was_begun(separate_run, loaded, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.delenv(module.KEY_VARIABLE, raising=False)
    for name in ("rewardmodel.inference.predict", "rewardmodel.predictions"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    began, answers, compute = threading.Event(), [], Predictor.compute

    def slowly(self, rows):
        began.set()
        time.sleep(0.3)
        return compute(self, rows)

    monkeypatch.setattr(Predictor, "compute", slowly)

    def ask(port):
        body = json.dumps({"input": ["a", "b"]}).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}/classify", body, headers), timeout=30
        ) as answer:
            answers.append(json.load(answer))

    def person():
        while not (lines := [one for one in caplog.messages if "is served at" in one]):
            time.sleep(0.02)
        port = int(lines[0].rsplit(":", 1)[1])
        asking = threading.Thread(target=ask, args=(port,))
        asking.start()
        assert began.wait(30)
        os.kill(os.getpid(), signal.SIGTERM)
        asking.join()

    thread = threading.Thread(target=person)
    thread.start()
    serve(separate_run, port=0)
    thread.join()
    assert len(answers[0]["data"]) == 2
    assert caplog.messages[-1] == "stopped; every request that was started has been answered"
    assert "anyone who reaches" not in caplog.text


def test_what_cannot_be_served_is_said_before_a_model_is_loaded(separate_run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no recipe\.yaml there"):
        serve(tmp_path)
    with pytest.raises(InputError, match="--timeout: 0; give a number above 0"):
        serve(separate_run, limits=Limits(timeout=0))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"--port: 127.0.0.1:{port} cannot be listened on"):
            serve(separate_run, port=port)
    with pytest.raises(InputError, match="unknown key"):
        serve(separate_run, overrides=["--inference.nope", "1"])
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "uvicorn" else SimpleNamespace())
    with pytest.raises(InputError, match=r"needs uvicorn; install it with: pip install 'rewardmodel\[serve\]'"):
        serve(separate_run)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("gpu-1", False)],
)
def test_other_machines_are_let_in_knowingly(host, loopback):
    assert module._is_loopback(host) == loopback
