"""The bodies of requests, as the consumers send them.

Of the endpoints in others' shapes, what is not named here is ignored, because their clients send more. Of our own,
`/battle` and `/reward`, it is refused, because it is a typing error.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictInt, Tag

MAX_TEXTS = 1024
"""Battles, responses or texts of a request."""

MAX_CHARACTERS = 400_000
"""Characters of a text."""

MAX_TURNS = 256
"""Turns of a conversation."""

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Turns = Annotated[list[Text], Field(min_length=1, max_length=MAX_TURNS)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


def tell_kind(given: Any) -> str:
    """Return which member of a union a value is meant to be, so that an error is about that one alone."""
    if isinstance(given, str):
        return "text"
    if isinstance(given, Sequence):
        return "messages" if given and isinstance(given[0], dict | Message) else "several"
    return "one"


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


Prompt = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[Turns, Tag("several")]
    | Annotated[Annotated[list[Message], Field(max_length=MAX_TURNS)], Tag("messages")],
    Discriminator(tell_kind, custom_error_type="prompt", custom_error_message="give a text, turns or messages"),
]
"""A text, the user's turns, or messages that end with the user's."""

Response = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Turns, Tag("several")],
    Discriminator(tell_kind, custom_error_type="response", custom_error_message="give a text, or a list of turns"),
]
"""A text, or the assistant's turns, as many as the prompt has."""

OneOrMore = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Texts, Tag("several")],
    Discriminator(tell_kind, custom_error_type="texts", custom_error_message="give a text, or a list of texts"),
]
"""A finished text, or several."""


Id = Annotated[
    Annotated[Text, Tag("text")] | Annotated[StrictInt, Tag("number")],
    Discriminator(
        lambda given: {str: "text", int: "number"}.get(type(given)),
        custom_error_type="id",
        custom_error_message="give a text, or a whole number",
    ),
]
"""What a battle is called in the answer."""


class BattleRequest(BaseModel):
    """One prompt and two responses."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {"prompt": "What is 2 + 2?", "response_a": "4", "response_b": "It is 5.", "id": "7"}
        },
    )
    prompt: Prompt
    response_a: Response
    response_b: Response
    id: Id | None = None
    model: Text | None = None


Battles = Annotated[list[BattleRequest], Field(min_length=1, max_length=MAX_TEXTS)]

BattleOrBattles = Annotated[
    Annotated[BattleRequest, Tag("one")] | Annotated[Battles, Tag("several")],
    Discriminator(
        lambda given: "several" if isinstance(given, list) else "one",
        custom_error_type="battle",
        custom_error_message="give a battle, or a list of battles",
    ),
]


class Request(BaseModel):
    """What the requests to score texts have in common: the served model's name, which may be left out."""

    model: Text | None = None


class RewardRequest(Request):
    """One prompt and its responses."""

    model_config = ConfigDict(extra="forbid")
    prompt: Prompt
    responses: Annotated[list[Response], Field(min_length=1, max_length=MAX_TEXTS)]


class InputRequest(Request):
    """Finished texts; vLLM's, SGLang's and OpenAI's shape."""

    input: OneOrMore
    use_activation: bool | None = None


class ScoreRequest(Request):
    """Pairs of texts, joined as they are: one with each of several, or one with one; vLLM's shape."""

    text_1: OneOrMore | None = None
    text_2: OneOrMore | None = None
    queries: OneOrMore | None = None
    documents: OneOrMore | None = None
    use_activation: bool | None = None


class Document(BaseModel):
    """A document as an object."""

    text: Text


class RerankRequest(Request):
    """A query and documents, each joined with the query as it is; Cohere's shape."""

    query: Text
    documents: Annotated[list[Text | Document], Field(min_length=1, max_length=MAX_TEXTS)]
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool = False
    use_activation: bool | None = None


class EvaluationRequest(Request):
    """Finished texts; LLaMA-Factory's shape."""

    messages: Texts
    max_length: Annotated[int, Field(ge=8)] | None = None


class QueryRequest(Request):
    """Prompts with their responses as finished texts; OpenRLHF's shape."""

    query: Texts
    prompts: list[Any] | None = None
    labels: list[Any] | None = None
