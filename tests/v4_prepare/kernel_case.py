"""What the kernel tests share: configurations, random steps, a device that is stepped by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fd_dsa.triton_runtime.transfers import transfers_for
from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4Arrays, V4PrepareConfig
from fd_dsa.v4_prepare.launch import ExpandLaunch, ExpandTiles
from fd_dsa.v4_prepare.slab import (
    ERROR_SLOTS,
    ERROR_WORDS,
    HEADER_WORDS,
    section_words,
    slab_words,
)
from tests.kernel_memory import POISON, KernelMemory
from tests.reference.v4_prepare import naive

V4_SIZES = {
    "window_size": 128,
    "block_size": 128,
    "csa_ratio": 4,
    "hca_ratio": 128,
    "index_topk": 512,
}
"""What DeepSeek-V4-Flash has."""


def serving_config(
    num_rows: int, max_model_len: int, spec_tokens: int, **changes: Any
) -> V4PrepareConfig:
    """A decode builder of real sizes with blocks for all rows at full length."""
    columns = -(-max_model_len // V4_SIZES["block_size"])
    sizes = {
        "spec_tokens": spec_tokens,
        "num_slots": num_rows,
        "num_blocks": num_rows * columns,
        "max_blocks_per_seq": columns,
        "max_num_seqs": num_rows,
        "max_num_tokens": num_rows * (spec_tokens + 1),
        "max_tokens_per_seq": spec_tokens + 1,
        "max_model_len": max_model_len,
    }
    return V4PrepareConfig(**(V4_SIZES | sizes | changes))


_SMALL = V4PrepareConfig(
    window_size=8,
    spec_tokens=1,
    block_size=16,
    csa_ratio=4,
    hca_ratio=16,
    index_topk=3,
    num_slots=6,
    num_blocks=64,
    max_blocks_per_seq=6,
    max_num_seqs=4,
    max_num_tokens=44,
    max_tokens_per_seq=40,
    max_model_len=96,
)
CONFIGS = {
    "ring": _SMALL,
    "decode": replace(_SMALL, spec_tokens=3, max_tokens_per_seq=4, max_num_tokens=16),
    # a window that is no power of two, four entries of either kind in a block
    "paged": replace(
        _SMALL,
        swa="paged",
        window_size=6,
        spec_tokens=2,
        csa_ratio=2,
        hca_ratio=4,
        index_topk=7,
        comp_base=0,
        max_num_seqs=3,
        max_num_tokens=24,
        max_tokens_per_seq=20,
    ),
    "odd ratios": replace(
        _SMALL,
        window_size=5,
        spec_tokens=0,
        block_size=30,
        csa_ratio=3,
        hca_ratio=10,
        comp_base=7,
        max_blocks_per_seq=4,
        max_num_tokens=21,
    ),
    "table": replace(_SMALL, hca_mode="table", max_num_tokens=20, max_tokens_per_seq=9),
}


_POISON = np.frombuffer(bytes([POISON]) * 4, np.int32)[0]


@dataclass
class Step:
    """Inputs of one step: ctx, q and slot [B], block table [B, MB] with -1 in unused cells."""

    ctx: np.ndarray
    q: np.ndarray
    slot: np.ndarray
    table: np.ndarray

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The inputs in the order of all builders."""
        return self.ctx, self.q, self.slot, self.table


