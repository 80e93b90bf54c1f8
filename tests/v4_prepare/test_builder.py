"""The host builder against worked examples and the loop oracle, on any step and on real sizes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.v4_host_lists import by_entry, by_token
from fd_dsa.errors import DtypeError, ShapeError
from fd_dsa.v4_prepare import (
    OUTPUT_SHAPES,
    V4Arrays,
    V4PrepareConfig,
    csa_translate,
    v4_prepare_np,
)
from fd_dsa.v4_prepare.builder import step_of, write_hca_list
from tests.reference.v4_prepare import naive
from tests.strategies import examples
from tests.v4_prepare.cases import Step, assert_same, outputs_of, serving_config
from tests.v4_prepare.golden import (
    CASES,
    assert_outputs,
    config_of,
    inputs_of,
)
from tests.v4_prepare.strategies import steps

DTYPES = ["int64", "uint32", "uint64", ">i4", "int8", "uint8"]


def poisoned(cfg: V4PrepareConfig, value: int) -> V4Arrays:
    """Arrays that hold garbage."""
    return V4Arrays(cfg, lambda shape, dtype: np.full(shape, value, dtype))


def check(cfg: V4PrepareConfig, inputs: Any, out: V4Arrays | None = None) -> V4Arrays:
    """Build a step and compare all its outputs with the oracle's."""
    out = v4_prepare_np(cfg, *inputs, out)
    assert_same(outputs_of(out), naive(cfg, *inputs))
    return out


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "int32") for name in CASES] + [("G8", dtype) for dtype in DTYPES],
)
def test_inputs_of_any_integer_dtype_in_a_table_of_any_layout(name: str, dtype: str) -> None:
    """Rows of the pools may exceed the inputs' own dtype; unsigned -1 stands where nobody reads."""
    case = CASES[name]
    cfg = config_of(case["config"])
    *lengths, table = inputs_of(case)
    wide = np.full((len(table), cfg.max_blocks_per_seq + 3), -7)
    for row, blocks in enumerate(table):
        wide[row, : len(blocks)] = blocks
    arrays = [np.array(one, np.int64).astype(dtype) for one in lengths]
    out = poisoned(cfg, -(2**31))
    assert v4_prepare_np(cfg, *arrays, np.asfortranarray(wide.astype(dtype)), out) is out
    assert_outputs(case, lambda field: getattr(out, field))


@examples(100, in_soak=500)
@given(made=steps(), garbage=st.integers(-(2**31), 2**31 - 1))
def test_any_step_over_garbage(made: tuple[V4PrepareConfig, Step], garbage: int) -> None:
    cfg, step = made
    inputs = step.arrays()
    before = [array.copy() for array in inputs]
    out = check(cfg, inputs, poisoned(cfg, garbage))
    for array, copy in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(array, copy)
    if cfg.swa == "ring":
        # no two tokens write one row
        written = out.swa_write[out.swa_write >= 0].tolist()
        assert len(set(written)) == len(written)


@pytest.mark.parametrize("swa", ["ring", "paged"])
def test_windows_narrower_than_a_decode_row_and_wider_than_a_row_of_blocks(swa: str) -> None:
    narrow = V4PrepareConfig(1, 3, 4, 2, 4, 3, 2, 9, 3, 2, 8, 4, 12, swa=swa)
    inputs = [np.array(one) for one in ([9, 4], [4, 4], [1, 0], [[7, 2, 5], [3, -1, -1]])]
    # every key is kept, those that fall out of the window at once too
    assert (check(narrow, inputs).swa_write >= 0).all()
    wide = V4PrepareConfig(9, 0, 4, 2, 4, 3, 2, 9, 3, 2, 8, 4, 12, swa=swa)
    check(wide, [np.array(one) for one in ([2, 4], [1, 4], [1, 0], [[7], [3]])])


