"""The selection by scores from tensor cores against that of the other kernel, and its sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the steps are on Paddle's tensors")

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.ops.topk.paddle_impl import positions_to_slots, select_positions
from tests.attention.score_case import BLOCK, ScoreCase
from tests.kernel_memory import KernelMemory

pytestmark = pytest.mark.triton

# a first chunk below the selection of 64, decode with drafts and an idle row between chunks of
# prompts after a prefix
MIXED = [(2, 0, 2), (0, 140, 1), (3, 90, 3), (0, 0, 0), (0, 70, 2), (4, 66, 4)]
DECODE = [(0, 140, 1), (0, 0, 0), (0, 70, 2), (0, 20, 1), (0, 100, 3)]


class Device:
    """Stands for a device of some processors, whose stream is captured, or not."""

    def __init__(self, processors: int) -> None:
        self.processors, self.capturing = processors, False

    def num_processors(self) -> int:
        return self.processors

    def is_capturing(self) -> bool:
        return self.capturing


class Tiles:
    """A case that is scored with TileScores; poisoned scores and slots.

    Attributes:
        shapes: of the scores that were asked for; they are kept.
    """

    def __init__(
        self,
        m: KernelMemory,
        rows: list[Any],
        num_logits: int = 1 << 16,
        drafts: int = 0,
        device: Any = None,
    ) -> None:
        from fd_dsa.attention.device_tiles import TileScores
        from fd_dsa.triton_runtime.transfers import transfers_for

        self.m, self.case = m, ScoreCase(m, rows)
        self.config = self.case.config
        self._buffer = m.poisoned((num_logits,), "float32")
        self.shapes: list[tuple[int, int]] = []

        def view(name: str, *shape: int) -> Any:
            assert name == "logits"
            self.shapes.append(shape)
            return self._buffer[: shape[0] * shape[1]].reshape(list(shape))

        device = device or transfers_for(self._buffer)
        self.scores = TileScores(
            self.config, m.poisoned, view, num_logits, self.choose, device, 1 + drafts
        )

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
        first_token: int,
    ) -> None:
        """`select_slots` as the CPU does it; its kernel takes seconds when it is interpreted."""
        assert num_blocks == self.case.keys.shape[0]
        rows = slice(first_token, first_token + logits.shape[0])
        batch, scores, k = self.m.get(batch)[rows], self.m.get(logits), slots.shape[1]
        lengths = np.where(batch < 0, 0, self.m.get(positions)[rows] + 1)
        lengths = np.minimum(lengths, scores.shape[1])
        chosen = select_positions(scores, lengths, k)
        # all keys of a short window, whatever their scores are
        column = np.arange(k)
        every = np.where(column < lengths[:, None], column, -1).astype(np.int32)
        chosen = np.where(lengths[:, None] <= k, every, chosen)
        slots[rows] = self.m.put(positions_to_slots(chosen, batch, self.m.get(tables), block_size))

    def select(self, step: Any = None, prepare: bool = True) -> np.ndarray:
        """The slots of a step, or of the case's own."""
        case = self.case
        step = step or case.step
        if prepare:
            self.scores.prepare(step)
        tokens = step.position_ids.shape[0]
        slots = self.m.poisoned((tokens, self.config.index_topk), "int32")
        self.scores.select(step, case.index_q, case.weights, case.keys, slots)
        return self.m.get(slots)


@pytest.mark.parametrize(("rows", "drafts"), [(MIXED, 0), (DECODE, 2)], ids=["mixed", "decode"])
def test_the_choice_of_the_other_kernel(
    kernel_memory: KernelMemory, rows: list[Any], drafts: int
) -> None:
    from fd_dsa.attention.device_logits import PageScores
    from fd_dsa.ops.topk.custom_op import slot_selector

    tiles = Tiles(kernel_memory, rows, drafts=drafts)
    case, num_logits = tiles.case, 1 << 12
    logits = kernel_memory.poisoned((num_logits,), "float32")
    pages = PageScores(
        case.config,
        lambda name, *shape: logits[: shape[0] * shape[1]].reshape(list(shape)),
        num_logits,
        slot_selector("gpu", kernel_memory.poisoned),
    )
    wanted = kernel_memory.poisoned((case.config.max_num_tokens, 64), "int32")
    pages.prepare(case.step)
    pages.select(case.step, case.index_q, case.weights, case.keys, wanted)
    # scores of small integers are the same in every order of sums
    np.testing.assert_array_equal(tiles.select(), kernel_memory.get(wanted))


