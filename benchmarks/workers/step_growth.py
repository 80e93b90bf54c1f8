"""Worker: what a step's metadata and launches do when layers, rows and contexts double.

Tiny models with random weights, on the test plug-in in host memory, where Triton interprets the
kernels that a GPU would compile.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np

from tests.gpu_rig import load

_BLOCK_SIZE = 16


def _runner(layers: int, rows: int, context: int, device: str) -> Any:
    """A runner whose rows have `context` tokens of cache, and blocks for one more each."""
    from fd_dsa.runner import InputBatch, ModelRunner
    from fd_dsa.runner.model_runner import cache_layout
    from tests.runner.tiny import V32, tiny_model

    model = tiny_model(V32 | {"num_hidden_layers": layers, "max_position_embeddings": 1024})
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


class Steps:
    """Decode steps on the plug-in, loaded once."""

    def __init__(self) -> None:
        self._rig = load("fake")

    def count(self, layers: int, rows: int, context: int) -> dict[str, Any]:
        """Builds and bytes of the metadata of one decode step, and launches of our kernels."""
        import paddle

        from fd_dsa.triton_runtime import interpreter

        counts: Counter[str] = Counter()
        original = interpreter.run

        def counting(launched: Any, *args: Any) -> None:
            counts[launched.__name__] += 1
            original(launched, *args)

        paddle.set_device(self._rig.device)
        try:
            runner = _runner(layers, rows, context, f"{self._rig.place.get_device_type()}:0")
            # views are made in the first step
            _decode_step(runner, context)
            backend = runner.attn_backends[0]
            before = backend.builder.num_builds
            interpreter.run = counting
            _decode_step(runner, context)
        finally:
            interpreter.run = original
            paddle.set_device("cpu")
        meta = backend.attention_metadata
        values = [getattr(meta, field.name) for field in fields(meta)]
        tensors = [value for value in values if hasattr(value, "element_size")]
        metadata = {
            "builds": backend.builder.num_builds - before,
            "bytes": sum(int(x.numel()) * x.element_size() for x in tensors),
        }
        return {"metadata": metadata, "launches": counts.total()}
