"""Steps that differ from the last one in `ctx` alone: the short check says what the full one does.

The full one is that of a second builder, which gets everything as lists and no appended blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4Prepare, V4PrepareConfig, V4PrepareError
from fd_dsa.v4_prepare.checks import RowChecks, rows_have_room
from fd_dsa.v4_prepare.steady import SteadyCheck
from fd_dsa.v4_prepare.table import TableMirror
from tests.v4_prepare.places import assert_step

SIZES: dict[str, Any] = dict(
    window_size=3,
    spec_tokens=1,
    block_size=4,
    csa_ratio=2,
    hca_ratio=4,
    index_topk=2,
    num_slots=4,
    num_blocks=30,
    max_blocks_per_seq=6,
    max_num_seqs=3,
    max_num_tokens=8,
    max_tokens_per_seq=4,
    max_model_len=22,
)
CFG = V4PrepareConfig(**SIZES)
INT32 = 2**31
EXTREMES = [-INT32, -INT32 + 1, -INT32 + 4, -4, -1, INT32 - 5, INT32 - 4, INT32 - 1]


def outputs(prepare: V4Prepare) -> dict[str, np.ndarray]:
    """The outputs of the step that was expanded last."""
    found = {name: getattr(prepare.buffers, name) for name in OUTPUT_SHAPES(prepare.cfg)}
    return found | {"hca_idx": found["hca_idx"][: found["counts"][2]]}


def verdict(call: Any, *arguments: Any) -> str:
    """The text of the error that a call raises, or ""."""
    try:
        call(*arguments)
    except (V4PrepareError, ValueError) as error:
        return str(error)
    return ""


def some_rows(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """q and slot, mostly good ones."""
    q, slot = rng.choice([0, 1, 1, 2, 4], num_rows), rng.permutation(4)[:num_rows]
    if num_rows and rng.random() < 0.3:
        q[rng.integers(num_rows)] = rng.choice([-1, 5, INT32 - 1])
    if num_rows and rng.random() < 0.3:
        slot[rng.integers(num_rows)] = rng.choice([-1, 4, slot[0], INT32 - 1])
    return q.astype(np.int32), slot.astype(np.int32)


def contexts(rng: np.random.Generator, q: np.ndarray) -> np.ndarray:
    """Contexts around the bounds of rows, and some from the ends of int32."""
    ctx = np.maximum(q, 0) + rng.integers(0, rng.choice([2, 12, 24]), len(q))
    if len(q) and rng.random() < 0.4:
        row = rng.integers(len(q))
        ctx[row] = rng.choice([q[row] - 1, 22, 23, *EXTREMES])
    return ctx.astype(np.int32)


class Twins:
    """A builder that gets arrays, and one that gets lists; they must agree on everything."""

    def __init__(self) -> None:
        self.ours, self.full = V4Prepare(CFG, "numpy"), V4Prepare(CFG, "numpy")
        self.blocks: list[int] = [0, 0, 0]

    def stage(self, *arrays: np.ndarray) -> None:
        found = verdict(self.ours.stage, *arrays)
        assert found == verdict(self.full.stage, *(array.tolist() for array in arrays))
        if not found:
            self.ours.expand()
            self.full.expand()
            assert_step(outputs(self.ours), outputs(self.full))
            if len(arrays) == 4:
                ctx, q = arrays[:2]
                for row in np.flatnonzero(q > 0):
                    self.blocks[row] = -(-int(ctx[row]) // CFG.block_size)

    def set_blocks(self, row: int, ids: list[int], start: int) -> None:
        found = verdict(self.ours.set_blocks, row, ids, start)
        assert found == verdict(self.full.set_blocks, row, ids, start)
        if not found:
            self.blocks[row] = start + len(ids)

    def append_blocks(self, rows: np.ndarray, ids: np.ndarray) -> None:
        """One call on one side; on the other side one for each row, of which all must be good."""
        found = verdict(self.ours.append_blocks, rows, ids)
        if found:
            return
        assert len(set(rows.tolist())) == len(rows)
        for row, block in zip(rows.tolist(), ids.tolist(), strict=True):
            self.full.set_blocks(row, [block], self.blocks[row])
            self.blocks[row] += 1


@settings(max_examples=150)
@given(seed=st.integers(0, 1 << 30), dtype=st.sampled_from(["int32"] * 3 + ["int64", "uint32"]))
def test_arrays_are_checked_as_lists_are(seed: int, dtype: str) -> None:
    rng, twins = np.random.default_rng(seed), Twins()
    for row in range(3):
        twins.set_blocks(row, rng.integers(0, 30, rng.integers(1, 5)).tolist(), 0)
    known = [some_rows(rng, n) for n in (3, 3, rng.integers(0, 3))]
    q, slot = known[0]
    for _ in range(20):
        kind = rng.choice(["again", "rows", "set", "append", "table"], p=[0.5, 0.1, 0.1, 0.2, 0.1])
        if kind == "set":
            row = int(rng.integers(3))
            start = int(rng.integers(0, twins.blocks[row] + 2))
            twins.set_blocks(row, rng.integers(-1, 30, rng.integers(0, 4)).tolist(), start)
        elif kind == "append":
            rows = rng.permutation(3)[: rng.integers(0, 4)]
            twins.append_blocks(rows, rng.integers(0 if rng.random() < 0.8 else -9, 31, len(rows)))
        else:
            if kind == "rows":
                q, slot = known[rng.integers(3)]
            ctx = contexts(rng, q)
            if dtype != "int32" and rng.random() < 0.5:
                twins.stage(*(array.astype(dtype) for array in (ctx, q, slot)))
            elif kind == "table":
                twins.stage(ctx, q, slot, rng.integers(0, 31, (len(q), 6)))
            else:
                twins.stage(ctx, q, slot)


@settings(max_examples=150)
@given(seed=st.integers(0, 1 << 30), is_long=st.booleans())
def test_the_short_check_knows_every_good_step(seed: int, is_long: bool) -> None:
    long = dict(block_size=1 << 29, hca_ratio=1 << 29, csa_ratio=1 << 28, max_model_len=INT32 - 1)
    cfg = V4PrepareConfig(**SIZES | dict(max_num_tokens=3, index_topk=1) | long) if is_long else CFG
    rng, table = np.random.default_rng(seed), TableMirror(cfg)
    check, (q, slot) = SteadyCheck(cfg, table), some_rows(rng, 3)
    q = np.clip(q, 0, 1)
    check.remember(q, slot)
    for _ in range(12):
        if rng.random() < 0.4:
            table.set_blocks(int(rng.integers(3)), [0] * int(rng.integers(0, 5)))
        ctx, room = contexts(rng, q), table.room(3)
        if rng.random() < 0.5:
            ctx[0] = min(int(room[0]) + int(rng.integers(-2, 3)), INT32 - 1)
        is_good = bool((ctx >= q).all() and (ctx <= cfg.max_model_len).all())
        assert check.is_good(ctx, q, slot) == (is_good and rows_have_room(ctx, q, room))


def test_a_step_like_the_last_one_is_not_checked_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = V4Prepare(CFG, "numpy")
    prepare.set_blocks(0, [3, 4])
    step = [np.array([value], np.int32) for value in (4, 1, 2)]
    prepare.stage(*step)
    monkeypatch.delattr(RowChecks, "num_tokens")
    step[0][0] = 8
    prepare.stage(*step)
    with pytest.raises(AttributeError):
        prepare.stage(step[0], step[1], step[2] + 1)


def test_what_is_no_array_like_the_last_ones_goes_the_long_way() -> None:
    check = SteadyCheck(CFG, TableMirror(CFG))
    ctx, q, slot = np.ones(3, np.int32), np.zeros(3, np.int32), np.arange(3, dtype=np.int32)
    assert not check.is_good(ctx, q, slot)
    check.remember(q.astype(np.int64), slot.astype(np.int64))
    assert check.is_good(ctx, q, slot) and check.is_good(ctx[::-1], q[::-1], slot)
    for others in (
        (ctx.tolist(), q, slot),
        (ctx.view(np.uint32), q, slot),
        (ctx[:, None], q[:, None], slot[:, None]),
        (ctx, q, slot[::-1]),
        (ctx[:1], q, slot),
        (ctx[:2], q[:2], slot[:2]),
        (ctx, np.int32(0), slot),
        (None, q, slot),
    ):
        assert not check.is_good(*others)
