"""Choice, lists of pairs and grouped GEMMs of the routed experts against float64, in every memory.

A GEMM is compared with its own operands, to the rounding of its result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from benchmarks import _tilings
from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.errors import ShapeError
from fd_dsa.ops.expert_gemm import configuration, expert_gemm
from fd_dsa.ops.expert_kernels import choose_experts, sum_experts
from fd_dsa.ops.expert_pairs import group_pairs
from fd_dsa.ops.split_sums import Tiling
from fd_dsa.tensor import Fp8Rows
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8
from tests.ops.block_fp8 import put_pair, row_values, weight_values
from tests.reference.moe import GateRule, ref_gate

pytestmark = pytest.mark.triton

EXPERTS = 6
KINDS = ["float32", "bfloat16", "uint8"]
# width of x, columns: no whole blocks along K; of FP8 a gated GEMM needs whole blocks of columns
SIZES = {"float32": (40, 24), "bfloat16": (72, 24), "uint8": (200, 128)}


def choices(kind: str, num_tokens: int, top_k: int, experts: int = EXPERTS) -> np.ndarray:
    """int32 [num_tokens, top_k], ascending; "padded": every third token is padding."""
    rng = np.random.default_rng([num_tokens, top_k])
    if kind == "one for all":
        return np.tile(np.arange(experts - top_k, experts, dtype=np.int32), (num_tokens, 1))
    rows = [np.sort(rng.choice(experts, top_k, replace=False)) for _ in range(num_tokens)]
    ids = np.array(rows, np.int32).reshape(num_tokens, top_k)
    if kind == "padded":
        ids[::3] = -1
    return ids


class Operands:
    """Rows and expert weights of a type: in a memory, and their exact values."""

    def __init__(
        self,
        m: KernelMemory,
        kind: str,
        rows: int,
        columns: int,
        width: int,
        experts: int = EXPERTS,
    ) -> None:
        rng = np.random.default_rng([rows, columns, width])
        self.m, self.kind = m, kind
        if kind == "uint8":
            codes, scales = block_fp8.activations(rng, rows, width)
            # sums near 1, where silu bends
            self.use_rows((codes, scales * np.float32(2.0**-9)))
            weight = block_fp8.weight(rng, experts, columns, width)
            self.weight: Any = put_pair(m, weight)[:2]
            self.weight_values = weight_values(*weight)
        else:
            values = rng.standard_normal((rows, width)), rng.standard_normal((columns, width))
            factors = np.float32(2.0) ** np.arange(experts)[:, None, None]
            x, every = values[0], values[1] * factors / width**0.5
            x, every = (block_fp8.rounded(v, kind) for v in (x, every))
            self.x: Any = block_fp8.put(m, x, kind)
            self.weight, self.values = (block_fp8.put(m, every, kind), None), x.astype(np.float64)
            self.weight_values = every.astype(np.float64)

    def use_rows(self, rows: tuple[np.ndarray, np.ndarray]) -> None:
        """Replace the rows by others in FP8."""
        self.x, self.values = put_pair(self.m, rows), row_values(*rows)

    def use_result(self, hidden: Any) -> None:
        """Replace the rows by what a GEMM gave."""
        if self.kind == "uint8":
            self.use_rows((self.m.get(hidden.codes), self.m.get(hidden.scales)))
        else:
            self.x = hidden
            # rows of padding are never written: their values may be signalling NaNs
            with np.errstate(invalid="ignore"):
                self.values = block_fp8.get(self.m, hidden).astype(np.float64)

    def sums(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float64 [pairs, columns] GEMM of each pair, and the sums of magnitudes; 0 of padding."""
        exact, size = np.zeros((2, ids.size, self.weight_values.shape[1]))
        for expert, weight in enumerate(self.weight_values):
            pairs = np.flatnonzero(ids.ravel() == expert)
            x = self.values[pairs // (ids.size // len(self.values))]
            exact[pairs], size[pairs] = x @ weight.T, np.abs(x) @ np.abs(weight).T
        return exact, size

    @property
    def step(self) -> float:
        """Relative error of the sums; see test_fp8_gemm.py."""
        return 2.0**-10 if self.m.on_gpu and self.kind == "uint8" else 2.0**-20

    def check_down(self, found: Any, ids: np.ndarray) -> None:
        """Assert the rows of pairs that have an expert."""
        live = ids.ravel() >= 0
        exact, size = (values[live] for values in self.sums(ids))
        bound = self.step * size
        if self.kind != "float32":
            bound += 2.0**-8 * np.abs(exact)
        values = block_fp8.get(self.m, found)
        assert list(values.shape) == [ids.size, self.weight_values.shape[1]]
        assert (np.abs(values[live] - exact) <= bound).all()

    def check_gated(self, found: Any, ids: np.ndarray, round_scales: bool) -> None:
        """Assert silu(gate) * up of those rows."""
        live = ids.ravel() >= 0
        exact, size = (values[live] for values in self.sums(ids))
        (gate, up), (gate_size, up_size) = (np.split(v, 2, axis=1) for v in (exact, size))
        silu = gate / (1 + np.exp(-gate))
        wanted = silu * up
        # silu bends by at most 1.1
        bound = self.step * (1.1 * gate_size * np.abs(up) + np.abs(silu) * up_size)
        if self.kind != "float32":
            bound += 2.0**-8 * np.abs(wanted)
        if self.kind == "uint8":
            assert isinstance(found, Fp8Rows)
            codes, scales = self.m.get(found.codes), self.m.get(found.scales)
            values, scale = row_values(codes, scales), scales[:, : len(codes)].T[live]
            largest = np.abs(wanted).reshape(len(wanted), -1, 128).max(axis=2)
            slack = bound.reshape(len(wanted), -1, 128).max(axis=2)
            high = (2 if round_scales else 1) * (largest + slack) / 448
            assert ((scale >= (largest - slack) / 448) & (scale <= high)).all()
            assert not round_scales or (np.frexp(scale)[0] == 0.5).all()
            # half a step of normal codes and of the smallest ones
            bound = 1.1 * bound + 2.0**-4 * np.abs(wanted) + 2.0**-10 * scale.repeat(128, axis=1)
        else:
            values = block_fp8.get(self.m, found)
        assert (np.abs(values[live] - wanted) <= bound).all()


# 40 pairs of an expert are more than a tile of rows, 2,100 x 2 pairs more than a block of the list
CASES = [("random", 0, 2), ("random", 1, 3), ("random", 5, EXPERTS), ("padded", 7, 2)]
CASES += [("random", 70, 1), ("one for all", 40, 2)]


@pytest.mark.parametrize(("which", "num_tokens", "top_k"), [*CASES, ("padded", 2100, 2)])
def test_pairs_of_experts(
    paddle_memory: KernelMemory, which: str, num_tokens: int, top_k: int
) -> None:
    m, ids = paddle_memory, choices(which, num_tokens, top_k)
    pairs, counts = map(m.get, group_pairs(m.put(ids), EXPERTS))
    for expert in range(EXPERTS):
        wanted = np.flatnonzero(ids.ravel() == expert)
        assert counts[expert] == len(wanted)
        np.testing.assert_array_equal(pairs[expert, : len(wanted)], wanted)


@pytest.mark.parametrize(
    ("kind", "which", "num_tokens", "top_k"),
    [
        *(("uint8", *case) for case in CASES),
        *((kind, *case) for kind in ("float32", "bfloat16") for case in (CASES[0], *CASES[3:5])),
    ],
)
def test_every_pair_meets_its_expert(
    paddle_memory: KernelMemory, kind: str, which: str, num_tokens: int, top_k: int
) -> None:
    m, ids = paddle_memory, choices(which, num_tokens, top_k)
    lists = group_pairs(m.put(ids), EXPERTS)
    width, columns = SIZES[kind]
    gate_up = Operands(m, kind, num_tokens, 2 * columns, width)
    hidden = expert_gemm(
        gate_up.x, gate_up.weight, *lists, top_k=top_k, gated=True, round_scales=True
    )
    if num_tokens:
        gate_up.check_gated(hidden, ids, round_scales=True)
    down = Operands(m, kind, ids.size, width, columns)
    down.use_result(hidden)
    parts = expert_gemm(down.x, down.weight, *lists, top_k=top_k)
    if num_tokens:
        down.check_down(parts, ids)
    shares = np.random.default_rng(0).random(ids.shape).astype(np.float32)
    base = np.ones((num_tokens, width), np.float32)
    result = sum_experts(parts, m.put(shares), m.put(ids), m.put(base))
    live = (ids.ravel() >= 0)[:, None]
    terms = np.where(live, block_fp8.get(m, parts), 0) * shares.reshape(-1, 1).astype(np.float64)
    wanted = 1 + terms.reshape(num_tokens, top_k, width).sum(axis=1)
    atol = 1e-6 * np.abs(terms).max(initial=1)
    np.testing.assert_allclose(m.get(result), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tiling_gives_the_same_values(
    paddle_memory: KernelMemory, kind: str, gated: bool
) -> None:
    m, ids = paddle_memory, choices("random", 45, 2, 3)
    lists = group_pairs(m.put(ids), 3)
    case = Operands(m, kind, 45, 256 if gated else 130, 136, 3)
    few = (Tiling(32, 128 if gated else 64, 8, 3), Tiling(128, 128, 8, 3))
    several = few[0]._replace(column_tiles=2)
    # an interpreted tile takes as long as all of its rows
    few = few if kind == "uint8" else few[gated:][:1]
    for tiling in (several, *(_tilings.experts(kind, gated) if m.large else few)):
        options = {"gated": gated, "round_scales": False, "tiling": tiling}
        found = expert_gemm(case.x, case.weight, *lists, top_k=2, **options)
        if gated:
            case.check_gated(found, ids, round_scales=False)
        else:
            case.check_down(found, ids)


def test_chosen_tilings_are_candidates() -> None:
    for kind in KINDS:
        for tokens in (1, 2, 128, 512, 1024, 2048, 8192):
            for gated in (False, True):
                # of Hopper, the A100 and the L40S
                for shared_bytes in (227 << 10, 163 << 10, 99 << 10):
                    chosen = configuration(kind, 8 * tokens, 256, gated, 512, 7168, shared_bytes)
                    assert chosen in _tilings.experts(kind, gated)


@pytest.mark.parametrize(
    ("kind", "tokens", "width", "column_tiles"),
    [
        # ranks of 8 and of 4, and one GPU, with and without enough pairs
        *(("uint8", 128, 256, 7), ("uint8", 8, 256, 1), ("uint8", 128, 512, 1)),
        *(("uint8", 512, 512, 7), ("uint8", 512, 2048, 1), ("uint8", 1024, 256, 1)),
        *(("e4m3", 8, 512, 7), ("e4m3", 2, 512, 1), ("int4", 128, 2048, 1)),
        *(("e8m0", 32, 512, 7), ("e8m0", 16, 512, 1), ("bfloat16", 128, 256, 1)),
    ],
)
def test_programs_of_several_tiles(kind: str, tokens: int, width: int, column_tiles: int) -> None:
    tiling = configuration(kind, 8 * tokens, 256, False, 7168, width, 227 << 10)
    assert tiling.column_tiles == column_tiles


def test_weights_past_32_bits(paddle_memory: KernelMemory) -> None:
    """Experts on both sides of 2^31 values; memory of those without a token is never touched."""
    m, columns, width = paddle_memory, 64, 1024
    experts = 2**31 // (columns * width) + 1
    codes = np.zeros((experts, columns, width), np.uint8)
    rng = np.random.default_rng(0)
    last, scales = block_fp8.weight(rng, columns, width)
    codes[0], codes[-1] = last[::-1], last
    every = np.tile(scales, (experts, 1, 1))
    x = block_fp8.activations(rng, 1, width)
    # the lists of 2 pairs of one token, as group_pairs would fill them
    pairs, counts = np.zeros((experts, 1), np.int32), np.zeros(experts, np.int32)
    pairs[-1], counts[[0, -1]] = 1, 1
    weight = m.put(codes) if m.on_gpu else as_tensor(codes), m.put(every)
    found = expert_gemm(put_pair(m, x), weight, m.put(pairs), m.put(counts), top_k=2)
    wanted = row_values(*x) @ weight_values(last, scales).T
    step = 2.0**-7 * np.abs(wanted).max()
    np.testing.assert_allclose(block_fp8.get(m, found)[1], wanted[0], rtol=2**-8, atol=step)
    np.testing.assert_allclose(block_fp8.get(m, found)[0], wanted[0, ::-1], rtol=2**-8, atol=step)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sum_of_experts(paddle_memory: KernelMemory, dtype: str) -> None:
    m, rng, width = paddle_memory, np.random.default_rng(0), 1100
    ids = np.int32([[0, 3, 5], [-1, -1, -1], [1, 2, 4]])
    weights = np.where(ids < 0, 0, rng.random(ids.shape)).astype(np.float32)
    parts, base = (block_fp8.rounded(rng.standard_normal((n, width)), dtype) for n in (ids.size, 3))
    # rows of padding are never written
    parts[3:6] = np.nan
    put = block_fp8.put(m, parts, dtype), m.put(weights), m.put(ids), block_fp8.put(m, base, dtype)
    found = sum_experts(*put)
    assert str(found.dtype).endswith(dtype)
    terms = np.nan_to_num(parts.reshape(3, 3, width)) * weights[..., None].astype(np.float64)
    wanted = base + terms.sum(axis=1)
    values, step = block_fp8.get(m, found), 2.0**-8 if dtype == "bfloat16" else 0
    np.testing.assert_allclose(values, wanted, rtol=step, atol=2e-6)
    np.testing.assert_array_equal(values[1], base[1])


def test_padding_takes_no_expert(paddle_memory: KernelMemory) -> None:
    """Groups left out are -inf: with biases below -1 every score of the others is below 0."""
    m, rng = paddle_memory, np.random.default_rng(3)
    rule = GateRule(8, n_group=8, topk_group=3, scaling=2.5)
    logits = rng.standard_normal((9, 64)).astype(np.float32)
    logits[4] = np.nan
    bias = rng.uniform(-4, -1.5, 64).astype(np.float32)
    slots = np.array([5, 2**40, -1, 0, -1, 7, 8, -2, 9])
    options = {"top_k": 8, "n_group": 8, "topk_group": 3, "norm": True, "scaling": 2.5}
    put = m.put(logits), m.put(bias)
    ids, weights, _ = choose_experts(*put, slot_mapping=m.put(slots), **options)
    every, shares, _ = choose_experts(*put, slot_mapping=m.put(abs(slots)), **options)
    ids, weights, every, shares = map(m.get, (ids, weights, every, shares))
    live = slots >= 0
    np.testing.assert_array_equal(ids[live], every[live])
    np.testing.assert_array_equal(weights[live], shares[live])
    assert (ids[~live] == -1).all() and not weights[~live].any()
    for token in np.flatnonzero(live):
        scores = np.float32(1) / (np.float32(1) + np.exp(-logits[token]))
        wanted = ref_gate(scores, bias, rule)
        assert ids[token].tolist() == list(wanted)
        np.testing.assert_allclose(weights[token], list(wanted.values()), rtol=1e-5)


def test_what_does_not_fit_is_refused(paddle_memory: KernelMemory) -> None:
    m, ids = paddle_memory, choices("random", 2, 2)
    lists = group_pairs(m.put(ids), EXPERTS)
    case = Operands(m, "uint8", 2, 200, 136)
    with pytest.raises(ShapeError, match="100 columns of the gate, allowed are multiples of 128"):
        expert_gemm(case.x, case.weight, *lists, top_k=2, gated=True)
    with pytest.raises(ShapeError, match=r"scales \[6, 1, 2\]"):
        weight = case.weight[0], case.weight[1][:, :1].contiguous()
        expert_gemm(case.x, weight, *lists, top_k=2)
