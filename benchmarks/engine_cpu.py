"""Embedded engine on a CPU against Hugging Face `generate`: same weights, threads and lengths.

    python -m benchmarks.engine_cpu            # all; about ten minutes on 2 cores
    python -m benchmarks.engine_cpu --skip-hf  # our side alone, where torch is not installed

Prints tokens/s of both sides and their ratio per case, then how the time of a decode step grows
with the context, next to the indexer's own scan. Writes benchmarks/results/engine_cpu.json.

tokens/s counts new tokens over the whole call, prefill included. Both sides generate greedily
and never stop early; each has a process of its own, and they take turns.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from benchmarks._harness import Worker, percentiles, save

# (concurrent requests, prompt tokens, new tokens, runs)
CASES = ((1, 64, 64, 5), (1, 2048, 32, 3), (32, 64, 64, 3), (32, 256, 16, 2))
CONTEXTS = (512, 1024, 1536, 2048, 2560, 3072, 3584, 4000)


def compare(ours: Worker, baseline: Worker | None) -> list[dict[str, Any]]:
    """tokens/s of each case, the two sides in turn."""
    rows = []
    for requests, prompt, new, runs in CASES:
        case = {"requests": requests, "prompt_tokens": prompt, "new_tokens": new}
        times: dict[str, list[float]] = {"ours": [], "hf": []}
        first: list[float] = []
        for run in range(runs + 1):
            seed = run
            answer = ours.call(op="generate", seed=seed, **case)
            hf = baseline.call(op="generate", seed=seed, **case) if baseline else None
            # the first run warms both sides up
            if run:
                times["ours"].append(answer["seconds"])
                first.append(answer["first_token_s"])
                if hf:
                    times["hf"].append(hf["seconds"])
        total = requests * new
        row: dict[str, Any] = {"case": case, "runs": runs, "warmup": 1}
        row["candidate"] = {"label": "fd_dsa", "tokens_per_s": total / np.median(times["ours"])}
        row["candidate"]["seconds"] = percentiles(times["ours"])
        row["candidate"]["time_to_first_token_s"] = percentiles(first)
        if times["hf"]:
            row["baseline"] = {
                "label": "transformers generate",
                "tokens_per_s": total / np.median(times["hf"]),
                "seconds": percentiles(times["hf"]),
            }
            pairs = [h / o for h, o in zip(times["hf"], times["ours"], strict=True)]
            row["ratio_p50"] = float(np.median(pairs))
            row["ratio_spread"] = [min(pairs), max(pairs)]
        speeds = {
            side: row[side]["tokens_per_s"] for side in ("candidate", "baseline") if side in row
        }
        print(f"{requests:3} x {prompt:4} + {new:3}, tokens/s: {speeds}", flush=True)
        rows.append(row)
    return rows


def growth(ours: Worker) -> dict[str, Any]:
    """Decode time as a + b * context, next to the slope of the indexer's scan alone."""
    decode = [ours.call(op="decode_ms", context=n)["ms"] for n in CONTEXTS]
    scan = [ours.call(op="scan_ms", context=n)["ms"] for n in CONTEXTS]
    b, a = np.polyfit(CONTEXTS, decode, 1)
    scan_b, scan_a = np.polyfit(CONTEXTS, scan, 1)
    return {
        "contexts": list(CONTEXTS),
        "decode_ms": decode,
        "scan_ms": scan,
        "a_ms": float(a),
        "b_ms_per_1k": float(b * 1000),
        "scan_a_ms": float(scan_a),
        "scan_b_ms_per_1k": float(scan_b * 1000),
        "b_over_scan": float(b / scan_b),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-hf", action="store_true", help="leave the baseline out")
    parser.add_argument("--threads", type=int, default=None, help="default: all processors")
    args = parser.parse_args(argv)
    threads = [] if args.threads is None else [str(args.threads)]
    ours = Worker("benchmarks.workers.ours", *threads)
    baseline = None if args.skip_hf else Worker("benchmarks.workers.hugging_face", *threads)
    try:
        result: dict[str, Any] = {"tier": "T0", "model": "demo model", "threads": args.threads}
        result["cases"] = compare(ours, baseline)
        result["growth"] = growth(ours)
        result["profile"] = [
            ours.call(op="profile", requests=1, context=2048),
            ours.call(op="profile", requests=32, context=512),
        ]
    finally:
        ours.close()
        if baseline:
            baseline.close()
    print(f"written: {save('engine_cpu', result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