def real_step(lengths: list[tuple[int, int]], **sizes: Any) -> tuple[V4PrepareConfig, list[Any]]:
    """A step of a configuration with the sizes of a real model; (ctx, q) of each row."""
    sizes = {"num_blocks": 9000, "max_num_tokens": 1024, "max_tokens_per_seq": 300} | sizes
    cfg = serving_config(256, sizes.pop("max_model_len", 131072), 3, **sizes)
    rng = np.random.default_rng(7)
    ctx, q = np.array(lengths, np.int32).reshape(-1, 2).T
    table = rng.integers(0, cfg.num_blocks, (len(ctx), cfg.max_blocks_per_seq), np.int32)
    slot = rng.permutation(cfg.num_slots)[: len(ctx)].astype(np.int32)
    return cfg, [ctx, q, slot, table]


LONG = [(131072, 4), (100003, 4), (65537, 1), (0, 0), (128, 128), (255, 4), (9001, 270), (3, 3)]
SHORT = [(4 + 97 * n % 696, n % 5) for n in range(256)]


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        (LONG, {"swa": "ring"}),
        (LONG, {"swa": "paged", "block_size": 256}),
        (SHORT, {"swa": "ring"}),
    ],
)
def test_real_sizes(lengths: list[tuple[int, int]], sizes: dict[str, Any]) -> None:
    """Long lists and short ones; one HCA entry a block, two.

    A short step after a long one leaves nothing of it, at the same addresses.
    """
    cfg, inputs = real_step(lengths, **sizes)
    out = check(cfg, inputs)
    memory = {name: getattr(out, name).ctypes.data for name in OUTPUT_SHAPES(cfg)}
    for others in ([(5, 1)], [], lengths[::-1]):
        check(cfg, real_step(others, **sizes)[1], out)
    assert memory == {name: getattr(out, name).ctypes.data for name in OUTPUT_SHAPES(cfg)}


