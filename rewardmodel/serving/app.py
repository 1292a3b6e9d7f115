"""A judge -> the web application that answers for it; every error is a status and a sentence, as JSON."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

import rewardmodel
from rewardmodel.errors import InputError
from rewardmodel.inference.judge import Judge
from rewardmodel.serving.guard import Guard, describe_error
from rewardmodel.serving.limits import Limits
from rewardmodel.serving.routes import routes
from rewardmodel.serving.service import Service

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


def _answer_validation(_: Request, error: Exception) -> JSONResponse:
    """Name the place and the reason of the first error; the text itself is not repeated."""
    assert isinstance(error, RequestValidationError | ValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return JSONResponse(describe_error(400, "the body is not JSON"), 400)
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", *TAGS))
    sentence = f"{place or 'body'}: {first['msg'][:1].lower()}{first['msg'][1:]}; /openapi.json says what is read"
    return JSONResponse(describe_error(422, sentence), 422)


TAGS = ("text", "several", "messages", "one")
"""What `serving.shapes` calls the members of its unions; not part of a place in a body."""


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
