"""GEMMs by cuBLASLt on a GPU against float64, of the operands as they are stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from fd_dsa.device.transfers import transfers_for
from fd_dsa.ops.cublaslt import Cublaslt, cublaslt_for
from fd_dsa.ops.cublaslt_library import fp8_unsupported_reason
from fd_dsa.ops.dense_kernels import padded_rows
from tests.kernel_memory import KernelMemory, open_memory
from tests.ops.e4m3 import E4M3_VALUES
from tests.reference.bfloat16 import upper_half, widened

# a result is rounded to bfloat16 once
BFLOAT16 = 2.0**-8
# of the sum of all terms' sizes: tensor cores add FP8 products to fewer bits than float32 has
FLOAT32_SUMS, FP8_SUMS = 1e-5, 2.0**-10
SIZES = [(136, 512), (576, 1536), (2240, 7168)]


@pytest.fixture(
    params=[
        pytest.param("torch", marks=pytest.mark.gpu),
        pytest.param("rig", marks=pytest.mark.gpu_rig),
    ]
)
def memory(request: pytest.FixtureRequest) -> KernelMemory:
    """CUDA memory."""
    opened = open_memory(request.param)
    if not opened.on_gpu:
        pytest.skip("cuBLASLt reads CUDA memory alone")
    return opened


def cublaslt(memory: KernelMemory) -> Cublaslt:
    """Return cuBLASLt on the memory's device."""
    return cublaslt_for(memory.put(np.zeros(1, np.float32)), memory.poisoned)


def values(found: np.ndarray) -> np.ndarray:
    """float64 values of float32, or of bfloat16 bits."""
    return (widened(found) if found.dtype == np.uint16 else found).astype(np.float64)


def check(found: np.ndarray, wanted: np.ndarray, allowed: np.ndarray) -> None:
    """Equal but for the errors that each value may have."""
    error = np.abs(values(found) - wanted)
    assert np.all(error <= allowed), error.max()


@pytest.mark.parametrize("rows", [1, 8, 13, 300])
@pytest.mark.parametrize("size", SIZES)
def test_linear(memory: KernelMemory, rows: int, size: tuple[int, int]) -> None:
    m, (outputs, inputs), rng = memory, size, np.random.default_rng(rows)
    arrays = [rng.standard_normal(shape, np.float32) for shape in ((rows, inputs), size)]
    x, weight = (upper_half(array).view(np.uint16) for array in arrays)
    out = m.poisoned((rows, outputs), "float32")
    cublaslt(m).linear(m.put(x, "bfloat16"), m.put(weight, "bfloat16"), out)
    left, right = values(x), values(weight)
    wanted, magnitude = left @ right.T, np.abs(left) @ np.abs(right).T
    check(m.get(out), wanted, FLOAT32_SUMS * magnitude)


class Fp8(NamedTuple):
    """Arguments of `fp8_linear`, and the values that they are."""

    operands: tuple[Any, ...]
    x: np.ndarray
    weight: np.ndarray

    def check(self, found: np.ndarray, num_tokens: int) -> None:
        """Equal in the rows of tokens."""
        x = self.x[:num_tokens]
        wanted, magnitude = x @ self.weight.T, np.abs(x) @ np.abs(self.weight).T
        check(found[:num_tokens], wanted, FP8_SUMS * magnitude + BFLOAT16 * np.abs(wanted))


def fp8(m: KernelMemory, num_tokens: int, size: tuple[int, int], seed: int = 0) -> Fp8:
    """Make operands whose scales differ by up to 2^8. Rows of padding are NaN."""
    rng, (outputs, inputs), rows = np.random.default_rng(seed), size, padded_rows(num_tokens)
    groups, blocks = inputs // 128, -(-outputs // 128)
    codes = [rng.integers(0, 0x60, shape) | rng.integers(0, 2, shape) << 7 for shape in
             ((rows, inputs), size)]  # fmt: skip
    codes[0][num_tokens:] = 0x7F
    codes_x, codes_w = (c.astype(np.uint8) for c in codes)
    scales_x, scales_w = (
        np.exp2(rng.integers(-8, 1, shape)).astype(np.float32)
        for shape in ((groups, rows), (blocks, groups))
    )
    operands = (
        *(m.put(codes_x), m.put(scales_x), m.put(codes_w), m.put(scales_w)),
        m.poisoned((rows, outputs), "bfloat16"),
    )
    x = E4M3_VALUES[codes_x] * np.repeat(scales_x.T, 128, axis=1).astype(np.float64)
    spread = np.repeat(np.repeat(scales_w, 128, axis=0)[:outputs], 128, axis=1)
    return Fp8(operands, x, E4M3_VALUES[codes_w] * spread.astype(np.float64))


def skip_without_block_scales(m: KernelMemory) -> None:
    reason = fp8_unsupported_reason(transfers_for(m.put(np.zeros(1, np.float32))).traits.capability)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("num_tokens", [1, 8, 12, 13, 20, 128, 300])
@pytest.mark.parametrize("size", SIZES)
def test_fp8_linear(memory: KernelMemory, num_tokens: int, size: tuple[int, int]) -> None:
    skip_without_block_scales(memory)
    case = fp8(memory, num_tokens, size)
    cublaslt(memory).fp8_linear(*case.operands)
    case.check(memory.get(case.operands[4]), num_tokens)


def test_fp8_linear_by_group(memory: KernelMemory) -> None:
    """Two groups of inputs, each with a weight of its own."""
    skip_without_block_scales(memory)
    m, parts = memory, [fp8(memory, 301, (256, 1024), seed=n) for n in range(2)]
    x, scales_x, weight, scales_w = (
        m.put(np.concatenate([m.get(part.operands[i]) for part in parts], axis=int(i == 0)))
        for i in range(4)
    )
    out = m.poisoned((padded_rows(301), 512), "bfloat16")
    cublaslt(m).fp8_linear(x, scales_x, weight, scales_w, out)
    for part, found in zip(parts, np.split(m.get(out), 2, axis=1), strict=True):
        part.check(found, 301)


def test_repeats_give_the_same_bits(memory: KernelMemory) -> None:
    skip_without_block_scales(memory)
    lt, size = cublaslt(memory), (2240, 7168)
    for num_tokens in (8, 128):
        case = fp8(memory, num_tokens, size)
        found = []
        for _ in range(20):
            lt.fp8_linear(*case.operands)
            found.append(memory.get(case.operands[4]))
        case.check(found[0], num_tokens)
        assert all(np.array_equal(found[0], other) for other in found)


@pytest.mark.gpu
def test_captured_with_changed_inputs() -> None:
    import torch

    m = open_memory("torch")
    skip_without_block_scales(m)
    lt, (first, second) = cublaslt(m), (fp8(m, 13, (576, 1536), seed=n) for n in range(2))
    stream, graph, other = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        lt.fp8_linear(*first.operands)
    # the first capture of a process makes the generator's tensors
    with torch.cuda.graph(other, stream=stream):
        pass
    m.sync()
    before = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph, stream=stream):
        lt.fp8_linear(*first.operands)
    assert torch.cuda.memory_allocated() == before
    for target, source in zip(first.operands[:4], second.operands[:4], strict=True):
        target.copy_(source)
    first.operands[4].zero_()
    graph.replay()
    second.check(m.get(first.operands[4]), 13)
