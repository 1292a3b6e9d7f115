"""A run and the URL of its server -> how far the served scores are from the run's, asked by many clients at once."""

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from rewardmodel.battles import TEXT_COLUMNS
from rewardmodel.errors import InputError, plural
from rewardmodel.inference.battles import battles_to_compare, single_model
from rewardmodel.progress import Progress
from rewardmodel.run_folder import load_run_recipe
from rewardmodel.serving.serve import KEY_VARIABLE

logger = logging.getLogger(__name__)

CLIENTS = 16
"""Clients that ask at once."""

LIMITS = {"float32": 1e-5}
"""Largest difference that is allowed, by the precision that the server computes in."""

ROUNDED_LIMIT = 2e-2
"""The same in 16 bits, where a sum depends on what else is in the batch."""

TRIES = 20
"""Times that a request is sent while the server is too busy."""


class ServedParity(NamedTuple):
    """How far served scores are from the run's.

    Attributes:
        battles: number of them.
        dtype: precision that the server computes in.
        probabilities: largest difference of a probability of a battle.
        rewards: largest difference of a reward, as a share of the reward where that is above 1; None: the run gives
            none.
        limit: that both must keep.
    """

    battles: int
    dtype: str
    probabilities: float
    rewards: float | None
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the served scores are the run's."""
        return self.probabilities <= self.limit and (self.rewards or 0.0) <= self.limit


def parity(
    run: str | Path, url: str, battles: Any = None, *, overrides: Sequence[str] = (), clients: int = CLIENTS
) -> ServedParity:
    """Return how far the scores that a server gives are from those of its run, computed here.

    Args:
        run: the run folder, or export, that is served.
        url: of the server, like `http://127.0.0.1:8000`.
        battles: as for `predict`, at least 64; default: of the run's validation fold, or of the sample.
        overrides: keys of the run's recipe, as the server was given.
        clients: that ask at once.

    Raises:
        InputError: no trained run, too few battles, or a server that cannot be asked.
    """
    folder = Path(run)
    single_model(folder)
    recipe = load_run_recipe(folder, overrides)
    compared = battles_to_compare(folder, battles)
    health = _ask(f"{url.rstrip('/')}/health")
    if "dtype" not in health:
        raise InputError(f"--url: {url}: no server of rewardmodel; start one with rewardmodel serve {run}")
    served = _ask_battles(url, compared, clients, health["rewards"])

    from rewardmodel.inference.predict import predict  # imports torch

    table = predict(folder, compared, recipe)
    names = [name for name in map(str, table) if name.removeprefix("ab_").removeprefix("ba_").startswith("p_")]
    found = np.array([[answer[name] for name in names] for answer, _ in served], np.float64)
    apart = np.abs(found - table[names].to_numpy(np.float64)).max()
    rewards = None
    if health["rewards"]:
        from rewardmodel.inference.reward_function import reward_function

        logger.info("computing the rewards of %s here …", plural(2 * len(compared), "response"))
        own = reward_function(folder, recipe)(*_conversations(compared))
        off = np.abs(np.array([one for _, one in served]).ravel() - own) / np.maximum(1, np.abs(own))
        rewards = float(off.max())
    limit = LIMITS.get(health["dtype"], ROUNDED_LIMIT)
    return ServedParity(len(compared), health["dtype"], float(np.nan_to_num(apart, nan=np.inf)), rewards, limit)


def format_served_parity(found: ServedParity) -> str:
    """Return what `parity` found as lines for a terminal."""
    lines = [
        f"{found.battles} battles served in {found.dtype}; limit {found.limit:g}",
        f"  {'max |dp|, /battle':<24}{found.probabilities:.2e}",
    ]
    if found.rewards is not None:
        lines.append(f"  {'max |dr|, /reward':<24}{found.rewards:.2e}")
    return "\n".join([*lines, f"the served scores are {'' if found.holds else 'NOT '}the run's"])


def _ask_battles(
    url: str, battles: Dataset, clients: int, with_rewards: bool
) -> list[tuple[dict[str, Any], list[float] | None]]:
    """Return what the server answers for each battle, and the rewards of both responses."""
    rows = [{name: row[name] for name in ("id", *TEXT_COLUMNS)} for row in battles.with_format(None)]

    def ask(row: dict[str, Any]) -> tuple[dict[str, Any], list[float] | None]:
        answer = _ask(f"{url.rstrip('/')}/battle", row)
        if not with_rewards:
            return answer, None
        asked = {"prompt": row["prompt"], "responses": [row["response_a"], row["response_b"]]}
        return answer, _ask(f"{url.rstrip('/')}/reward", asked)["rewards"]

    answers = []
    with ThreadPoolExecutor(clients) as pool, Progress(len(rows), "asking the server") as shown:
        for answer in pool.map(ask, rows):
            answers.append(answer)
            shown.update(1)
    return answers


def _conversations(battles: Dataset) -> tuple[list[list[dict[str, str]]], list[list[dict[str, str]]]]:
    """Return prompts and completions as messages, A and B of each battle in turn; the last answer is the completion."""
    prompts, completions = [], []
    for row in battles.with_format(None):
        for name in ("response_a", "response_b"):
            pairs = zip(row["prompt"], row[name], strict=True)
            messages = [
                {"role": role, "content": text}
                for pair in pairs
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            prompts.append(messages[:-1])
            completions.append(messages[-1:])
    return prompts, completions


def _ask(url: str, body: Any = None) -> Any:
    """Return the JSON that a server answers; a server that is too busy is asked again."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    for _ in range(TRIES):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 429:
                time.sleep(float(error.headers.get("Retry-After", 1)))
                continue
            said = error.read().decode(errors="replace")[:300]
            hint = f"; set {KEY_VARIABLE} to the server's key" if error.code == 401 else ""
            raise InputError(f"--url: {url}: answered {error.code} ({said}){hint}") from error
        except (OSError, ValueError) as error:
            raise InputError(f"--url: {url}: cannot be asked ({error}); is the server running?") from error
    raise InputError(f"--url: {url}: stayed too busy; try again later")
