"""With FD_DSA_BATCH_INVARIANT=1 a row of a launch has the same bits in any company.

Every launch of a layer that sums is made of all rows at once, then of one row, of the last ones, of
every second one and of them in another order. Operands are of one type and drawn at random, so
that a sum in another order has other bits; the last test shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.ops.device_matrix import DeviceMatrix, FourBitExperts
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.tensor import Fp8Rows
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8, logits_case, tensor_core_case
from tests.ops.four_bit_case import INT4, NVFP4, Weight
from tests.ops.paged_rows import paged_rows

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("one_order")]
Run = Callable[[np.ndarray], np.ndarray]
"""From the rows of a launch to its result, an array with an entry for each."""


def _matrix(m: KernelMemory, kind: str, *shape: int, **how: Any) -> DeviceMatrix:
    """A random weight of a type, "uint8" for FP8."""
    rng = np.random.default_rng(shape)
    if kind == "uint8":
        codes, scales = block_fp8.weight(rng, *shape)
        return DeviceMatrix(m.put(codes), m.put(scales))
    return DeviceMatrix(block_fp8.put(m, _rounded(rng, kind, *shape), kind), **how)


def _rounded(rng: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    return block_fp8.rounded(rng.standard_normal(shape), kind)


def _rows(m: KernelMemory, kind: str, rows: int, width: int) -> Callable[[np.ndarray], Any]:
    """Activations of a weight of a type, of which it gives some in an order."""
    rng = np.random.default_rng(rows)
    if kind == "uint8":
        codes, scales = block_fp8.activations(rng, rows, width)

        def chosen(index: np.ndarray) -> Any:
            stride = max(8, -(-len(index) // 4) * 4)
            own = np.full((len(scales), stride), np.nan, np.float32)
            own[:, : len(index)] = scales[:, index]
            padded = np.zeros((stride, width), np.uint8)
            padded[: len(index)] = codes[index]
            padded = m.put(padded)
            return Fp8Rows(padded[: len(index)], m.put(own), padded)

        return chosen
    values = _rounded(rng, kind, rows, width)
    return lambda index: block_fp8.put(m, values[index], kind)


def linear(m: KernelMemory, rows: int, kind: str, *shape: int, **how: Any) -> Run:
    """A GEMM by a whole weight."""
    weight, x = _matrix(m, kind, *shape, **how), _rows(m, kind, rows, shape[1])
    return lambda index: block_fp8.get(m, weight.matmul(x(index)))


def heads(m: KernelMemory, rows: int, kind: str, *shape: int) -> Run:
    """A GEMM of each head."""
    weight = _matrix(m, kind, *shape)
    values = _rounded(np.random.default_rng(rows), kind, rows, *shape[:2])
    return lambda index: block_fp8.get(
        m, weight.matmul_by_head(block_fp8.put(m, values[index], kind))
    )


def experts(m: KernelMemory, rows: int, kind: str, *shape: int) -> Run:
    """Both grouped GEMMs, and the sum; what the first rows choose makes some experts full."""
    from fd_dsa.ops.expert_kernels import sum_experts
    from fd_dsa.ops.expert_pairs import group_pairs

    count, width, hidden = shape
    gate_up: Any
    down: Any
    if kind == "four bits":
        gate_up = FourBitExperts(Weight(NVFP4, count, 2, hidden, width).put(m))
        down = FourBitExperts(Weight(INT4, count, 1, width, hidden).put(m))
        x = _rows(m, "bfloat16", rows, width)
    else:
        gate_up = _matrix(m, kind, count, 2 * hidden, width)
        down, x = _matrix(m, kind, count, width, hidden), _rows(m, kind, rows, width)
    rng = np.random.default_rng(rows)
    ids = np.sort(np.argsort(rng.random((rows, count)) * np.arange(1, count + 1))[:, :2])
    weights = rng.random((rows, 2)).astype(np.float32)
    base = _rounded(rng, "float32", rows, width)

    def run(index: np.ndarray) -> np.ndarray:
        chosen = m.put(ids[index].astype(np.int32))
        pairs = group_pairs(chosen, count)
        hidden = gate_up.grouped_matmul(x(index), *pairs, top_k=2, gated=True)
        parts = down.grouped_matmul(hidden, *pairs, top_k=2)
        out = sum_experts(parts, m.put(weights[index]), chosen, m.put(base[index]))
        return block_fp8.get(m, out)

    return run


def projection(m: KernelMemory, rows: int, kind: str, width: int) -> Run:
    """Index keys and head weights side by side."""
    from fd_dsa.ops.indexer_projection.triton_kernel import project_indexer

    rng = np.random.default_rng(rows)
    values = _rounded(rng, kind, rows, width)
    weights = [block_fp8.put(m, _rounded(rng, kind, width, n), kind) for n in (128, 64)]

    def run(index: np.ndarray) -> np.ndarray:
        made = m.poisoned((len(index), 128), kind), m.poisoned((len(index), 64), "float32")
        out = project_indexer(block_fp8.put(m, values[index], kind), *weights, made)
        return np.concatenate([block_fp8.get(m, part) for part in out], axis=1)

    return run


def attention(m: KernelMemory, rows: int, cache_dtype: str, num_heads: int, topk: int) -> Run:
    """Sparse MLA on tensor cores, of rows with few and with many keys."""
    from fd_dsa.ops.mla.tensor_core import Partials, attend_on_tensor_cores

    counts = np.random.default_rng(rows).integers(1, topk, rows).tolist()
    case = tensor_core_case.make(cache_dtype, counts, topk, heads=num_heads)
    case.slots[: rows // 2, topk // 2 :] = -1
    rank, room = tensor_core_case.RANK, 4096
    partials = m.poisoned((room * rank,), "float32"), m.poisoned((room,), "float32")

    def run(index: np.ndarray) -> np.ndarray:
        q = m.put(case.q_bits[index].view(np.uint16), "bfloat16")
        _, cache, _ = case.inputs(m)
        # a step of short rows alone has narrower rows of slots
        width = int((case.slots[index] >= 0).sum(axis=1).max())
        slots = m.put(np.ascontiguousarray(case.slots[index, :width]))
        out = m.poisoned((len(index), num_heads, rank), "float32")
        how = {"softmax_scale": case.scale, "partials": Partials(*partials)}
        attend_on_tensor_cores(q, cache, slots, out, **how)
        return m.get(out)

    return run


def scores(m: KernelMemory, rows: int, num_heads: int, cached: int, *types: str) -> Run:
    """The indexer's scores of a request on tensor cores.

    A row alone is a decode row. `types` are those of queries and keys; FP8 if left out.
    """
    from fd_dsa.ops.logits.tile_kernel import score_step

    step = paged_rows(((cached, rows),), 64, num_padded=0)
    case = logits_case.make(step, *types, heads=num_heads)
    meta = vars(step.meta(m))
    shared = {name: meta[name] for name in ("block_tables", "max_seqlen_k")}

    def run(index: np.ndarray) -> np.ndarray:
        num_prompts = len(index) if len(index) > 1 else 0
        ends = (step.position_ids[index] + 1).astype(np.int32)
        few = SimpleNamespace(
            **shared,
            position_ids=m.put(step.position_ids[index]),
            batch_id_per_token=m.put(step.batch_ids[index]),
            cu_seqlens_q=m.put(np.array([0, len(index)], np.int32)),
            num_prefill_tokens=num_prompts,
            seq_lens_encoder=m.put(np.array([num_prompts], np.int32)),
            cu_seqlens_kg=m.put(np.array([0, cached + rows], np.int32)),
            indexer_attn_mask_offsets=m.put(np.stack([0 * ends, ends], 1).ravel()),
        )
        own = replace(case, q_stored=case.q_stored[index], weights=case.weights[index])
        q, weights, cache = own.inputs(m)
        out = m.put(np.zeros((len(index), cached + rows), np.float32))
        score_step(q, weights, cache, few, out)
        return m.get(out)

    return run


Cases = dict[str, tuple[int, Callable[[KernelMemory, int], Run]]]
SMALL: Cases = {
    "fp8": (21, lambda m, n: linear(m, n, "uint8", 200, 640)),
    "bfloat16": (21, lambda m, n: linear(m, n, "bfloat16", 72, 328)),
    "float32": (21, lambda m, n: linear(m, n, "float32", 40, 72)),
    "router": (21, lambda m, n: linear(m, n, "bfloat16", 40, 328, sums_in_float32=True)),
    "heads": (21, lambda m, n: heads(m, n, "bfloat16", 3, 72, 40)),
    "experts": (21, lambda m, n: experts(m, n, "bfloat16", 6, 72, 40)),
    "experts in fp8": (21, lambda m, n: experts(m, n, "uint8", 3, 256, 128)),
    "experts in four bits": (21, lambda m, n: experts(m, n, "four bits", 3, 256, 128)),
    "projection": (21, lambda m, n: projection(m, n, "bfloat16", 328)),
    "attention": (7, lambda m, n: attention(m, n, "fp8_ds_mla", 3, 200)),
    "scores": (7, lambda m, n: scores(m, n, 5, 130)),
    "scores in bfloat16": (7, lambda m, n: scores(m, n, 5, 130, "bfloat16", "bfloat16")),
}
# DeepSeek-V3.2's widths
LARGE: Cases = {
    "q_a, wk, kv_a": (300, lambda m, n: linear(m, n, "uint8", 2240, 7168)),
    "o_proj": (300, lambda m, n: linear(m, n, "uint8", 7168, 16384)),
    "q_b": (1100, lambda m, n: linear(m, n, "uint8", 24576, 1536)),
    "router": (300, lambda m, n: linear(m, n, "bfloat16", 256, 7168, sums_in_float32=True)),
    "head": (130, lambda m, n: linear(m, n, "bfloat16", 32768, 7168, sums_in_float32=True)),
    "wide": (1100, lambda m, n: linear(m, n, "bfloat16", 7168, 2048)),
    "absorbed": (300, lambda m, n: heads(m, n, "bfloat16", 128, 128, 512)),
    "values": (300, lambda m, n: heads(m, n, "bfloat16", 128, 512, 128)),
    "experts": (600, lambda m, n: experts(m, n, "uint8", 16, 7168, 2048)),
    "experts in four bits": (600, lambda m, n: experts(m, n, "four bits", 16, 7168, 2048)),
    "experts in bfloat16": (600, lambda m, n: experts(m, n, "bfloat16", 16, 2048, 512)),
    "projection": (1100, lambda m, n: projection(m, n, "bfloat16", 7168)),
    "scores": (300, lambda m, n: scores(m, n, 64, 4000)),
    "scores in bfloat16": (300, lambda m, n: scores(m, n, 64, 4000, "bfloat16", "bfloat16")),
    **{
        f"attention, {cache}, {heads}": (
            70,
            lambda m, n, cache=cache, heads=heads: attention(m, n, cache, heads, 2048),
        )
        for cache in ("fp8_ds_mla", "bfloat16")
        for heads in (8, 16, 32, 128)
    },
}


def parts(rows: int) -> list[np.ndarray]:
    """Companies that rows are launched in."""
    every = np.arange(rows)
    shuffled = np.random.default_rng(0).permutation(rows)
    several = [every[:size] for size in (2, 8, 33, 65, 129, 513) if size < rows]
    return [every[:1], every[-1:], every[rows // 2 :], every[::2], shuffled, *several]


def differing(
    m: KernelMemory, rows: int, make: Callable[[KernelMemory, int], Run]
) -> Iterator[int]:
    """In how many values rows of each company differ from those of all rows together."""
    run = make(m, rows)
    whole = run(np.arange(rows))
    # bfloat16 has some thousand values of any size at all
    assert np.isfinite(whole).all() and len(np.unique(whole)) > min(whole.size // 100, 1000)
    for index in parts(rows):
        yield int((run(index) != whole[index]).sum())


@pytest.mark.parametrize("name", SMALL)
def test_no_company_changes_a_row(paddle_memory: KernelMemory, name: str) -> None:
    assert not any(differing(paddle_memory, *SMALL[name]))


@pytest.mark.parametrize("name", LARGE)
def test_no_company_changes_a_row_of_real_widths(paddle_memory: KernelMemory, name: str) -> None:
    if not paddle_memory.large:
        pytest.skip("real widths are for a GPU")
    assert not any(differing(paddle_memory, *LARGE[name]))


def test_without_it_company_changes_rows(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FD_DSA_BATCH_INVARIANT")
    fixed_order.cache_clear()
    assert any(differing(paddle_memory, 70, lambda m, n: projection(m, n, "bfloat16", 1300)))
