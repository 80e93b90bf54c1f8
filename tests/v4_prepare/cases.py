"""Parts of all tests of V4 steps: configurations, steps, the oracle's outputs, and places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4Arrays, V4Prepare, V4PrepareConfig
from tests.kernel_memory import POISON, open_memory
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


def rejected_drafts(step: Step, most: int, rng: np.random.Generator) -> np.ndarray:
    """int32 [B], a rollback that every row can have."""
    return rng.integers(0, most + 1, len(step.q)).clip(max=step.ctx - step.q).astype(np.int32)


def expected(cfg: V4PrepareConfig, step: Step, rollback: Any = None) -> dict[str, np.ndarray]:
    """The oracle's outputs; rows that no rollback allows are padding in the middle."""
    ctx, q = step.ctx.astype(np.int64), step.q.copy()
    if rollback is not None:
        back = np.zeros(len(q), np.int64)
        back[: len(rollback)] = rollback[: len(q)]
        back[q == 0] = 0
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
    pads = {"positions": 0, "req_of_token": -1, "win_idx": -1, "win_len": 0, "ext_len": 0}
    for name, pad in (pads | {"swa_write": -1, "csa_visible": 0}).items():
        moved[name][: len(is_kept)] = pad
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


POISON_WORD = int(np.frombuffer(bytes([POISON]) * 4, np.int32)[0])
PLACES = [
    "numpy",
    "cpu",
    pytest.param("interpreter", marks=pytest.mark.triton),
    pytest.param("torch", marks=pytest.mark.gpu),
    pytest.param("rig", marks=pytest.mark.gpu_rig),
]
DEVICES = PLACES[2:]


class Place:
    """Place of the outputs of `V4Prepare`. A missing place skips the test.

    Attributes:
        is_host: whether it is host memory, whose builder launches no kernel.
        large: True on a GPU.
    """

    def __init__(self, name: str) -> None:
        self.name, self.is_host = name, name in ("numpy", "cpu")
        self._memory = None if self.is_host else open_memory(name)
        self.large = bool(self._memory and self._memory.large)
        if name == "cpu":
            pytest.importorskip("paddle")

    def new(self, cfg: V4PrepareConfig) -> V4Prepare:
        """A builder there, in memory that was poisoned before its empty first step."""
        if self._memory is None:
            return V4Prepare(cfg, self.name)
        return V4Prepare(cfg, self.name, self._memory.poisoned)

    def prepare(self, cfg: V4PrepareConfig) -> V4Prepare:
        """A builder there. On a device what it writes, and the slabs it reads, are poisoned."""
        prepare = self.new(cfg)
        if self._memory is not None:
            self._memory.sync()
            for slab in prepare.steps.staging.host:
                slab.fill(POISON_WORD)
            for name in (*OUTPUT_SHAPES(cfg), "block_table"):
                tensor = getattr(prepare.buffers, name)
                tensor.copy_(self._memory.poisoned(tuple(tensor.shape), "int32"), False)
        return prepare

    def put(self, array: np.ndarray) -> Any:
        """An array of the place with the values of a NumPy array."""
        if self._memory is not None:
            return self._memory.put(array)
        if self.name == "numpy":
            return array.copy()
        import paddle

        return paddle.to_tensor(array)

    def get(self, array: Any) -> np.ndarray:
        """The values of an array of the place, a copy."""
        if self._memory is not None:
            return self._memory.get(array)
        return np.array(array if self.name == "numpy" else array.numpy())

    def address(self, array: Any) -> int:
        """Return the address of an array."""
        return array.ctypes.data if self.name == "numpy" else array.data_ptr()

    def outputs(self, prepare: V4Prepare) -> dict[str, np.ndarray]:
        """Copies of all outputs that mean something, by name."""
        return outputs_of(prepare.buffers, self.get)

    def run(self, prepare: V4Prepare, step: Step, rollback: Any = None) -> dict[str, np.ndarray]:
        """Stage and expand a step; all outputs by name."""
        prepare.stage(*step.arrays())
        given = None if rollback is None else self.put(np.asarray(rollback, np.int32))
        prepare.expand(given)
        return self.outputs(prepare)

    def assert_nothing_else(self, prepare: V4Prepare, *steps: Step) -> None:
        """Of the poisoned table the cells that were sent were written, of the list those listed."""
        cfg, longest = prepare.cfg, 0
        table = np.full((cfg.max_num_seqs, cfg.max_blocks_per_seq), POISON_WORD)
        for step in steps:
            for row in np.flatnonzero(step.q):
                used = -(-int(step.ctx[row]) // cfg.block_size)
                table[row, :used] = step.table[row, :used]
            longest = max(longest, naive(cfg, *step.arrays())["counts"][2])
        np.testing.assert_array_equal(self.get(prepare.buffers.block_table), table)
        if prepare.buffers.hca_idx is not None:
            assert (self.get(prepare.buffers.hca_idx)[longest:] == POISON_WORD).all()