@pytest.mark.parametrize("kind", ["few tokens", "short lists", "long lists", "prompts", "any"])
@pytest.mark.parametrize("seed", range(2))
def test_hca_lists_are_those_of_a_copy_a_token_and_of_a_gather(kind: str, seed: int) -> None:
    """Each form of the lists serves the steps that it is the fastest for, with equal results."""
    rng = np.random.default_rng(seed)
    rows, longest, most = {
        "few tokens": (4, 131072, 4),
        "short lists": (200, 2000, 4),
        "long lists": (48, 60000, 4),
        "prompts": (3, 9000, 3000),
        "any": (40, 30000, 120),
    }[kind]
    q = rng.integers(0, most + 1, rows).astype(np.int32)
    ctx = (q + rng.integers(0, longest, rows)).astype(np.int32)
    sizes = {"max_num_tokens": 16384, "max_tokens_per_seq": 8192, "hca_mode": "list"}
    block_size = int(rng.choice([128, 256, 512]))
    cfg, (*_, slot, table) = real_step([(1, 1)] * rows, block_size=block_size, **sizes)
    step = step_of(ctx, q, slot, table)
    indptr = np.zeros(len(step.row) + 1, np.int32)
    np.cumsum((step.position + 1) // cfg.hca_ratio, out=indptr[1:])
    lists = np.full((3, indptr[-1] + 5), -5, np.int32)
    for form, out in zip((write_hca_list, by_token, by_entry), lists, strict=True):
        form(cfg, step, indptr, out)
    np.testing.assert_array_equal(lists[0], lists[1])
    np.testing.assert_array_equal(lists[0], lists[2])
    assert (lists[:, indptr[-1] :] == -5).all()


def test_table_mode_at_a_million_tokens() -> None:
    lengths = [(2**20, 4), (2**20 - 1, 1), (2**20, 200)]
    cfg, inputs = real_step(lengths, max_model_len=2**20, max_num_tokens=4096)
    # 4096 tokens of 8192 entries each would be 128 MiB
    assert cfg.hca_mode == "table" and "hca_idx" not in OUTPUT_SHAPES(cfg)
    out = v4_prepare_np(cfg, *inputs)
    counts = [2**20 // 128 - 1] * 3 + [8192, 8191]
    counts += [p // 128 for p in range(2**20 - 199, 2**20 + 1)]
    assert out.hca_indptr[:206].tolist() == [0, *np.cumsum(counts).tolist()]
    assert out.csa_indptr[205] == 205 * 512


def test_numpy_alone_is_enough() -> None:
    """A step is built and staged where neither Paddle nor Triton can be imported."""
    code = """
import sys
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("paddle", "triton", "torch"):
            raise AssertionError(name)
sys.meta_path.insert(0, Closed())
from fd_dsa.v4_prepare import V4Prepare, V4PrepareConfig, csa_translate, v4_prepare_np
cfg = V4PrepareConfig(8, 0, 16, 4, 16, 3, 4, 32, 6, 4, 4, 1, 96)
out = v4_prepare_np(cfg, [21], [1], [3], [[19, 26]])
prepare = V4Prepare(cfg, "numpy")
prepare.stage([21], [1], [3], [[19, 26]])
print(out.hca_idx[0], prepare.expand().hca_idx[0], csa_translate(out, [[19, 26]], [[4, 0, 9]]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "51 51 [136 108  -1]\n", result.stderr


@examples(50, in_soak=150)
@given(made=steps(), seed=st.integers(0, 2**16), dtype=st.sampled_from([np.int32, np.int64]))
def test_translated_entries(made: tuple[V4PrepareConfig, Step], seed: int, dtype: Any) -> None:
    """Of numbers as an indexer might leave them: most are entries, some are not."""
    cfg, step = made
    out, rng = v4_prepare_np(cfg, *step.arrays()), np.random.default_rng(seed)
    shape, per_block = (cfg.max_num_tokens, cfg.index_topk), cfg.block_size // cfg.csa_ratio
    chosen = rng.integers(-2, 2 + cfg.max_model_len // cfg.csa_ratio, shape)
    extreme = rng.choice([2**31 - 1, -(2**31)])
    chosen = np.where(rng.random(shape) < 0.1, extreme, chosen).astype(dtype)
    expected = []
    for t in range(int(out.counts[1])):
        visible, row = int(out.csa_visible[t]), int(out.req_of_token[t])
        for entry in chosen[t, : min(visible, cfg.index_topk)].tolist():
            if 0 <= entry < visible:
                block = int(step.table[row, entry // per_block])
                expected.append(cfg.comp_base + block * per_block + entry % per_block)
            else:
                expected.append(-1)
    rows = csa_translate(out, step.table, chosen)
    assert rows.dtype == np.int32
    assert rows.tolist() == expected


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_translated_rows_may_exceed_the_dtype_of_the_table(dtype: str) -> None:
    case = CASES["G2"]
    *lengths, table = inputs_of(case)
    topk, expected = case["csa_translate"]["local_topk"], np.array(case["csa_translate"]["rows"])
    for comp_base in (44, 500):
        out = v4_prepare_np(config_of(case["config"], comp_base=comp_base), *lengths, table)
        rows = csa_translate(out, np.array(table, np.int64).astype(dtype), topk)
        assert rows.tolist() == np.where(expected < 0, -1, expected - 44 + comp_base).tolist()


def test_wrong_choices_are_refused() -> None:
    *lengths, table = inputs_of(CASES["G2"])
    out, good = v4_prepare_np(config_of(CASES["G2"]["config"]), *lengths, table), np.zeros((6, 3))
    for shape in ((5, 3), (6, 2), (6, 4), (18,)):
        with pytest.raises(ShapeError, match=r"local_topk: got .*, must be \[6 or more, 3\]"):
            csa_translate(out, table, np.zeros(shape, np.int32))
    with pytest.raises(DtypeError, match="local_topk: got float64, must be an integer dtype"):
        csa_translate(out, table, good)
    with pytest.raises(ShapeError, match=r"block_table: got \(2, 6\), must be \[3 or more"):
        csa_translate(out, table[:2], good.astype(np.int32))
    with pytest.raises(DtypeError, match="block_table: got float64"):
        csa_translate(out, np.array(table, float), good.astype(np.int32))
    empty = v4_prepare_np(out.config, [], [], [], [])
    assert csa_translate(empty, [], np.zeros((0, 3), np.int32)).tolist() == []
