"""Cost of drafts on a GPU: DeepSeek-V3.2's widths, few layers, random weights.

    python -m benchmarks.speculative_gpu --rig                 # on the test plug-in
    python -m benchmarks.speculative_gpu --rig --peer DIR      # then vLLM on the same GPU
    python -m benchmarks.speculative_gpu --rig --v4            # DeepSeek-V4 of v4_gpu: V46
    python -m benchmarks.speculative_gpu --dry     # small widths on the CPU: shows that it runs

Greedy decode steps of 1, 8, 32 and 128 rows run in three engines, each with the GPU for itself. The
first has no drafts, and the second has one known draft a row. The third runs the layer for
multi-token prediction too, whose drafts the known ones replace, because random weights accept no
draft. A step takes two tokens a row. A ratio is its time divided by that of a step with one.

Known drafts are the tokens of a run without drafts. Steps of other sizes may round otherwise, and
then random weights soon choose another token. From there on every draft is wrong, which changes no
step's time. `accepted` is the share of right drafts, 1 with FD_DSA_BATCH_INVARIANT=1. At the
largest number of rows the kernels of a step are recorded. DIR has a `run.sh` that runs `python
SCRIPT ...` with vLLM's packages, and a `vllm_bench.py`. Writes
benchmarks/results/speculative_gpu.json, whose name ends with _v4 for DeepSeek-V4.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._gpu_engine_model import FP8, Shape, engine_options
from benchmarks._harness import Worker, rig_parser, rig_result, run_peer, write_result
from benchmarks._v4_gpu_model import V4Shape, drafted_bytes, v4_options
from benchmarks.gpu_engine import CAPTURED, CONFIG
from benchmarks.v4_gpu import CONFIG as V4_CONFIG
from benchmarks.workers.gpu_engine import by_class

TARGET = "benchmarks.workers.speculative_gpu:Engine"
ROWS = (1, 8, 32, 128)
RUNS = 3
# of the bytes that must be read, with experts chosen uniformly
FLOORS: dict[str, Sequence[float]] = {
    "known": (1.33, 1.61, 1.33, 1.02),
    "mtp": (1.82, 1.97, 1.59, 1.21),
}
METHODS = {"plain": None, "known": "ngram", "mtp": "mtp"}


def measure(engine: Worker, rows: Sequence[int], prompt: int, steps: int) -> dict[int, Any]:
    """Return the medians of `Engine.drafted` by rows."""
    engine.call(op="drafted", batch=2, prompt=prompt, steps=8)
    found: dict[int, Any] = {}
    for batch in rows:
        # large batches vary little, and their prompts take long
        runs = [
            engine.call(op="drafted", batch=batch, prompt=prompt, steps=steps)
            for _ in range(RUNS if batch <= 8 else 1)
        ]
        found[batch] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        print(batch, found[batch], flush=True)
    return found


def cases_of(
    found: dict[str, dict[int, Any]],
    rows: Sequence[int],
    peer: dict[str, float],
    target: str,
    by_the_bytes: Mapping[str, Sequence[float]],
) -> list[dict[str, Any]]:
    """Return the cases: both ways of drafting, steps without drafts, and the peer's."""
    cases = []
    for way, floors in by_the_bytes.items():
        for batch in rows:
            step, plain = found[way][batch], found["plain"][batch]
            cases.append(
                {
                    "case": f"{way}, {batch} rows",
                    "target": target,
                    "plain_step_ms": plain["step_ms"],
                    "step_ms": step["step_ms"],
                    "ratio": step["step_ms"] / plain["step_ms"],
                    "by_the_bytes": dict(zip(ROWS, floors, strict=True)).get(batch),
                    "accepted": step["accepted"],
                    "ms_a_token": step["step_ms"] / (1 + step["accepted"]),
                    "peer_step_ms": peer.get(str(batch)) if way == "mtp" else None,
                }
            )
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = rig_parser(__doc__)
    parser.add_argument("--peer", type=Path, help="folder with vLLM's run.sh")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--ways", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layers", type=int, default=Shape().layers)
    parser.add_argument("--v4", action="store_true", help="DeepSeek-V4, whole depth")
    args = parser.parse_args(argv)
    result = rig_result("speculative_gpu" + "_v4" * args.v4, args, steps={})
    prompt, steps = (64, 12) if args.dry else (4096, 48)
    config: dict[str, Any] = (V4_CONFIG if args.v4 else CONFIG) | {
        "max_model_len": 2 * prompt,
        "max_num_seqs": max(args.rows),
        "enable_prefix_caching": True,
        "target_inter_token_latency_ms": 0,
    }
    found = result["steps"]
    profiles: dict[str, Any] = {}
    peer: dict[str, float] = {}
    fields = {"num_nextn_predict_layers": 1, "quantization_config": FP8}
    target, floors = "P20", FLOORS
    if args.v4:
        v4, target = V4Shape(), "V46"
        if args.dry:
            v4, config["max_model_len"] = V4Shape(4, 8), 2 * V4_CONFIG["block_size"]
        floors = {
            way: [drafted_bytes(v4, batch, prompt, way == "mtp") for batch in ROWS]
            for way in FLOORS
        }
        engines = v4_options(args, v4, config)
    else:
        engines = engine_options(args, Shape(2 if args.dry else args.layers), config, fields)
    with engines as options:
        for way in args.ways:
            most = (1 + (way != "plain")) * max(args.rows)
            sizes = [size for size in (*CAPTURED, 256) if size <= most]
            own = config | {"cudagraph_capture_sizes": sizes}
            if METHODS[way]:
                method = {"method": METHODS[way], "num_speculative_tokens": 1}
                own |= {"speculative_config": method}
            with Worker(TARGET, **options | {"config": own}) as engine:
                print(way, flush=True)
                found[way] = measure(engine, args.rows, prompt, steps)
                if not args.dry:
                    most = max(args.rows)
                    profiles[way] = engine.call(op="profile", batch=most, prompt=prompt, steps=8)
                result["classes"] = by_class(profiles)
                write_result(args.out, result)
        if args.peer:
            model = options["model"]
            steps_path = Path(model) / "peer.json"
            run_peer(args.peer, "vllm_drafts.py", model, json.dumps(args.rows), steps_path)
            peer = json.loads(steps_path.read_text())
    if found.keys() == METHODS.keys():
        result["cases"] = cases_of(found, args.rows, peer, target, floors)
        write_result(args.out, result)
        for case in result["cases"]:
            least = case["by_the_bytes"]
            print(
                f"{case['case']:<16} {case['plain_step_ms']:8.3f} -> {case['step_ms']:8.3f} ms "
                f"{case['ratio']:6.3f}  by the bytes {least and round(least, 2)}  "
                f"accepted {case['accepted']:.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
