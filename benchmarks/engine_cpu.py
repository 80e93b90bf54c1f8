"""Embedded engine on a CPU against Hugging Face `generate`: same weights, threads and lengths.

    python -m benchmarks.engine_cpu            # all; about 20 minutes on 2 cores
    python -m benchmarks.engine_cpu --skip-hf  # our side only, without torch

Prints tokens/s of both sides and their ratio per case. Then it prints the growth of a decode step
with the context, and that of the indexer's scan. Writes benchmarks/results/engine_cpu.json.

tokens/s counts new tokens over the whole call, prefill included. Both sides generate greedily
and never stop early. Each has its own process, and they take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from benchmarks._harness import Worker, in_turns, parser_of, percentiles, save

# (concurrent requests, prompt tokens, new tokens)
CASES = ((1, 64, 64), (1, 2048, 32), (32, 64, 64), (32, 256, 16))
RUNS = 15
LABELS = {"candidate": "fd_dsa", "baseline": "transformers generate"}
CONTEXTS = (512, 1024, 1536, 2048, 2560, 3072, 3584, 4000)


def compare(
    sides: Mapping[str, Worker],
    cases: Sequence[tuple[int, int, int]] = CASES,
    runs: int = RUNS,
) -> list[dict[str, Any]]:
    """Return tokens/s of each case, the two sides in turn. A first round warms both up."""
    rows = []
    for requests, prompt, new in cases:
        case = {"requests": requests, "prompt_tokens": prompt, "new_tokens": new}
        row: dict[str, Any] = {"case": case, "runs": runs, "warmup": 1}
        calls = {k: partial(worker.call, op="generate", **case) for k, worker in sides.items()}
        answers = in_turns(calls, runs, seeded=True)
        seconds = {side: [a["seconds"] for a in found] for side, found in answers.items()}
        for side, times in seconds.items():
            speed = requests * new / np.median(times)
            row[side] = {"label": LABELS[side], "tokens_per_s": speed}
            row[side]["seconds"] = percentiles(times)
            print(f"{requests:3} x {prompt:4} + {new:3}, {side}: {speed:.1f} tokens/s", flush=True)
        first = [answer["first_token_s"] for answer in answers["candidate"]]
        row["candidate"]["time_to_first_token_s"] = percentiles(first)
        if "baseline" in seconds:
            pairs = [h / o for o, h in zip(*seconds.values(), strict=True)]
            row["ratio_p50"] = float(np.median(pairs))
            row["ratio_p25"] = float(np.percentile(pairs, 25))
            row["ratio_spread"] = [min(pairs), max(pairs)]
            print(
                f"    ratio: median {row['ratio_p50']:.2f}, lower quartile {row['ratio_p25']:.2f}"
            )
        rows.append(row)
    return rows


def growth(ours: Worker) -> dict[str, Any]:
    """Decode time as a + b * context, next to the slope of the indexer's scan alone."""
    decode = [ours.call(op="decode_ms", context=n) for n in CONTEXTS]
    scan = [ours.call(op="scan_ms", context=n) for n in CONTEXTS]
    b, a = np.polyfit(CONTEXTS, decode, 1)
    scan_b, _ = np.polyfit(CONTEXTS, scan, 1)
    found = {"contexts": list(CONTEXTS), "decode_ms": decode, "scan_ms": scan, "a_ms": float(a)}
    per_1k = {"b_ms_per_1k": float(b * 1000), "scan_b_ms_per_1k": float(scan_b * 1000)}
    return found | per_1k | {"b_over_scan": float(b / scan_b)}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Returns 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--skip-hf", action="store_true", help="leave the baseline out")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"model": "demo model"}
    with ExitStack() as stack:
        ours = stack.enter_context(Worker("benchmarks.workers.ours:Engine"))
        sides = {"candidate": ours}
        if not args.skip_hf:
            baseline = Worker("benchmarks.workers.hugging_face:Model")
            sides["baseline"] = stack.enter_context(baseline)
        result["cases"] = compare(sides)
        result["growth"] = growth(ours)
    save("engine_cpu", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
