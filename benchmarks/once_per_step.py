"""What once per step is worth in a whole model: five layers of DeepSeek-V3.2 in bfloat16.

    python -m benchmarks.once_per_step --rig     # on the test plug-in
    python -m benchmarks.once_per_step --dry     # small widths on the CPU: shows that it runs
    python -m benchmarks.once_per_step --rig --tensor-parallel-size 4      # a whole model: P31

FastDeploy #7367's experiment: time per output token with a step's metadata made once, and again in
every layer, captured and eager; and #7598's: prompts whose windows come from one launch, and from a
loop on the host. The other forms are changes of this engine's classes, made in a worker. On several
GPUs the model has the shape of DeepSeek-V3.2-REAP-345B in FP8, only decode steps are timed, and it
is rank 0 that makes the metadata again, for which the others wait. Writes
benchmarks/results/once_per_step.json, with the number of ranks at its end if there are several; a
ratio above 1 means that once is better.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._gpu_engine_model import FP8, Shape, of_ranks, shape_of, write_model
from benchmarks._harness import RESULTS, Worker, environment, write_json

LAYERS, DENSE_LAYERS = 5, 3
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "vocab_size": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "index_n_heads": 4,
    "index_topk": 64,
    "n_routed_experts": 16,
    "max_position_embeddings": 4096,
}
TARGET = "benchmarks.workers.once_per_step:Engine"
PAIRS = 5


def compare(
    options: dict[str, Any], config: dict[str, Any], others: str, request: dict[str, Any]
) -> tuple[float, float]:
    """Medians of once and of another way of working; each engine has the device for itself."""
    figure = "tpot_ms" if request["op"] == "decode" else "tok_s"
    values: dict[str, list[float]] = {}
    for work in ("once", others):
        # in sequence: the weights of both do not fit
        with Worker(TARGET, work=work, config=config, **options) as engine:
            engine.call(**request)
            values[work] = [engine.call(**request)[figure] for _ in range(PAIRS)]
    return statistics.median(values["once"]), statistics.median(values[others])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--rig", action="store_true", help="Paddle's CPU wheel and the test plug-in"
    )
    parser.add_argument("--dry", action="store_true", help="small widths on the CPU")
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    args = parser.parse_args(argv)
    ranks = args.tensor_parallel_size
    name = of_ranks("once_per_step", ranks)
    result: dict[str, Any] = {"name": name, "env": environment(), "cases": []}
    result["tier"] = "dry" if args.dry else "T1p" if args.rig else "T2"
    prompt, new = (256, 32) if args.dry else (4096, 128)
    config: dict[str, Any] = {
        "max_model_len": prompt * 2,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 8 * prompt if args.dry else 8192,
        "target_inter_token_latency_ms": 0,
        "tensor_parallel_size": ranks,
    }
    decode = {"op": "decode", "batch": 1, "prompt": prompt, "new": new}
    prefill = {"op": "prefill", "batch": 8, "prompt": prompt, "new": 1}
    cases: dict[str, tuple[bool, str, dict[str, Any]]] = {
        "decode, captured": (False, "every layer", decode),
        "decode, eager": (True, "every layer", decode),
        "prompts, windows": (True, "host loop", prefill),
    }
    shape, fields = Shape(LAYERS, DENSE_LAYERS), SMALL if args.dry else {}
    if ranks > 1:
        del cases["prompts, windows"]
        shape = shape._replace(ranks=ranks) if args.dry else shape_of(ranks, None)
        fields = fields or {"quantization_config": FP8}
    with tempfile.TemporaryDirectory() as folder:
        device = "cpu" if args.dry else "gpu"
        model = write_model(folder, shape, fields)
        options = {"model": model, "rig": args.rig, "device": device}
        for case, (eager, other, request) in cases.items():
            once, others = compare(options, config | {"enforce_eager": eager}, other, request)
            is_time = request["op"] == "decode"
            entry = {
                "case": case,
                "peer": other,
                "peer_value": others,
                "ours_value": once,
                "unit": "ms a token" if is_time else "prompt tokens/s",
                "ratio": others / once if is_time else once / others,
            }
            result["cases"].append(entry)
            print(
                f"{case:<18} once {once:10.3f}  {other} {others:10.3f} {entry['unit']}"
                f"  {entry['ratio']:.3f}x",
                flush=True,
            )
    path = args.out / f"{name}.json"
    write_json(path, result)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
