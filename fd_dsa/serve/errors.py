"""Every failure leaves the server as one OpenAI error object.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Source: the shape that the `openai` client parses; statuses follow the OpenAI API (400, 401, 403,
404, 405, 408, 413, 415, 429, 431, 500, 503), and validation is 400, never FastAPI's 422.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from fd_dsa.errors import FdDsaError

# pydantic error type of our own validators: their message is complete as it is
CUSTOM_ERROR = "fd_dsa"
_SHOWN_INPUT_CHARS = 60
# pydantic's types of errors in our words: its own tell of classes and of validation
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
    "/v1/responses": "the Responses API",
    "/v1/messages": "the Anthropic API",
}


class ErrorObject(BaseModel):
    """What went wrong, as the OpenAI API tells it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorObject


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorResponse, "description": "400 and above: an error object"}
}
"""Of every route, for the OpenAPI document; in the place of FastAPI's 422, which is never sent."""


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

    def body(self) -> dict[str, Any]:
        """The error object."""
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

    def response(self) -> JSONResponse:
        """The error object with its status and headers."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


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
    """Answer ApiError, HTTPException and validation errors of `app` with error objects."""

    async def api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _from_http_exception(request, error).response()

    async def validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _from_validation(request, error).response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)


def _from_http_exception(request: Request, error: HTTPException) -> ApiError:
    """404 and 405 of the router, told with the paths and methods that exist."""
    path = request.url.path
    headers = dict(error.headers or {})
    if error.status_code == 404:
        routes = ", ".join(sorted(request.app.openapi()["paths"]))
        return ApiError(404, f"path {path} does not exist here; {_scope(path)}it has {routes}")
    if error.status_code == 405:
        allowed = headers.get("allow") or headers.get("Allow") or "another method"
        message = f"method {request.method} is not allowed on {path}; use {allowed}"
        return ApiError(405, message, headers=headers)
    if error.status_code == 400 and error.__cause__ is not None:
        return ApiError(400, _unreadable(error.__cause__))
    return ApiError(error.status_code, str(error.detail), headers=headers)


def _unreadable(error: BaseException) -> str:
    """Why FastAPI could not make anything of a body."""
    if isinstance(error, UnicodeDecodeError):
        return (
            f"body is not text: byte {error.start} is no {error.encoding}; send JSON in UTF-8, and "
            "without a Content-Encoding"
        )
    if isinstance(error, RecursionError):
        return "body nests too deeply; send a request that is flatter"
    return f"body cannot be read: {str(error).partition(';')[0].lower()}"


def _scope(path: str) -> str:
    """What to say of a path that servers of another purpose have."""
    for prefix, what in _OUT_OF_SCOPE.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return f"this server generates text, {what} is out of its scope; "
    return "this server generates text; "


def _from_validation(request: Request, error: RequestValidationError) -> ApiError:
    """The first problem of a request body, in our words."""
    first = error.errors()[0]
    location = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"body is not valid JSON: {reason} at character {location[0]}")
    if not location:
        return ApiError(400, _not_an_object(request, first))
    param = _field_path(location)
    if first["type"] == CUSTOM_ERROR:
        return ApiError(400, f"{param}: {first['msg']}", param=param)
    if first["type"] == "missing":
        return ApiError(400, f"{param}: is missing; the field is required", param=param)
    rule = _RULES.get(first["type"], "another value").format_map(first.get("ctx", {}))
    return ApiError(400, f"{param}: got {show(first.get('input'))}; allowed is {rule}", param=param)


def _not_an_object(request: Request, first: Mapping[str, Any]) -> str:
    """Why the body as a whole is no request: empty, another content type, or not an object."""
    if first["type"] == "missing":
        return "body is empty; send a JSON object"
    kind = request.headers.get("content-type", "")
    if kind.split(";")[0].strip() != "application/json":
        return f"Content-Type is {kind!r}; send JSON with Content-Type: application/json"
    return f"body: got {show(first.get('input'))}; send a JSON object"


def _field_path(location: Sequence[str | int]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else str(part)
    return path


def show(value: Any) -> str:
    """A value of a request as it stood there, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _SHOWN_INPUT_CHARS else text[:_SHOWN_INPUT_CHARS] + "..."
