"""Decode steps of the embedded engine on Paddle tensors in CUDA memory: eager, and from graphs.

    python -m tests.gpu_rig.decode_steps --out DIR          # on a GPU; writes DIR/decode_steps.json

The demo model with fp8_ds_mla caches, in a process for each way. First both ways must give the
greedy tokens of the CPU, up to the first that leads by less than LEAST_LEAD; then steps of 1, 8 and
32 rows of short and long contexts take turns. A step is timed on the host's clock, from scheduling
to its tokens: it waits for the device once. `--cpu-tokens FILE` keeps the tokens of the CPU, which
take longest. A way that fails is named, and the other goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import Worker, environment, percentiles, write_json
from tests.demo.samples import LEADING_PROMPTS
from tests.gpu_rig.decode_worker import CPU, EAGER, GRAPH

WORKER = "tests.gpu_rig.decode_worker"
ROWS, CONTEXTS = (1, 8, 32), (128, 1024)
MAX_TOKENS, ROUNDS = 64, 3
LEAST_LEAD = 0.05
"""The last bit of a sum may change a code of an FP8 record: a token that led by 0.021 on a CPU was
another one on an H200."""

Tokens = Sequence[Sequence[tuple[int, float]]]
"""For each prompt and step the token, and its lead in log-probability."""


def cpu_tokens(options: Sequence[str], max_tokens: int, kept: Path | None) -> Tokens:
    """Greedy tokens on the CPU and their leads, read from a file where they are kept."""
    if kept and kept.exists():
        found = json.loads(kept.read_text())
        if len(found[0]) >= max_tokens:
            return [tokens[:max_tokens] for tokens in found]
    worker = Worker(WORKER, CPU, *options)
    try:
        tokens = worker.call(op="tokens", prompts=LEADING_PROMPTS, max_tokens=max_tokens)
    finally:
        worker.close()
    if kept:
        write_json(kept, tokens)
    return tokens


def agreement(found: Tokens, wanted: Tokens) -> str:
    """Where tokens differ that rounding does not explain; "" where none do."""
    for prompt, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        for n, ((token, _), (cpus, lead)) in enumerate(zip(ours, theirs, strict=True)):
            if token == cpus:
                continue
            if lead >= LEAST_LEAD:
                return f"prompt {prompt}: token {n} of {len(theirs)} is another than the CPU's"
            # what follows has another text before it
            break
    return ""


class Ways:
    """The processes of the ways that work, and what was wrong with the others."""

    def __init__(self, options: Sequence[str]) -> None:
        self.workers = {way: Worker(WORKER, way, *options) for way in (EAGER, GRAPH)}
        self.failed: dict[str, str] = {}

    def call(self, way: str, **request: Any) -> Any:
        """The answer of a way; None, noted, where its process ended."""
        try:
            return self.workers[way].call(**request)
        except (RuntimeError, BrokenPipeError) as error:
            self.failed[way] = str(error)
            del self.workers[way]
            print(f"{way}: {error}", flush=True)
            return None

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.close()


def case_of(ways: Ways, rows: int, context: int, steps: int) -> dict[str, Any] | None:
    """One case, both ways in turn; None where neither works."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for _ in range(ROUNDS):
        for way in list(ways.workers):
            found = ways.call(way, op="steps", rows=rows, context=context, steps=steps)
            if found is not None:
                samples.setdefault(way, []).append(found)
    if not samples:
        return None

    def merged(way: str, key: str) -> dict[str, float]:
        return percentiles([us for part in samples[way] for us in part[key]])

    ours = GRAPH if GRAPH in samples else EAGER
    times = {way: merged(way, "step_us") for way in samples}
    return {
        "case": f"{rows} x {context}",
        "tier": "T1p",
        "rows": rows,
        "context": context,
        "times": times,
        "runner": {way: merged(way, "runner_us") for way in samples},
        "counted": {way: parts[-1]["counted"] for way, parts in samples.items()},
        "ours": ours,
        "ratios": {way: t["p50"] / times[ours]["p50"] for way, t in times.items() if way != ours},
    }


def line_of(case: Mapping[str, Any]) -> str:
    """A case in one line."""
    told = ", ".join(
        f"{way} {times['p50']:.0f} us (runner {case['runner'][way]['p50']:.0f})"
        for way, times in case["times"].items()
    )
    ratios = "".join(f", {ratio:.2f}x {way}" for way, ratio in case["ratios"].items())
    return f"{case['case']:<10} {told}{ratios}; counted {case['counted']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Check and time both ways; 0 if both work and give the CPU's tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of decode_steps.json")
    parser.add_argument("--form", default="real", help="real, fake or guard")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--steps", type=int, default=32, help="timed steps of each of three rounds")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="compared with the CPU")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--cpu-tokens", type=Path, help="file that keeps the tokens of the CPU")
    args = parser.parse_args(argv)
    sizes = ",".join(map(str, sorted({*args.rows, len(LEADING_PROMPTS)})))
    options = args.form, sizes, str(args.max_model_len), str(args.max_num_batched_tokens)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "decode_steps.json"
    result: dict[str, Any] = {
        "name": "decode_steps",
        "env": environment() | {"tier": "T1p", "form": args.form},
        "gate": "not run",
        "tokens": {},
        "facts": {},
        "cases": [],
    }
    wanted = cpu_tokens(options, args.max_tokens, args.cpu_tokens)
    ways = Ways(options)
    try:
        for way in (EAGER, GRAPH):
            result["facts"][way] = ways.call(way, op="facts")
            found = None
            if way in ways.workers:
                request = {"prompts": LEADING_PROMPTS, "max_tokens": args.max_tokens}
                found = ways.call(way, op="tokens", **request)
            wrong = agreement(found, wanted) if found else "no tokens"
            result["tokens"][way] = wrong or "those of the CPU"
            print(f"{way}: {result['facts'][way]}, tokens: {result['tokens'][way]}", flush=True)
            write_json(path, result)
        good = set(result["tokens"].values()) == {"those of the CPU"}
        result["gate"] = "passed" if good else "failed"
        for rows in args.rows:
            for context in args.contexts:
                case = case_of(ways, rows, context, args.steps)
                result["failed"] = ways.failed
                if case is not None:
                    result["cases"].append(case)
                    print(line_of(case), flush=True)
                write_json(path, result)
    finally:
        ways.close()
    return int(not good or bool(ways.failed))


if __name__ == "__main__":
    sys.exit(main())
