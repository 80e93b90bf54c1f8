"""The server against the engine called in its process: throughput, and milliseconds a token.

    python -m benchmarks.server_overhead                        # about four minutes on 2 cores
    python -m benchmarks.server_overhead --baseline CHECKOUT    # and the server of another checkout

A real server process streams over the loopback. The other side is `LLM.generate` in its own
process, with the same model, prompts and flags, alternately. Two arrangements of the processors:

- apart: the server, or the engine, has processor 0, its client processor 1. Serving delays the
  model, and the client costs nothing.
- together: all have all processors, like a first try of the package on a machine.

tokens/s counts new tokens over the whole call, prompts and the reading of requests included.
Writes benchmarks/results/server_overhead.json.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import Worker, compare_packages, in_turns, percentiles
from benchmarks._serving import served

STREAMS = (1, 8, 32)
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 64, 128, 5
ARRANGEMENTS: dict[str, tuple[set[int] | None, set[int] | None]] = {
    "apart": ({0}, {1}),
    "together": (None, None),
}


def compare(arrangement: str, checkouts: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Compare the engine and a server of each checkout. A first round warms up."""
    cpus, client_cpus = ARRANGEMENTS[arrangement]
    rows = []
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(Worker("benchmarks.workers.ours:Engine", cpus=cpus))
        calls: dict[str, Callable[..., Any]] = {"engine": partial(engine.call, op="generate")}
        for label, path in checkouts.items():
            calls[label] = stack.enter_context(served(path, cpus, client_cpus))
        for streams in STREAMS:
            case = {"requests": streams, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
            turns = {label: partial(call, **case) for label, call in calls.items()}
            answers = in_turns(turns, rounds, seeded=True)
            alone = [answer["seconds"] for answer in answers.pop("engine")]
            row: dict[str, Any] = {
                "arrangement": arrangement,
                "streams": streams,
                "engine_tokens_per_s": streams * NEW_TOKENS / float(np.median(alone)),
                "servers": {label: _against(alone, a) for label, a in answers.items()},
            }
            rows.append(row)
            for label, side in row["servers"].items():
                speed = f"{side['tokens_per_s']:.1f} tok/s, loss {side['loss']:.1%}"
                print(f"{arrangement:9} {streams:3} {label:7} {speed}", flush=True)
    return rows


def _against(alone: list[float], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare a server with the engine, pair by pair."""
    seconds = [answer["seconds"] for answer in answers]
    shares = [s / e for s, e in zip(seconds, alone, strict=True)]
    added = [1e3 * (s - e) / NEW_TOKENS for s, e in zip(seconds, alone, strict=True)]
    per_token = {
        f"{who}_us": 1e6 * float(np.median([a[f"{who}_cpu_s"] / a["tokens"] for a in answers]))
        for who in ("serve", "client")
    }
    return {
        "tokens_per_s": answers[0]["tokens"] / float(np.median(seconds)),
        "loss": 1 - 1 / float(np.median(shares)),
        "loss_spread": [1 - 1 / min(shares), 1 - 1 / max(shares)],
        "added_ms_a_token": percentiles(added),
        "cpu_per_token": per_token,
    }


def measure(checkouts: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Measure both arrangements."""
    result: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    result["cases"] = [row for name in ARRANGEMENTS for row in compare(name, checkouts, rounds)]
    return result


main = partial(compare_packages, "server_overhead", __doc__, measure, ROUNDS)

if __name__ == "__main__":
    sys.exit(main())
