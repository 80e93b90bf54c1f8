"""Runs steps of an engine whose graphs are captured, and prints what the host still enqueues.

`python -m tests.null_driver.captured_steps [deepseek_v4 [RANKS]]`. A replay does nothing, so all
launches, collectives and allocations of a captured step are those beside its graph.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._harness import random_prompts
from benchmarks.host_time import v32
from tests.null_driver.engine import (
    V4,
    V4_FORMATS,
    NullDriver,
    open_engine,
    replace,
)

STEPS, ROWS, SIZES = 40, 8, (64, 256)


def capture(place: object) -> Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]:
    """Return a capture whose replays do nothing."""

    def captured(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        return work(), lambda: None

    return captured


def main() -> None:
    """Run requests that come beside others, and print the work of their steps."""
    is_v4, ranks = sys.argv[1:2] == ["deepseek_v4"], int((sys.argv[2:] or ["1"])[0])
    model = V4 | V4_FORMATS if is_v4 else v32(layers=3, dense=1, experts=16)
    config: dict[str, Any] = {
        "kv_cache_dtype": "fp8",
        "max_model_len": 8192,
        "max_num_seqs": ROWS,
        "max_num_batched_tokens": 1024,
        "kv_cache_memory_bytes": "4G",
        "enforce_eager": True,
        # copies of snapshots are launches between steps
        "enable_prefix_caching": False,
        "tensor_parallel_size": ranks,
    }
    driver = NullDriver(ranks)
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(driver, model, Path(folder), **config)
    from fd_dsa import SamplingParams
    from fd_dsa.ops import dense_kernels, device_matrix
    from fd_dsa.startup.capture import capture_graphs
    from fd_dsa.triton_runtime import warming

    runner, num_empty, native = engine.runner, [0], dense_kernels.empty

    def counted(*given: Any) -> Any:
        num_empty[0] += 1
        return native(*given)

    for module in (dense_kernels, device_matrix):
        replace(module, "empty", counted)
    with warming():
        capture_graphs(runner, (ROWS,), capture, SIZES)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    for step in range(STEPS):
        if step % 3 == 0:
            # within the selection, and past it
            tokens = (10, 50, 200, 2500)[step // 3 % 4]
            [ids] = random_prompts(1, tokens, 100_000, seed=step)
            engine.add_request(str(step), ids, params)
        before = driver.launches(), num_empty[0]
        engine.step()
        key = runner.graph_key
        if key is not None:
            done = driver.launches() - before[0], num_empty[0] - before[1]
            sums = seen.get(key[:2], (0, 0))
            seen[key[:2]] = sums[0] + done[0], sums[1] + done[1]
    assert num_empty[0], "the capture allocates"
    for (size, length), (launches, allocations) in sorted(seen.items()):
        print(f"{size} tokens, rows up to {length}: {launches} launches, {allocations} allocations")


if __name__ == "__main__":
    main()
