"""Wall time of steps with decode rows and a prompt, over the time that the GPU works. P34, P34b.

    python -m benchmarks.mixed_steps --rig         # one GPU: 61 layers of 16 experts
    python -m benchmarks.mixed_steps --rig -tp 4   # the shape of DeepSeek-V3.2-REAP-345B
    python -m benchmarks.mixed_steps --dry         # small widths on the CPU: shows that it runs

Steps of 64 to 2,048 tokens have 32 rows that decode and one prompt, which arrives with each step.
Short steps have no row past `index_topk`. In long steps the rows decode after 4,096 tokens, and the
prompts follow 2,304 cached tokens. The next step is scheduled while the GPU works, as in a server.
The GPU works while any kernel runs, by a profile of such steps. A ratio of 1 means that no step
waits for the host. Writes benchmarks/results/mixed_steps.json, with the number of ranks at its end
if there are several. Then the GPU's work is that of rank 0, with its waits for the other ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks._gpu_engine_model import Shape, engine_options, of_ranks, shape_of
from benchmarks._harness import Worker, rig_parser, rig_result, write_json, write_result

TARGET = "benchmarks.workers.mixed_steps:Engine"
SIZES = (64, 128, 256, 512, 1024, 2048)
# most wall time over the time of the GPU's work
GATE, GOAL = 1.15, 1.05
# milliseconds of a short step on four GPUs at most: gate and goal, by number of tokens
WALLS = {128: (45, 34), 512: (65, 48), 2048: (130, 100)}


def kinds(is_dry: bool) -> dict[str, dict[str, int]]:
    """Return the tokens before the decode rows and before the prompts, by kind of step."""
    if is_dry:
        return {"short": {"context": 20, "prefix": 0}, "long": {"context": 96, "prefix": 128}}
    return {"short": {"context": 1024, "prefix": 0}, "long": {"context": 4096, "prefix": 2304}}


def case_of(
    kind: str, tokens: int, timed: Mapping[str, Any], busy: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the entry of a step.

    Args:
        kind: "short" or "long".
        tokens: tokens of the step.
        timed: answer of the worker's `steps`.
        busy: answer of the worker's `busy`; None without a GPU.
    """
    wall_ms = timed["ms"]["p50"]
    case = {"case": f"{kind}, {tokens:,} tokens", "target": "P34", "wall_ms": wall_ms}
    case |= {"wall": timed["ms"], "captured": timed["captured"], "busy_ms": None, "ratio": None}
    if busy is not None:
        busy_ms = busy["busy_us"] / 1e3
        case |= {"busy_ms": busy_ms, "ratio": wall_ms / busy_ms, "launches": busy["launches"]}
    return case


def measure(engine: Worker, sizes: Sequence[int], rows: int, args: Any) -> Any:
    """Yield the case of each kind and size as soon as it is there."""
    steps, profiled = (4, 0) if args.dry else (30, 6)
    for kind, before in kinds(args.dry).items():
        engine.call(op="begin", rows=rows, new=60 if args.dry else 600, **before)
        for tokens in sizes:
            timed = engine.call(op="steps", tokens=tokens, steps=steps)
            if timed["tokens"] != [tokens]:
                raise RuntimeError(f"steps had {timed['tokens']} tokens, {tokens} were asked for")
            busy = engine.call(op="busy", tokens=tokens, steps=profiled) if profiled else None
            yield case_of(kind, tokens, timed, busy)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = rig_parser(__doc__, is_split=True)
    parser.add_argument("--layers", type=int, help="default: 61")
    args = parser.parse_args(argv)
    ranks, rows = args.tensor_parallel_size, 4 if args.dry else 32
    shape = Shape(61, 3, 16) if ranks == 1 else shape_of(ranks, None)
    if args.dry or args.layers:
        layers = args.layers or 3
        shape = shape._replace(layers=layers, dense=min(shape.dense, layers))
    config: dict[str, Any] = {
        "max_model_len": 512 if args.dry else 8192,
        "max_num_seqs": rows + 4,
        "max_num_batched_tokens": 512 if args.dry else 8192,
        "target_inter_token_latency_ms": 0,
        "tensor_parallel_size": ranks,
    }
    if not args.dry:
        config["kv_cache_dtype"] = "fp8"
    sizes = (16, 64) if args.dry else SIZES
    name = of_ranks("mixed_steps", ranks)
    result = rig_result(name, args, shape=shape._asdict(), rows=rows, most=GATE, goal=GOAL)
    with engine_options(args, shape, config) as options, Worker(TARGET, **options) as engine:
        result["start"] = engine.call(op="start_up")
        result["capture_s"] = engine.call(op="capture_seconds")
        print(f"start {result['start']}, captures {result['capture_s']:.1f} s", flush=True)
        for case in measure(engine, sizes, rows, args):
            result["cases"].append(case)
            ratio = "" if case["ratio"] is None else f"{case['ratio']:.3f} of the GPU's work"
            share = f"{100 * case['captured']:.0f} % captured"
            print(f"{case['case']:<20} {case['wall_ms']:8.2f} ms, {share} {ratio}", flush=True)
            write_json(args.out / f"{name}.json", result)
    if ranks > 1 and not args.dry:
        walls = {case["case"]: case["wall_ms"] for case in result["cases"]}
        result["walls"] = [
            {"tokens": tokens, "target": "P34b", "ms": walls[f"short, {tokens:,} tokens"]}
            | {"gate_ms": gate, "goal_ms": goal}
            for tokens, (gate, goal) in WALLS.items()
        ]
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
