"""How many battles a second a server answers, against the same battles predicted offline on the same machine.

    python scripts/bench_serving.py runs/quickstart sample --json scripts/results/serving.json

The server is a separate process; clients are threads here, each with a battle a request, one after the other. Offline
is the same model in this process, all battles in one call; loading is timed in neither, tokenising in both. A run that
gives rewards is also asked for the best of eight responses: in one request, where the prompt is computed once, and in
eight at once, where it is not.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

RESPONSES = 8
"""Responses to one prompt, of which the best is wanted."""


@contextmanager
def served(run: str) -> Iterator[str]:
    """Serve a run in a separate process; the URL."""
    command = [sys.executable, "-m", "rewardmodel", "serve", run, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"is served at (\S+)", line):
                yield found[1]
                break
        else:
            sys.exit(f"error: rewardmodel serve {run} did not start")
    finally:
        process.terminate()
        process.wait()


def post(url: str, body: Any) -> Any:
    """Return what a server answers."""
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=600) as answer:
        return json.load(answer)


def ask(url: str, path: str, bodies: Sequence[Any], clients: int) -> dict[str, float]:
    """Send bodies by a number of clients at once and return requests a second, and seconds that they took."""

    def one(body: Any) -> float:
        start = time.perf_counter()
        post(url + path, body)
        return time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds = list(pool.map(one, bodies))
    wall = time.perf_counter() - start
    p50, p99 = np.quantile(seconds, [0.5, 0.99]).tolist()
    return {"a_second": round(len(bodies) / wall, 3), "p50_s": round(p50, 4), "p99_s": round(p99, 4)}


def best_of(url: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return prompts a second whose eight responses were scored, in one request and in eight at once."""
    pool = [row[name][-1] for row in rows for name in ("response_a", "response_b")]
    asked = [
        {"prompt": row["prompt"][-1], "responses": [pool[(number + other) % len(pool)] for other in range(RESPONSES)]}
        for number, row in enumerate(rows)
    ]
    together = ask(url, "/reward", asked, 1)["a_second"]
    alone = [{**one, "responses": [response]} for one in asked for response in one["responses"]]
    apart = ask(url, "/reward", alone, RESPONSES)["a_second"] / RESPONSES
    return {"prompt_shared": together, "prompt_repeated": round(apart, 3), "times": round(together / apart, 2)}


def measure(run: str, battles: Any, clients: Sequence[int], start: Callable[[str], Any] = served) -> dict[str, Any]:
    """Return the figures of a run.

    Args:
        run: its folder.
        battles: to ask about.
        clients: numbers of clients, each measured with all battles.
        start: of a server: the run -> a context of its URL.
    """
    from rewardmodel.inference.judge import load_judge

    rows = [{name: row[name] for name in ("id", "prompt", "response_a", "response_b")} for row in battles]
    judge = load_judge(run)
    judge.predict(rows[:2])
    began = time.perf_counter()
    judge.predict(rows)
    offline = len(rows) / (time.perf_counter() - began)
    figures: dict[str, Any] = {
        "battles": len(rows),
        "device": str(judge.predictor.device),
        "dtype": str(judge.predictor.dtype).removeprefix("torch."),
        "offline_a_second": round(offline, 3),
        "clients": {},
    }
    rewards = judge.no_reward is None
    del judge
    with start(run) as url:
        ask(url, "/battle", rows[:2], 1)
        for number in clients:
            found = ask(url, "/battle", rows, number)
            figures["clients"][str(number)] = {**found, "of_offline": round(found["a_second"] / offline, 3)}
        if rewards:
            figures["best_of_8"] = best_of(url, rows[: max(4, len(rows) // RESPONSES)])
    return figures


def main() -> None:
    """Parse, measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a trained run")
    parser.add_argument("battles", help="a file of battles, or sample")
    parser.add_argument("--limit", type=int, default=128, help="battles to ask about")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    from rewardmodel.data.formats import read_battles

    battles = read_battles(options.battles)
    figures = measure(options.run, battles.select(range(min(options.limit, len(battles)))), options.clients)
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
