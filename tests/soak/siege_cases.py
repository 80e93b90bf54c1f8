"""Requests that are large, deep or many enough to hold a server up, one kind at a time.

Unlike `tests.soak.hostile` these are few and fixed: each is the worst found of its kind, and what a
server does with it is measured by `tests.soak.siege`.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.soak.hostile import BODIES, GRAMMARS, REGEXES, SCHEMAS, HostileRequest
from tests.soak.siege_requests import (
    CHAT,
    COMPLETIONS,
    COUNT_TOKENS,
    DETOKENIZE,
    INPUT_TOKENS,
    LONGEST_BODY,
    MEGABYTE,
    MESSAGES,
    RESPONSES,
    TOKENIZE,
    USER,
    Case,
    Facts,
    one,
    post,
)
from tests.soak.siege_work import WORK

SENTENCE_SOURCES = sorted((Path(__file__).resolve().parents[2] / "docs").glob("*.md"))
# a prompt of so many tokens takes the demo model seconds, not minutes
LONG_PROMPT = 8192
# regular expressions whose states grow with every token, or with every step of an output
GREEDY = (
    "(a|b)*a(a|b){20}x",
    "(?s:.{1000,10000})",
    "(.*[aeiou].{15})+x",
    "(\\w{1,20}\\W{1,20}){1,300}",
    "|".join(f"(.*{chr(97 + i)}.{{{8 + i}}})" for i in range(20)),
)
# grammars whose masks take long: rows of many items at once, or after a text that looks harmless
AMBIGUOUS = (
    "start: s\ns: s s | s s s | /[a-z ]/ |",
    "start: s\ns: s s | /[^x]/ | /(?s:.)/",
    "start: s\ns: a s a s | a s | a\na: /[a-z]/ | /[a-z ]/ |",
    "start: e\ne: e e e e | /[ -~]/ |",
    *(
        f"start: s\ns: t{' n' * count}\nt: /[a-z ]/ s | /[.,A-Z]/ u\nu: /[a-z ]/\nn: | /\\d/"
        for count in (100, 1000, 4000)
    ),
    "start: s\n" + "".join(f"s: s s{i} |\ns{i}: /[a-z ]/ s |\n" for i in range(3)),
)


def prose(num_bytes: int) -> str:
    """Text of the documentation, repeated."""
    text = "".join(path.read_text("utf-8") for path in SENTENCE_SOURCES)
    text = text.encode("ascii", "ignore").decode()
    return (text * (num_bytes // len(text) + 1))[:num_bytes]


def letters(num_bytes: int, seed: int = 0) -> str:
    """Random lower-case letters in one word, so that nearly all merges are tried."""
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=num_bytes))


def filled(start: bytes, entry: bytes, end: bytes, size: int = LONGEST_BODY) -> bytes:
    """A body of nearly `size` bytes: `entry` as often as it fits, with commas."""
    count = (size - len(start) - len(end)) // (len(entry) + 1)
    return start + b",".join([entry] * count) + end


def _template() -> str:
    """A Jinja template of 10 MB."""
    return "{{ 'a' }}" * (10 * MEGABYTE // 9)


def _tools(count: int) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(count)]
    return {"messages": USER, "tools": tools, "max_tokens": 4}


def _messages(count: int) -> dict[str, Any]:
    return {"messages": USER * count, "max_tokens": 4}


def _stops(_: Facts) -> dict[str, Any]:
    stops = [letters(512, seed) for seed in range(64)]
    return {"prompt": "a", "stop": stops, "n": 32, "max_tokens": 32, "ignore_eos": True}


def _bad_words(_: Facts) -> dict[str, Any]:
    words = [letters(512, seed) for seed in range(1024)]
    return {"prompt": "a", "bad_words": words, "max_tokens": 16}


def _bias_of_all(facts: Facts) -> dict[str, Any]:
    bias = {str(token): 1 for token in range(facts.vocab_size)}
    return {"prompt": "a", "logit_bias": bias, "n": 32, "max_tokens": 32, "ignore_eos": True}


def _echo(stream: bool) -> dict[str, Any]:
    body = {"prompt": list(range(10, 1010)), "n": 128, "echo": True, "logprobs": 20}
    return {**body, "max_tokens": 1, **({"stream": True} if stream else {"prompt_logprobs": 20})}


def _longest_prompts(facts: Facts) -> Iterator[HostileRequest]:
    """Prompts of random tokens, so that none is cached."""
    draw, length = random.Random(0), min(LONG_PROMPT, facts.max_model_len) - 1
    for _ in range(8):
        prompt = [draw.randrange(10, facts.vocab_size) for _ in range(length)]
        yield post(COMPLETIONS, {"prompt": prompt, "max_tokens": 1})


def _nested(opening: bytes, closing: bytes, depth: int) -> bytes:
    return b'{"prompt":"a","x":' + opening * depth + b"1" + closing * depth + b"}"


def _deep_schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _wide_schema(width: int) -> dict[str, Any]:
    fields = {f"field{i}": {"type": "string", "pattern": "[a-z]+"} for i in range(width)}
    return {"type": "object", "properties": fields}


def _with_schema(schema: dict[str, Any]) -> Iterator[HostileRequest]:
    """A schema in each of the places that take one."""
    chat = {"messages": USER, "max_tokens": 4}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    for choice in ("auto", "required"):
        yield post(CHAT, {**chat, "tools": [tool], "tool_choice": choice})
    yield post(CHAT, {**chat, "response_format": form})
    yield post(CHAT, {**chat, "guided_json": json.dumps(schema)})


def _bombs(_: Facts) -> Iterator[HostileRequest]:
    """Every form that `tests.soak.hostile` knows, and greedy ones."""
    forms: list[dict[str, Any]] = [{"regex": text} for text in (*REGEXES, *GREEDY)]
    forms += [{"grammar": text} for text in GRAMMARS] + [{"json": schema} for schema in SCHEMAS]
    for form in forms:
        body = {"prompt": "a", "max_tokens": 32, "structured_outputs": form}
        yield post(COMPLETIONS, json.dumps(body).encode())


def _ambiguous(_: Facts) -> Iterator[HostileRequest]:
    """Several outputs of each grammar that is ambiguous, at once, also streamed."""
    for number in range(4 * len(AMBIGUOUS)):
        form = {"grammar": AMBIGUOUS[number % len(AMBIGUOUS)] + " " * number}
        body = {"prompt": "Once", "max_tokens": 60, "n": 8, "ignore_eos": True}
        yield post(COMPLETIONS, {**body, "structured_outputs": form, "stream": number % 2 == 1})


def _forms(_: Facts) -> Iterator[HostileRequest]:
    """96 requests over 48 forms, more than are kept compiled."""
    for number in range(96):
        schema = _wide_schema(4 + number % 48)
        body = {"prompt": "a", "max_tokens": 48, "ignore_eos": True, "guided_json": schema}
        yield post(COMPLETIONS, body)


_LONG_LISTS = ("stop", "bad_words", "guided_choice", "prompt", "messages", "tools", "input")


def _arrays(_: Facts) -> Iterator[HostileRequest]:
    """An array of a million entries in each field of each body."""
    numbers = b"[" + b",".join([b"1"] * MEGABYTE) + b"]"
    texts = b"[" + b",".join([b'"a"'] * MEGABYTE) + b"]"
    valid: dict[str, dict[str, Any]] = {
        COMPLETIONS: {"prompt": "a"},
        CHAT: {"messages": USER},
        RESPONSES: {"input": "a"},
        INPUT_TOKENS: {"input": "a"},
        MESSAGES: {"messages": USER, "max_tokens": 1},
        COUNT_TOKENS: {"messages": USER},
        TOKENIZE: {"prompt": "a"},
        DETOKENIZE: {"tokens": [5]},
    }
    for path, model in BODIES.items():
        for field in model.model_fields:
            rest = {name: value for name, value in valid[path].items() if name != field}
            start = json.dumps({**rest, field: 0}).encode().removesuffix(b"0}")
            yield post(path, start + numbers + b"}")
            if field in _LONG_LISTS:
                yield post(path, start + texts + b"}")


def _headers(_: Facts) -> list[HostileRequest]:
    headers = [(b"x-%d" % i, b"a") for i in range(10_000)]
    return [post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}, *headers)]


def _unended(num_bytes: int, copies: int) -> Any:
    """Bodies of 15 MB of which so many bytes come."""
    length = (b"content-length", b"%d" % (15 * MEGABYTE))
    body = (b'{"prompt":"' + b"a" * num_bytes)[:num_bytes]
    return lambda _: [post(COMPLETIONS, body, length)] * copies


def _idle(_: Facts) -> list[HostileRequest]:
    """Connections on which nothing is sent."""
    return [HostileRequest("", "", (), b"")] * 1100


def _text(make: Callable[[int], str], num_bytes: int = 15 * MEGABYTE, copies: int = 1) -> Any:
    return one(TOKENIZE, lambda _: {"prompt": make(num_bytes)}, copies)


CASES: dict[str, Case] = {
    "15 MB of prose to /tokenize": Case(_text(prose)),
    "15 MB of prose as a prompt": Case(
        one(COMPLETIONS, lambda _: {"prompt": prose(15 * MEGABYTE)})
    ),
    "2 MB of prose in a chat": Case(
        one(CHAT, lambda _: {"messages": [{"role": "user", "content": prose(2 * MEGABYTE)}]})
    ),
    "8 x 200 kB of random letters": Case(_text(letters, 200_000, 8), at_once=8),
    "8 x 15 MB of prose to /tokenize": Case(_text(prose, copies=8), at_once=8),
    "20,000 tools": Case(one(CHAT, lambda _: _tools(20_000))),
    "200,000 tools": Case(one(CHAT, lambda _: _tools(200_000))),
    "8 x 200,000 tools": Case(one(CHAT, lambda _: _tools(200_000), 8), at_once=8),
    "64 stops of 512, n = 32": Case(one(COMPLETIONS, _stops)),
    "8 x 64 stops of 512, n = 32": Case(one(COMPLETIONS, _stops, 8), at_once=8),
    "350,000 messages": Case(one(CHAT, lambda _: _messages(350_000))),
    "8 x 350,000 messages": Case(one(CHAT, lambda _: _messages(350_000), 8), at_once=8),
    "logit_bias of 1M": Case(
        one(COMPLETIONS, lambda _: {"prompt": "a", "logit_bias": {str(i): 1 for i in range(10**6)}})
    ),
    "logit_bias of every token, n = 32": Case(one(COMPLETIONS, _bias_of_all)),
    "/detokenize of 1M ids": Case(one(DETOKENIZE, lambda _: {"tokens": [5] * 10**6})),
    "token_strs of a long prompt": Case(
        one(
            TOKENIZE,
            lambda facts: {"prompt": prose(2 * facts.max_model_len), "return_token_strs": True},
        )
    ),
    "bad_words 1,024 x 512": Case(one(COMPLETIONS, _bad_words)),
    "n = 128, echo, logprobs 20": Case(one(COMPLETIONS, lambda _: _echo(False)), patience=3),
    "n = 128, echo, logprobs 20, streamed": Case(
        one(COMPLETIONS, lambda _: _echo(True)), patience=3
    ),
    "8 x n = 128, echo, logprobs 20": Case(
        one(COMPLETIONS, lambda _: _echo(False), 8), at_once=8, patience=3
    ),
    "1,100 idle sockets, ulimit -n 1024": Case(_idle, hold_s=15, open_files=1024),
    "1,100 idle sockets, ulimit -n 64": Case(_idle, hold_s=15, open_files=64),
    "8 prompts of 8k tokens": Case(_longest_prompts, at_once=8),
    "96 requests over 48 forms": Case(_forms, at_once=96),
    "arrays 100,000 deep": Case(one(COMPLETIONS, lambda _: _nested(b"[", b"]", 100_000))),
    "objects 100,000 deep": Case(one(COMPLETIONS, lambda _: _nested(b'{"a":', b"}", 100_000))),
    "16 MiB of empty arrays": Case(
        one(COMPLETIONS, lambda _: filled(b'{"prompt":[', b"[]", b"]}"))
    ),
    "16 MiB of empty objects": Case(
        one(CHAT, lambda _: filled(b'{"messages":[', b'{"a":{}}', b"]}"))
    ),
    "8 x 16 MiB of empty objects": Case(
        one(CHAT, lambda _: filled(b'{"messages":[', b'{"a":{}}', b"]}"), 8), at_once=8
    ),
    "16 MiB of backslashes": Case(
        one(COMPLETIONS, lambda _: b'{"prompt":"%b"}' % (b"\\" * (LONGEST_BODY - 100)))
    ),
    "16 MiB of escapes": Case(
        one(COMPLETIONS, lambda _: b'{"prompt":"%b"}' % (b"\\u00e9" * (LONGEST_BODY // 6 - 9)))
    ),
    "a number of 16 MiB": Case(
        one(COMPLETIONS, lambda _: b'{"prompt":"a","seed":%b}' % (b"9" * (LONGEST_BODY - 99)))
    ),
    "schemas 200 deep": Case(lambda _: _with_schema(_deep_schema(200)), at_once=4),
    "schemas of 100,000 fields": Case(lambda _: _with_schema(_wide_schema(100_000))),
    "regexes, grammars, schemas that explode": Case(_bombs, at_once=8),
    # more outputs at once would measure the model
    "ambiguous grammars, n = 8": Case(_ambiguous, at_once=2),
    "chat_template of 10 MB": Case(
        one(CHAT, lambda _: {"messages": USER, "chat_template": _template()})
    ),
    "chat_template_kwargs of 10 MB": Case(
        one(CHAT, lambda _: {"messages": USER, "chat_template_kwargs": {"a": _template()}})
    ),
    "arrays of 1M in every field": Case(_arrays, at_once=2),
    "10,000 headers": Case(_headers),
    "200 bodies that drip": Case(_unended(100, 200), hold_s=15, drip=b"a"),
    "8 bodies of 15 MB that never end": Case(_unended(14 * MEGABYTE, 8), hold_s=15),
    **WORK,
}
