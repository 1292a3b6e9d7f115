"""The endpoints: one function each, from a request of `serving.shapes` to the JSON that its consumer reads.

`/battle` and `/reward` are ours. The others score finished texts verbatim, in the shapes of vLLM, SGLang, OpenAI,
Cohere, LLaMA-Factory and OpenRLHF.
"""

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import rewardmodel
from rewardmodel.errors import InputError, plural
from rewardmodel.serving.service import Service
from rewardmodel.serving.shapes import (
    BattleOrBattles,
    Document,
    EvaluationRequest,
    InputRequest,
    QueryRequest,
    RerankRequest,
    RewardRequest,
    ScoreRequest,
)

Json = dict[str, Any]

routes = APIRouter()


def service_of(request: Request) -> Service:
    """Return the service of the application that a request was sent to."""
    return request.app.state.service


@routes.get("/", response_class=HTMLResponse, include_in_schema=False)
def page() -> str:
    """Return the page to compare two responses on."""
    return (files("rewardmodel.serving") / "page.html").read_text(encoding="utf-8")


@routes.get("/health")
def health(request: Request) -> Json:
    """Return what is served, once it can be asked."""
    service = service_of(request)
    judge = service.judge
    if not service.batcher.thread.is_alive():
        raise HTTPException(503, "the model's thread has ended; restart the server and look at its log")
    return {
        "status": "ok",
        "model": service.names[0],
        "version": rewardmodel.__version__,
        "objective": judge.recipe.objective.name,
        "rewards": judge.no_reward is None,
        "both_orders": judge.both_orders,
        "calibrated": judge.calibration.fitted_on is not None,
        "dtype": str(judge.predictor.dtype).removeprefix("torch."),
        "device": str(judge.predictor.device),
        "waiting": len(service.batcher.waiting),
    }


@routes.get("/metrics", response_class=Response)
def metrics(request: Request) -> Response:
    """Return counters in Prometheus' text format."""
    return Response(generate_latest(service_of(request).figures.registry), media_type=CONTENT_TYPE_LATEST)


@routes.get("/v1/models")
def models(request: Request) -> Json:
    """Return the served model, in OpenAI's shape."""
    return {"object": "list", "data": [{"id": service_of(request).names[0], "object": "model", "owned_by": "user"}]}


@routes.post("/battle")
async def battle(request: Request, body: BattleOrBattles) -> Json | list[Json]:
    """Return who wins, and how sure: of a battle, or of each of a list."""
    several = isinstance(body, list)
    answers = await service_of(request).judge_battles(request, body if isinstance(body, list) else [body])
    return answers if several else answers[0]


@routes.post("/reward")
async def reward(request: Request, body: RewardRequest) -> Json:
    """Return the reward of each response, and the index of the best."""
    service = service_of(request)
    rewards = await service.reward(request, body)
    return {"model": service.names[0], "rewards": rewards, "best": rewards.index(max(rewards))}


@routes.post("/classify")
@routes.post("/v1/classify", include_in_schema=False)
async def classify(request: Request, body: InputRequest) -> Json:
    """Return rewards of finished texts in vLLM's shape: `data[i].probs[-1]`."""
    found = await _score_input(request, body)
    data = [
        {"index": index, "label": "reward", "probs": [value], "num_classes": 1} for index, value in enumerate(found)
    ]
    return {"object": "list", "model": service_of(request).names[0], "data": data}


@routes.post("/pooling")
async def pooling(request: Request, body: InputRequest) -> Json:
    """Return rewards of finished texts in vLLM's shape: `data[i].data[-1]`."""
    found = await _score_input(request, body)
    data = [{"index": index, "object": "pooling", "data": [value]} for index, value in enumerate(found)]
    return {"object": "list", "model": service_of(request).names[0], "data": data}


@routes.post("/v1/embeddings")
async def embeddings(request: Request, body: InputRequest) -> Json:
    """Return rewards of finished texts in OpenAI's shape: `data[i].embedding[-1]`."""
    found = await _score_input(request, body)
    data = [{"index": index, "object": "embedding", "embedding": [value]} for index, value in enumerate(found)]
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    return {"object": "list", "model": service_of(request).names[0], "data": data, "usage": usage}


@routes.post("/score")
@routes.post("/v1/score", include_in_schema=False)
async def score(request: Request, body: ScoreRequest) -> Json:
    """Return rewards of pairs of texts, joined as they are, in vLLM's shape: `data[i].score`."""
    service = service_of(request)
    service.check_name(body.model)
    first, second = (body.text_1, body.text_2) if body.queries is None else (body.queries, body.documents)
    if first is None or second is None:
        raise InputError("give text_1 and text_2, or queries and documents")
    begins, ends = _listed(first), _listed(second)
    if len(begins) not in (1, len(ends)):
        raise InputError(f"{plural(len(begins), 'text')} for {len(ends)}; give one for all, or one for each")
    texts = [begin + end for begin, end in zip(begins * (len(ends) // len(begins)), ends, strict=True)]
    found = _activate(await service.score(request, texts, shared=len(begins) == 1), body.use_activation)
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(found)]
    return {"object": "list", "model": service.names[0], "data": data}


@routes.post("/rerank")
@routes.post("/v1/rerank", include_in_schema=False)
@routes.post("/v2/rerank", include_in_schema=False)
async def rerank(request: Request, body: RerankRequest) -> Json:
    """Return documents by falling reward of the query and the document, joined as they are, in Cohere's shape."""
    service = service_of(request)
    service.check_name(body.model)
    documents = [one.text if isinstance(one, Document) else one for one in body.documents]
    found = await service.score(request, [body.query + one for one in documents], shared=True)
    found = _activate(found, body.use_activation)
    order = sorted(range(len(found)), key=lambda index: -found[index])[: body.top_n]
    results: list[Json] = [{"index": index, "relevance_score": found[index]} for index in order]
    if body.return_documents:
        results = [{**one, "document": {"text": documents[one["index"]]}} for one in results]
    return {"model": service.names[0], "results": results}


@routes.post("/v1/score/evaluation")
async def evaluation(request: Request, body: EvaluationRequest) -> Json:
    """Return rewards of finished texts in LLaMA-Factory's shape: `scores`."""
    service = service_of(request)
    service.check_name(body.model)
    found = await service.score(request, body.messages, body.max_length)
    return {"id": "score", "object": "score.evaluation", "model": service.names[0], "scores": found}


@routes.post("/{path:path}", include_in_schema=False)
async def remote_reward(request: Request, path: str, body: dict[str, Any]) -> Json:
    """Return rewards of prompts with their responses, in OpenRLHF's shape, which posts to any path."""
    if "query" not in body:
        raise HTTPException(404, f"there is no /{path:.80} here; /openapi.json lists what there is")
    asked = QueryRequest.model_validate(body)
    service = service_of(request)
    found = await service.score(request, asked.query)
    return {"rewards": found, "scores": found, "extra_logs": {}}


async def _score_input(request: Request, body: InputRequest) -> list[float]:
    service = service_of(request)
    service.check_name(body.model)
    return _activate(await service.score(request, _listed(body.input)), body.use_activation)


def _listed(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _activate(rewards: list[float], wanted: bool | None) -> list[float]:
    """Return rewards, or their sigmoid where a request asks for it."""
    return [(1 + math.tanh(reward / 2)) / 2 for reward in rewards] if wanted else rewards
