"""Every failure leaves the server as one error object, of the OpenAI API or of Anthropic's.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
    {"type": "error", "error": {"type": ..., "message": ...}}

The second form is that of the paths below /v1/messages.

Source: the shape that the `openai` client parses; statuses follow the OpenAI API (400, 401, 403,
404, 405, 408, 413, 415, 429, 431, 500, 503), and validation is 400, never FastAPI's 422.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException

# pydantic reads only this TypedDict before Python 3.12
from typing_extensions import TypedDict

from fd_dsa.chat.json_text import shortened_json
from fd_dsa.errors import FdDsaError
from fd_dsa.serve.json_response import JsonResponse

# pydantic error type of our own validators: their message is complete as it is
CUSTOM_ERROR = "fd_dsa"
_SHOWN_INPUT_CHARS = 60
# pydantic's types of errors in our words: its own name classes and validation
_RULES = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
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
# types of the Anthropic API; any other status below 500 is an invalid request
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC_PATH = "/v1/messages"
# endpoints of other servers that people try, and what fd_dsa is not for
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
    "/v1/responses": "storage of responses",
    "/v1/messages/batches": "batches of messages",
}


def is_anthropic(path: str) -> bool:
    """Whether the clients of a path speak the Anthropic API."""
    return f"{path}/".startswith(f"{_ANTHROPIC_PATH}/")


class ErrorObject(TypedDict):
    """Failure in the shape of the OpenAI API."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """Body of every answer that is no success."""

    error: ErrorObject


class AnthropicErrorObject(TypedDict):
    """Failure in the shape of Anthropic's API."""

    type: str
    message: str


class AnthropicErrorResponse(TypedDict):
    """Body of every answer below /v1/messages that is no success."""

    type: Literal["error"]
    error: AnthropicErrorObject


def error_responses(model: type) -> dict[int | str, dict[str, Any]]:
    """Describe the failures of routes, for the OpenAPI document.

    They replace FastAPI's 422, which is never sent.
    """
    return {"default": {"model": model, "description": "400 and above: an error object"}}


class ApiError(FdDsaError):
    """A request that is answered with an error object.

    Args:
        status: HTTP status, 400..599.
        message: what, what was found, what is allowed, what to do.
        param: the field of the request that is to blame, as `messages[0].content`.
        code: machine-readable code of the OpenAI API, such as `model_not_found`.
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
        # a lone surrogate of a request has no UTF-8 form
        self.message = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(self.message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self, path: str = "") -> ErrorResponse | AnthropicErrorResponse:
        """The error object in the form that clients of a path read."""
        if is_anthropic(path):
            general = "api_error" if self.status >= 500 else "invalid_request_error"
            kind = _ANTHROPIC_TYPES.get(self.status, general)
            return {"type": "error", "error": {"type": kind, "message": self.message}}
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
        """The error object with its status and headers, for a request to a path."""
        return JsonResponse(self.body(path), status_code=self.status, headers=self.headers)


class FieldError(ApiError):
    """A 400 whose message begins with the field to blame, as in `messages[0].content: got null`."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(400, message, param=message.partition(": ")[0], code=code)


def internal_error(request_id: str) -> ApiError:
    """A 500 that names the request in the server's log and nothing else."""
    return ApiError(
        500, f"internal error in request {request_id}; the server's log has the details"
    )


def request_error(error: ValueError, fields: Sequence[str]) -> ApiError:
    """A 400 from a ValueError; `param` is its first word where that is one of `fields`."""
    message = str(error)
    word = message.partition(" ")[0].rstrip(":")
    return ApiError(400, message, param=word if word in fields else None)


def install_error_handlers(app: FastAPI) -> None:
    """Answer ApiError and HTTPException of `app` with error objects."""

    async def answer(request: Request, error: Exception) -> JsonResponse:
        if isinstance(error, HTTPException):
            error = _from_http_exception(request, error)
        assert isinstance(error, ApiError)
        return error.response(request.url.path)

    app.add_exception_handler(ApiError, answer)
    app.add_exception_handler(HTTPException, answer)


def _from_http_exception(request: Request, error: HTTPException) -> ApiError:
    """404 and 405 of the router, with the paths and methods that exist."""
    path = request.url.path
    headers = dict(error.headers or {})
    if error.status_code == 404:
        routes = ", ".join(sorted(request.app.openapi()["paths"]))
        # paths that servers of another purpose have
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
    """A 400 from what a parser of JSON raised."""
    if isinstance(error, json.JSONDecodeError):
        reason = f"is not valid JSON: {error.msg} at character {error.pos}"
    elif isinstance(error, UnicodeDecodeError):
        reason = (
            f"is not text: byte {error.start} is no {error.encoding}; send JSON in UTF-8, and "
            "without a Content-Encoding"
        )
    elif isinstance(error, RecursionError):
        reason = "nests too deeply; send a request that is flatter"
    else:
        reason = f"cannot be read: {str(error).partition(';')[0].lower()}"
    return ApiError(400, f"body {reason}")


def validation_refusal(error: ValidationError) -> ApiError:
    """The first problem of a request body, in our words."""
    first = error.errors(include_url=False)[0]
    path = _field_path(first["loc"])
    param = path or None
    if first["type"] == CUSTOM_ERROR:
        return ApiError(400, f"{path or 'body'}: {first['msg']}", param=param)
    if first["type"] == "missing":
        return ApiError(400, f"{path}: is missing; the field is required", param=param)
    rule = _RULES.get(first["type"], "another value").format_map(first.get("ctx", {}))
    return ApiError(400, f"{path}: got {show(first.get('input'))}; allowed is {rule}", param=param)


def _field_path(location: Sequence[str | int]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = part[:_SHOWN_INPUT_CHARS]
            path += f".{name}" if path else name
    return path


def show(value: object) -> str:
    """A value of a request as it was sent, shortened; only the beginning of a long one is read."""
    return shortened_json(value, _SHOWN_INPUT_CHARS)
