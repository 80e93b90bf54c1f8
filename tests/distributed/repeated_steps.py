"""A decode step of a split model, from a graph, again and again: its logits must not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.models.registry import read_config
from tests.distributed.rank_checks import digest

# past the demo model's selection of 256 keys, and short ones
LENGTHS = (5, 300, 40, 470)
_BLOCK_SIZE, _MAX_LEN = 64, 512


def split_runner(folder: Path, kv_cache_dtype: str, device: str, group: Any) -> Any:
    """This rank's runner of a folder, in bfloat16 or FP8 as stored."""
    from fd_dsa.device.allocation import paddle_allocator
    from fd_dsa.models.checkpoint import Checkpoint
    from fd_dsa.models.device_weights import DeviceWeights
    from fd_dsa.models.loader import fp8_tensors, load_weights
    from fd_dsa.models.registry import create_model
    from fd_dsa.runner import InputBatch
    from fd_dsa.runner.ranks import WorkerRunner
    from fd_dsa.startup.warm_up import warm_up_kernels
    from tests.runner.dsa import dsa_runner

    config = read_config(folder)
    with Checkpoint.open(folder) as checkpoint:
        fp8, allocate = fp8_tensors(checkpoint, config), paddle_allocator(device)
        scales = config.round_scales
        weights = DeviceWeights("bfloat16", allocate, fp8, round_scales=scales, group=group)
        model = create_model(config.split(group.size), weights)
        load_weights(checkpoint, config, weights.loaders, group=group)
    weights.finish()
    rows, blocks = len(LENGTHS), _MAX_LEN // _BLOCK_SIZE
    batch = InputBatch(rows, _MAX_LEN, blocks, _BLOCK_SIZE)
    layout = model.config.cache_layout(kv_cache_dtype, _BLOCK_SIZE)
    sizes = model, batch, layout, rows * blocks, device
    runner = dsa_runner(*sizes, dtype="bfloat16", kind=WorkerRunner)
    shuffled = np.random.default_rng(0).permutation(rows * blocks).tolist()
    warm_up_kernels(runner)
    for row in range(rows):
        batch.set_blocks(row, shuffled[row * blocks : (row + 1) * blocks])
    return runner


def repeat(
    runner: Any,
    capture: Callable[[Any], Any],
    memory: Any,
    copy: Callable[[Any, Any], None],
    times: int,
    kept: int = 50,
) -> str:
    """Digest of the logits of a captured step, which are the same every time.

    Args:
        runner: of `split_runner`; all ranks do this at once.
        capture: as of `capture_graphs`.
        memory: of the logits.
        copy: queues a copy between two tensors, target first.
        times: how often the step runs.
        kept: steps that follow each other without a look from the host.
    """
    from fd_dsa.startup.capture import capture_graphs

    batch, rows = runner.input_batch, len(LENGTHS)
    tables = batch.block_tables.copy()
    capture_graphs(runner, (rows,), capture, ())
    # the capture took the blocks of row 0
    batch.set_blocks(0, tables[0].tolist())
    ids = np.random.default_rng(1).integers(3, runner.vocab_size, (rows, _MAX_LEN)).tolist()
    for row, length in enumerate(LENGTHS):
        batch.begin_step()
        batch.add_row(row, ids[row][:length], 0, True)
        runner.run(np.array([length - 1]))
    batch.begin_step()
    for row, length in enumerate(LENGTHS):
        batch.add_row(row, ids[row][length : length + 1], length, False)
    every = np.arange(rows)
    logits = runner.graphs[runner.graphs.fitting(batch, every)].step.logits
    first = np.array(runner.execute_model(every))
    assert np.isfinite(first).all() and first.std() > 0
    shots = [memory.poisoned(first.shape, "float32") for _ in range(min(kept, times))]
    for begin in range(0, times, len(shots)):
        for shot in shots:
            runner.run(every)
            copy(shot, logits)
        for number, shot in enumerate(shots):
            same = np.array_equal(memory.get(shot).view(np.uint32), first.view(np.uint32))
            assert same, f"step {begin + number}"
    return digest(first)
