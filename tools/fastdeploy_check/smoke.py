"""Does a server answer: a chat and a completion, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tools.fastdeploy_check.servers import CheckFailed, Server

_PROMPT = "The capital of France is"


def smoke(server: Server) -> dict[str, Any]:
    """Ask for one completion and one chat; gives their texts.

    Raises:
        CheckFailed: an answer is missing, empty, or another when it is streamed.
    """
    greedy = {"max_tokens": 16, "temperature": 0}
    whole = server.complete(prompt=_PROMPT, **greedy)["choices"][0]["text"]
    streamed = "".join(
        chunk["choices"][0].get("text") or ""
        for chunk in stream(server, "/v1/completions", prompt=_PROMPT, **greedy)
        if chunk.get("choices")
    )
    if not whole:
        raise CheckFailed("/v1/completions: the text is empty")
    if streamed != whole:
        raise CheckFailed(f"/v1/completions: streamed {streamed!r}, whole {whole!r}")
    messages = [{"role": "user", "content": "Hello! What can you do?"}]
    answer = server.post("/v1/chat/completions", messages=messages, **greedy)
    content = answer["choices"][0]["message"]["content"]
    if not content:
        raise CheckFailed("/v1/chat/completions: the answer is empty")
    return {"completion": whole, "chat": content}


def stream(server: Server, route: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer.

    Raises:
        CheckFailed: another status than 200, or the stream has no end.
    """
    body = {"model": server.name, "stream": True, **fields}
    with server.client.stream("POST", f"{server.url}{route}", json=body) as answer:
        if answer.status_code != 200:
            raise CheckFailed(f"{route}: {answer.status_code} {answer.read().decode()[:300]}")
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return
            if data != line:
                yield json.loads(data)
    raise CheckFailed(f"{route}: the stream ended without [DONE]")
