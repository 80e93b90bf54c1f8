"""fd_dsa's side: models of folders, and prompts through ModelRunner in chunks and batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.distributed import Group
from fd_dsa.models.loader import load_weights, validate
from fd_dsa.models.mtp_layer import add_mtp_layer
from fd_dsa.models.registry import create_model, open_checkpoint, read_config
from fd_dsa.models.weights import HostWeights
from fd_dsa.runner import InputBatch, ModelRunner
from fd_dsa.v4_attention import V4AttentionBackend

ROWS = 6


def load_model(folder: Path, group: Group | None = None, *, mtp: bool = False) -> Any:
    """Load the model of a folder, or a rank's part of it, with its draft layer if `mtp` asks."""
    config = read_config(folder)
    with open_checkpoint(config, folder) as checkpoint:
        if mtp:
            config = add_mtp_layer(checkpoint, config)
        weights = HostWeights(group)
        model = create_model(config.split(group.size if group else 1), weights)
        validate(checkpoint, config)
        load_weights(checkpoint, config, weights.loaders, group=group)
    return model


def make_runner(
    model: Any, block_size: int, most_tokens: int = 320, max_drafts: int = 0
) -> ModelRunner:
    """A runner whose rows own scattered blocks, and whose unwritten cache rows are NaN."""
    columns = -(-most_tokens // block_size)
    batch = InputBatch(ROWS, 4 * most_tokens, columns, block_size)
    num_blocks = ROWS * columns + 1
    blocks = np.random.default_rng(0).permutation(num_blocks)
    for row in range(ROWS):
        batch.set_blocks(row, blocks[row:-1:ROWS])
    backend = V4AttentionBackend(model.config, batch, num_blocks, max_drafts)
    runner = ModelRunner(model, batch, backend)
    poison(runner)
    return runner


def poison(runner: ModelRunner) -> None:
    """Make whatever is read before it is written show."""
    for pools in runner.caches:
        for pool in (pools.keys, pools.index_entries, pools.states, pools.records):
            if pool is not None:
                pool[...] = np.nan


def run_step(runner: ModelRunner, parts: dict[int, tuple[list[int], int]]) -> dict[int, np.ndarray]:
    """Logits of all tokens of a step: of each row its new tokens and how many went before."""
    batch = runner.input_batch
    batch.begin_step()
    ends = {}
    for row, (ids, done) in sorted(parts.items()):
        ends[row] = batch.add_row(row, ids, done, is_prefill=len(ids) > 1 or not done) + 1
    logits = runner.execute_model(np.arange(batch.num_tokens))
    return {row: logits[end - len(parts[row][0]) : end].copy() for row, end in ends.items()}


def prompt_logits(
    runner: ModelRunner, prompts: Sequence[list[int]], chunk: int
) -> list[np.ndarray]:
    """float32 [len(prompt), vocab] of each prompt, all of them in one batch, chunk by chunk."""
    found: list[list[np.ndarray]] = [[] for _ in prompts]
    for begin in range(0, max(map(len, prompts)), chunk):
        parts = {
            row: (prompt[begin : begin + chunk], begin)
            for row, prompt in enumerate(prompts)
            if begin < len(prompt)
        }
        for row, logits in run_step(runner, parts).items():
            found[row].append(logits)
    return [np.concatenate(one) for one in found]
