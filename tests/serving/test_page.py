"""The page in a real headless Chromium: a person types, clicks and reads. Skipped where there is none."""

import threading

import pytest
import uvicorn
from browser import CHROMIUM, Browser

from rewardmodel.serving.app import build_app

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")


@pytest.fixture
def server(joint_judge):
    """Return a function that starts a real server on a free port: server(key=None) -> its URL."""
    running = []

    def start(**options):
        server = uvicorn.Server(uvicorn.Config(build_app(joint_judge, ["joint"], **options), port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            thread.join(0.02)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture
def browser(tmp_path):
    opened = Browser(tmp_path / "profile", width=390, height=800, dark=True)
    yield opened
    opened.close()


def test_a_person_types_clicks_and_reads(server, browser, joint):
    texts = {
        "prompt": "What is 2 + 2?",
        "response_a": "a kind 4",
        "response_b": "<img src=x onerror=document.title='no'>",
    }
    browser.open(server(key="hush"))
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"  # dark
    for name, text in texts.items():
        browser.type(name, text)

    # without the key, the page asks for it
    browser.click("ask")
    browser.wait_for("!document.getElementById('asks_key').hidden")
    assert "give the key" in browser.evaluate("document.getElementById('error').innerText")
    browser.type("key", "hush")
    browser.click("ask")
    browser.wait_for("!document.getElementById('result').hidden")

    # what it shows is what the endpoint answers
    answer = joint.post("/battle", json=texts).json()
    shown = browser.evaluate("[...document.querySelectorAll('#bars .value')].map(one => one.innerText)")
    assert shown == [f"{100 * answer[f'p_{name}']:.1f} %" for name in ("model_a", "model_b", "tie")]
    widths = browser.evaluate(
        "[...document.querySelectorAll('.fill')].map(one => one.offsetWidth / one.parentNode.clientWidth)"
    )
    assert widths == pytest.approx([answer[f"p_{name}"] for name in ("model_a", "model_b", "tie")], abs=0.02)
    orders = browser.evaluate("document.getElementById('orders').innerText")
    assert f"{100 * answer['ba_p_tie']:.1f} %" in orders
    note = browser.evaluate("document.getElementById('order').innerText")
    assert ("do not rely" in note) == answer["flips"]

    # it fits a phone, needs nothing from elsewhere, and runs nothing that was typed
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    loaded = browser.evaluate("performance.getEntriesByType('resource').map(one => one.name)")
    assert {url.rsplit("/", 1)[1] for url in loaded} <= {"health", "battle", ""}
    assert browser.evaluate("document.title") == "Which response is better?"
