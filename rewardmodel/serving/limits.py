"""What a server accepts; in a separate module, because the command line's help needs nothing else of the server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
        max_waiting: battles, responses or texts that may wait for the model; more are refused with 429.
        max_tokens: of a finished text; None: the recipe's `prompt.max_length`.
        max_body: bytes of a request.
        timeout: seconds in which a request is to arrive, and in which it is to be answered.
    """

    max_waiting: int = 4096
    max_tokens: int | None = None
    max_body: int = 8 * 2**20
    timeout: float = 120.0
