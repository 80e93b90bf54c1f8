"""Second turns of long conversations whose blocks were evicted to host memory.

    python -m benchmarks.host_tier --rig    # one GPU: seven layers in FP8, contexts of 64k tokens
    python -m benchmarks.host_tier --rig -tp 4    # DeepSeek-V3.2-REAP-345B on four GPUs
    python -m benchmarks.host_tier --rig --v4     # DeepSeek-V4 of v4_gpu, whole depth
    python -m benchmarks.host_tier --dry    # small widths on the CPU: shows that it runs

A first turn computes its context. Other conversations then evict it, and a second turn gets it
back from host memory. Reported is the time to the first token of the second turn over that of the
first one. Streams beside a second turn show what the copies cost them: their time with a context
in host memory over their time with the same context in device memory. Writes
benchmarks/results/host_tier.json, or host_tier_N.json of N GPUs, for DeepSeek-V4 host_tier_v4.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._gpu_engine_model import Shape, engine_options, of_ranks, shape_of
from benchmarks._harness import Worker, rig_parser, rig_result, write_json, write_result
from benchmarks._v4_gpu_model import V4Shape, v4_options, v4_shape_of

MODULE = "benchmarks.workers.host_tier:Engine"
# largest ratios that pass
GATES = {"first_token_ratio": 0.15, "streams_ratio": 1.03}
LOAD: dict[str, int] = {"context": 65536, "question": 128, "streams": 16, "tokens": 400}
DRY_LOAD: dict[str, int] = {"context": 256, "question": 16, "streams": 2, "tokens": 6}
CONFIG: dict[str, Any] = {
    "kv_cache_dtype": "fp8",
    "max_model_len": 66560,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 8192,
    # a context, its question and the streams
    "num_gpu_blocks_override": 1240,
    "kv_offload_bytes": "16G",
}
DRY: dict[str, Any] = {
    "max_model_len": 320,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "num_gpu_blocks_override": 10,
    "kv_offload_bytes": "64M",
}
# the same tokens in blocks of DeepSeek-V4; a dry run has contexts of several blocks
V4_CONFIG = CONFIG | {
    "kv_cache_dtype": "bfloat16",
    "block_size": 256,
    "num_gpu_blocks_override": 310,
}
V4_DRY_LOAD = DRY_LOAD | {"context": 1024}
V4_DRY = DRY | {"block_size": 128, "max_model_len": 1280, "num_gpu_blocks_override": 14}
ROUNDS = 5


def measure(engine: Worker, load: dict[str, int], round_number: int) -> dict[str, Any]:
    """Return the case of one round, with a conversation of its own."""
    turn = {"context": load["context"], "question": load["question"]}
    seed, others = 10 * round_number, iter(range(10 * round_number + 1, 10 * round_number + 9))

    def evict() -> None:
        for _ in range(2):
            engine.call(op="turn", seed=next(others), number=0, **turn)

    first = engine.call(op="turn", seed=seed, number=0, **turn)
    evict()
    second = engine.call(op="turn", seed=seed, number=1, **turn)
    streams = [engine.call(op="beside", seed=seed, number=2, **load)]
    evict()
    streams.append(engine.call(op="beside", seed=seed, number=3, **load))
    kept, copied = streams
    return {
        "first_turn": first,
        "second_turn": second,
        "streams_beside_kept": kept,
        "streams_beside_copied": copied,
        "first_token_ratio": second["seconds"] / first["seconds"],
        "streams_ratio": copied["seconds"] / kept["seconds"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = rig_parser(__doc__, is_split=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--v4", action="store_true", help="DeepSeek-V4, whole depth")
    args = parser.parse_args(argv)
    ranks = args.tensor_parallel_size
    more = {"tensor_parallel_size": ranks}
    shape: Shape | V4Shape
    if args.v4:
        load, config = (V4_DRY_LOAD, V4_DRY | more) if args.dry else (LOAD, V4_CONFIG | more)
        shape = V4Shape(4, 8, ranks) if args.dry else v4_shape_of(ranks, None, None)
        engines = v4_options(args, shape, config)
    else:
        load, config = (DRY_LOAD, DRY | more) if args.dry else (LOAD, CONFIG | more)
        shape = Shape(ranks=ranks) if args.dry else shape_of(ranks, None)
        engines = engine_options(args, shape, config)
    name = of_ranks("host_tier" + "_v4" * args.v4, ranks)
    result = rig_result(name, args, **shape._asdict(), load=load, gates=GATES)
    path: Path = args.out / f"{result['name']}.json"
    with (
        engines as options,
        Worker(MODULE, **options) as engine,
    ):
        # the first round warms up
        for number in range(args.rounds + 1):
            case = measure(engine, load, number)
            print(json.dumps(case), flush=True)
            if number:
                result["cases"].append(case)
                write_json(path, result)
    for gate, most in GATES.items():
        ratio = float(np.median([case[gate] for case in result["cases"]]))
        result[gate] = {"median": ratio, "passes": ratio <= most}
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
