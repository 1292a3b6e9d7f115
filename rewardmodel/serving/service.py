"""Texts of a request -> token rows -> logits from the batcher -> predictions or rewards of that request.

Tokens are made and tables are built in a separate thread, one at a time: a tokenizer has settings that change from
call to call, and the event loop must stay free.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fastapi import HTTPException, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rewardmodel.battles import TEXT_COLUMNS
from rewardmodel.errors import InputError, plural
from rewardmodel.inference.judge import Battle, Judge, TokenRow
from rewardmodel.inference.reward_function import conversation_turns
from rewardmodel.serving.answers import Answer
from rewardmodel.serving.batcher import Batcher, TooBusyError
from rewardmodel.serving.limits import Limits
from rewardmodel.serving.shapes import BattleRequest, Message, RewardRequest
from rewardmodel.serving.tables import Tables


class Figures:
    """What `/metrics` reports, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry, "namespace": "rewardmodel"}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **kept)
        self.seconds = Histogram("request_seconds", "Seconds from request to answer.", ["path"], **kept)
        self.batches = Counter("batches", "Batches that the model computed.", **kept)
        self.rows = Counter("rows", "Battles, groups of responses and texts that the model computed.", **kept)
        self.sequences = Counter("sequences", "Sequences that the model computed.", **kept)
        self.tokens = Counter("tokens", "Tokens that the model computed.", **kept)
        self.waiting = Gauge("waiting_rows", "Battles, groups of responses and texts that wait.", **kept)
        self.dropped = Counter("dropped_requests", "Requests whose client hung up or whose time was up.", **kept)

    def count_batch(self, rows: int, sequences: int, tokens: int) -> None:
        """Add a batch that was computed."""
        counted = ((self.batches, 1), (self.rows, rows), (self.sequences, sequences), (self.tokens, tokens))
        for counter, count in counted:
            counter.inc(count)


