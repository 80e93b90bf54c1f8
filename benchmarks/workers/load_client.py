"""Worker: a client that sends requests at their times and notes when each token comes."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.workers.stream_client import EVENT, OPTIONS, completion_request


async def _stream(
    host: str, port: int, request: dict[str, Any], begin: float, times: list[float]
) -> None:
    """Send a request at its time, and add the time of each token of its answer."""
    body = {"prompt": request["prompt"], "max_tokens": request["new_tokens"], **OPTIONS}
    data = completion_request(body)
    await asyncio.sleep(max(begin + request["at"] - time.perf_counter(), 0))
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(data)
        # an event is one line; lines between events belong to HTTP
        while line := await reader.readline():
            if line.startswith(EVENT):
                came = time.perf_counter() - begin
                choices = json.loads(line[len(b"data: ") :])["choices"]
                times += [came] * sum(len(one.get("token_ids") or ()) for one in choices)
    finally:
        writer.close()


async def _replay(host: str, port: int, load: list[dict[str, Any]]) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in load]
    begin = time.perf_counter()
    streams = (_stream(host, port, one, begin, t) for one, t in zip(load, times, strict=True))
    await asyncio.gather(*streams)
    return times


def replay(host: str, port: int, load: str) -> dict[str, Any]:
    """Send the requests of a JSON file at their times.

    Returns:
        `times`: of each request, the seconds after the beginning at which its tokens came;
        `client_cpu_s`.
    """
    requests = json.loads(Path(load).read_text())
    cpu = time.process_time()
    times = asyncio.run(_replay(host, port, requests))
    return {"times": times, "client_cpu_s": time.process_time() - cpu}
