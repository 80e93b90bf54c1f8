"""Hostile requests against the server: never a 5xx, always an error object, memory bounded.

    python -m tests.soak.fuzz --requests 100000
    python -m tests.soak.fuzz --first 4711 --requests 1

The application runs in this process, with the demo model's tokenizer and chat template, the real
engine, and the runner that checks what its slots hold.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import re
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from fd_dsa.config import demo_model_path
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.serve.app import create_app
from fd_dsa.serve.errors import is_anthropic
from fd_dsa.serve.heap import share_heap
from fd_dsa.serve.state import ServerState
from tests.engine.threaded import threaded
from tests.soak import report
from tests.soak.audit import audit, running_requests
from tests.soak.checking_runner import EOS, CheckingRunner
from tests.soak.hostile import POSTS, HostileRequest, draw_request

NUM_BLOCKS = 96
BLOCK_SIZE = 8
MAX_MODEL_LEN = 160
MAX_NUM_SEQS = 16
NUM_CLIENTS = 16
ANSWER_WITHIN_S = 120.0
WARM_UP_REQUESTS = 2000
MAX_FAILURES = 10
# of what is held beside compiled grammars; the allocator cannot give everything back at any time
MAX_GROWTH_MIB = 100
# last event of a stream, where it is no [DONE]
STREAM_ENDS = {
    "/v1/responses": r'{"type":"response\.(completed|incomplete|failed)"',
    "/v1/messages": r'{"type":"(message_stop|error)"',
}
PAGE_BYTES = resource.getpagesize()


def make_engine() -> LLMEngine:
    """The engine over a checking runner, with the tokenizer of the demo model."""
    tokenizer = Tokenizer.from_folder(demo_model_path())
    batch = InputBatch(MAX_NUM_SEQS, 64, MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE)
    runner = CheckingRunner(
        batch, NUM_BLOCKS, lambda: running_requests(engine), vocab_size=tokenizer.vocab_size
    )
    engine = LLMEngine(
        runner,
        tokenizer,
        num_blocks=NUM_BLOCKS,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=[EOS],
    )
    return engine


def check_answer(method: str, path: str, answer: httpx.Response) -> None:
    """AssertionError unless an answer is what a client may rely on."""
    assert answer.status_code < 500, f"{answer.status_code}: {answer.text}"
    assert answer.headers.get("x-request-id")
    if answer.status_code >= 400:
        if method != "HEAD":
            check_error(answer.json(), path)
    elif answer.headers.get("content-type", "").startswith("text/event-stream"):
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        end = STREAM_ENDS.get(path, r"\[DONE\]")
        assert re.match(end, events[-1]), f"a stream without an end: {events[-1]}"
        for event in map(json.loads, (event for event in events if event != "[DONE]")):
            if "error" in event:
                check_error(event, path)
            failure = event.get("response", {}).get("error")
            assert failure is None or failure["code"] != "server_error", failure
    elif method == "POST" and path in POSTS:
        assert not answer.json().get("error")


def check_error(content: Any, path: str) -> None:
    """AssertionError unless it is an error object of the path's API, without an inner detail."""
    error = content["error"]
    # a server that cannot read the head does not know the path
    if is_anthropic(path) and "no valid HTTP/1.1" not in error["message"]:
        assert content == {"type": "error", "error": error}
        assert set(error) == {"message", "type"}, content
    else:
        assert list(content) == ["error"], content
        assert set(error) == {"message", "type", "param", "code"}, content
    assert isinstance(error["message"], str) and error["message"]
    assert error["type"] not in ("server_error", "api_error"), content
    for word in ("pydantic", "Traceback", 'File "'):
        assert word not in error["message"], content


def held_without_grammars_mib(engine: LLMEngine) -> int:
    """Memory of this process without what its allocator and the grammar cache keep for later."""
    for _ in range(2):
        engine.grammars.expire()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return round(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES / 2**20)


async def send(
    client: httpx.AsyncClient, hostile: HostileRequest, url: str = "http://server"
) -> httpx.Response:
    """Send a hostile request as it is."""
    request = client.build_request(
        hostile.method, url, headers=list(hostile.headers), content=hostile.body
    )
    # what httpx would tidy up is part of the request
    request.url = request.url.copy_with(raw_path=hostile.path.encode("ascii"))
    return await asyncio.wait_for(client.send(request), ANSWER_WITHIN_S)


async def fuzz(app: FastAPI, first: int, count: int) -> Counter[str]:
    """Send the hostile requests `first` .. `first + count - 1` from some clients at a time.

    Returns:
        How many answers had which status.
    """
    numbers = iter(range(first, first + count))
    counts: Counter[str] = Counter()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport) as client:
        await asyncio.gather(*(_client(client, numbers, counts) for _ in range(NUM_CLIENTS)))
        assert (await client.get("http://server/health")).status_code == 200
    return counts


async def _client(client: httpx.AsyncClient, numbers: Iterator[int], counts: Counter[str]) -> None:
    """One client: the next number, until there is none."""
    for number in numbers:
        hostile = draw_request(number)
        try:
            answer = await send(client, hostile)
            check_answer(hostile.method, hostile.path, answer)
        except Exception as error:
            what = f"{hostile.method} {hostile.path} {hostile.headers} {hostile.body!r:.400}"
            again = f"python -m tests.soak.fuzz --first {number} --requests 1"
            print(f"request {number}: {error!r:.600}\n  {what}\n  again: {again}", flush=True)
            counts["failures"] += 1
            assert counts["failures"] < MAX_FAILURES, "too many requests were answered wrongly"
            continue
        counts[f"status {answer.status_code}"] += 1


def run(first: int, count: int) -> Counter[str]:
    """Start an application, send the requests, and see that nothing is left over."""
    engine = make_engine()
    state = ServerState(["demo"])
    state.loaded_engine = threaded(engine)
    state.loaded_engine.start()
    app = create_app(state)

    async def serve() -> Counter[str]:
        async with app.router.lifespan_context(app):
            num_warm = min(count, WARM_UP_REQUESTS)
            counts = await fuzz(app, first, num_warm)
            warm = held_without_grammars_mib(engine)
            counts["MiB held after the warm-up, without grammars"] = warm
            counts += await fuzz(app, first + num_warm, count - num_warm)
            deadline = time.monotonic() + ANSWER_WITHIN_S
            while engine.has_unfinished_requests() and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            assert not engine.has_unfinished_requests(), "a request is stuck"
            assert app.state.server.engine.errored is None
            assert app.state.server.num_admitted == 0
            end = held_without_grammars_mib(engine)
            counts["MiB held at the end, without grammars"] = end
            assert end < warm + MAX_GROWTH_MIB, counts
        counts["MiB at most"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        return counts

    counts = asyncio.run(serve())
    audit(engine)
    assert engine.stats().num_used_blocks == 0
    assert counts["failures"] == 0, "the requests above were answered wrongly"
    return counts


if __name__ == "__main__":
    # as a server does
    share_heap()
    report.main(__doc__, "requests", 100_000, run)
