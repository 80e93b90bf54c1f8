"""Worker: what a step's metadata and launches do when layers, rows and contexts double.

Tiny models with random weights. Metadata is timed on the CPU. Launches are counted on the test
plug-in in host memory, where Triton interprets the kernels that a GPU would compile.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np

from benchmarks._harness import serve_requests
from tests.gpu_rig import Rig, load

_BLOCK_SIZE = 16
_STEPS = 40


def _runner(layers: int, rows: int, context: int, device: str) -> Any:
    """A runner whose rows have `context` tokens of cache, and blocks for one more each."""
    from fd_dsa.runner import InputBatch, ModelRunner
    from fd_dsa.runner.model_runner import cache_layout
    from tests.runner.tiny import V32, tiny_model

    model = tiny_model(V32 | {"num_hidden_layers": layers, "max_position_embeddings": 1024})
    if device != "cpu":
        model.to_device(device)
    columns = -(-(context + 1) // _BLOCK_SIZE)
    batch = InputBatch(rows, rows, columns, _BLOCK_SIZE)
    layout = cache_layout(model.config, "float32", _BLOCK_SIZE)
    runner = ModelRunner(model, batch, layout, rows * columns, device)
    for row in range(rows):
        batch.set_blocks(row, range(row * columns, (row + 1) * columns))
    return runner


def _decode_step(runner: Any, context: int) -> None:
    """One token for every row."""
    batch = runner.input_batch
    batch.begin_step()
    for row in range(batch.max_num_seqs):
        batch.add_row(row, [5], context, False)
    runner.execute_model(np.arange(batch.num_tokens))


def metadata(layers: int, rows: int, context: int) -> dict[str, Any]:
    """Builds of a step's metadata, its bytes, and its microseconds, on a CPU."""
    from fd_dsa.ops._host import as_numpy

    runner = _runner(layers, rows, context, "cpu")
    backend, times = runner.attn_backends[0], []
    _decode_step(runner, context)
    before = backend.builder.num_builds
    for _ in range(_STEPS):
        runner.input_batch.begin_step()
        for row in range(rows):
            runner.input_batch.add_row(row, [5], context, False)
        begin = time.perf_counter()
        runner.initialize_forward_meta()
        times.append(1e6 * (time.perf_counter() - begin))
    meta = backend.attention_metadata
    values = [getattr(meta, field.name) for field in fields(meta)]
    arrays = [as_numpy(value) for value in values if hasattr(value, "shape")]
    return {
        "builds": (backend.builder.num_builds - before) / _STEPS,
        "bytes": sum(array.nbytes for array in arrays),
        "us": float(np.median(times)),
    }


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Launches inside by kernel."""
    from fd_dsa.triton_runtime import interpreted, kernel

    counts: Counter[str] = Counter()
    original = interpreted.run_interpreted

    def counting(launched: Any, *args: Any) -> None:
        counts[launched.__name__] += 1
        original(launched, *args)

    modules: tuple[Any, ...] = (kernel, interpreted)
    for module in modules:
        module.run_interpreted = counting
    try:
        yield counts
    finally:
        for module in modules:
            module.run_interpreted = original


def launches(rig: Rig, layers: int, rows: int, context: int) -> dict[str, Any]:
    """Launches of our kernels in one decode step."""
    import paddle

    paddle.set_device(rig.device)
    try:
        runner = _runner(layers, rows, context, f"{rig.place.get_device_type()}:0")
        # views are made in the first step
        _decode_step(runner, context)
        with _counted() as counts:
            _decode_step(runner, context)
    finally:
        paddle.set_device("cpu")
    return {"launches": counts.total(), "kernels": len(counts)}


def main() -> None:
    """Answer."""
    rig = load("fake")
    serve_requests(
        {"metadata": metadata, "launches": lambda **case: launches(rig, **case)},
    )


if __name__ == "__main__":
    main()
