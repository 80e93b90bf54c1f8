"""Lists of pairs and grouped GEMMs of the routed experts against NumPy, in every memory."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.ops._expert_kernels import expert_gemm, group_pairs, sum_experts
from tests.kernel_memory import KernelMemory

pytestmark = pytest.mark.triton

EXPERTS, WIDTH, COLUMNS = 6, 40, 24


def choices(kind: str, num_tokens: int, top_k: int) -> np.ndarray:
    """int32 [num_tokens, top_k], ascending: at random, or the same experts for every token."""
    rng = np.random.default_rng([num_tokens, top_k])
    if kind == "one for all":
        return np.tile(np.arange(EXPERTS - top_k, EXPERTS, dtype=np.int32), (num_tokens, 1))
    rows = [np.sort(rng.choice(EXPERTS, top_k, replace=False)) for _ in range(num_tokens)]
    return np.array(rows, np.int32).reshape(num_tokens, top_k)


def check(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal to the rounding of float32 sums of their size."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max(initial=1))


# 600 x 2 pairs are more than a block of the list, 70 and 600 tokens more than a tile of rows
@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 3), (5, EXPERTS), (70, 1), (600, 2)])
@pytest.mark.parametrize("kind", ["random", "one for all"])
def test_every_pair_meets_its_expert(
    paddle_memory: KernelMemory, kind: str, num_tokens: int, top_k: int
) -> None:
    m, rng = paddle_memory, np.random.default_rng(0)
    ids = choices(kind, num_tokens, top_k)
    pairs, counts = group_pairs(m.put(ids), EXPERTS)
    found = m.get(counts)
    for expert in range(EXPERTS):
        wanted = np.flatnonzero(ids.ravel() == expert)
        assert found[expert] == len(wanted)
        np.testing.assert_array_equal(m.get(pairs)[expert, : len(wanted)], wanted)
    x = rng.standard_normal((num_tokens, WIDTH)).astype(np.float32)
    gate_up = rng.standard_normal((EXPERTS, WIDTH, 2 * COLUMNS)).astype(np.float32)
    down = rng.standard_normal((EXPERTS, COLUMNS, WIDTH)).astype(np.float32)
    shares = rng.random((num_tokens, top_k)).astype(np.float32)
    hidden = expert_gemm(m.put(x), m.put(gate_up), pairs, counts, top_k=top_k, gated=True)
    both = np.einsum("tw,tkwc->tkc", x, gate_up[ids].astype(np.float64))
    gate, up = both[..., :COLUMNS], both[..., COLUMNS:]
    silu = gate / (1 + np.exp(-gate)) * up
    check(m.get(hidden), silu.reshape(-1, COLUMNS))
    parts = expert_gemm(hidden, m.put(down), pairs, counts, top_k=top_k)
    results = np.einsum("tkc,tkcw->tkw", silu, down[ids].astype(np.float64))
    total = (results * shares[..., None]).sum(axis=1)
    check(m.get(sum_experts(parts, m.put(shares))), total)
