"""Attention divided among ranks by tokens: which steps, and results equal to those by heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the weights are Paddle's tensors")

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.protocol import PromptLimits
from fd_dsa.cache_formats import CacheLayout
from fd_dsa.environment import exchanged_min_tokens
from fd_dsa.errors import ConfigError
from fd_dsa.step import StepMetadataBuilder
from tests.distributed.sums import rounded, widened
from tests.kernel_memory import KernelMemory
from tests.strategies import make_batch

pytestmark = pytest.mark.triton
VARIABLE = "FD_DSA_EXCHANGED_MIN_TOKENS"
HEADS, RANK, ROPE, NOPE, VALUES, BLOCK, TOPK = 2, 32, 16, 16, 16, 16, 20
# a prompt past the selection, a decode row, an idle row, two more prompts; no multiple of the ranks
ROWS = [(11, 40, 11), (0, 50, 1), (0, 0, 0), (8, 30, 8), (5, 21, 5)]
NUM_TOKENS = sum(new for _, _, new in ROWS)
LENGTHS = tuple(np.array(ROWS, np.int32).T)


class Apart:
    """A rank that runs without the others: it knows their queries, and keeps what it sends.

    Args:
        queries: queries of each rank, [num_tokens, heads * width].
        sent: values that this rank sends, by receiver.
    """

    gathers_rows = True

    def __init__(self, rank: int, memory: KernelMemory, queries: list[np.ndarray]) -> None:
        self.rank, self.size, self._memory, self._queries = rank, len(queries), memory, queries
        self.bounds: list[int] = []
        self.sent: list[np.ndarray] = []

    def exchange_rows(
        self, source: Any, source_bounds: Sequence[int], target: Any, target_bounds: Sequence[int]
    ) -> None:
        rows = self._memory.get(source)
        if not self.bounds:
            self.bounds = list(source_bounds)
            np.testing.assert_array_equal(rows.reshape(NUM_TOKENS, -1), self._queries[self.rank])
            own = slice(*source_bounds[self.rank : self.rank + 2])
            parts = [queries[own] for queries in self._queries]
            assert np.diff(target_bounds).tolist() == [len(part) for part in parts]
            dtype = "bfloat16" if rows.dtype == np.uint16 else None
            target.copy_(self._memory.put(np.concatenate(parts), dtype), True)
            return
        assert list(target_bounds) == self.bounds
        self.sent = np.split(rows, source_bounds[1:-1])


def config(dtype: str, ranks: int, heads: int = HEADS) -> DSABackendConfig:
    layout = CacheLayout(dtype, BLOCK, RANK, ROPE, 16)
    limits: Any = {"max_num_seqs": len(ROWS), "max_num_tokens": NUM_TOKENS + 2}
    limits |= {"max_blocks_per_seq": 4, "dtype": dtype, "head_widths": (NOPE, VALUES)}
    return DSABackendConfig(heads, 2, TOPK, 0.2, layout, **limits, exchange_ranks=ranks)


def step_of(memory: KernelMemory, rows: list[tuple[int, int, int]]) -> Any:
    batch = make_batch(rows, BLOCK)
    limits = len(rows), batch.num_tokens, batch.block_tables.shape[1]
    built = StepMetadataBuilder(*limits, BLOCK, device="numpy").build(*batch.inputs())
    put = {
        field.name: memory.put(np.array(value)) if hasattr(value, "shape") else value
        for field in fields(built)
        for value in [getattr(built, field.name)]
    }
    return type(built)(**put)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_by_tokens_are_those_by_heads(
    kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch, dtype: str, size: int
) -> None:
    from fd_dsa.attention.device import DeviceAttention
    from fd_dsa.ops.device_matrix import DeviceMatrix

    monkeypatch.setenv(VARIABLE, str(NUM_TOKENS))
    m, rng, all_heads = kernel_memory, np.random.default_rng(size), HEADS * size
    is_narrow = dtype == "bfloat16"

    def normal(*shape: int) -> np.ndarray:
        values = rng.standard_normal(shape).astype(np.float32)
        return rounded(values) if is_narrow else values

    def put(array: np.ndarray) -> Any:
        return m.put(array, "bfloat16" if is_narrow else None)

    q, cache = normal(NUM_TOKENS, all_heads, NOPE + ROPE), put(normal(20, 1, BLOCK, RANK + ROPE))
    keys, values = put(normal(all_heads, NOPE, RANK)), put(normal(all_heads, RANK, VALUES))
    cos_sin = m.put(rng.uniform(-1, 1, (NUM_TOKENS, ROPE)).astype(np.float32))
    selection = m.put(rng.integers(-1, 20 * BLOCK, (NUM_TOKENS, TOPK)).astype(np.int32))
    step, whole = step_of(m, ROWS), (DeviceMatrix(keys), DeviceMatrix(values))

    alone = DeviceAttention(config(dtype, 1, all_heads), m.poisoned)
    query = alone.absorbed_query(whole[0], put(q), None, cos_sin)
    by_heads = m.get(whole[1].matmul_by_head(alone.attend(step, query, cache, selection)))

    by_rank = [q[:, r * HEADS : (r + 1) * HEADS] for r in range(size)]
    flat, groups = [part.reshape(NUM_TOKENS, -1) for part in by_rank], []
    for rank in range(size):
        own = slice(rank * HEADS, (rank + 1) * HEADS)
        groups.append(Apart(rank, m, flat))
        group: Any = groups[-1]
        attention = DeviceAttention(config(dtype, size), m.poisoned, group)
        attention.begin_step(step, LENGTHS)
        layer: Any = SimpleNamespace(
            k_b_proj=DeviceMatrix(keys[own], whole=whole[0]),
            v_b_proj=DeviceMatrix(values[own], whole=whole[1]),
        )
        assert attention.exchange is not None
        ours = put(np.ascontiguousarray(by_rank[rank]))
        out = attention.exchange.attend(ours, cos_sin, cache, selection, layer)
        assert list(out.shape) == [NUM_TOKENS, HEADS * VALUES]
    bounds = groups[0].bounds
    assert (bounds[0], bounds[-1]) == (0, NUM_TOKENS) and all(np.diff(bounds) > 0)
    for rank in range(size):
        parts = [group.sent[rank].reshape(-1, HEADS, VALUES) for group in groups]
        found = np.concatenate(parts)
        wanted = by_heads[:, rank * HEADS : (rank + 1) * HEADS]
        if is_narrow:
            found, wanted = widened(found), widened(wanted)
        bound = 2.0**-7 if is_narrow else 1e-5
        np.testing.assert_allclose(found, wanted, rtol=bound, atol=bound)


def test_only_long_eager_steps_without_dense_prompts_are_divided(
    kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fd_dsa.attention.device import DeviceAttention

    def is_divided(rows: list[tuple[int, int, int]], lengths: Any = None) -> bool:
        group: Any = SimpleNamespace(size=2, rank=0, gathers_rows=True)
        attention = DeviceAttention(config("bfloat16", 2), kernel_memory.poisoned, group)
        given = tuple(np.array(rows, np.int32).T) if lengths is None else lengths
        attention.begin_step(step_of(kernel_memory, rows), given)
        return attention.exchange is not None

    monkeypatch.setenv(VARIABLE, str(NUM_TOKENS))
    assert is_divided(ROWS)
    assert not is_divided(ROWS[:-1])
    # in a capture
    assert not is_divided(ROWS, PromptLimits(3, 60, 2))
    # decode rows alone, rows within the selection, and prompts that begin within it
    assert not is_divided([(0, 40, NUM_TOKENS)])
    assert not is_divided([(5, 0, 5), (20, 0, 20)])
    assert not is_divided([(NUM_TOKENS, 10, NUM_TOKENS)])
    # at least some tokens for each rank
    monkeypatch.setenv(VARIABLE, "1")
    assert is_divided([(8, 30, 8)]) and not is_divided([(7, 30, 7)])
    monkeypatch.delenv(VARIABLE)
    assert not is_divided(ROWS)


def test_the_threshold_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert exchanged_min_tokens() == 0
    monkeypatch.setenv(VARIABLE, "2048")
    assert exchanged_min_tokens() == 2048
    monkeypatch.setenv(VARIABLE, "many")
    with pytest.raises(ConfigError, match=f"{VARIABLE}: got 'many', allowed: a number of tokens"):
        exchanged_min_tokens()
