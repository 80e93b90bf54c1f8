"""DeepSeek-V4-Flash in whole depth with random weights: half of its experts, or all on two GPUs.

    python -m benchmarks.v4_gpu --rig               # ours, on the test plug-in
    python -m benchmarks.v4_gpu --rig --peer DIR    # then vLLM on the same GPU
    python -m benchmarks.v4_gpu --rig --kv-cache-dtype fp8_ds_mla
    python -m benchmarks.v4_gpu --rig --layers 4 --experts 256 --cases decode-1x4k
    python -m benchmarks.v4_gpu --rig --tensor-parallel-size 2 --peer DIR   # all experts: V36
    python -m benchmarks.v4_gpu --dry               # small widths on the CPU

The model has V4-Flash's 43 layers and the 128 experts a layer of its expert-pruned releases: FP8
weights, FP4 experts, random. On several GPUs it has all 256 experts. Prompts are token ids of one
seed, because the first layers route by id. Answers are greedy and have a fixed length. All runs are
in process. The cases, the peer's `run.sh` and the form of the result are those of `gpu_engine`.

Writes benchmarks/results/v4_gpu.json after each case, the short cases first. After these it writes
v4_gpu_profile.json, the kernels of a step by purpose. From this profile come the launches of a
layer, and the share of a step in which the GPU waits for the host. The floor counts the experts
that even routing hits; at the end the hit ones are counted on one GPU.

The profile of several GPUs is that of rank 0, and the names of their files end with the number of
ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._gpu_engine_model import FIGURES, Case, of_ranks
from benchmarks._harness import Worker, rig_parser, rig_result, write_json, write_result
from benchmarks._v4_gpu_model import CASES, V4Shape, floor, of_dry_run, v4_options, v4_shape_of
from benchmarks.gpu_engine import (
    CAPTURED,
    add_peers,
    entry,
    measure,
    measured_before,
    write_profiles,
)
from benchmarks.workers.v4_gpu import CLASSES

TARGET = "benchmarks.workers.v4_gpu:Engine"
CONFIG: dict[str, Any] = {
    # 64 CSA entries, as many as the keys of a page in other models
    "block_size": 256,
    "max_model_len": 131584,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 8192,
    "cudagraph_capture_sizes": CAPTURED,
}
SMALL = {
    "block_size": 256,
    "max_model_len": 4096,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 1024,
}
# cases of as many prompt tokens come after the profile
MANY_TOKENS = 1 << 17
# rows of decode steps whose experts are counted, and tokens of their prompts
HITS, HIT_PROMPT = (8, 32, 128), 256
# launches of a decode layer on one GPU: gate and goal, and how many more there may be on several
LAUNCHES = {"CSA": (20, 17), "HCA": (18, 15), "window": (18, 15)}
MORE_LAUNCHES = 3
# share of a step in which the GPU waits: gate and goal
WAITS = 0.05, 0.02


def run_cases(
    engine: Worker, cases: Mapping[str, Case], shape: V4Shape, result: dict[str, Any], path: Path
) -> None:
    """Measure cases. Each is written as soon as it is there."""
    for name, ours in measure(engine, cases):
        case = cases[name]
        found = entry(name, case, ours, floor(case, shape))
        share = ""
        if least := found["floor"]:
            found["of_floor"] = least / ours if FIGURES[case.kind][2] else ours / least
            share = f"floor {least:10.2f}, {100 * found['of_floor']:.0f} % of it"
        print(f"{name:<16} {ours:10.2f} {FIGURES[case.kind][1]:<16} {share}", flush=True)
        result["cases"].append(found)
        result["late_compilations"] = engine.call(op="late_compilations")
        write_json(path, result)


def launches_of(profiles: Mapping[str, Any], ranks: int) -> list[dict[str, Any]]:
    """Return V42: launches of a layer of each kind, by the rows of the step."""
    more = MORE_LAUNCHES if ranks > 1 else 0
    return [
        {"target": "V42", "rows": int(rows), "kind": kind, **counts}
        | {"gate": LAUNCHES[kind][0] + more, "goal": LAUNCHES[kind][1] + more}
        for rows, profile in profiles.items()
        for kind, counts in profile.get("layers", {}).items()
    ]


def waits_of(profiles: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return V43: the part of a step without the profiler in which no kernel runs."""
    found = []
    for case in cases:
        rows = case["case"].removeprefix("decode-").removesuffix("x4k")
        if rows in profiles and "layers" in profiles[rows]:
            step_us, busy_us = 1e3 * case["ours_value"], profiles[rows]["busy_us"]
            share = max(0.0, 1 - busy_us / step_us)
            sizes = {"target": "V43", "rows": int(rows), "step_us": step_us, "busy_us": busy_us}
            found.append(sizes | {"share": share, "gate": WAITS[0], "goal": WAITS[1]})
    return found


