"""The host builder against the loop oracle, on any step and on sizes of real models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4Arrays, V4PrepareConfig, v4_prepare_np
from tests.reference.v4_prepare import naive
from tests.v4_prepare.strategies import V4Step, steps


def assert_same(out: V4Arrays, expected: dict[str, np.ndarray]) -> None:
    """Compare everything but what nobody reads behind the HCA list."""
    for name in OUTPUT_SHAPES(out.config):
        found = getattr(out, name)
        if name == "hca_idx":
            found = found[: out.counts[2]]
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected[name], err_msg=name)


@settings(max_examples=600, deadline=None)
@given(step=steps(), garbage=st.integers(-(2**31), 2**31 - 1))
def test_any_step_over_garbage(step: V4Step, garbage: int) -> None:
    out = V4Arrays.allocate(step.cfg)
    for name in OUTPUT_SHAPES(step.cfg):
        getattr(out, name).fill(garbage)
    inputs = step.inputs()
    before = [array.copy() for array in inputs]
    v4_prepare_np(step.cfg, *inputs, out)
    assert_same(out, naive(step.cfg, *inputs))
    for array, copy in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@settings(max_examples=100, deadline=None)
@given(step=steps())
def test_what_a_token_reads_adds_up(step: V4Step) -> None:
    out = v4_prepare_np(step.cfg, *step.inputs())
    num_tokens = int(out.counts[1])
    seen = np.minimum(out.positions[:num_tokens] + 1, step.cfg.window_size)
    assert (out.win_len + out.ext_len)[:num_tokens].tolist() == seen.tolist()
    for name, ratio in (("r1", step.cfg.csa_ratio), ("r2", step.cfg.hca_ratio)):
        start = step.ctx - step.q
        finished = (step.ctx // ratio - start // ratio)[step.q > 0].sum()
        kept = np.minimum(step.q, step.cfg.pool(ratio)).sum()
        assert (getattr(out, f"plan_{name}")[:, 0] >= 0).sum() == finished
        assert (getattr(out, f"wplan_{name}")[:, 0] >= 0).sum() == kept


@settings(max_examples=60, deadline=None)
@given(step=steps(swa="ring"))
def test_two_tokens_never_write_one_row(step: V4Step) -> None:
    written = v4_prepare_np(step.cfg, *step.inputs()).swa_write
    written = written[written >= 0].tolist()
    assert len(set(written)) == len(written)


def real_step(
    rng: np.random.Generator, lengths: list[tuple[int, int]], **sizes: Any
) -> tuple[V4PrepareConfig, tuple[np.ndarray, ...]]:
    """A step of a configuration with the sizes of a real model; (ctx, q) of each row."""
    cfg = V4PrepareConfig(
        **{
            "window_size": 128,
            "spec_tokens": 3,
            "block_size": 128,
            "csa_ratio": 4,
            "hca_ratio": 128,
            "index_topk": 512,
            "num_slots": 300,
            "num_blocks": 9000,
            "max_blocks_per_seq": 1024,
            "max_num_seqs": 256,
            "max_num_tokens": 1024,
            "max_tokens_per_seq": 300,
            "max_model_len": 131072,
        }
        | sizes
    )
    ctx, q = np.array(lengths, np.int32).T
    table = rng.integers(0, cfg.num_blocks, (len(ctx), cfg.max_blocks_per_seq), np.int32)
    slot = rng.permutation(cfg.num_slots)[: len(ctx)].astype(np.int32)
    return cfg, (ctx, q, slot, table)


@pytest.mark.parametrize("swa", ["ring", "paged"])
def test_a_window_narrower_than_a_decode_row(swa: str) -> None:
    """A decode row keeps every key it writes, those that fall out of the window at once too."""
    cfg = V4PrepareConfig(1, 3, 4, 2, 4, 3, 2, 9, 3, 2, 8, 4, 12, swa=swa)
    inputs = [np.array(one) for one in ([9, 4], [4, 4], [1, 0], [[7, 2, 5], [3, -1, -1]])]
    out = v4_prepare_np(cfg, *inputs)
    assert (out.swa_write >= 0).all()
    assert_same(out, naive(cfg, *inputs))


def test_a_window_wider_than_the_blocks_of_a_row() -> None:
    """Columns that a short row's table does not have are never looked at."""
    cfg = V4PrepareConfig(9, 0, 4, 2, 4, 3, 2, 9, 3, 2, 8, 4, 12, swa="paged")
    inputs = [np.array(one) for one in ([2, 4], [1, 4], [1, 0], [[7], [3]])]
    assert_same(v4_prepare_np(cfg, *inputs), naive(cfg, *inputs))


LONG = [(131072, 4), (100003, 4), (65537, 1), (0, 0), (128, 128), (255, 4), (9001, 270), (3, 3)]


@pytest.mark.parametrize("swa", ["ring", "paged"])
@pytest.mark.parametrize("block_size", [128, 256])
def test_long_rows(swa: str, block_size: int) -> None:
    """Lists so long that they are copied, blocks with one HCA entry and with two."""
    rng = np.random.default_rng(7)
    cfg, inputs = real_step(rng, LONG, swa=swa, block_size=block_size)
    out = v4_prepare_np(cfg, *inputs)
    assert out.counts[2] > 20_000
    assert_same(out, naive(cfg, *inputs))


def test_many_short_rows() -> None:
    rng = np.random.default_rng(8)
    lengths = [(int(rng.integers(4, 700)), int(rng.integers(0, 5))) for _ in range(256)]
    cfg, inputs = real_step(rng, lengths, num_slots=256)
    assert_same(v4_prepare_np(cfg, *inputs), naive(cfg, *inputs))


def test_table_mode_at_a_million_tokens() -> None:
    cfg, inputs = real_step(
        np.random.default_rng(9),
        [(2**20, 4), (2**20 - 1, 1), (2**20, 200)],
        max_model_len=2**20,
        max_blocks_per_seq=8192,
        max_num_tokens=4096,
    )
    # 4096 tokens of 8192 entries each would be 128 MiB
    assert cfg.hca_mode == "table" and cfg.hca_capacity == 0
    out = v4_prepare_np(cfg, *inputs)
    assert out.hca_idx is None
    start = 2**20 - 200
    counts = [2**20 // 128 - 1] * 3 + [8192, 8191] + [p // 128 for p in range(start + 1, 2**20 + 1)]
    assert out.hca_indptr[:206].tolist() == [0, *np.cumsum(counts).tolist()]
    assert out.csa_indptr[205] == 205 * 512


def test_arrays_are_used_again_in_place() -> None:
    """A short step after a long one leaves nothing of it, at the same addresses."""
    rng = np.random.default_rng(10)
    cfg, inputs = real_step(rng, LONG)
    out = v4_prepare_np(cfg, *inputs)
    memory = {name: getattr(out, name).ctypes.data for name in OUTPUT_SHAPES(cfg)}
    for lengths in ([(5, 1)], [], LONG[::-1]):
        short = real_step(rng, lengths or [(0, 0)])[1]
        v4_prepare_np(cfg, *(array[: len(lengths)] for array in short), out)
        assert_same(out, naive(cfg, *(array[: len(lengths)] for array in short)))
    assert memory == {name: getattr(out, name).ctypes.data for name in OUTPUT_SHAPES(cfg)}
