"""Time per token of captured decode steps, with a fork to a second stream and without it.

    python -m benchmarks.engine_overlap --rig     # on the test plug-in, one GPU: five layers in FP8
    python -m benchmarks.engine_overlap --rig -tp 2 --layers 8
    python -m benchmarks.engine_overlap --dry     # small widths on the CPU: shows that it runs

1 to 256 rows have more keys than are selected. On one GPU an engine has both graphs of each size,
and a run of decode steps takes them in turns. On several GPUs each way is an engine of its own,
twice, because all ranks must fork alike. Writes benchmarks/results/engine_overlap.json, with the
number of ranks at its end if there are several. A ratio above 1 means that the fork pays.
`limit_tokens` is the largest size up to which it pays at every size. It bounds the default,
`fd_dsa.environment.DEFAULT_OVERLAP_MAX_TOKENS`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks._gpu_engine_model import Shape, engine_options, of_ranks, shape_of
from benchmarks._harness import Worker, rig_parser, rig_result, write_result
from benchmarks.once_per_step import DENSE_LAYERS, LAYERS
from benchmarks.workers.engine_overlap import ONE, TWO
from fd_dsa.environment import DEFAULT_OVERLAP_MAX_TOKENS

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TARGET = "benchmarks.workers.engine_overlap:Engine"
# most tokens of a step that forks; the order cancels a drift
ENGINES = ((ONE, 0), (TWO, ROWS[-1]), (TWO, ROWS[-1]), (ONE, 0))


def in_turns(
    options: dict[str, Any], rows: Sequence[int], request: Mapping[str, int]
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield median milliseconds of both ways on one GPU, rows after rows."""
    with Worker(TARGET, most=None, **options) as engine:
        engine.call(op="capture_both")
        for batch in rows:
            found = engine.call(op="decode_in_turns", batch=batch, **request)
            yield batch, {name: times["p50"] for name, times in found.items()}


def by_engines(
    options: dict[str, Any], rows: Sequence[int], prompt: int, new: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the medians of engines on several GPUs, in sequence: two do not fit."""
    values: dict[tuple[int, str], list[float]] = {}
    for name, most in ENGINES:
        with Worker(TARGET, most=most, **options) as engine:
            for batch in rows:
                engine.call(op="decode", batch=batch, prompt=prompt, new=8)
                found = engine.call(op="decode", batch=batch, prompt=prompt, new=new)
                values.setdefault((batch, name), []).append(found["tpot_ms"])
    for batch in rows:
        yield batch, {name: float(np.mean(values[batch, name])) for name in (ONE, TWO)}


def limit(cases: Sequence[Mapping[str, Any]]) -> int:
    """Return the largest number of rows up to which the fork pays at every number, or 0."""
    found = 0
    for case in sorted(cases, key=lambda one: one["rows"]):
        if case["ratio"] < 1:
            break
        found = case["rows"]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = rig_parser(__doc__, is_split=True)
    parser.add_argument("--layers", type=int, help="of a model on several GPUs; default: all 61")
    args = parser.parse_args(argv)
    ranks = args.tensor_parallel_size
    shape = Shape(LAYERS, DENSE_LAYERS)
    if ranks > 1:
        shape = shape._replace(ranks=ranks) if args.dry else shape_of(ranks, args.layers)
    rows = (1, 4) if args.dry else ROWS
    # more keys than index_topk, so that keys are scored and selected
    prompt, turns, steps = (80, 4, 8) if args.dry else (2304, 16, 20)
    config: dict[str, Any] = {
        "max_model_len": 512 if args.dry else 4096,
        "max_num_seqs": rows[-1],
        "max_num_batched_tokens": 512 if args.dry else 8192,
        "target_inter_token_latency_ms": 0,
        "cudagraph_capture_sizes": rows,
        "tensor_parallel_size": ranks,
    }
    if not args.dry:
        config["kv_cache_dtype"] = "fp8"
    name = of_ranks("engine_overlap", ranks)
    result = rig_result(name, args, shape=shape._asdict(), prompt_tokens=prompt)
    with engine_options(args, shape, config) as options:
        if ranks == 1:
            request = {"prompt": prompt, "turns": turns, "steps": steps}
            found = in_turns(options, rows, request)
        else:
            found = by_engines(options, rows, prompt, turns * steps // 4)
        for batch, ms in found:
            case = {"rows": batch, "one_ms": ms[ONE], "two_ms": ms[TWO]}
            case["ratio"] = ms[ONE] / ms[TWO]
            result["cases"].append(case)
            print(
                f"{batch:>4} rows: {ONE} {ms[ONE]:9.4f} ms, {TWO} {ms[TWO]:9.4f} ms a token, "
                f"{case['ratio']:.4f}x",
                flush=True,
            )
    result["limit_tokens"] = limit(result["cases"])
    result["default_tokens"] = DEFAULT_OVERLAP_MAX_TOKENS
    print(f"the fork pays up to {result['limit_tokens']} tokens of a step")
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