def make_step(
    cfg: V4PrepareConfig, rows: Sequence[tuple[int, int]], rng: np.random.Generator
) -> Step:
    """A step of rows (tokens before, tokens in this step) with random slots and blocks.

    Rows are cut where the capacities of the configuration end.
    """
    ctx, q, left = [], [], cfg.max_num_tokens
    for before, new in rows[: cfg.max_num_seqs]:
        num_new = min(new, left, cfg.max_tokens_per_seq, cfg.max_model_len)
        q.append(num_new)
        ctx.append(min(before, cfg.max_model_len - num_new) + num_new)
        left -= num_new
    num_rows = len(q)
    table = np.full((num_rows, cfg.max_blocks_per_seq), -1, np.int32)
    for row, length in enumerate(ctx):
        used = -(-length // cfg.block_size)
        table[row, :used] = rng.integers(0, cfg.num_blocks, used)
    slots = rng.permutation(cfg.num_slots)[:num_rows]
    return Step(*(np.array(x, np.int32) for x in (ctx, q, slots)), table)


class DeviceStepper:
    """Steps on a device without `V4Prepare`: slabs of garbage, outputs and table of poison.

    Args:
        memory: where the kernel runs.
        cfg: sizes of the steps.
        tiles: another cut into programs.
        send_all: send all cells of a row in every step, not those that changed.
    """

    def __init__(
        self,
        memory: KernelMemory,
        cfg: V4PrepareConfig,
        tiles: ExpandTiles | None = None,
        send_all: bool = False,
    ) -> None:
        self.memory, self.cfg, self._send_all = memory, cfg, send_all
        self.num_words = slab_words(cfg)
        self.buffers = V4Arrays(cfg, memory.poisoned)
        self.slabs = memory.poisoned((2, self.num_words), "int32")
        transfers, num_bytes = transfers_for(self.slabs), 4 * self.num_words
        words = transfers.host_buffer(4 * ERROR_SLOTS * ERROR_WORDS).view(np.int32)
        self.errors = words.reshape(ERROR_SLOTS, ERROR_WORDS)
        self._host = transfers.host_buffer(num_bytes).view(np.int32)
        start = self.slabs.data_ptr()
        self._copies = [
            transfers.upload(start + index * num_bytes, self._host, None) for index in range(2)
        ]
        self.launch = ExpandLaunch(self.buffers, self.slabs, self.errors, tiles)
        # cells that the device's table holds; -2 = it does not have them
        self.mirror = np.full((cfg.max_num_seqs, cfg.max_blocks_per_seq), -2, np.int32)
        self.stamp = 0
        self._longest_list = 0

    def write(self, step: Step, slab: int | None = None) -> int:
        """Put a step into slab 0 or 1, by default in turn; where it starts."""
        self.stamp += 1
        slab = self.stamp % 2 if slab is None else slab
        self._host[:] = self.fill(step)
        self._copies[slab].queue(self._host.nbytes)
        self.memory.sync()
        return slab * self.num_words

    def fill(self, step: Step) -> np.ndarray:
        """The words of a step; what no launch may read is garbage."""
        slab = np.full(self.num_words, 0x5A5A5A5A, np.int32)
        slab[:4] = self.stamp, len(step.ctx), step.q.sum(), 0
        rows, section = self.cfg.max_num_seqs, section_words(self.cfg)
        ends = HEADER_WORDS + 5 * section
        ctx, q, slot, run_column, run_start = slab[HEADER_WORDS:ends].reshape(5, section)
        values = slab[ends:]
        for words, given, empty in ((ctx, step.ctx, 0), (q, step.q, 0), (slot, step.slot, -1)):
            words[:rows] = empty
            words[: len(given)] = given
        run_column[:rows] = end = 0
        for row in range(rows):
            run_start[row] = end
            if row < len(step.ctx):
                run_column[row], cells = self._run(step, row)
                values[end : end + len(cells)] = cells
                end += len(cells)
        run_start[rows] = end
        return slab

    def _run(self, step: Step, row: int) -> tuple[int, np.ndarray]:
        """First column and cells of the run that a row sends."""
        cells = step.table[row][: -(-int(step.ctx[row]) // self.cfg.block_size)]
        held = self.mirror[row, : len(cells)]
        changed = np.arange(len(cells)) if self._send_all else np.flatnonzero(held != cells)
        if not len(changed):
            return 0, cells[:0]
        first, end = int(changed[0]), int(changed[-1]) + 1
        self.mirror[row, first:end] = cells[first:end]
        return first, cells[first:end]

    def run(self, step: Step, rollback: Any = None) -> dict[str, np.ndarray]:
        """Launch a step; all outputs by name. `rollback` is a NumPy array or None."""
        given = None if rollback is None else self.memory.put(np.asarray(rollback, np.int32))
        self.launch(self.write(step), given)
        return self.outputs()

    def outputs(self) -> dict[str, np.ndarray]:
        """Copies of all outputs; the HCA list is cut to its length."""
        found = outputs_of(self.buffers, self.memory.get)
        self._longest_list = max(self._longest_list, len(found.get("hca_idx", ())))
        return found

    def assert_nothing_else(self) -> None:
        """Of the table the cells that were sent were written, of the HCA list those of a step."""
        wanted = np.where(self.mirror == -2, _POISON, self.mirror)
        np.testing.assert_array_equal(self.memory.get(self.buffers.block_table), wanted)
        if self.buffers.hca_idx is not None:
            assert (self.memory.get(self.buffers.hca_idx)[self._longest_list :] == _POISON).all()


def expected(
    cfg: V4PrepareConfig, step: Step, rollback: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The oracle's outputs; rows that no rollback allows are padding in the middle."""
    ctx, q = step.ctx.astype(np.int64), step.q.copy()
    if rollback is not None:
        back = np.where(q > 0, np.resize(rollback, len(q)), 0).astype(np.int64)
        bad = (back < 0) | (ctx - back < q)
        ctx, q = np.where(bad, 0, ctx - back), np.where(bad, 0, q)
    found = naive(cfg, ctx, q, step.slot, step.table)
    return found if (q == step.q).all() else _with_gaps(cfg, found, step.q, q)


def _with_gaps(
    cfg: V4PrepareConfig, found: dict[str, np.ndarray], q: np.ndarray, kept: np.ndarray
) -> dict[str, np.ndarray]:
    """The outputs of a step of `kept` tokens, moved to their places in a step of `q` tokens."""
    is_kept = np.repeat(kept > 0, q)
    places, num_kept = np.flatnonzero(is_kept), int(kept.sum())
    moved = {name: array.copy() for name, array in found.items()}
    per_token = ("positions", "req_of_token", "win_idx", "win_len", "ext_len", "swa_write")
    for name in (*per_token, "csa_visible"):
        moved[name][: len(is_kept)] = _padding(name)
        moved[name][places] = found[name][:num_kept]
    for name in ("hca_indptr", "csa_indptr"):
        counts = np.zeros(cfg.max_num_tokens, np.int32)
        counts[places] = np.diff(found[name])[:num_kept]
        moved[name][1:] = np.cumsum(counts)
    for name in ("plan_r1", "wplan_r1", "plan_r2", "wplan_r2"):
        tokens = found[name][:, 0]
        moved[name][:, 0] = np.where(tokens < 0, -1, np.append(places, -1)[tokens])
    moved["cu_q"][1 : len(q) + 1] = np.cumsum(q)
    moved["cu_q"][len(q) :] = q.sum()
    moved["counts"][1] = q.sum()
    return moved


def _padding(name: str) -> int:
    """What a token that is none has in an output."""
    return -1 if name in ("req_of_token", "win_idx", "swa_write") else 0


def outputs_of(out: V4Arrays, get: Callable[[Any], np.ndarray] = np.copy) -> dict[str, np.ndarray]:
    """Copies of all outputs that mean something, by name."""
    found = {name: get(getattr(out, name)) for name in OUTPUT_SHAPES(out.config)}
    if "hca_idx" in found:
        found["hca_idx"] = found["hca_idx"][: found["counts"][2]]
    return found


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """All outputs are equal, in dtype, shape and value; the oracle has a list in table mode too."""
    assert set(found) | {"hca_idx"} == set(wanted)
    for name, array in found.items():
        assert array.dtype == np.int32, name
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
