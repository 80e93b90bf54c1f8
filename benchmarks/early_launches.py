"""What launches before the end of the kernel ahead are worth (FD_DSA_PDL): whole decode steps.

    python -m benchmarks.early_launches --rig     # on the test plug-in
    python -m benchmarks.early_launches --dry     # small widths on the CPU: shows that it runs

DeepSeek-V3.2's widths, one dense layer and two with experts, random weights in FP8, fp8_ds_mla
caches, decode steps from graphs after 4k tokens. One engine after the other: the variable is read
when a kernel is compiled. Writes benchmarks/results/early_launches.json; a ratio above 1 means that
early launches are faster.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any
from unittest import mock

from benchmarks._gpu_engine_model import FP8, Shape, write_model
from benchmarks._harness import Worker, environment, rig_parser, tier_of, write_json
from benchmarks.once_per_step import SMALL

LAYERS, DENSE_LAYERS = 3, 1
ROWS = (1, 8, 32)
RUNS = 3
SIDES = {"without": "0", "with": "1"}


def step_ms(options: dict[str, Any], switch: str, prompt: int, new: int) -> list[float]:
    """Median milliseconds of a decode step of each number of rows."""
    with mock.patch.dict(os.environ, FD_DSA_PDL=switch):
        engine = Worker("benchmarks.workers.gpu_engine:Engine", **options)
    with engine:
        found = []
        for batch in ROWS:
            request = {"op": "decode", "batch": batch, "prompt": prompt, "new": new}
            times = [engine.call(**request)["tpot_ms"] for _ in range(1 + RUNS)]
            found.append(statistics.median(times[1:]))
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 0."""
    parser = rig_parser(__doc__)
    args = parser.parse_args(argv)
    tier = tier_of(args)
    result: dict[str, Any] = {"name": "early_launches", "tier": tier, "layers": LAYERS}
    result |= {"env": environment(), "cases": []}
    prompt, new = (64, 8) if args.dry else (4096, 64)
    config: dict[str, Any] = {
        "max_model_len": 2 * prompt,
        "max_num_seqs": max(ROWS),
        "max_num_batched_tokens": 8192,
        "target_inter_token_latency_ms": 0,
    }
    if not args.dry:
        config |= {"kv_cache_dtype": "fp8", "cudagraph_capture_sizes": ROWS}
    with tempfile.TemporaryDirectory() as folder:
        fields = SMALL if args.dry else {"quantization_config": FP8}
        model = write_model(folder, Shape(LAYERS, DENSE_LAYERS), fields)
        options = {"model": model, "rig": args.rig, "config": config}
        options["device"] = "cpu" if args.dry else "gpu"
        ms = {side: step_ms(options, switch, prompt, new) for side, switch in SIDES.items()}
    for batch, without, early in zip(ROWS, ms["without"], ms["with"], strict=True):
        entry = {"rows": batch, "without_ms": without, "with_ms": early, "ratio": without / early}
        result["cases"].append(entry)
        print(f"{batch:3} rows: {without:.3f} ms, early {early:.3f} ms, {without / early:.3f}x")
    write_json(args.out / "early_launches.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
