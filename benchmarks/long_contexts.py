"""Benchmark of one request with a long context: its first token, and each token after it.

    python -m benchmarks.long_contexts --rig          # on the test plug-in
    python -m benchmarks.long_contexts --rig --lengths 65536 163840
    python -m benchmarks.long_contexts --rig --v4     # DeepSeek-V4 of v4_gpu, to 1,048,576 tokens
    python -m benchmarks.long_contexts --dry          # small widths on the CPU: shows that it runs

The model has DeepSeek-V3.2's widths in FP8, 7 layers and random weights. The longest context is
all that it allows, 163,840 tokens. A request has prompt tokens of one seed. It is alone in the
engine, and no earlier request has its prefix.

Writes benchmarks/results/long_contexts.json, for DeepSeek-V4 long_contexts_v4.json. The floor is
that of `gpu_engine` or `v4_gpu`: the time to multiply or to read. A share of 1 would be the floor.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks._gpu_engine_model import SMALL, Case, Shape, engine_options, floor
from benchmarks._harness import Worker, rig_parser, rig_result, write_json, write_result
from benchmarks._v4_gpu_model import V4Shape, v4_options
from benchmarks._v4_gpu_model import floor as v4_floor
from benchmarks.v4_gpu import CONFIG as V4_CONFIG

TARGET = "benchmarks.workers.gpu_engine:Engine"
LENGTHS = 2048, 16384, 65536, 131072, 163840
V4_LENGTHS = 2048, 16384, 131072, 524288, 1048576
CHUNK, NEW_TOKENS, RUNS = 8192, 64, 3
# contexts from which on there is one run, because its prompt takes more than a minute
ONE_RUN = 1 << 19

Floor = Callable[[Case], float | None]


def cases(engine: Worker, length: int, new: int, floor_of: Floor) -> Iterator[Any]:
    """Yield the case of the first token and that of each token after it.

    Args:
        length: tokens of the context, with all that the request may get.
        new: measured steps that decode.
    """
    prompt, num_runs = length - new - 1, RUNS if length < ONE_RUN else 1
    runs = [engine.call(op="alone", prompt=prompt, new=new) for _ in range(num_runs)]
    rate = floor_of(Case("", "prefill", 1, prompt, 1))
    least = {
        "first token": 1e3 * prompt / rate if rate else None,
        "time per token": floor_of(Case("", "decode", 1, prompt, new)),
    }
    for name, figure in (("first token", "first_ms"), ("time per token", "tpot_ms")):
        ours, lower = statistics.median(run[figure] for run in runs), least[name]
        yield {
            "case": f"{name}, {length} tokens",
            "context": length,
            "unit": "ms",
            "ours_value": ours,
            "floor": lower,
            "share_of_floor": lower / ours if lower else None,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = rig_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of a context")
    parser.add_argument("--v4", action="store_true", help="DeepSeek-V4, whole depth")
    args = parser.parse_args(argv)
    lengths = args.lengths or (V4_LENGTHS if args.v4 else LENGTHS)
    chunk, new = CHUNK, NEW_TOKENS
    if args.dry:
        lengths, chunk, new = args.lengths or (256, 512), 64, 16
    config: dict[str, Any] = {
        "max_model_len": max(lengths),
        "max_num_seqs": 4,
        "max_num_batched_tokens": chunk,
    }
    if not args.dry:
        config |= {"cudagraph_capture_sizes": (1, 2, 4)}
    shape: Shape | V4Shape
    if args.v4:
        config["block_size"] = V4_CONFIG["block_size"]
        shape = V4Shape(4, 8) if args.dry else V4Shape()
        floor_of, options_of = partial(v4_floor, shape=shape), v4_options(args, shape, config)
    else:
        config |= {} if args.dry else {"kv_cache_dtype": "fp8"}
        shape = Shape(2, 1, SMALL["n_routed_experts"]) if args.dry else Shape()
        floor_of, options_of = partial(floor, shape=shape), engine_options(args, shape, config)
    name = "long_contexts" + "_v4" * args.v4
    result = rig_result(name, args, **shape._asdict())
    with options_of as options, Worker(TARGET, **options) as engine:
        engine.call(op="decode", batch=1, prompt=min(lengths) // 2, new=new)
        for length in lengths:
            for entry in cases(engine, length, new, floor_of):
                print(f"{entry['case']:<32} {entry['ours_value']:10.2f} ms", flush=True)
                result["cases"].append(entry)
                # kept if a later case has no time left
                write_json(args.out / f"{name}.json", result)
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
