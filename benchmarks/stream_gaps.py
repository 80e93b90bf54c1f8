"""Gaps of a stream alongside a long prompt by target, and prompts without a stream.

    python -m benchmarks.stream_gaps     # about fifteen minutes on 2 cores

Each target has an engine in a process of its own, and they take turns. A gap is the time from the
end of a step to the end of the next one. Prompts alone are computed in steps without a request that
decodes, for which a target changes nothing. Writes benchmarks/results/stream_gaps.json.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks._harness import Worker, parser_of, percentiles, save

MODULE = "benchmarks.workers.ours:Engine"
# milliseconds, 0 = no target
TARGETS = (0.0, 100.0, 200.0, 400.0)
PROMPT_TOKENS, ROUNDS = 8000, 5
# prompts of the load without streams, and their tokens; how often in a round
ALONE, ALONE_REPEATS = (2, 1024), 4


def measure(rounds: int) -> list[dict[str, Any]]:
    """Measure every target. The first round, without known step times, has its own figures."""
    fields = {"max_num_seqs": 8, "kv_cache_memory_bytes": "1G"}
    # no side is always the one after another
    turns = [*TARGETS, *reversed(TARGETS)]
    beside: dict[float, list[dict[str, Any]]] = {target: [] for target in TARGETS}
    alone: dict[float, list[float]] = {target: [] for target in TARGETS}
    with contextlib.ExitStack() as stack:
        workers = {}
        for target in TARGETS:
            engine = Worker(MODULE, target_inter_token_latency_ms=target, **fields)
            workers[target] = stack.enter_context(engine)
        for seed in range(rounds + 1):
            for target in TARGETS if seed % 2 else reversed(TARGETS):
                answer = workers[target].call(op="beside", prompt_tokens=PROMPT_TOKENS, seed=seed)
                beside[target].append(answer)
                print(f"round {seed}, target {target:g}: {_spread(answer['gaps_ms'])}", flush=True)
            for repeat in range(ALONE_REPEATS // 2):
                for n, target in enumerate(turns):
                    case = {"requests": ALONE[0], "prompt_tokens": ALONE[1]}
                    case["seed"] = 2 * repeat + n // len(TARGETS)
                    alone[target].append(workers[target].call(op="alone", **case))
    return [_side(t, beside[t], alone[t], alone[TARGETS[0]]) for t in TARGETS]


def _side(
    target: float, beside: list[dict[str, Any]], alone: list[float], without: list[float]
) -> dict[str, Any]:
    """Return the figures of a target.

    Args:
        without: seconds of prompts without a stream and without a target.
    """
    gaps = [answer["gaps_ms"] for answer in beside]
    ratios = [w / s for w, s in zip(without, alone, strict=True)]
    return {
        "target_ms": target,
        "first_gap_ms": _spread(gaps[0]),
        "gap_ms": _spread([gap for one in gaps[1:] for gap in one]),
        "prompt_s": percentiles([answer["seconds"] for answer in beside[1:]]),
        "prompt_tokens_per_s": ALONE[0] * ALONE[1] / float(np.median(alone)),
        "prompts_ratio": float(np.median(ratios)),
        "prompts_ratio_spread": [min(ratios), max(ratios)],
    }


def _spread(gaps: Sequence[float]) -> dict[str, float]:
    """Return p50, p99 and the largest."""
    p50, p99 = np.percentile(gaps, (50, 99))
    return {"p50": float(p50), "p99": float(p99), "max": float(max(gaps))}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Returns 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    args = parser.parse_args(argv)
    sides = measure(args.rounds)
    result = {"prompt_tokens": PROMPT_TOKENS, "alone": ALONE, "rounds": args.rounds}
    save("stream_gaps", result | {"sides": sides})
    return 0


if __name__ == "__main__":
    sys.exit(main())
