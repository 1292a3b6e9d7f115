"""A judge -> the web application that answers for it; every error is a status and a sentence, as JSON."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

import rewardmodel
from rewardmodel.errors import InputError, nearest
from rewardmodel.inference.judge import Judge
from rewardmodel.serving.guard import Guard, describe_error
from rewardmodel.serving.limits import Limits
from rewardmodel.serving.routes import routes
from rewardmodel.serving.service import Service
from rewardmodel.serving.shapes import BattleRequest, RewardRequest

logger = logging.getLogger(__name__)

ABOUT = """Scores of a model that rewardmodel trained. `/battle` compares two responses, `/reward` scores responses to a
prompt, both with the template of the training. The other endpoints score finished texts as they are: one BOS is put
before a text that has none, and nothing else."""


def build_app(
    judge: Judge,
    names: Sequence[str],
    limits: Limits | None = None,
    *,
    key: str | None = None,
    log_texts: bool = False,
) -> FastAPI:
    """Return the application; its lifespan ends once what was started is answered.

    Args:
        judge: the model.
        names: that requests may call it by, the one to report first.
        limits: what is accepted; default: `Limits()`.
        key: that requests must carry; None: none.
        log_texts: log the bodies of requests.
    """
    limits = limits or Limits()
    service = Service(judge, limits, names)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="rewardmodel",
        description=ABOUT,
        version=rewardmodel.__version__,
        docs_url=None,  # these pages load scripts from a network
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    app.include_router(routes)
    for kind, answer in ERRORS.items():
        app.add_exception_handler(kind, answer)
    paths = {path for route in routes.routes if "{" not in (path := getattr(route, "path", ""))}
    app.add_middleware(Guard, limits=limits, figures=service.figures, paths=paths, key=key, log_texts=log_texts)
    return app


def _answer_http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(describe_error(error.status_code, str(error.detail)), error.status_code, error.headers)


def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    """Name the place and the reason of the first error; the text itself is not repeated."""
    assert isinstance(error, RequestValidationError | ValidationError)
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])  # explains what is missing
    if first["type"] == "json_invalid":
        return JSONResponse(describe_error(400, "the body is not JSON"), 400)
    place = _name_place([part for part in first["loc"] if part not in ("body", *TAGS)])
    what = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    if first["type"] == "extra_forbidden":
        known = OWN[request.scope["route"].path].model_fields
        what = f"unknown field{nearest(str(first['loc'][-1]), known)}; known: {', '.join(known)}"
    return JSONResponse(describe_error(422, f"{place}: {what}; /openapi.json says what is read"), 422)


def _name_place(parts: Sequence[str | int]) -> str:
    """Return a place in a body, like `prompt[0].content`, or `body[1].id` where the body is a list."""
    named = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return named.removeprefix(".") if named.startswith(".") else f"body{named}"


TAGS = ("text", "several", "messages", "one", "number")
"""What `serving.shapes` calls the members of its unions; not part of a place in a body."""

OWN: dict[str, type[BaseModel]] = {"/battle": BattleRequest, "/reward": RewardRequest}
"""Bodies of our own endpoints, whose fields are all known."""


def _answer_input(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(describe_error(422, str(error)), 422)


def _answer_failure(_: Request, error: Exception) -> JSONResponse:
    logger.error("a request failed: %s", type(error).__name__)
    sentence = (
        str(error) if isinstance(error, FloatingPointError) else "this could not be computed; see the server's log"
    )
    return JSONResponse(describe_error(500, sentence), 500)


ERRORS = {
    HTTPException: _answer_http,
    RequestValidationError: _answer_validation,
    ValidationError: _answer_validation,
    InputError: _answer_input,
    FloatingPointError: _answer_failure,
    RuntimeError: _answer_failure,
}
"""Kinds of errors and how they are answered."""
