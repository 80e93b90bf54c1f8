"""Error objects in the shape of OpenAI's or Anthropic's API, sent for every failure.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
    {"type": "error", "error": {"type": ..., "message": ...}}

The second shape is for paths below /v1/messages.

Source: the shape that the `openai` client parses. Statuses follow the OpenAI API (400, 401, 403,
404, 405, 408, 413, 415, 429, 431, 500, 503). A failed validation is a 400, not FastAPI's 422.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException

# pydantic reads only this TypedDict before Python 3.12
from typing_extensions import NotRequired, TypedDict

from fd_dsa.chat.json_text import shortened_json
from fd_dsa.errors import FdDsaError
from fd_dsa.serve.json_response import JsonResponse

# pydantic error type of our own validators, whose messages are complete
CUSTOM_ERROR = "fd_dsa"
_SHOWN_INPUT_CHARS = 60
# our wording for pydantic's error types, whose own messages name classes and validation
_RULES = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than_equal": "{ge} or more",
    "int_type": "an integer",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_too_short": "a text of {min_length} characters or more",
    "string_type": "a string",
    "string_unicode": "valid Unicode",
    "too_short": "a list with {min_length} entry or more",
}
_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
# types of the Anthropic API; another status below 500 is an invalid request
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# codes of the Anthropic API; it has no word for the others
_ANTHROPIC_CODES = frozenset(("thread_unsupported_request",))
_ANTHROPIC_PATH = "/v1/messages"
# endpoints of other servers that clients may try, with the feature that fd_dsa lacks
_OUT_OF_SCOPE = {
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "reranking",
    "/rerank": "reranking",
    "/v1/score": "scoring of pairs",
    "/v1/audio": "audio",
    "/v1/images": "images",
    "/v1/moderations": "moderation",
    "/v1/files": "files",
    "/v1/batches": "batches of files",
    "/v1/fine_tuning": "training",
    "/v1/responses/compact": "compaction of conversations",
    "/v1/responses": "storage of responses",
    "/v1/messages/batches": "batches of messages",
}


def is_anthropic(path: str) -> bool:
    """Return True if clients of this path use the Anthropic API."""
    return f"{path}/".startswith(f"{_ANTHROPIC_PATH}/")


class ErrorObject(TypedDict):
    """A failure in the shape of the OpenAI API."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """Body of every error response."""

    error: ErrorObject


class AnthropicErrorDetails(TypedDict):
    """The code of a failure in Anthropic's API."""

    error_code: str


class AnthropicErrorObject(TypedDict):
    """A failure in the shape of Anthropic's API."""

    type: str
    message: str
    details: NotRequired[AnthropicErrorDetails]


class AnthropicErrorResponse(TypedDict):
    """Body of every error response below /v1/messages."""

    type: Literal["error"]
    error: AnthropicErrorObject


def error_responses(model: type) -> dict[int | str, dict[str, Any]]:
    """Describe the failures of routes for the OpenAPI document.

    The description replaces FastAPI's 422, which is never sent.
    """
    return {"default": {"model": model, "description": "400 and above: an error object"}}


class ApiError(FdDsaError):
    """A request that is answered with an error object.

    Args:
        status: HTTP status, 400..599.
        message: the field, the value found, the rule, and what to do.
        param: the request field at fault, such as `messages[0].content`.
        code: machine-readable code of the API, such as `model_not_found`.
        headers: extra response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # a lone surrogate from a request has no UTF-8 form
        self.message = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(self.message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self, path: str = "") -> ErrorResponse | AnthropicErrorResponse:
        """Return the error object in the shape that clients of `path` read."""
        if is_anthropic(path):
            general = "api_error" if self.status >= 500 else "invalid_request_error"
            kind = _ANTHROPIC_TYPES.get(self.status, general)
            found: AnthropicErrorObject = {"type": kind, "message": self.message}
            if self.code in _ANTHROPIC_CODES:
                found["details"] = {"error_code": self.code}
            return {"type": "error", "error": found}
        general = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, general)
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self, path: str = "") -> JsonResponse:
        """Return the response with error object, status and headers for a request to `path`."""
        return JsonResponse(self.body(path), status_code=self.status, headers=self.headers)


class FieldError(ApiError):
    """A 400 whose message begins with the field: `messages[0].content: got null`."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(400, message, param=message.partition(": ")[0], code=code)


class ContextLengthError(FieldError):
    """A 400 of a prompt, or of a prompt and its output, that is longer than the context.

    The message ends with the words by which clients recognize this failure: many never read the
    code. An agent then shortens its conversation.

    Args:
        is_prompt: True for a prompt that is too long by itself.
    """

    def __init__(self, message: str, max_model_len: int, *, is_prompt: bool = True) -> None:
        prompt = "the prompt is too long, " if is_prompt else ""
        context = f"this model's maximum context length is {max_model_len} tokens"
        super().__init__(f"{message}; {prompt}{context}", code="context_length_exceeded")


