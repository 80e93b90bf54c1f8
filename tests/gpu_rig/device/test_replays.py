"""Captured steps at released widths, replayed thousands of times: the same bits each time."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks._gpu_engine_model import FP8
from benchmarks._gpu_engine_model import SMALL as SMALL_V32
from benchmarks._gpu_engine_model import WIDTHS as V32
from benchmarks._v4_gpu_model import SMALL as SMALL_V4
from custom_ops.build_library import build_library
from fd_dsa import LLM, custom_ops
from fd_dsa.config import demo_model_path
from fd_dsa.runner import ModelRunner
from fd_dsa.startup.capture import capture_graphs
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import capture_of
from tests.gpu_rig.rows import logits_of_rows
from tests.models.published import V4_FLASH

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.slow, pytest.mark.own_process]

# a layer of each kind, then experts by score; V3.2 has a dense layer and two with experts
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deepseek_v32": (
        V32 | {"num_hidden_layers": 3, "first_k_dense_replace": 1, "quantization_config": FP8},
        SMALL_V32 | {"quantization_config": None},
    ),
    "deepseek_v4": (V4_FLASH | {"num_hidden_layers": 4, "num_hash_layers": 1}, SMALL_V4),
}
# tokens of the rows before the steps, across the selection of either model
CONTEXTS = (3, 130, 700, 1500, 2040, 2300, 2600)
PROMPT_ROW, PROMPT = len(CONTEXTS), 200
Row = tuple[int, int, bool]


def steps_of(scale: int) -> list[list[tuple[int, Row]]]:
    """Return decode steps of one, some and all rows, and prompts beside such rows and alone.

    A step has rows with their tokens before and in it, and whether these are of a prompt. A prompt
    begins with its first token, so that a replay finds all that it reads.
    """
    decoding = [(row, (length // scale, 1, False)) for row, length in enumerate(CONTEXTS)]
    prompt = [(PROMPT_ROW, (0, PROMPT // scale, True))]
    return [decoding[-1:], decoding[:3], decoding, [*decoding[2:4], *prompt], prompt]


def logits_of(runner: ModelRunner, rows: list[tuple[int, Row]]) -> np.ndarray:
    """Logits of the last token of each row of a step."""
    given = []
    for row, (before, new, is_prefill) in rows:
        ids = [(7 * row + 31 * p) % runner.vocab_size for p in range(before, before + new)]
        given.append((row, ids, before, is_prefill))
    return logits_of_rows(runner, given)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("model", "caches"),
    [("deepseek_v32", "bfloat16"), ("deepseek_v4", "bfloat16"), ("deepseek_v4", "fp8_ds_mla")],
)
def test_replays_give_the_same_bits(model: str, caches: str, rig: Rig, tmp_path: Path) -> None:
    """10,000 replays on a GPU, few of a small model in Triton's interpreter."""
    if model != "deepseek_v32" and not rig.is_real:
        pytest.skip("the interpreter takes minutes, for a replay that runs the same work again")
    fields, small = MODELS[model]
    scale, repeats = (1, 2000) if rig.is_real else (64, 1)
    (tmp_path / "config.json").write_text(json.dumps(fields if rig.is_real else fields | small))
    custom_ops.use_library(build_library() if rig.is_real else None)
    sizes: dict[str, Any] = {
        "block_size": 256 if model == "deepseek_v4" else 64,
        "max_num_seqs": 8,
        "max_model_len": 4096 if rig.is_real else 256,
        "max_num_batched_tokens": 2048 if rig.is_real else 16,
        "kv_cache_dtype": caches,
        "tokenizer": demo_model_path(),
    }
    with LLM(
        str(tmp_path), device=rig.device, load_format="dummy", enforce_eager=True, **sizes
    ) as llm:
        runner = llm.engine.runner
        sizes_of_graphs = (1, 4, 8) if rig.is_real else (8,)
        capture_graphs(runner, sizes_of_graphs, capture_of(rig), (256 // scale + 4,))
        batch = runner.input_batch
        per_row = batch.block_tables.shape[1]
        for row in range(batch.max_num_seqs):
            batch.set_blocks(row, range(row * per_row, (row + 1) * per_row))
        chunk = batch.max_num_tokens
        for row, length in enumerate(CONTEXTS):
            for before in range(0, length // scale, chunk):
                new = min(chunk, length // scale - before)
                logits_of(runner, [(row, (before, new, True))])
        steps = steps_of(scale)
        graphs_before = sum(runner.counters.graph_steps.values())
        first = [logits_of(runner, step) for step in steps]
        assert all(np.isfinite(logits).all() and np.ptp(logits) > 0 for logits in first)
        for number in range(repeats):
            for step, logits in zip(steps, first, strict=True):
                found = logits_of(runner, step)
                assert np.array_equal(found, logits), f"replay {number} of {step}"
        replayed = sum(runner.counters.graph_steps.values()) - graphs_before
        assert replayed == len(steps) * (1 + repeats)
        runner.graphs = None
    custom_ops.use_library(None)
    gc.collect()
