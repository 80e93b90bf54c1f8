"""fd_dsa's side of the comparison: prompts through ModelRunner in chunks and batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.loader import load_weights
from fd_dsa.models.registry import create_model, read_config
from fd_dsa.models.weights import HostWeights
from fd_dsa.runner import InputBatch, ModelRunner
from tests.parity.cases import BLOCK_SIZE
from tests.runner.dsa import dsa_runner

MAX_ROWS = 12
MAX_TOKENS = 640
BLOCKS_PER_ROW = 24
# row of the greedy run
GREEDY_ROW = 3


@dataclass
class Sequence:
    """A row's token ids, how many of them have run, and the logits of those."""

    row: int
    token_ids: list[int]
    done: int = 0
    logits: list[np.ndarray] = field(default_factory=list)


def load_model(folder: Path):
    """The model of a folder, its weights loaded."""
    config = read_config(folder)
    weights = HostWeights()
    model = create_model(config, weights)
    load_weights(Checkpoint.open(folder), config, weights.loaders)
    return model


def make_runner(model, kv_cache_dtype: str = "float32") -> ModelRunner:
    """A runner whose rows own scattered, interleaved blocks."""
    batch = InputBatch(MAX_ROWS, MAX_TOKENS, BLOCKS_PER_ROW, BLOCK_SIZE)
    num_blocks = MAX_ROWS * BLOCKS_PER_ROW + 1
    blocks = np.random.default_rng(0).permutation(num_blocks)[: MAX_ROWS * BLOCKS_PER_ROW]
    for row in range(MAX_ROWS):
        batch.set_blocks(row, blocks[row::MAX_ROWS])
    layout = model.config.cache_layout(kv_cache_dtype, BLOCK_SIZE)
    return dsa_runner(model, batch, layout, num_blocks)


def run_step(runner: ModelRunner, sequences: list[Sequence], chunk: int) -> None:
    """Run up to `chunk` prompt tokens of every unfinished sequence; all logits are kept."""
    batch = runner.input_batch
    batch.begin_step()
    parts = []
    for sequence in sequences:
        ids = sequence.token_ids[sequence.done : sequence.done + chunk]
        if ids:
            last = batch.add_row(sequence.row, ids, sequence.done, is_prefill=True)
            parts.append((sequence, slice(last + 1 - len(ids), last + 1)))
    logits = runner.execute_model(np.arange(batch.num_tokens))
    for sequence, tokens in parts:
        sequence.done += tokens.stop - tokens.start
        sequence.logits.append(logits[tokens])


def prompt_logits(runner: ModelRunner, prompts: list[list[int]], chunk: int) -> list[np.ndarray]:
    """float32 [len(prompt), vocab] of each prompt, all of them in one batch, chunk by chunk."""
    sequences = [Sequence(row, ids) for row, ids in enumerate(prompts)]
    while any(s.done < len(s.token_ids) for s in sequences):
        run_step(runner, sequences, chunk)
    return [np.concatenate(s.logits) for s in sequences]


def greedy(
    runner: ModelRunner, prompt: list[int], steps: int, beside: list[list[int]] = ()
) -> np.ndarray:
    """Greedy tokens int64 [steps] of `GREEDY_ROW`, while the prompts `beside` prefill in bits."""
    others = [Sequence(row, ids) for row, ids in enumerate(beside, start=GREEDY_ROW + 1)]
    batch, ids, done, tokens = runner.input_batch, list(prompt), 0, []
    while len(tokens) < steps:
        batch.begin_step()
        last = batch.add_row(GREEDY_ROW, ids, done, is_prefill=done == 0)
        for other in others:
            part = other.token_ids[other.done : other.done + 5]
            if part:
                batch.add_row(other.row, part, other.done, is_prefill=True)
                other.done += len(part)
        done += len(ids)
        best = int(runner.execute_model(np.array([last]))[0].argmax())
        tokens.append(best)
        ids = [best]
    return np.array(tokens)
