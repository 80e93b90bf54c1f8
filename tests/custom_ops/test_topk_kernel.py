"""The kernel of top-k through its C ABI on a GPU: sizes, scores and repeats of real serving."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa import custom_ops
from tests.custom_ops.topk_rows import KINDS, best, call, rows_of, scores_of
from tests.kernel_memory import KernelMemory
from tests.ops.test_many_scores import K, best_positions, scored

KERNELS = "topk"
POISON = -91
# the edges of what registers hold, of a tile, of a window of positions, and real lengths
WIDTHS = (1, 3, 2047, 2049, 4093, 4095, 4096, 4097, 8189, 8191, 8192, 8193, 16385, 32768, 65537)


def choose(m: KernelMemory, scores: np.ndarray, lengths: Any, k: int, offset: int = 0) -> Any:
    """int32 [rows, k] by the kernel, from rows that lie apart and begin at an offset."""
    rows, width = scores.shape
    gap = 5 if offset else 0
    memory = np.full(rows * (width + gap) + 8, np.nan, np.float32)
    memory[offset : offset + rows * (width + gap)].reshape(rows, -1)[:, :width] = scores
    logits, counts = m.put(memory), m.put(np.array(lengths, np.int32))
    out = m.put(np.full((rows, k), POISON, np.int32))
    arguments = rows_of(logits, counts, out, width, width + gap)
    arguments.logits += 4 * offset
    call(custom_ops.build().kernels, arguments)
    return m.get(out)


def lengths_for(rows: int, width: int, k: int) -> np.ndarray:
    """Whole rows, shorter ones, those around k, none, and numbers that no row has."""
    some = [width, width - 1, width // 2, k, k + 1, k - 1, 0, 1, width + 9, -1]
    return np.resize(np.array(some, np.int32), rows)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths(gpu_memory: KernelMemory, width: int) -> None:
    scores = scores_of("few values", 10, width, seed=width)
    for k in (1, 2, 2047, 2048, 2049, 3000):
        for offset in (0, 1, 2, 3):
            lengths = lengths_for(10, width, k)
            found = choose(gpu_memory, scores, lengths, k, offset)
            np.testing.assert_array_equal(found, best(scores, lengths, k), err_msg=f"{k} {offset}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "width"),
    [(1, 4096), (3, 8192), (1, 16384), (9, 32768), (40, 65536), (2, 131072), (300, 9000)],
)
def test_kinds(gpu_memory: KernelMemory, kind: str, rows: int, width: int) -> None:
    if not gpu_memory.large:
        pytest.skip("sizes of serving")
    scores, lengths = scores_of(kind, rows, width, seed=3), lengths_for(rows, width, 2048)
    found = choose(gpu_memory, scores, lengths, 2048)
    np.testing.assert_array_equal(found, best(scores, lengths, 2048))


@pytest.mark.parametrize("k", [7, 2048, 6000, 40_000])
def test_rows_of_a_million(gpu_memory: KernelMemory, k: int) -> None:
    if not gpu_memory.large:
        pytest.skip("sizes of serving")
    for kind in ("normal", "zeros", "recent"):
        scores = scores_of(kind, 2, 1_000_003, seed=k)
        found = choose(gpu_memory, scores, [1_000_003, 600_000], k)
        np.testing.assert_array_equal(found, best(scores, [1_000_003, 600_000], k))


def test_many_rows_of_all_lengths(gpu_memory: KernelMemory) -> None:
    if not gpu_memory.large:
        pytest.skip("sizes of serving")
    scores = scores_of("normal", 3000, 9000, seed=0)
    lengths = np.random.default_rng(0).integers(0, 9001, 3000)
    found = choose(gpu_memory, scores, lengths, 512)
    np.testing.assert_array_equal(found, best(scores, lengths, 512))


@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (1, 131072), (8, 16384), (64, 65536)])
@pytest.mark.parametrize("kind", ["normal", "zeros", "few values"])
def test_ten_thousand_times_the_same_bits(
    gpu_memory: KernelMemory, kind: str, rows: int, width: int
) -> None:
    import torch

    if not gpu_memory.large:
        pytest.skip("sizes of serving")
    scores, lengths = scores_of(kind, rows, width, seed=5), np.full(rows, width)
    first = gpu_memory.put(best(scores, lengths, 2048))
    logits, counts = gpu_memory.put(scores), gpu_memory.put(lengths.astype(np.int32))
    out, kernels = torch.empty_like(first), custom_ops.build().kernels
    arguments = rows_of(logits, counts, out, width, width)
    differing = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(10_000):
        out.fill_(POISON)
        call(kernels, arguments, torch.cuda.current_stream().cuda_stream)
        differing += (out != first).any()
    assert int(differing) == 0


def test_a_graph_sees_lengths_of_its_replay(gpu_memory: KernelMemory) -> None:
    import torch

    width, rows, k = 20_000, 6, 2048
    scores = scores_of("normal", rows, width, seed=8)
    logits, out = gpu_memory.put(scores), gpu_memory.put(np.zeros((rows, k), np.int32))
    counts, kernels = gpu_memory.put(np.zeros(rows, np.int32)), custom_ops.build().kernels
    arguments = rows_of(logits, counts, out, width, width)
    call(kernels, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(kernels, arguments, torch.cuda.current_stream().cuda_stream)
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(0, width + 1, rows).astype(np.int32)
        counts.copy_(torch.from_numpy(lengths))
        out.fill_(POISON)
        graph.replay()
        np.testing.assert_array_equal(gpu_memory.get(out), best(scores, lengths, k))


@pytest.mark.slow
def test_more_scores_than_31_bits_count(gpu_memory: KernelMemory) -> None:
    if not gpu_memory.large:
        pytest.skip("sizes of serving")
    m, (step, logits) = gpu_memory, scored(gpu_memory)
    width = logits.shape[1]
    counts = m.put(step.window.astype(np.int32))
    out = m.put(np.full((step.num_tokens, K), POISON, np.int32))
    call(custom_ops.build().kernels, rows_of(logits, counts, out, width, width))
    found = m.get(out)
    for token, positions in best_positions(step).items():
        assert found[token].tolist() == positions
