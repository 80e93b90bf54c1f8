"""Tables of docs/performance.md, made from benchmarks/results/*.json.

python -m benchmarks.report          # prints them; docs/performance.md holds the same lines
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks._harness import RESULTS


def engine_cpu(result: dict[str, Any]) -> str:
    """Markdown of benchmarks/results/engine_cpu.json."""
    env, growth = result["env"], result["growth"]
    lines = [
        f"{env['cpu']}, {env['cpus']} processors; Python {env['python']}, paddlepaddle "
        f"{env['paddlepaddle']}, torch {env['torch']}, transformers {env['transformers']}; commit "
        f"{env['commit'][:12]}.",
        "",
        "| requests x prompt + new tokens | fd_dsa, tokens/s | transformers, tokens/s | ratio "
        "(least, most) | first token, fd_dsa |",
        "|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        case, ours, low_high = row["case"], row["candidate"], row["ratio_spread"]
        lines.append(
            f"| {case['requests']} x {case['prompt_tokens']} + {case['new_tokens']} "
            f"| {ours['tokens_per_s']:.1f} | {row['baseline']['tokens_per_s']:.1f} "
            f"| {row['ratio_p50']:.2f} ({low_high[0]:.2f}, {low_high[1]:.2f}) "
            f"| {ours['time_to_first_token_s']['p50'] * 1e3:.0f} ms |"
        )
    lines += [
        "",
        f"Decode step of one request: {growth['a_ms']:.1f} ms + {growth['b_ms_per_1k']:.2f} ms "
        f"per 1,000 tokens of context. The indexer's scan alone (scores and top-k of all layers, "
        f"on the same pages): {growth['scan_b_ms_per_1k']:.2f} ms per 1,000. Ratio "
        f"{growth['b_over_scan']:.2f}.",
    ]
    for profile in result["profile"]:
        lines += [
            "",
            f"Profile of a decode step of {profile['requests']} x {profile['context']}, "
            f"{profile['ms']:.1f} ms without the profiler:",
            "",
            "| function | calls | share of the time |",
            "|---|---|---|",
        ]
        lines += [
            f"| `{f['name'].removeprefix('~:')}` | {f['calls_per_step']:.0f} | {f['share']:.1%} |"
            for f in profile["functions"][:6]
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the tables of every result; returns 0."""
    print(engine_cpu(json.loads((RESULTS / "engine_cpu.json").read_text())), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
