"""The OpenAPI document: FastAPI's, with stream events and the keys of guarded paths.

FastAPI derives the schemas of bodies and whole answers from the types of the routes. It does not
know the events of streams, or that the guard requires a key before any route.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from fd_dsa.serve.errors import AnthropicErrorResponse, ErrorResponse, is_anthropic
from fd_dsa.serve.guard import OPEN_PATHS
from fd_dsa.serve.protocol import messages_answers, responses_answers
from fd_dsa.serve.protocol.answers import ChatCompletionChunk, CompletionChunk
from fd_dsa.serve.state import ServerState

STREAMS: dict[str, Any] = {
    "/v1/chat/completions": ChatCompletionChunk | ErrorResponse,
    "/v1/completions": CompletionChunk | ErrorResponse,
    "/v1/responses": responses_answers.StreamEvent,
    "/v1/messages": messages_answers.StreamEvent | AnthropicErrorResponse,
}
"""Path -> type of its stream events. A stream that fails ends with an error."""

_BEARER, _API_KEY = "bearer", "x-api-key"
_SCHEMES = {
    _BEARER: {"type": "http", "scheme": "bearer", "description": "A key of --api-key."},
    _API_KEY: {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


class Application(FastAPI):
    """The FastAPI application of a server, with the complete OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        """Return the document, which is made once."""
        if not self.openapi_schema:
            document = super().openapi()
            _add_streams(document)
            state: ServerState = self.state.server
            if state.options.api_key:
                _add_locks(document)
            self.openapi_schema = document
        return self.openapi_schema


def _add_streams(document: dict[str, Any]) -> None:
    """Describe the events of streams in addition to the whole answers."""
    kinds = [(path, "serialization", TypeAdapter(kind)) for path, kind in STREAMS.items()]
    schemas, shared = TypeAdapter.json_schemas(
        kinds,  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
    )
    known = document["components"]["schemas"]
    document["components"]["schemas"] = {**shared["$defs"], **known}
    for path in STREAMS:
        success = document["paths"][path]["post"]["responses"]["200"]
        success["description"] = "The whole answer, or with `stream` an event for each change"
        success["content"]["text/event-stream"] = {"schema": schemas[path, "serialization"]}


def _add_locks(document: dict[str, Any]) -> None:
    """Declare the key that the guard requires on each guarded path."""
    document["components"]["securitySchemes"] = _SCHEMES
    for path, operations in document["paths"].items():
        if path in OPEN_PATHS:
            continue
        # either of the two headers
        kinds = (_BEARER, _API_KEY) if is_anthropic(path) else (_BEARER,)
        for operation in operations.values():
            operation["security"] = [{kind: []} for kind in kinds]