def internal_error(request_id: str) -> ApiError:
    """Return a 500 that names only the request, so that its details stay in the log."""
    return ApiError(
        500, f"internal error in request {request_id}; the server's log has the details"
    )


def request_error(error: ValueError, fields: Sequence[str], default: str | None = None) -> ApiError:
    """Make a 400 from a ValueError.

    `param` is the first word of its text if it is in `fields`, otherwise `default`.
    """
    message = str(error)
    word = message.partition(" ")[0].rstrip(":")
    if word not in fields and default is not None:
        return FieldError(f"{default}: {message}")
    return ApiError(400, message, param=word if word in fields else None)


def install_error_handlers(app: FastAPI) -> None:
    """Answer ApiError and HTTPException of `app` with error objects."""

    async def answer(request: Request, error: Exception) -> JsonResponse:
        if isinstance(error, HTTPException):
            error = _from_http_exception(request, error)
        assert isinstance(error, ApiError)
        return error.response(request.scope["path"])

    app.add_exception_handler(ApiError, answer)
    app.add_exception_handler(HTTPException, answer)


def _from_http_exception(request: Request, error: HTTPException) -> ApiError:
    """Convert the router's 404 and 405, adding the paths and methods that exist."""
    # not of `request.url`, which some versions of Starlette cannot make of a strange Host
    path = quote(request.scope["path"])
    headers = dict(error.headers or {})
    if error.status_code == 404:
        routes = ", ".join(sorted(request.app.openapi()["paths"]))
        # endpoints of servers for another purpose
        outside = next((w for p, w in _OUT_OF_SCOPE.items() if f"{path}/".startswith(f"{p}/")), "")
        scope = f", {outside} is out of its scope" if outside else ""
        here = f"this server generates text{scope}; it has {routes}"
        return ApiError(404, f"path {path} does not exist here; {here}")
    if error.status_code == 405:
        allowed = headers.pop("allow", "") or headers.pop("Allow", "another method")
        # see RequestIdMiddleware
        if allowed == "GET":
            allowed = "GET, HEAD"
        headers["Allow"] = allowed
        message = f"method {request.method} is not allowed on {path}; use {allowed}"
        return ApiError(405, message, headers=headers)
    return ApiError(error.status_code, str(error.detail), headers=headers)


def unreadable(error: Exception) -> ApiError:
    """Make a 400 from an exception of the JSON parser."""
    if isinstance(error, json.JSONDecodeError) and "infinity" in error.msg:
        # the message of orjson
        reason = f"has a number at character {error.pos} that is too large for float64"
    elif isinstance(error, json.JSONDecodeError):
        what = error.msg.removesuffix(" at")
        reason = f"is not valid JSON: {what} at character {error.pos}"
    elif isinstance(error, UnicodeDecodeError):
        reason = (
            f"is not text: byte {error.start} is no {error.encoding}; send JSON in UTF-8, and "
            "without a Content-Encoding"
        )
    elif isinstance(error, RecursionError):
        reason = "nests too deeply; send a flatter request"
    else:
        reason = f"cannot be read: {str(error).partition(';')[0].lower()}"
    return ApiError(400, f"body {reason}")


def validation_refusal(error: ValidationError) -> ApiError:
    """Describe the first problem of a request body in our wording."""
    first = error.errors(include_url=False)[0]
    path = field_path(first["loc"])
    param = path or None
    if first["type"] == CUSTOM_ERROR:
        return ApiError(400, f"{path or 'body'}: {first['msg']}", param=param)
    if first["type"] == "missing":
        return ApiError(400, f"{path}: is missing; the field is required", param=param)
    rule, given = _RULES.get(first["type"], "another value"), first.get("input")
    if first["type"] == "int_type" and isinstance(given, float) and abs(given) >= 2**63:
        # the reader of JSON makes floats of larger integers
        rule += " of at most 64 bits"
    rule = rule.format_map(first.get("ctx", {}))
    # the path of a name that is no valid Unicode is empty
    return ApiError(400, f"{path or 'body'}: got {show(given)}; allowed is {rule}", param=param)


def field_path(location: Sequence[str | int]) -> str:
    """Format a location such as `("messages", 0, "content")` as `messages[0].content`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = part[:_SHOWN_INPUT_CHARS]
            path += f".{name}" if path else name
    return path


def show(value: object) -> str:
    """Return a value as JSON, shortened. Only the beginning of a long value is encoded."""
    return shortened_json(value, _SHOWN_INPUT_CHARS)