def measure_ours(
    args: argparse.Namespace, cases: Mapping[str, Case], shape: V4Shape, path: Path
) -> dict[str, Any]:
    """Measure our engine's cases and profiles."""
    result = rig_result(path.stem, args, **shape._asdict())
    short = {n: case for n, case in cases.items() if case.batch * case.prompt < MANY_TOKENS}
    rest = {name: case for name, case in cases.items() if name not in short}
    # a CPU has no other caches than float32
    config = SMALL if args.dry else CONFIG | {"kv_cache_dtype": args.kv_cache_dtype}
    result["kv_cache_dtype"] = args.kv_cache_dtype
    config = config | {"tensor_parallel_size": shape.ranks}
    profiled = path.stem.replace("v4_gpu", "v4_gpu_profile")
    with (
        v4_options(args, shape, config) as options,
        Worker(TARGET, kinds=shape.kinds, **options) as engine,
    ):
        result["start"] = {"target": "V45"} | engine.call(op="start_up")
        result["memory"] = {"target": "V44"} | engine.call(op="memory")
        print(result["start"], result["memory"], flush=True)
        write_json(path, result)
        engine.call(op="decode", batch=2, prompt=CONFIG["block_size"], new=16)
        run_cases(engine, short, shape, result, path)
        profiles: dict[str, Any] = {}
        if args.profile and not args.dry:
            profiles = write_profiles(engine, args, result, profiled, CLASSES)
            result["launches"] = launches_of(profiles, shape.ranks)
            print(*result["launches"], sep="\n", flush=True)
            write_json(path, result)
        run_cases(engine, rest, shape, result, path)
        result["waits"] = waits_of(profiles, result["cases"])
        print(*result["waits"], sep="\n", flush=True)
        write_json(path, result)
        result["memory_after"] = engine.call(op="memory")
        # other ranks would replay the graph of a step that is eager here
        hits = () if args.dry or shape.ranks > 1 else HITS
        result["hits"] = [
            engine.call(op="experts_hit", batch=rows, prompt=HIT_PROMPT)
            | {"even": shape.even_hits(rows)}
            for rows in hits
        ]
        print(result["memory_after"], *result["hits"], sep="\n", flush=True)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = rig_parser(__doc__, is_split=True)
    parser.add_argument("--peer", type=Path, help="folder with vLLM's run.sh")
    parser.add_argument(
        "--earlier", action="store_true", help="the peer alone, beside ours in --out of this hour"
    )
    parser.add_argument("--cases", default=",".join(CASES), help="default: all")
    parser.add_argument(
        "--profile", default="1,32", help="rows of decode steps that are profiled, and a prompt"
    )
    parser.add_argument("--kv-cache-dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--experts", type=int, help="of a layer")
    args = parser.parse_args(argv)
    names = [name for name in args.cases.split(",") if name]
    ranks = args.tensor_parallel_size
    cases = {name: case for name, case in CASES.items() if name in names}
    if ranks > 1:
        cases = {name: case._replace(target="V36") for name, case in cases.items()}
    if args.dry:
        cases = {name: of_dry_run(case) for name, case in cases.items()}
    shape = v4_shape_of(ranks, args.layers, args.experts)
    own = "v4_gpu" if args.kv_cache_dtype == "bfloat16" else "v4_gpu_fp8"
    path: Path = args.out / f"{of_ranks(own, ranks)}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    result = measured_before(path) if args.earlier else measure_ours(args, cases, shape, path)
    if args.peer:
        model = f"--model-type deepseek_v4 --layers {shape.layers} --experts {shape.experts}"
        add_peers(result, path, cases, args.peer, model, ranks)
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
