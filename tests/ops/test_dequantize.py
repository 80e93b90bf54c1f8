"""Records of prompts as rows of 16-bit values: what is dequantized, where, and to which bits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernel_memory import KernelMemory
from tests.ops.e4m3 import E4M3_VALUES
from tests.ops.tensor_core_case import RANK, records

BLOCK, WIDTH = 16, 576
POISONED = 0xA5A5
# new tokens of prefill rows, tokens before, tokens of the step
Rows = list[tuple[int, int, int]]


def words(num_blocks: int, num_rows: int, capacity: int) -> int:
    """float32 numbers for so many blocks."""
    return -(-(num_blocks + num_rows) // 32) * 32 + capacity * BLOCK * WIDTH // 2


def expected(cache: np.ndarray) -> np.ndarray:
    """uint16 [..., 576]: bits of float16 latents and bfloat16 rope of records."""
    codes = E4M3_VALUES[cache[..., :RANK]].astype(np.float16) * np.float16(2**-8)
    scales = np.ascontiguousarray(cache[..., RANK : RANK + 16]).view(np.float32) * np.float32(256)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = np.repeat(scales.astype(np.float16), 128, axis=-1)
        latents = (codes * scales).view(np.uint16)
    rope = np.ascontiguousarray(cache[..., RANK + 16 :]).view(np.uint16)
    return np.concatenate([latents, rope], axis=-1)


class World:
    """A cache, and a step's rows in it."""

    def __init__(self, rows: Rows, *, spare: int = 3, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.rows = rows
        self.keys = [before + new for _, before, new in rows]
        self.counts = [-(-keys // BLOCK) for keys in self.keys]
        self.num_blocks = sum(self.counts) + spare
        self.cache = records(rng, self.num_blocks * BLOCK)[0].reshape(self.num_blocks, BLOCK, -1)
        self.tables = np.full((len(rows), max(self.counts, default=0) + 1), -1, np.int32)
        free = rng.permutation(self.num_blocks).astype(np.int32)
        for row, count in enumerate(self.counts):
            self.tables[row, :count], free = free[:count], free[count:]

    def fill(self, m: KernelMemory, capacity: int, keys_per_token: int = 1 << 20) -> Any:
        """Fill poisoned memory for some blocks and return it."""
        from fd_dsa.ops.mla.records import DequantizedRecords

        memory = m.poisoned((words(self.num_blocks, len(self.rows), capacity),), "float32")
        encoder, decoder, new = (np.array(x, np.int32) for x in zip(*self.rows, strict=True))
        step = {
            "block_tables": self.tables,
            "seq_lens_encoder": encoder,
            "seq_lens_decoder": decoder,
            "seq_lens_this_time": new,
            "batch_id_per_token": np.repeat(np.arange(len(self.rows), dtype=np.int32), new),
        }
        tensors: Any = SimpleNamespace(**{name: m.put(x) for name, x in step.items()})
        found = DequantizedRecords(memory, keys_per_token).fill(m.put(self.cache), tensors)
        if found is None:
            return None
        values = m.get(found.values).view(np.uint16).reshape(-1, BLOCK, WIDTH)
        blocks, flags = (m.get(x).view(np.int32) for x in (found.blocks, found.is_dequantized))
        assert found.num_slots == capacity * BLOCK == len(values) * BLOCK
        return values, blocks, flags.tolist()

    def check(self, found: Any, wanted: list[int]) -> None:
        """These rows, whole and nothing else, are where `blocks` says."""
        values, blocks, flags = found
        assert [row for row, flag in enumerate(flags) if flag] == wanted
        assert set(flags) <= {0, 1}
        bits, seen = expected(self.cache), np.zeros(values.shape[:2], bool)
        for row in wanted:
            for position in range(self.keys[row]):
                block = self.tables[row, position // BLOCK]
                place, offset = blocks[block], position % BLOCK
                np.testing.assert_array_equal(values[place, offset], bits[block, offset])
                seen[place, offset] = True
        assert seen.sum() == sum(self.keys[row] for row in wanted)
        assert (values[~seen] == POISONED).all()


def test_prefill_rows_alone(kernel_memory: KernelMemory) -> None:
    world = World([(5, 40, 5), (0, 33, 1), (0, 0, 0), (17, 0, 17), (0, 20, 3), (16, 16, 16)])
    world.check(world.fill(kernel_memory, 12), [0, 3, 5])


@pytest.mark.parametrize(
    ("capacity", "wanted"), [(1, [1]), (3, [0]), (4, [0, 1]), (5, [0, 1]), (7, [0, 1, 2])]
)
def test_rows_that_do_not_fit_are_left_out(
    kernel_memory: KernelMemory, capacity: int, wanted: list[int]
) -> None:
    # blocks: 3, 1, 3
    world = World([(48, 0, 48), (16, 0, 16), (3, 45, 3)])
    world.check(world.fill(kernel_memory, capacity), wanted)


@pytest.mark.parametrize(("keys_per_token", "wanted"), [(10, [0, 2]), (9, [2]), (1, [2])])
def test_few_tokens_of_a_long_row_are_not_worth_it(
    kernel_memory: KernelMemory, keys_per_token: int, wanted: list[int]
) -> None:
    world = World([(4, 36, 4), (2, 50, 2), (20, 0, 20)])
    world.check(world.fill(kernel_memory, 20, keys_per_token), wanted)


def test_more_blocks_than_programs(kernel_memory: KernelMemory) -> None:
    if not kernel_memory.large:
        pytest.skip("a size for a GPU")
    world = World([(9000, 0, 9000), (0, 100, 1), (5000, 33, 5000), (1, 0, 1)])
    world.check(world.fill(kernel_memory, 900), [0, 2, 3])


def test_no_room_at_all(kernel_memory: KernelMemory) -> None:
    assert World([(5, 0, 5)]).fill(kernel_memory, 0) is None


def test_entries_that_are_no_blocks_are_skipped(kernel_memory: KernelMemory) -> None:
    world = World([(48, 0, 48)])
    table = world.tables[0].copy()
    world.tables[0, :2] = [-1, world.num_blocks]
    values, blocks, flags = world.fill(kernel_memory, 3)
    assert flags == [1] and blocks[table[2]] == 2
    assert (values[:2] == POISONED).all()
    np.testing.assert_array_equal(values[2], expected(world.cache)[table[2]])


def test_rows_may_share_blocks(kernel_memory: KernelMemory) -> None:
    world = World([(16, 32, 16), (16, 32, 16)])
    world.tables[1, :2] = world.tables[0, :2]
    values, blocks, flags = world.fill(kernel_memory, 6)
    assert flags == [1, 1]
    bits = expected(world.cache)
    for block in np.unique(world.tables[:, :3]):
        np.testing.assert_array_equal(values[blocks[block]], bits[block])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_every_code_and_scales_at_the_ends_of_float16(kernel_memory: KernelMemory) -> None:
    world = World([(32, 0, 32)], spare=0)
    codes = np.tile(np.arange(256, dtype=np.uint8), 2)
    if not kernel_memory.on_gpu:
        # the interpreter takes the code of NaN for a number
        codes[(codes & 0x7F) == 0x7F] = 0
    world.cache[:, :, :RANK] = codes
    scales = np.array([2.0**-40, 1e-5, 3.3e-7, 1.0, 255.9, 257.0, 1e9, 0.0], np.float32)
    world.cache[:, :, RANK : RANK + 16] = np.resize(scales, (2, BLOCK, 4)).view(np.uint8)
    values, blocks, _ = world.fill(kernel_memory, 2)
    found = values[blocks[world.tables[0, :2]], :, :RANK].view(np.float16)
    wanted = expected(world.cache)[world.tables[0, :2], :, :RANK].view(np.float16)
    np.testing.assert_array_equal(found, wanted)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.tuples(st.booleans(), st.integers(0, 70), st.integers(0, 40)), min_size=1, max_size=9
    ),
    capacity=st.integers(1, 12),
    keys_per_token=st.integers(1, 8),
)
def test_any_rows(
    kernel_memory: KernelMemory,
    rows: list[tuple[bool, int, int]],
    capacity: int,
    keys_per_token: int,
) -> None:
    step = [(new * is_prefill, before, new) for is_prefill, before, new in rows]
    world, wanted, used = World(step), [], 0
    for row, (prefill, _, _) in enumerate(step):
        keys, count = world.keys[row], world.counts[row]
        if prefill and keys <= prefill * keys_per_token and count <= capacity:
            used += count
            if used <= capacity:
                wanted.append(row)
    world.check(world.fill(kernel_memory, capacity, keys_per_token), wanted)