def test_chunks_of_a_long_step(kernel_memory: KernelMemory) -> None:
    whole = Tiles(kernel_memory, MIXED)
    width = whole.scores._max_width
    parts = Tiles(kernel_memory, MIXED, num_logits=4 * width + 1)
    np.testing.assert_array_equal(parts.select(), whole.select())
    assert (whole.shapes, parts.shapes) == ([(14, width)], [(4, width), (2, width)])


def test_a_schedule_serves_all_layers(kernel_memory: KernelMemory) -> None:
    tiles = Tiles(kernel_memory, DECODE)
    first = tiles.select()
    np.testing.assert_array_equal(tiles.select(prepare=False), first)


def test_captured_scores_hold_the_longest_row(kernel_memory: KernelMemory) -> None:
    m, device = kernel_memory, Device(2)
    tiles = Tiles(m, DECODE, device=device)
    wanted = tiles.select()
    # the capture believes in short rows; a replay reads what the device then has
    step = tiles.case.step
    captured = type(step)(**vars(step))
    captured.max_seqlen_k = 65
    device.capturing = True
    np.testing.assert_array_equal(tiles.select(captured), wanted)
    # without a capture it is taken at its word
    device.capturing = False
    assert (tiles.select(captured)[0] != wanted[0]).any()
    assert (m.get(tiles.scores._schedules[0].programs) != 0).any()


def test_replays_of_a_long_step_have_the_chunks_of_its_capture(
    kernel_memory: KernelMemory,
) -> None:
    whole, device = Tiles(kernel_memory, MIXED), Device(2)
    wanted, width = whole.select(), whole.scores._max_width
    tiles = Tiles(kernel_memory, MIXED, num_logits=4 * width, device=device)
    step = type(tiles.case.step)(**vars(tiles.case.step))
    step.max_seqlen_k = 65
    # the schedule is made outside of the graph, before its capture and before every replay
    tiles.scores.prepare(step)
    device.capturing = True
    tiles.select(step, prepare=False)
    device.capturing = False
    tiles.scores.prepare(step)
    device.capturing = True
    np.testing.assert_array_equal(tiles.select(step, prepare=False), wanted)


def config(**changes: Any) -> DSABackendConfig:
    from fd_dsa.attention.cache_layout import CacheLayout

    sizes = {
        "num_heads": 64,
        "index_n_heads": 32,
        "index_topk": 64,
        "softmax_scale": 0.1,
        "cache_layout": CacheLayout("fp8_ds_mla", BLOCK, 512, 64, 128),
        "max_num_seqs": 4,
        "max_num_tokens": 100,
        "max_blocks_per_seq": 10,
    }
    return DSABackendConfig(**(sizes | changes))


def test_reasons_against_a_configuration() -> None:
    from fd_dsa.attention.cache_layout import CacheLayout
    from fd_dsa.attention.device_tiles import reason_against

    assert reason_against(config()) is None
    assert "float32" in str(
        reason_against(config(cache_layout=CacheLayout("float32", BLOCK, 512, 64, 128)))
    )
    assert "129 index heads" in str(reason_against(config(index_n_heads=129)))


@pytest.mark.parametrize("num_logits", [640, 64_000, 640_000])
@pytest.mark.parametrize("heads", [16, 32, 64])
def test_bytes_are_those_that_are_allocated(num_logits: int, heads: int) -> None:
    from fd_dsa.attention.device_tiles import TileScores, tile_bytes

    total = 0

    def allocate(shape: tuple[int, ...], dtype: str) -> np.ndarray:
        nonlocal total
        assert dtype == "int32"
        total += 4 * int(np.prod(shape))
        return np.empty(shape, np.int32)

    sizes = replace(config(), index_n_heads=heads)
    TileScores(sizes, allocate, None, num_logits, None, Device(132))
    assert total == tile_bytes(sizes, num_logits, 132)
