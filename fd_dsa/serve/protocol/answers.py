"""Answers of the OpenAI API: types of the dicts that the server sends.

mypy compares the dicts of an answer with these types, and the OpenAPI document has their schemas.
Answers are dicts rather than models, because a stream makes one for each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema

# pydantic reads only this TypedDict before Python 3.12
from typing_extensions import NotRequired, TypedDict

from fd_dsa.engine.output import FinishReason


@dataclass(frozen=True)
class PackedAs:
    """Annotation of a value that is JSON text already: the type that gives its schema."""

    kind: Any

    def __get_pydantic_core_schema__(self, _: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(self.kind)


PackedIds = Annotated[orjson.Fragment, PackedAs(list[int])]
PackedTexts = Annotated[orjson.Fragment, PackedAs(list[str])]


class PromptTokensDetails(TypedDict):
    """Prompt tokens found in the prefix cache, and those of them found in host memory."""

    cached_tokens: int
    host_cached_tokens: NotRequired[int]


class CompletionTokensDetails(TypedDict):
    """Tokens of the reasoning, if the chat format has one, and verified drafts, if there were some.

    The reasoning includes its markers.
    """

    reasoning_tokens: NotRequired[int]
    accepted_prediction_tokens: NotRequired[int]
    rejected_prediction_tokens: NotRequired[int]


class Usage(TypedDict):
    """Token counts. Each prompt counts once, every output counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[CompletionTokensDetails]


class SelectedPositions(TypedDict):
    """Positions that the indexer selected for the token before the last one."""

    position: int
    layers: list[PackedIds]
    tokens: PackedTexts


class PromptScore(TypedDict):
    """Score of a token at one position of a prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptScores = Annotated[orjson.Fragment, PackedAs(list[dict[str, PromptScore] | None])]


class PromptFields(TypedDict):
    """Fields of a prompt, only if the request asks for them."""

    prompt_logprobs: NotRequired[PromptScores | None]
    prompt_token_ids: NotRequired[list[int]]


class EndFields(TypedDict):
    """Fields of a choice that has ended."""

    stop_reason: str | int | None
    topk_positions: NotRequired[SelectedPositions]


class AnswerHead(TypedDict):
    """Fields of every answer and chunk."""

    id: str
    created: int
    model: str


class ScoredToken(TypedDict):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ScoredToken):
    """A token of an answer, with the most likely tokens at its position."""

    top_logprobs: list[ScoredToken]


ChatTokens = Annotated[orjson.Fragment, PackedAs(list[ChatToken])]


class ChatLogprobs(TypedDict):
    """Scores of the tokens of a choice."""

    content: ChatTokens
    refusal: None


class FunctionText(TypedDict):
    """A called function with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionText


class FunctionDelta(TypedDict):
    """The name of a called function, or a part of its arguments."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The beginning of a call, or a part of its arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class AnswerMessage(TypedDict):
    """The message of a choice."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class Delta(TypedDict):
    """The part of a message that a chunk adds."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


ChatFinish = FinishReason | Literal["tool_calls"]


class ChatEnd(EndFields):
    """The end of a choice of a chat completion."""

    finish_reason: ChatFinish | None


class ChatChoice(ChatEnd):
    """A choice of a chat completion."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    token_ids: NotRequired[list[int]]


class ChatCompletion(AnswerHead, PromptFields):
    """The answer to a chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(TypedDict):
    """The part of a choice that a chunk adds."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish | None
    stop_reason: NotRequired[str | int | None]
    topk_positions: NotRequired[SelectedPositions]
    token_ids: NotRequired[list[int]]


class ChatChunkBody(TypedDict):
    """A chunk of a chat completion without its head."""

    choices: list[ChatChunkChoice]
    prompt_token_ids: NotRequired[list[int]]


class ChatCompletionChunk(AnswerHead, ChatChunkBody):
    """An event of a streamed chat completion."""

    object: Literal["chat.completion.chunk"]
    usage: NotRequired[Usage | None]


class CompletionLogprobs(TypedDict):
    """Scores of the tokens of a text, as columns."""

    tokens: PackedTexts
    token_logprobs: Annotated[orjson.Fragment, PackedAs(list[float | None])]
    top_logprobs: Annotated[orjson.Fragment, PackedAs(list[dict[str, float] | None])]
    text_offset: PackedIds


class CompletionEnd(TypedDict):
    """End of a completion's choice. `finish_reason` is null before the end."""

    finish_reason: FinishReason | None
    stop_reason: NotRequired[str | int | None]
    topk_positions: NotRequired[SelectedPositions]


class CompletionChoice(CompletionEnd, PromptFields):
    """A choice of a completion, or the part of one that a chunk adds."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    token_ids: NotRequired[list[int]]


class Completion(AnswerHead):
    """The answer to a completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(AnswerHead):
    """An event of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
