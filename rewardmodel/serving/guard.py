"""What a request passes before its endpoint: the key, the size of its body, the time that it takes; and is counted."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rewardmodel.serving.limits import Limits
from rewardmodel.serving.service import Figures

logger = logging.getLogger(__name__)

OPEN = ("/", "/health")
"""Paths that need no key: the page, which asks for one, and what a load balancer asks."""

DRAINED = 8
"""A body up to this many times the limit is read to its end, so that its client gets to read why it is refused."""


class Guard:
    """Wraps an application.

    Args:
        app: the application.
        limits: `max_body` and `timeout` are kept here.
        figures: where requests are counted.
        paths: of the endpoints; others are counted together.
        key: that requests carry as `Authorization: Bearer KEY`; None: they need none.
        log_texts: log each request with its body.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, figures: Figures, paths: set[str], key: str | None, log_texts: bool
    ) -> None:
        self.app = app
        self.limits = limits
        self.figures = figures
        self.paths = paths
        self.key = key
        self.log_texts = log_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 499

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._answer(scope, receive, watched)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.figures.requests.labels(path, str(status)).inc()
            self.figures.seconds.labels(path).observe(time.monotonic() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.key and scope["path"] not in OPEN and not self._has_key(scope):
            await refuse(send, 401, "give the key of this server: Authorization: Bearer KEY")
            return
        try:
            body = await asyncio.wait_for(self._read_body(receive), self.limits.timeout)
        except TimeoutError:
            await refuse(send, 408, f"the body did not arrive within {self.limits.timeout:g} s; send it whole")
            return
        if body is None:  # hung up
            return
        if len(body) > self.limits.max_body:
            await refuse(send, 413, f"a body of more than {self.limits.max_body:,} bytes; send fewer or shorter texts")
            return
        if self.log_texts:
            logger.info("%s %s %s", scope["method"], scope["path"], body.decode(errors="replace"))
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return messages.pop() if messages else await receive()

        # whatever a client calls it, like curl: a body is JSON or is refused as what is not
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        await self.app({**scope, "headers": [*headers, (b"content-type", b"application/json")]}, replayed, send)

    def _has_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self.key}".encode())

    async def _read_body(self, receive: Receive) -> bytes | None:
        """Return the body; of one above the limit its beginning, that much and more; None: the client hung up."""
        parts, kept, size = [], 0, 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if kept <= self.limits.max_body:
                parts.append(part)
                kept += len(part)
            if not message.get("more_body", False) or size > DRAINED * self.limits.max_body:
                return b"".join(parts)


async def refuse(send: Send, status: int, sentence: str) -> None:
    """Send an error as the application sends them."""
    body = json.dumps(describe_error(status, sentence)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def describe_error(status: int, sentence: str) -> dict[str, Any]:
    """Return the JSON of an error, in OpenAI's shape."""
    return {"error": {"message": sentence, "type": "invalid_request" if status < 500 else "server", "code": status}}
