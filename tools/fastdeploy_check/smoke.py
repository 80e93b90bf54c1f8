"""Does a server answer: a chat and a completion, whole and streamed."""

from __future__ import annotations

from typing import Any

from tools.fastdeploy_check.servers import CheckFailed, Server

_PROMPT = "The capital of France is"


def smoke(server: Server) -> dict[str, Any]:
    """Ask for one completion and one chat; gives their texts.

    Raises:
        CheckFailed: an answer is missing, empty, or another when it is streamed.
    """
    greedy = {"max_tokens": 16, "temperature": 0}
    route = "/v1/completions"
    whole = server.post(route, prompt=_PROMPT, **greedy)["choices"][0]["text"]
    events = server.stream(route, prompt=_PROMPT, **greedy)
    streamed = "".join(event["choices"][0].get("text") or "" for event in events)
    if not whole:
        raise CheckFailed(f"{route}: the text is empty")
    if streamed != whole:
        raise CheckFailed(f"{route}: streamed {streamed!r}, whole {whole!r}")
    messages = [{"role": "user", "content": "Hello! What can you do?"}]
    answer = server.post("/v1/chat/completions", messages=messages, **greedy)
    content = answer["choices"][0]["message"]["content"]
    if not content:
        raise CheckFailed("/v1/chat/completions: the answer is empty")
    return {"completion": whole, "chat": content}
