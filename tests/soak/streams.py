"""Many clients at once against a real server process: streams, disconnects, bad requests.

    python -m tests.soak.streams --seconds 600

The server runs with FD_DSA_BATCH_INVARIANT=1, so that no GEMM rounds differently with another
number of rows: an answer that is read to its end must be that of the request alone, bit for bit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.serve.conftest import chunks_of
from tests.serve.processes import serving
from tests.soak import report
from tests.soak.fuzz import check_answer, send
from tests.soak.hostile import draw_request

NUM_CLIENTS = 64
NUM_QUESTIONS = 32
# few blocks, so that requests are preempted and cached prefixes evicted; pings between the chunks
FLAGS = (
    *("--max-model-len", "256", "--max-num-seqs", "24", "--block-size", "8"),
    *("--max-num-batched-tokens", "64", "--num-gpu-blocks-override", "80"),
    *("--sse-ping-interval", "0.1"),
)
ANSWER_WITHIN_S = 240.0
KINDS = ("whole", "stream", "disconnect", "give up", "bad")
SHARES = (3, 4, 3, 1, 3)
STEM = "Once upon a time there was a small boat on a wide river and it could not float. " * 2
# output tokens, their text and their log-probabilities, of each choice
Answer = list[tuple[list[int], str, list[float]]]


@dataclass
class Load:
    """Shared state of the clients.

    Attributes:
        url: of the server.
        questions: bodies, and the answers that they get alone.
        ends_at: when clients stop, of the monotonic clock.
        counts: what has happened.
        longest_s: the longest that an answer took.
    """

    url: str
    questions: list[tuple[dict[str, Any], Answer]]
    ends_at: float
    counts: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0


def draw_question(draw: random.Random) -> dict[str, Any]:
    """A completion whose prompt mostly begins as others do."""
    prompt = STEM[: draw.randint(0, len(STEM))] + f"{draw.randrange(1000)} boats"
    body = {
        "prompt": prompt,
        "max_tokens": draw.randint(1, 64),
        "temperature": draw.choice([0, 1]),
        "seed": draw.randint(0, 9),
        "n": draw.choice([1, 1, 1, 2]),
        "logprobs": 5,
        "return_token_ids": True,
        "ignore_eos": draw.random() < 0.5,
    }
    salt = draw.choice([None, None, "a", "b"])
    return body if salt is None else {**body, "cache_salt": salt}


def joined(parts: Iterable[Mapping[str, Any]], num_choices: int) -> Answer:
    """An answer out of its choices, or out of chunks of them."""
    tokens: list[list[int]] = [[] for _ in range(num_choices)]
    texts, scores = [""] * num_choices, [list[float]() for _ in range(num_choices)]
    for part in parts:
        index = part["index"]
        tokens[index] += part.get("token_ids") or []
        texts[index] += part["text"]
        scores[index] += (part["logprobs"] or {"token_logprobs": []})["token_logprobs"]
    return list(zip(tokens, texts, scores, strict=True))


async def ask(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Answer:
    """The whole answer."""
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return joined(answer.json()["choices"], body["n"])


async def read_stream(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Answer:
    """The answer out of its chunks."""
    answer = await client.post("/v1/completions", json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    return joined((chunk["choices"][0] for chunk in chunks_of(answer)), body["n"])


async def _client(load: Load, number: int) -> None:
    """One client: one request after the other, of a random kind, until the time is over."""
    draw = random.Random(number)
    limits = httpx.Limits(max_keepalive_connections=1)
    async with httpx.AsyncClient(
        base_url=load.url, timeout=ANSWER_WITHIN_S, limits=limits
    ) as client:
        while time.monotonic() < load.ends_at:
            kind = draw.choices(KINDS, SHARES)[0]
            begin = time.monotonic()
            await asyncio.wait_for(_request(client, load, kind, draw), ANSWER_WITHIN_S)
            load.counts[kind] += 1
            load.longest_s = max(load.longest_s, time.monotonic() - begin)


async def _request(client: httpx.AsyncClient, load: Load, kind: str, draw: random.Random) -> None:
    """One request of that kind."""
    body, alone = draw.choice(load.questions)
    if kind == "bad":
        hostile = draw_request(draw.randrange(10**9))
        check_answer(hostile.method, hostile.path, await send(client, hostile, load.url))
    elif kind == "disconnect":
        stream = {**body, "max_tokens": 64, "stream": True}
        async with client.stream("POST", "/v1/completions", json=stream) as answer:
            assert answer.status_code == 200
            async with contextlib.aclosing(answer.aiter_lines()) as lines:
                for _ in range(draw.randint(0, 16)):
                    await anext(lines, None)
    elif kind == "give up":
        try:
            await asyncio.wait_for(ask(client, body), draw.uniform(0.01, 2))
        except (asyncio.TimeoutError, httpx.TimeoutException):
            load.counts["given up before the answer"] += 1
    else:
        answer = await (ask if kind == "whole" else read_stream)(client, body)
        assert answer == alone, f"{body}: alone {alone}, in company {answer}"
        load.counts["survivors equal"] += 1


def metric(text: str, name: str) -> float:
    """One figure of /metrics."""
    found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


async def _wait_until_idle(client: httpx.AsyncClient) -> str:
    """The metrics when nothing runs, waits or holds a block any more."""
    deadline = time.monotonic() + ANSWER_WITHIN_S
    names = ("fd_dsa:num_requests_running", "fd_dsa:num_requests_waiting")
    while time.monotonic() < deadline:
        text = (await client.get("/metrics")).text
        if not any(metric(text, name) for name in (*names, "fd_dsa:kv_cache_usage_perc")):
            return text
        await asyncio.sleep(0.05)
    raise AssertionError(f"still at work or blocks leaked: {text}")


async def _run(
    url: str, seconds: float, num_clients: int, num_questions: int, seed: int
) -> Counter[str]:
    """Ask alone, then all at once, then see that nothing is left."""
    draw = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_WITHIN_S) as client:
        bodies = [draw_question(draw) for _ in range(num_questions)]
        questions = [(body, await ask(client, body)) for body in bodies]
        before = await _wait_until_idle(client)
        load = Load(url, questions, time.monotonic() + seconds)
        await asyncio.gather(*(_client(load, seed * 1000 + i) for i in range(num_clients)))
        after = await _wait_until_idle(client)
        # what was computed meanwhile is still right
        for body, alone in questions:
            assert await ask(client, body) == alone
        assert (await client.get("/health")).status_code == 200
    # of the HTTP process, and of the engine's
    memory = [f"{prefix}process_resident_memory_bytes" for prefix in ("", "fd_dsa_engine_")]
    load.counts["MiB before"] = round(sum(metric(before, m) for m in memory) / 2**20)
    load.counts["MiB after"] = round(sum(metric(after, m) for m in memory) / 2**20)
    for name in ("num_preemptions_total", "prefix_cache_hits_total", "generation_tokens_total"):
        load.counts[name] = round(metric(after, f"fd_dsa:{name}"))
    load.counts["longest answer, s"] = round(load.longest_s)
    return load.counts


def run(
    seconds: float,
    num_clients: int = NUM_CLIENTS,
    num_questions: int = NUM_QUESTIONS,
    seed: int = 0,
) -> Counter[str]:
    """Start a server on the demo model and let the clients at it.

    Args:
        seconds: for which clients begin new requests.
        num_clients: at a time.
        num_questions: different ones, whose answers are compared.
        seed: of what they ask.

    Returns:
        What has happened, how often.

    Raises:
        AssertionError: what must not be.
    """
    env = {"FD_DSA_BATCH_INVARIANT": "1"}
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), *FLAGS, env=env) as server:
        counts = asyncio.run(_run(server.url, seconds, num_clients, num_questions, seed))
        assert server.process.poll() is None
        log = server.log.read_text()
        assert "Traceback" not in log, log
    return counts


def main() -> None:
    """Run what the command line asks for and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=NUM_CLIENTS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = run(args.seconds, args.clients, seed=args.seed)
    report.print_counts(f"{args.clients} clients for {args.seconds:g} s:", counts)


if __name__ == "__main__":
    main()
