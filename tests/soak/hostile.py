"""Requests that no client should send: malformed, huge, deep, of other types, or with a trap.

A request is a function of its number, so that one that does harm can be sent again.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fd_dsa.serve.completions import CompletionRequest
from fd_dsa.serve.protocol.chat import ChatCompletionRequest
from fd_dsa.serve.protocol.fields import Body
from fd_dsa.serve.protocol.messages import CountTokensRequest, MessagesRequest
from fd_dsa.serve.protocol.responses import ResponsesRequest
from fd_dsa.serve.tokenization import DetokenizeRequest, TokenizeRequest

BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/responses/input_tokens": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
POSTS = tuple(BODIES)
GETS = ("/v1/models", "/health", "/version", "/metrics", "/openapi.json", "/server_info", "/docs")
JSON = (b"content-type", b"application/json")
WORD = "\u202e\U0001f642\u0000 {{ 7*7 }} <|im_start|>"


@dataclass(frozen=True)
class HostileRequest:
    """Parts of a hostile HTTP request, as bytes where a client could send any."""

    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def deep(draw: random.Random) -> Any:
    """A value nested as deep as JSON libraries go, or nearly."""
    value: Any = draw.choice([[], {}, 0, "x"])
    for _ in range(draw.choice([10, 60, 200])):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


NUMBERS = (0, -1, 1, 2, 20, 21, 129, 2**31, 2**63, -(2**64), 10**40, 0.5, -0.0, 1e308, 1e-320)
TEXTS = ("", " ", "a", "\ud800", "\x00", "NaN", "null", "../../etc/passwd", "a" * 5000, WORD)
SIMPLE = (*NUMBERS, *TEXTS, None, True, False, [], {}, [None], [[]], {"": None}, [0] * 300)
# of the right type, which the pool above mostly is not
LISTS: tuple[Any, ...] = (
    ["a"], ["a", ""], ["\ud800"], ["x" * 9000], ["e"] * 2000, [WORD], [" ", "\n"], ["a", 1],
    [5, 6], [10**9], [-1], [2**63], [5] * 3000, [[5], [6]], [[5], []], [5.0], list(range(140)),
    {"5": 100}, {"5": 1e308}, {"-1": 0}, {"9" * 30: 1}, {str(i): -100 for i in range(400)},
    {"type": "json_object"}, {"type": "text"}, {"include_usage": True}, {"json_object": True},
)  # fmt: skip
REGEXES = (
    "(a+)+$",
    "(a|aa)+" * 20,
    "[",
    "(?=x)",
    "(?<n>a)\\1",
    "a{1000000}",
    "(a{100}){100}",
    "\\p{L}*",
    "(" * 300 + ")" * 300,
    ".*" * 200,
    "\\",
    "[^\\x00-\\x{10FFFF}]",
    "",
    "x*?",
    "(?i)ß",
    "a|" * 3000,
)
GRAMMARS = (
    "start: start",
    'start: "a" start | "b"',
    "start: x",
    "root ::= root",
    "start: /(/",
    "%import x",
    'start: "a"~1..1000000',
    "start: " + "(" * 500,
    "start: " + '"a" ' * 3000,
    "\x00",
    "%%%",
    "",
    "start: A\nA: A",
    'start: ("a"? "a"?)*',
    "start: %json { }",
    'root ::= "a"+ | ""',
)
SCHEMAS: tuple[Any, ...] = (
    {"$ref": "#"}, {"$ref": "http://127.0.0.1:9/x"}, {"$ref": "file:///etc/passwd"},
    {"type": "string", "pattern": "(a+)+$"}, {"type": "nothing"}, {"type": []}, {"enum": []},
    {"type": "array", "minItems": 10**9}, {"type": "string", "minLength": 10**12},
    {"allOf": [{"type": "string"}, {"type": "integer"}]}, {"anyOf": [{}] * 500}, {"not": {}},
    {"type": "object", "properties": {str(i): {"type": "string"} for i in range(300)}},
    {"type": "integer", "minimum": 5, "maximum": 4}, {"multipleOf": 0}, {"const": "\ud800"},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "object", "required": ["a"] * 100, "additionalProperties": False}, {"x": 10**400},
)  # fmt: skip


def _structured(draw: random.Random) -> dict[str, Any]:
    """A field of structured output, of one of its spellings."""
    form = draw.choice(["regex", "grammar", "json", "choice"])
    pools = {"regex": REGEXES, "grammar": GRAMMARS, "json": SCHEMAS}
    value = draw.choice(pools.get(form, (["a"], [""], [], ["x" * 9000], ["é"] * 2000, "ab")))
    if draw.random() < 0.2:
        value = draw.choice(SIMPLE)
    if form == "json" and draw.random() < 0.5:
        return {"response_format": {"type": "json_schema", "json_schema": {"schema": value}}}
    if draw.random() < 0.5:
        return {"structured_outputs": {form: value}}
    return {f"guided_{form}": value}


def _tools(draw: random.Random) -> dict[str, Any]:
    """Tools and the choice of one."""
    function: dict[str, Any] = {"name": draw.choice(["f", "", "a b", WORD])}
    function["parameters"] = draw.choice((*SCHEMAS, *SIMPLE))
    fields = {"tools": [{"type": "function", "function": function}] * draw.choice([1, 2, 200])}
    named = {"type": "function", "function": {"name": draw.choice(["f", "g", 1])}}
    choices = [None, "auto", "required", "none", "x", named, {}]
    return {**fields, "tool_choice": draw.choice(choices)}


def _messages(draw: random.Random) -> dict[str, Any]:
    """A conversation in which something is wrong."""
    roles = ["system", "user", "assistant", "tool", "developer", "root", None]
    call = {"id": "1", "function": {"name": "f", "arguments": draw.choice(["{}", "{", "[]", 3])}}
    messages = []
    for _ in range(draw.choice([0, 1, 2, 5, 200])):
        content = draw.choice([*SIMPLE, [{"type": "text", "text": WORD}], [{"type": "image_url"}]])
        message: dict[str, Any] = {"role": draw.choice(roles), "content": content}
        if draw.random() < 0.2:
            message["tool_calls"] = draw.choice([[call], [], None, [{}], "x"])
        messages.append(message)
    return {"messages": messages}


def _parts(draw: random.Random) -> dict[str, Any]:
    """A conversation of the Responses or Messages API in which something is wrong."""
    texts = ("text", "name", "id", "call_id", "arguments", "output", "input", "tool_use_id")
    kinds = (
        "message", "reasoning", "function_call", "function_call_output", "item_reference", "text",
        "input_text", "tool_use", "tool_result", "thinking", "image", None,
    )  # fmt: skip

    def part(depth: int) -> Any:
        made: dict[str, Any] = {"type": draw.choice(kinds)}
        made["role"] = draw.choice(["user", "assistant", "system", "tool"])
        for name in draw.sample(texts, 4):
            made[name] = draw.choice(("f", "{}", *SIMPLE))
        nested = [part(depth - 1) for _ in range(draw.choice([0, 1, 3]))] if depth else "x"
        for name in ("content", "summary", "input", "output", "thinking"):
            if draw.random() < 0.4:
                made[name] = draw.choice([nested, nested, {}, *SIMPLE])
        return made

    parts = [part(2) for _ in range(draw.choice([1, 2, 5]))]
    fields = draw.choice(["reasoning", "text", "thinking", "output_config", "tool_choice"])
    value: Any = {draw.choice(["type", "effort", "format", "name"]): draw.choice(SIMPLE)}
    tools = [{**value, **part(0)} for _ in range(draw.choice([0, 1, 2]))]
    return {"input": parts, "messages": parts, fields: value, "tools": tools}


def _valid(draw: random.Random, path: str) -> dict[str, Any]:
    """A body without a fault."""
    if path == "/detokenize":
        return {"tokens": [5, 6, 7]}
    if path.startswith("/v1/responses"):
        return {"input": "hello", "max_output_tokens": draw.choice([1, 3, 12])}
    if path == "/v1/chat/completions" or path.startswith("/v1/messages"):
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
    else:
        body = {"prompt": draw.choice(["hello", "a b c " * 8])}
    return body if path == "/tokenize" else {**body, "max_tokens": draw.choice([1, 3, 12])}


def _fields(draw: random.Random, path: str) -> bytes:
    """A body some of whose fields have values from the pools above."""
    body, names = _valid(draw, path), sorted(BODIES[path].model_fields)
    for _ in range(draw.choice([1, 1, 2, 5])):
        value = deep(draw) if draw.random() < 0.1 else draw.choice((*SIMPLE, *LISTS))
        body[draw.choice(names) if draw.random() < 0.9 else draw.choice(TEXTS)] = value
    return json.dumps(body).encode()


def _special(draw: random.Random, path: str) -> bytes:
    """A body with a form, tools or messages."""
    body = _valid(draw, path)
    if path.startswith(("/v1/responses", "/v1/messages")):
        wrong = draw.choice([_structured, _parts, _parts, _tools])(draw)
        body.update({name: wrong[name] for name in wrong if name in BODIES[path].model_fields})
    else:
        body.update(draw.choice([_structured, _structured, _tools, _messages])(draw))
    if draw.random() < 0.3:
        body["stream"] = True
    if draw.random() < 0.3:
        body["n"] = draw.choice([1, 2, 128, 129, 10**9])
    return json.dumps(body).encode()


def _broken(draw: random.Random, path: str) -> bytes:
    """Bytes that are no JSON, or not the JSON that they seem."""
    text = json.dumps(_valid(draw, path))
    body = text.encode()
    place = draw.randrange(len(body))
    kinds: list[Callable[[], bytes]] = [
        lambda: body[:place],
        lambda: body[:place] + bytes([draw.randrange(256)]) + body[place + 1 :],
        lambda: body[:place] + draw.randbytes(8) + body[place:],
        lambda: draw.randbytes(draw.randrange(200)),
        lambda: b"[" * draw.choice([10, 5000, 200_000]),
        lambda: b'{"prompt":' * draw.choice([10, 2000]) + b"1",
        lambda: b'{"a":' + b"[" * 3000 + b"]" * 3000 + b',"prompt":"a"}',
        lambda: body + body,
        lambda: b"\xef\xbb\xbf" + body,
        lambda: text.encode(draw.choice(["utf-16", "utf-32", "utf-16-be"])),
        lambda: zlib.compress(body),
        lambda: body[:-1] + b', "seed": ' + b"9" * draw.choice([30, 4000, 6000]) + b"}",
        lambda: body[:-1] + b', "top_p": ' + draw.choice([b"NaN", b"-Infinity", b"1e999"]) + b"}",
        lambda: b'{"prompt": "\\ud800\\udfff\\ud800", "max_tokens": 2, "echo": true}',
        lambda: b'{"prompt": "a", "prompt": {"prompt": []}}',
        lambda: draw.choice([b"", b"null", b"[]", b"1", b'"x"', b"true", b"{}", b"\x00"]),
        lambda: b'{"prompt": [' + b"5," * 3000 + b"5]}",
        lambda: b'{"prompt": "' + b"ab " * 40_000 + b'"}',
    ]
    return draw.choice(kinds)()


def _header(draw: random.Random) -> tuple[bytes, bytes]:
    """A header with a trap."""
    garbage = bytes(draw.choice(range(33, 256)) for _ in range(draw.choice([1, 20, 500])))
    kinds = (
        (b"content-type", draw.choice([b"text/plain", b"application/xml", b"", garbage, b"a/b;;"])),
        (
            b"content-type",
            b"application/json; charset=" + draw.choice([b"utf-16", b"latin1", b"x"]),
        ),
        (b"content-type", b"multipart/form-data; boundary=" + garbage),
        (b"content-encoding", draw.choice([b"gzip", b"deflate", b"br", garbage])),
        (b"x-request-id", draw.choice([garbage, b"a" * 5000, b"", b"a\tb"])),
        (b"authorization", draw.choice([b"Bearer", b"Basic " + garbage, garbage])),
        (b"accept", draw.choice([garbage, b"image/png", b"*/*;q=x"])),
        (b"host", draw.choice([garbage, b"", b"[::1", b"a:b:c"])),
        (b"cookie", garbage),
        (b"range", b"bytes=0-0,9-,-1"),
        (b"if-none-match", garbage),
        (b"x-forwarded-for", garbage),
        (b"x-http-method-override", b"DELETE"),
    )
    return draw.choice(kinds)


def _elsewhere(draw: random.Random) -> HostileRequest:
    """Another path or another method."""
    paths = (
        "/v1", "/", "//", "/v1/models/" + "a" * 3000, "/v1/models/%00", "/v1/models/..%2f..%2f",
        "/v1/completions/", "/V1/COMPLETIONS", "/v1/embeddings", "/.git/config", "/%ff%fe",
        "/a?b=%", "/v1/models/%C3%A9", "/metrics?x[]=1", "/health/../v1/models",
        "/openapi.json?a=" + "b" * 2000,
    )  # fmt: skip
    path = draw.choice((*paths, *GETS, *POSTS))
    method = draw.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "X"])
    body = b"{}" if draw.random() < 0.3 else b""
    return HostileRequest(method, path, (_header(draw),), body)


def draw_request(number: int) -> HostileRequest:
    """The hostile request of that number, any integer."""
    draw = random.Random(number)
    if draw.random() < 0.1:
        return _elsewhere(draw)
    path = draw.choice((*POSTS[:2], *POSTS))
    make = draw.choice([_fields, _fields, _special, _special, _broken])
    headers = [JSON]
    if draw.random() < 0.15:
        given = _header(draw)
        headers = [given] if given[0] == JSON[0] else [JSON, given]
    return HostileRequest("POST", path, tuple(headers), make(draw, path))