class Service:
    """A judge that answers many requests at once.

    Args:
        judge: the model.
        limits: what it accepts.
        names: of the model, the one to report first; a request that names another is refused.
    """

    def __init__(self, judge: Judge, limits: Limits, names: Sequence[str]) -> None:
        self.judge = judge
        self.limits = limits
        self.names = names
        self.figures = Figures()
        self.batcher = Batcher(judge.predictor, limits.max_waiting, self.figures.count_batch)
        self.figures.waiting.set_function(lambda: len(self.batcher.waiting))
        self.texts = ThreadPoolExecutor(1, "texts")
        self.tables = Tables(judge.predictions, self.texts)

    def close(self) -> None:
        """Finish what was started, then end both threads."""
        self.batcher.close()
        self.texts.shutdown()

    def check_name(self, name: str | None) -> None:
        """Raise unless a request asks for the model that is served.

        Raises:
            HTTPException: 404.
        """
        if name and name not in self.names:
            raise HTTPException(404, f"model: there is no '{name:.80}' here; this is '{self.names[0]}'")

    async def judge_battles(self, request: Request, asked: Sequence[BattleRequest]) -> list[Answer]:
        """Return the answer to each battle of a request."""
        for one in asked:
            self.check_name(one.model)
        battles = [_battle(number, one, len(asked)) for number, one in enumerate(asked)]
        rows = await self._apart(self.judge.battle_rows, battles)
        logits = np.stack(await self._compute(request, rows))
        answers = await asyncio.wrap_future(self.tables.submit(battles, logits))
        return [{"id": one.id, **answer} for one, answer in zip(asked, answers, strict=True)]

    async def reward(self, request: Request, asked: RewardRequest) -> list[float]:
        """Return the reward of each response of a request; what the responses share is computed once."""
        self.check_name(asked.model)
        _refuse(self.judge.no_reward)
        conversations = [
            _turns(asked.prompt, one, f"responses[{number}]") for number, one in enumerate(asked.responses)
        ]
        return await self._rewards(request, lambda: self.judge.reward_rows(conversations))

    async def score(
        self, request: Request, texts: Sequence[str], max_length: int | None = None, shared: bool = False
    ) -> list[float]:
        """Return the reward of each finished text.

        Args:
            request: that asks.
            texts: with their chat template.
            max_length: tokens to cut them to; None: a text that is longer than allowed is refused.
            shared: whether they begin alike.
        """
        _refuse(self.judge.no_verbatim_reward)
        most = self.limits.max_tokens or self.judge.recipe.prompt.max_length
        cut = min(max_length, most) if max_length else None
        return await self._rewards(request, lambda: self._verbatim_rows(texts, cut, most, shared))

    def _verbatim_rows(self, texts: Sequence[str], cut: int | None, most: int, shared: bool) -> list[TokenRow]:
        rows = self.judge.verbatim_rows(texts, cut, shared=shared)
        longest = max(row["branches"][0] + max(row["branches"][1:]) for row in rows)
        if longest > most:
            raise InputError(
                f"a text has {longest:,} tokens; at most {most:,} are scored: shorten it, or serve with --max-tokens"
            )
        return rows

    async def _rewards(self, request: Request, make_rows: Callable[[], list[TokenRow]]) -> list[float]:
        logits = await self._compute(request, await self._apart(make_rows))
        found = np.concatenate(logits)[:, 0].tolist()
        if not np.isfinite(found).all():
            raise FloatingPointError(f"a reward is NaN or infinite ({self.judge.predictor.dtype})")
        return found

    async def _apart(self, work: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.texts, work, *given)

    async def _compute(self, request: Request, rows: list[TokenRow]) -> list[np.ndarray]:
        """Return the logits of each row; rows whose client hangs up, or whose time is up, are computed no more."""
        try:
            answers = self.batcher.submit(rows)
        except TooBusyError as error:
            raise HTTPException(429, str(error), {"Retry-After": str(error.seconds)}) from error
        computed: asyncio.Future[list[np.ndarray]] = asyncio.gather(*map(asyncio.wrap_future, answers))
        gone: asyncio.Future[Any] = asyncio.ensure_future(
            request.receive()
        )  # the body was read: what comes next is the end
        try:
            ends: set[asyncio.Future[Any]] = {computed, gone}
            await asyncio.wait(ends, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if computed.done():
                return computed.result()
        finally:
            gone.cancel()
            if not computed.done():
                computed.cancel()
                computed.add_done_callback(lambda _: None if computed.cancelled() else computed.exception())
                self.figures.dropped.inc()
        if gone.done() and not gone.cancelled():
            raise HTTPException(499, "the client hung up")
        raise HTTPException(504, f"not answered within {self.limits.timeout:g} s; try again later")


def _battle(number: int, asked: BattleRequest, count: int) -> Battle:
    """Return the battle that was asked about, one of `count` of its request."""
    place = f"body[{number}]." if count > 1 else ""
    prompt, response_a = _turns(asked.prompt, asked.response_a, f"{place}response_a")
    _, response_b = _turns(asked.prompt, asked.response_b, f"{place}response_b")
    name = f"request {number}" if asked.id is None else str(asked.id)
    return {"id": name, **dict(zip(TEXT_COLUMNS, (prompt, response_a, response_b), strict=True))}


def _turns(prompt: Any, response: str | list[str], name: str) -> tuple[list[str], list[str]]:
    """Return the user's and the assistant's turns; both lists are equally long."""
    if isinstance(prompt, list) and isinstance(prompt[0], Message):
        if not isinstance(response, str):
            raise InputError(f"{name}: a list of turns; give one text, the answer to the last message of the prompt")
        return conversation_turns([one.model_dump() for one in prompt], response)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    responses = [response] if isinstance(response, str) else response
    if len(prompts) != len(responses):
        raise InputError(
            f"{name}: {plural(len(responses), 'turn')}, but the prompt has {len(prompts)}; give one for each"
        )
    return prompts, responses


def _refuse(reason: str | None) -> None:
    if reason:
        raise HTTPException(400, f"this model cannot be asked for that: {reason}; or ask /battle")
