"""Entries that a device selects by scores from tensor cores, beside those of the other kernel."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fd_dsa.device.transfers import transfers_for
from fd_dsa.models.registry import config_from_dict
from fd_dsa.ops.cache_write import bfloat16_bits
from fd_dsa.ops.providers import asking_for
from fd_dsa.runner import InputBatch
from fd_dsa.step import StepHints
from fd_dsa.v4_attention.device_pools import DeviceLayout
from tests.kernel_memory import KernelMemory
from tests.v4_model.cases import CASES

pytestmark = pytest.mark.triton

HEADS, WIDTH, TOPK, LONGEST, PADDING = 16, 128, 6, 512, 3
FP8 = "fp8_ds_mla"
CONFIG = config_from_dict(CASES["mixed"].config | {"index_head_dim": WIDTH})
# numbers and their e4m3 codes: dot products are exact in any order
SMALL, CODES = np.array([0, 1, 2, -1, -2]), np.array([0x00, 0x38, 0x40, 0xB8, 0xC0], np.uint8)
# tokens of a row before the step and in it: a chunk, no entry at all, drafts, an idle row
MIXED = [(130, 9), (0, 40), (0, 3), (420, 1), (180, 3), (0, 0), (27, 1)]
DECODE = [(509, 3), (0, 1), (0, 0), (255, 1), (260, 2), (27, 1)]


class Selection:
    """A backend, and entries and queries of a step of rows.

    Attributes:
        longest: bound of a row's length, as the host knows it.
    """

    def __init__(
        self,
        m: KernelMemory,
        rows: list[tuple[int, int]],
        cache_dtype: str,
        block_size: int,
        allocate: Any = None,
    ) -> None:
        # its kernels are loaded only if there is Triton
        from fd_dsa.v4_attention.device_backend import V4DeviceBackend

        self.m, self.rows, rng = m, np.array(rows, np.int32).T.copy(), np.random.default_rng(0)
        self.num_tokens, columns = int(self.rows[1].sum()) + PADDING, LONGEST // block_size
        self.batch = batch = InputBatch(len(rows), self.num_tokens, columns, block_size)
        num_blocks = len(rows) * columns + 2
        tables = rng.permutation(num_blocks)[: len(rows) * columns].reshape(-1, columns)
        self.tables = tables.astype(np.int32)
        device = "gpu" if m.name != "rig" else "hopper:0"
        sizes = CONFIG, batch, num_blocks, device, "bfloat16", allocate or m.poisoned
        self.backend = V4DeviceBackend(*sizes, max_drafts=2, kv_cache_dtype=cache_dtype)
        self.longest = LONGEST
        # rotated channels are 0, because an angle would round the others
        q = rng.choice(SMALL, (self.num_tokens, HEADS, WIDTH)).astype(np.float32)
        q[..., WIDTH - CONFIG.qk_rope_head_dim :] = 0
        bits = bfloat16_bits(q.reshape(self.num_tokens, -1)).view(np.uint16)
        weights = rng.integers(-2, 3, (self.num_tokens, HEADS)).astype(np.float32) / 2
        self.q, self.weights = m.put(bits, "bfloat16"), m.put(weights)
        shape = num_blocks, block_size // 4, WIDTH
        if cache_dtype == FP8:
            scales = np.exp2(rng.integers(-2, 2, shape[:2])).astype(np.float32)
            codes = rng.choice(CODES, shape).reshape(num_blocks, -1)
            entries = np.concatenate([codes, scales.view(np.uint8)], axis=1)
            self.entries = m.put(entries.reshape(*shape[:2], WIDTH + 4))
        else:
            values = rng.choice(SMALL, shape).astype(np.float32)
            self.entries = m.put(bfloat16_bits(values).view(np.uint16), "bfloat16")

    def select(self) -> np.ndarray:
        """Slots of the entries that each token selects."""
        before, new = (self.m.put(counts) for counts in self.rows)
        prompts = int(self.rows[1][self.rows[1] > 3].sum())
        hints = StepHints(self.num_tokens - PADDING, prompts, self.longest, self.num_tokens)
        meta: Any = SimpleNamespace()
        inputs = before, before, new, self.m.put(self.tables)
        self.backend.build_step(meta, inputs, hints)
        step = self.backend.current_step(meta)
        assert step.index_view is not None
        assert (step.index_view.num_prefill_tokens > 0) == step.has_prompts == (prompts > 0)
        arguments = self.q, self.weights, self.entries, step
        # a schedule serves all layers
        found = [self.m.get(self.backend.select_entries(*arguments)) for _ in range(2)]
        np.testing.assert_array_equal(*found)
        return found[0]


@pytest.mark.usefixtures("fresh_choices")
@pytest.mark.parametrize(
    ("rows", "cache_dtype", "block_size"),
    [
        pytest.param(rows, dtype, size, marks=[pytest.mark.slow] * (i ^ j ^ k))
        for i, rows in enumerate((MIXED, DECODE))
        for j, dtype in enumerate(("bfloat16", FP8))
        for k, size in enumerate((128, 256))
    ],
    ids=lambda one: None if isinstance(one, int | str) else "decode" if one is DECODE else "mixed",
)
def test_the_choice_of_the_other_kernel(
    paddle_memory: KernelMemory,
    rows: list[tuple[int, int]],
    cache_dtype: str,
    block_size: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fd_dsa.attention.device_scores import PageScores, TileScores

    case = paddle_memory, rows, cache_dtype, block_size
    with asking_for({"indexer_logits": "triton"}):
        pages = Selection(*case)
        assert type(pages.backend.scores.kernels) is PageScores
        wanted = pages.select()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fd_dsa"):
        tiles = Selection(*case)
    kernels = tiles.backend.scores.kernels
    assert type(kernels) is TileScores
    (said,) = (text for text in caplog.messages if text.startswith("indexer_logits"))
    assert ": triton_tensor_core (a device, " in said and "not " not in said
    np.testing.assert_array_equal(tiles.select(), wanted)
    # all entries of a row with few of them, and no more
    counts = (wanted >= 0).sum(axis=1)
    ends = [before + i + 1 for before, new in rows for i in range(new)]
    assert counts.tolist() == [min(end // 4, TOPK) for end in ends] + [0] * PADDING
    # a graph is captured for rows of any length, and its launches read them
    monkeypatch.setattr(type(transfers_for(tiles.weights)), "is_capturing", lambda _: True)
    tiles.longest = 4 * (TOPK + 1)
    np.testing.assert_array_equal(tiles.select(), wanted)
    assert not kernels.is_captured


@pytest.mark.usefixtures("fresh_choices")
def test_chunks_of_a_long_step(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = paddle_memory, MIXED, "bfloat16", 128
    wanted = Selection(*case).select()
    # scores of seven tokens at a time
    monkeypatch.setattr("fd_dsa.attention.device_memory.LOGITS_BYTES", 7 * LONGEST)
    np.testing.assert_array_equal(Selection(*case).select(), wanted)


@pytest.mark.usefixtures("fresh_choices")
@pytest.mark.parametrize(
    ("cache_dtype", "block_size", "reason"),
    [
        ("float32", 128, "the cache is float32"),
        ("bfloat16", 64, "blocks of 16 keys, it reads 64 and 32"),
        (FP8, 512, "blocks of 128 keys"),
    ],
)
def test_sizes_that_the_other_kernel_serves(
    paddle_memory: KernelMemory,
    cache_dtype: str,
    block_size: int,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from fd_dsa.attention.device_scores import PageScores

    with caplog.at_level(logging.INFO, logger="fd_dsa"):
        made = Selection(paddle_memory, DECODE, cache_dtype, block_size)
    assert type(made.backend.scores.kernels) is PageScores
    (said,) = (text for text in caplog.messages if text.startswith("indexer_logits"))
    assert f"not triton_tensor_core: {reason}" in said


@pytest.mark.usefixtures("fresh_choices")
@pytest.mark.parametrize("cache_dtype", ["bfloat16", FP8, "float32"])
def test_bytes_of_the_plan(paddle_memory: KernelMemory, cache_dtype: str) -> None:
    """The plan counts the scores' buffers, of the schedule too."""
    from fd_dsa.v4_attention.device_memory import workspace_bytes

    taken: dict[str, int] = dict.fromkeys(("float32", "int32", "int64"), 0)

    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        taken[dtype] += int(np.prod(shape)) * np.dtype(dtype).itemsize
        return paddle_memory.poisoned(shape, dtype)

    made = Selection(paddle_memory, DECODE, cache_dtype, 128, allocate)
    layout = DeviceLayout(CONFIG, cache_dtype, 128, max_drafts=2)
    traits = transfers_for(made.weights).traits
    planned = workspace_bytes(layout, made.batch, "bfloat16", traits)
    assert planned == sum(taken.values())
