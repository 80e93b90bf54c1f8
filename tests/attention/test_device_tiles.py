"""Scores from tensor cores against those of the other kernel, and the chunks of both."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the steps are on Paddle's tensors")

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.cache_formats import CacheLayout
from fd_dsa.ops.key_bounds import PromptWindows, key_bounds, positions_to_slots, prompt_windows
from fd_dsa.ops.topk import select_positions
from fd_dsa.step import StepMetadataBuilder
from tests.kernel_memory import KernelMemory
from tests.strategies import make_batch

pytestmark = pytest.mark.triton

PADDING, TOPK, HEADS = 2, 64, 32
DIM, BLOCK = 128, 64
# e4m3 codes of 0, 1, 2, -1 and -2: dot products are exact in any order
SMALL = np.array([0x00, 0x38, 0x40, 0xB8, 0xC0], np.uint8)
# a first chunk below the selection of 64, decode with drafts and an idle row between chunks of
# prompts after a prefix
MIXED = [(2, 0, 2), (0, 140, 1), (3, 90, 3), (0, 0, 0), (0, 70, 2), (4, 66, 4)]
DECODE = [(0, 140, 1), (0, 0, 0), (0, 70, 2), (0, 20, 1), (0, 100, 3)]


class Device:
    """Stands for a device of two processors, whose stream is captured, or not."""

    capturing = False
    traits = SimpleNamespace(num_processors=2)

    def is_capturing(self) -> bool:
        return self.capturing


class Tiles:
    """A step over random fp8_ds_mla keys, scored with TileScores; poisoned scores and slots.

    Args:
        rows: (encoder, decoder, this_time) of each request.
        num_logits: scores that are held at a time.

    Attributes:
        shapes: of the scores that were asked for.
    """

    def __init__(
        self, m: KernelMemory, rows: list[Any], num_logits: int = 1 << 16, drafts: int = 0
    ) -> None:
        from fd_dsa.attention.device_scores import TileScores, tile_sizes

        num_tokens = sum(new for _, _, new in rows) + PADDING
        batch = make_batch(rows, BLOCK, num_padded_tokens=num_tokens)
        sizes = len(rows), num_tokens, batch.block_tables.shape[1]
        layout = CacheLayout("fp8_ds_mla", BLOCK, 512, 64, DIM)
        self.config = DSABackendConfig(
            64, HEADS, TOPK, 0.1, layout, *sizes, dtype="bfloat16", tokens_per_row=1 + drafts
        )
        self.m, self.device = m, Device()
        meta = StepMetadataBuilder(*sizes, BLOCK, device="numpy").build(*batch.inputs(), num_tokens)
        values = {field.name: getattr(meta, field.name) for field in fields(meta)}
        self.step = SimpleNamespace(
            **{k: m.put(np.array(v)) if hasattr(v, "shape") else v for k, v in values.items()}
        )
        rng = np.random.default_rng(0)
        scales = np.exp2(rng.integers(-2, 2, (batch.num_blocks, BLOCK))).astype(np.float32)
        codes = rng.choice(SMALL, (batch.num_blocks, BLOCK * DIM))
        keys = np.concatenate([codes, scales.view(np.uint8)], axis=1)
        weights = rng.integers(-2, 3, (num_tokens, HEADS)).astype(np.float32) / 2
        self.index_q = m.put(rng.choice(SMALL, (num_tokens, HEADS, DIM)))
        self.weights, self.keys = m.put(weights), m.put(keys.reshape(-1, BLOCK, DIM + 4))
        buffers = tile_sizes(self.config.indexer, num_logits, 2)
        buffers["logits"] = num_logits, (), "float32"
        self._buffers = {
            name: (m.poisoned((n * int(np.prod(shape)),), dtype), shape)
            for name, (n, shape, dtype) in buffers.items()
        }
        self.shapes: list[tuple[int, ...]] = []
        self.scores = TileScores(self.config.indexer, self.view, num_logits, self.device)
        self.max_width = BLOCK * sizes[2]

    def view(self, name: str, *counts: int) -> Any:
        if name == "logits":
            self.shapes.append(counts)
        from fd_dsa.device.allocation import buffer_view

        return buffer_view(self._buffers, name, *counts)

    def choose(
        self,
        logits: Any,
        positions: Any,
        batch: Any,
        tables: Any,
        slots: Any,
        *,
        block_size: int,
        num_blocks: int,
        windows: PromptWindows,
        first_token: int,
    ) -> None:
        """`select_slots` as the CPU does it; its kernel takes seconds when it is interpreted."""
        assert num_blocks == self.keys.shape[0]
        rows = slice(first_token, first_token + logits.shape[0])
        first, ends = self.bounds(positions, batch, windows)
        assert not first.any()
        batch, scores, k = self.m.get(batch)[rows], self.m.get(logits), slots.shape[1]
        lengths = np.minimum(ends[rows], scores.shape[1])
        chosen = select_positions(scores, lengths, k)
        # all keys of a short window, whatever their scores are
        column = np.arange(k)
        every = np.where(column < lengths[:, None], column, -1).astype(np.int32)
        chosen = np.where(lengths[:, None] <= k, every, chosen)
        slots[rows] = self.m.put(positions_to_slots(chosen, batch, self.m.get(tables), block_size))

    def bounds(self, positions: Any, batch: Any, windows: PromptWindows) -> Any:
        """`key_bounds` of tensors."""
        offsets, starts, encoder = (None if x is None else self.m.get(x) for x in windows)
        step: Any = SimpleNamespace(
            position_ids=self.m.get(positions),
            batch_id_per_token=self.m.get(batch),
            num_prefill_tokens=0 if offsets is None else encoder.sum(),
            indexer_attn_mask_offsets=offsets,
            cu_seqlens_kg=starts,
            seq_lens_encoder=encoder,
        )
        live = int((step.batch_id_per_token >= 0).sum())
        return [np.pad(bound, (0, PADDING)) for bound in key_bounds(step, live)]

    @property
    def whole(self) -> tuple[int, int]:
        """All tokens of the step."""
        return 0, self.config.max_num_tokens

    def select(
        self,
        scores: Any = None,
        prepare: bool = True,
        choose: Any = None,
        part: tuple[int, int] | None = None,
        **changes: Any,
    ) -> np.ndarray:
        """Return the slots that `choose` selects, in the step with `changes` of its fields."""
        scores, step = scores or self.scores, SimpleNamespace(**(vars(self.step) | changes))
        part = part or self.whole
        if prepare:
            scores.prepare(step, part)
        slots = self.m.poisoned((self.config.max_num_tokens, TOPK), "int32")

        def use(logits: Any, *, first_token: int) -> None:
            (choose or self.choose)(
                *(logits, step.position_ids, step.batch_id_per_token, step.block_tables, slots),
                block_size=BLOCK,
                num_blocks=self.keys.shape[0],
                windows=prompt_windows(step),
                first_token=first_token,
            )

        scores.compute(step, part, self.index_q, self.weights, self.keys, use)
        return self.m.get(slots)


@pytest.mark.parametrize(("rows", "drafts"), [(MIXED, 0), (DECODE, 2)], ids=["mixed", "decode"])
def test_the_choice_of_the_other_kernel(
    kernel_memory: KernelMemory, rows: list[Any], drafts: int
) -> None:
    from fd_dsa.attention.device_scores import PageScores
    from fd_dsa.ops.topk.custom_op import slot_selector

    tiles = Tiles(kernel_memory, rows, drafts=drafts)
    choose = slot_selector("gpu", kernel_memory.poisoned)
    wanted = tiles.select(PageScores(tiles.config.indexer, tiles.view, 1 << 12), choose=choose)
    # scores of small integers are the same in every order of sums
    np.testing.assert_array_equal(tiles.select(), wanted)
    # a schedule serves all layers
    np.testing.assert_array_equal(tiles.select(prepare=False), wanted)


def test_chunks_of_a_long_step(kernel_memory: KernelMemory) -> None:
    whole = Tiles(kernel_memory, MIXED)
    width = whole.max_width
    parts = Tiles(kernel_memory, MIXED, num_logits=4 * width + 1)
    np.testing.assert_array_equal(parts.select(), whole.select())
    assert (whole.shapes, parts.shapes) == ([(14, width)], [(4, width), (2, width)])


@pytest.mark.parametrize("chunk", [None, 3])
def test_parts_of_a_step_are_selected_as_in_the_whole(
    kernel_memory: KernelMemory, chunk: int | None
) -> None:
    whole = Tiles(kernel_memory, MIXED)
    wanted, tokens = whole.select(), whole.whole[1]
    num_logits = chunk * whole.max_width if chunk else 1 << 16
    tiles = Tiles(kernel_memory, MIXED, num_logits=num_logits)
    # within rows and between them, and a part without tokens
    bounds = [0, 2, 2, 4, 9, tokens]
    for begin, end in pairwise(bounds):
        found = tiles.select(part=(begin, end))
        np.testing.assert_array_equal(found[begin:end], wanted[begin:end])
        # rows of other parts keep their poison
        outside = np.delete(found, np.s_[begin:end], axis=0)
        assert (outside == outside.flat[0]).all() and outside.flat[0] < -1


def test_captured_scores_hold_the_longest_row(kernel_memory: KernelMemory) -> None:
    tiles = Tiles(kernel_memory, DECODE)
    wanted = tiles.select()
    # the capture believes in short rows; a replay reads what the device then has
    tiles.device.capturing = True
    np.testing.assert_array_equal(tiles.select(max_seqlen_k=65), wanted)
    # without a capture it is taken at its word
    tiles.device.capturing = False
    assert (tiles.select(max_seqlen_k=65)[0] != wanted[0]).any()


def test_replays_of_a_long_step_have_the_chunks_of_its_capture(
    kernel_memory: KernelMemory,
) -> None:
    whole = Tiles(kernel_memory, MIXED)
    wanted, width = whole.select(), whole.max_width
    tiles = Tiles(kernel_memory, MIXED, num_logits=4 * width)
    for _ in range(2):
        # the schedule is made outside of the graph, before its capture and before every replay
        step = SimpleNamespace(**(vars(tiles.step) | {"max_seqlen_k": 65}))
        tiles.scores.prepare(step, tiles.whole)
        tiles.device.capturing = True
        found = tiles.select(prepare=False, max_seqlen_k=65)
        tiles.device.capturing = False
    np.testing.assert_array_equal(found, wanted)
