"""Benchmark of one request with a long context: its first token, and each token after it.

    python -m benchmarks.long_contexts --rig          # on the test plug-in
    python -m benchmarks.long_contexts --rig --lengths 65536 163840
    python -m benchmarks.long_contexts --dry          # small widths on the CPU: shows that it runs

The model has DeepSeek-V3.2's widths in FP8, 7 layers and random weights. The longest context is
all that it allows, 163,840 tokens. A request has prompt tokens of one seed. It is alone in the
engine, and no earlier request has its prefix.

Writes benchmarks/results/long_contexts.json. The floor is that of `gpu_engine`: the time to
multiply or to read. A share of 1 would be the floor.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks._gpu_engine_model import SMALL, Case, Shape, engine_options, floor
from benchmarks._harness import Worker, rig_parser, rig_result, write_json, write_result

TARGET = "benchmarks.workers.gpu_engine:Engine"
LENGTHS = 2048, 16384, 65536, 131072, 163840
CHUNK, NEW_TOKENS, RUNS = 8192, 64, 3


def cases(engine: Worker, length: int, chunk: int, new: int, shape: Shape) -> Iterator[Any]:
    """Yield the case of the first token and that of each token after it.

    Args:
        length: tokens of the context, with all that the request may get.
        chunk: most tokens of a step.
        new: measured steps that decode.
    """
    # a request of the operation `decode` may get so many tokens
    prompt = length - new - length // chunk - 8
    sizes = {"batch": 1, "prompt": prompt}
    rates = [engine.call(op="prefill", **sizes, new=1)["tok_s"] for _ in range(RUNS)]
    first = [1e3 * prompt / rate for rate in rates]
    decoded = [engine.call(op="decode", **sizes, new=new)["tpot_ms"] for _ in range(RUNS)]
    most = floor(Case("", "prefill", 1, prompt, 1), shape)
    least = {
        "first token": 1e3 * prompt / most if most else None,
        "time per token": floor(Case("", "decode", 1, prompt, new), shape),
    }
    for name, values in (("first token", first), ("time per token", decoded)):
        ours, lower = statistics.median(values), least[name]
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
    args = parser.parse_args(argv)
    shape = Shape(2, 1, SMALL["n_routed_experts"]) if args.dry else Shape()
    lengths = args.lengths or ((256, 512) if args.dry else LENGTHS)
    chunk, new = (64, 16) if args.dry else (CHUNK, NEW_TOKENS)
    config: dict[str, Any] = {
        "max_model_len": max(lengths),
        "max_num_seqs": 4,
        "max_num_batched_tokens": chunk,
    }
    if not args.dry:
        config |= {"kv_cache_dtype": "fp8", "cudagraph_capture_sizes": (1, 2, 4)}
    result = rig_result("long_contexts", args, **shape._asdict())
    args.out.mkdir(parents=True, exist_ok=True)
    with engine_options(args, shape, config) as options, Worker(TARGET, **options) as engine:
        engine.call(op="decode", batch=1, prompt=min(lengths) // 2, new=new)
        for length in lengths:
            for entry in cases(engine, length, chunk, new, shape):
                print(f"{entry['case']:<32} {entry['ours_value']:10.2f} ms", flush=True)
                result["cases"].append(entry)
                # kept if a later case has no time left
                write_json(args.out / "long_contexts.json", result)
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
