"""Worker: a client that sends requests at their times and notes when each token comes."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.workers.stream_client import EVENT, OPTIONS, completion_request


async def _stream(
    host: str, port: int, request: dict[str, Any], begin: float, answer: dict[str, Any]
) -> None:
    """Send a request at its time, and add to its answer the time of each token, or the error."""
    body = {"prompt": request["prompt"], "max_tokens": request["new_tokens"], **OPTIONS}
    data = completion_request(body)
    await asyncio.sleep(max(begin + request["at"] - time.perf_counter(), 0))
    try:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(data)
            await _read(reader, begin, answer)
        finally:
            writer.close()
    except OSError as error:
        answer["error"] = repr(error)


async def _read(reader: asyncio.StreamReader, begin: float, answer: dict[str, Any]) -> None:
    """Read an answer to its end."""
    status = (await reader.readline()).decode().strip()
    if " 200 " not in status:
        body = (await reader.read()).decode().strip()
        # the header ends with an empty line
        answer["error"] = f"{status or 'no answer'} {body.splitlines()[-1:]}"
    # an event is one line; lines between events belong to HTTP
    while line := await reader.readline():
        if line.startswith(EVENT):
            came = time.perf_counter() - begin
            event = json.loads(line[len(b"data: ") :])
            for choice in event.get("choices", ()):
                answer["times"] += [came] * len(choice.get("token_ids") or ())
            if "error" in event:
                answer["error"] = str(event["error"])


async def _replay(host: str, port: int, load: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = [{"times": []} for _ in load]
    begin = time.perf_counter()
    streams = (_stream(host, port, one, begin, a) for one, a in zip(load, answers, strict=True))
    await asyncio.gather(*streams)
    return answers


def replay(host: str, port: int, load: str) -> dict[str, Any]:
    """Send the requests of a JSON file at their times.

    Returns:
        `answers`: of each request, `times`, the seconds after the beginning at which its tokens
        came, and `error` if there was one; `seconds`; `client_cpu_s`.
    """
    requests = json.loads(Path(load).read_text())
    # a search for garbage in all token ids would hold up the answers
    gc.collect()
    gc.freeze()
    cpu, begin = time.process_time(), time.perf_counter()
    answers = asyncio.run(_replay(host, port, requests))
    seconds = time.perf_counter() - begin
    return {"answers": answers, "seconds": seconds, "client_cpu_s": time.process_time() - cpu}
