"""The schedule of query tiles: every page is some program's, none is two's, all work as long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernel_memory import KernelMemory, open_memory

pytestmark = pytest.mark.triton

# (cached, new) tokens of each row; a row of 0 new tokens is idle
Rows = list[tuple[int, int]]
PAGE = 64


@dataclass(frozen=True)
class Step:
    """Tokens of a step, padded at its end.

    Attributes:
        chunk_tokens: tokens of a chunk.
    """

    rows: Rows
    num_padded: int
    chunk_tokens: int

    @property
    def num_tokens(self) -> int:
        return sum(new for _, new in self.rows) + self.num_padded

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of a ForwardMeta that a schedule is made from."""
        new = [n for _, n in self.rows]
        padding = np.zeros(self.num_padded, np.int64)
        positions = [np.arange(cached, cached + n) for cached, n in self.rows]
        batch = np.repeat(np.arange(len(self.rows)), new)
        return {
            "position_ids": np.concatenate([*positions, padding]).astype(np.int64),
            "batch_id_per_token": np.concatenate([batch, padding - 1]).astype(np.int32),
            "cu_seqlens_q": np.cumsum([0, *new]).astype(np.int32),
        }

    def tiles(self, tile_tokens: int, max_keys: int, least: int) -> list[Any]:
        """Of each chunk, the tiles by a loop over tokens: (token, number, request, pages)."""
        positions, batch, _ = self.arrays().values()
        found = []
        for first in range(0, self.num_tokens, self.chunk_tokens):
            end, token, tiles = min(first + self.chunk_tokens, self.num_tokens), first, []
            while token < end:
                stop = token + 1
                while stop < min(token + tile_tokens, end) and batch[stop] == batch[token]:
                    stop += 1
                keys = min(int(positions[stop - 1]) + 1, max_keys)
                if batch[token] >= 0 and keys > least:
                    pages = -(-keys // PAGE)
                    tiles.append((token, stop - token, int(batch[token]), pages))
                token = stop if batch[token] >= 0 else token + 1
            found.append(tiles)
        return found


def fill(
    m: KernelMemory, step: Step, num_programs: int, tile_tokens: int = 2,
    max_keys: int = 1 << 21, least: int = 0,
) -> Any:  # fmt: skip
    """The schedule of a step, as NumPy arrays; poison where nothing was written."""
    from fd_dsa.ops.logits.tile_configs import TileConfig
    from fd_dsa.ops.logits.tile_schedule import TileSchedule

    num_chunks, first = -(-step.num_tokens // step.chunk_tokens), -(-tile_tokens // 2)
    sizes = max(step.num_tokens, 1), max(num_chunks, 1), num_programs
    schedule = TileSchedule.allocate(TileConfig(first, tile_tokens - first), *sizes, m.poisoned)
    arrays = {name: m.put(x) for name, x in step.arrays().items()}
    tensors: Any = SimpleNamespace(**arrays, num_prefill_tokens=0)
    schedule.fill(tensors, max_keys, step.chunk_tokens, least)
    return replace(schedule, tiles=m.get(schedule.tiles), programs=m.get(schedule.programs))


def check(found: Any, wanted: list[Any], chunk_tokens: int, num_programs: int) -> None:
    """Every tile of a loop is there, and work is shared out evenly: pages, and to begin a tile."""
    for chunk, tiles in enumerate(wanted):
        first = chunk * chunk_tokens
        held = found.tiles[first : first + len(tiles)]
        assert list(map(tuple, held.tolist())) == tiles
        begins = [-1] * found.config.begin_pages
        work = [(i, page) for i, tile in enumerate(tiles) for page in (*begins, *range(tile[3]))]
        least, more = divmod(len(work), num_programs)
        for program, row in enumerate(found.programs[chunk].tolist()):
            tile, page, count, _, *entry = row
            tile -= first
            if count:
                assert tuple(entry) == tiles[tile]
            taken = []
            for _ in range(count):
                taken.append((tile, page))
                tile, page = (tile + 1, 0) if page + 1 == tiles[tile][3] else (tile, page + 1)
            begin = program * least + min(program, more)
            own = work[begin : begin + least + (program < more)]
            assert taken == [pair for pair in own if pair[1] >= 0]


ROWS = st.lists(
    st.tuples(st.one_of(st.integers(0, 300), st.integers(0, 1 << 20)), st.integers(0, 9)),
    min_size=1,
    max_size=12,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=ROWS,
    num_padded=st.integers(0, 3),
    chunk=st.integers(1, 40),
    num_programs=st.integers(1, 40),
    tile_tokens=st.integers(1, 4),
    least=st.sampled_from([0, 64, 2048]),
)
def test_every_page_is_taken_once(
    rows: Rows,
    num_padded: int,
    chunk: int,
    num_programs: int,
    tile_tokens: int,
    least: int,
) -> None:
    # long histories would make lists of millions of pages
    rows = [(min(cached, 40_000 // len(rows)), new) for cached, new in rows]
    step = Step(rows, num_padded, chunk)
    if step.num_tokens == 0:
        return
    m = open_memory("interpreter")
    found = fill(m, step, num_programs, tile_tokens, least=least)
    wanted = step.tiles(tile_tokens, 1 << 21, least)
    check(found, wanted, chunk, num_programs)


def test_a_million_keys(kernel_memory: KernelMemory) -> None:
    step = Step([(1 << 20, 1), (3, 1), ((1 << 20) - 1, 2)], 0, 4)
    found = fill(kernel_memory, step, 132 * 4)
    check(found, step.tiles(2, 1 << 21, 0), 4, 132 * 4)


def test_more_tokens_and_programs_than_lanes(kernel_memory: KernelMemory) -> None:
    step = Step([(5, 1030), (4000, 7)], 2, 2000)
    found = fill(kernel_memory, step, 1100, 4)
    check(found, step.tiles(4, 1 << 21, 0), 2000, 1100)


def test_the_width_of_the_scores_bounds_the_pages(kernel_memory: KernelMemory) -> None:
    step = Step([(1000, 3)], 0, 3)
    found = fill(kernel_memory, step, 2, 4, max_keys=200)
    check(found, step.tiles(4, 200, 0), 3, 2)
    assert found.tiles[0].tolist() == [0, 3, 0, 4]


def test_a_step_that_scores_nothing(kernel_memory: KernelMemory) -> None:
    found = fill(kernel_memory, Step([(100, 1), (0, 0)], 3, 4), 5, least=128)
    assert found.programs[0, :, 2].tolist() == [0] * 5


def test_no_tokens_is_no_launch(kernel_memory: KernelMemory) -> None:
    programs = fill(kernel_memory, Step([], 0, 1), 3).programs
    assert programs.size and (programs == programs.flat[0]).all()
