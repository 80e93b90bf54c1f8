"""Both projections of the indexer in one launch: the values of float64, whatever the tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks._projection_tilings import SPLIT, WHOLE
from fd_dsa.ops.indexer_projection import project_on_host as project_indexer
from tests.kernel_memory import KernelMemory, ending_midway
from tests.reference.bfloat16 import ref_array, upper_half, widened

# tokens, hidden size, width of a key, heads: no tile is full, and what V3.2 and GLM-5 have
SMALL = ((1, 40, 24, 5), (33, 72, 128, 64), (5, 96, 128, 32))
LARGE = ((1, 7168, 128, 64), (64, 7168, 128, 64), (257, 7168, 128, 64), (130, 6144, 128, 32))


def case(num_tokens: int, hidden: int, width: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and the two weights side by side, sums near 1."""
    rng = np.random.default_rng(num_tokens)
    x = rng.standard_normal((num_tokens, hidden), np.float32)
    weight = rng.standard_normal((hidden, width + heads), np.float32) / hidden**0.5
    return x, weight.astype(np.float32)


def dirty_scratch(m: KernelMemory) -> Any:
    """Scratch memory as an earlier launch may leave it: counters at zero, sums of any value."""
    from fd_dsa.ops.indexer_projection.triton_kernel import NUM_PARTIALS
    from fd_dsa.ops.split_sums import NUM_COUNTERS

    values = np.zeros(NUM_COUNTERS), np.full(NUM_PARTIALS, np.nan)
    return m.put(np.concatenate(values).astype(np.float32))


def in_memory(m: KernelMemory, array: np.ndarray, dtype: str) -> Any:
    """A tensor of float32 or of bfloat16 numbers."""
    return m.put(upper_half(array).view(np.uint16) if dtype == "bfloat16" else array, dtype)


def in_kernel(
    m: KernelMemory,
    x: np.ndarray,
    weight: np.ndarray,
    width: int,
    dtype: str = "float32",
    scratch: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Launch on slices of one weight, to poisoned memory. Return keys as float32."""
    from fd_dsa.ops.indexer_projection.triton_kernel import project_indexer as launch

    put = [in_memory(m, array, dtype) for array in (x, weight)]
    heads = weight.shape[1] - width
    out = m.poisoned((len(x), width), dtype), m.poisoned((len(x), heads), "float32")
    both = put[1][:, :width], put[1][:, width:]
    assert launch(put[0], *both, out, scratch) is out
    keys = m.get(out[0])
    return widened(keys) if dtype == "bfloat16" else keys, m.get(out[1])


def shapes(m: KernelMemory) -> tuple[tuple[int, int, int, int], ...]:
    """Sizes that this memory has the time for."""
    return SMALL + LARGE if m.large else SMALL


def close(found: tuple[np.ndarray, ...], wanted: np.ndarray) -> None:
    np.testing.assert_allclose(np.concatenate(found, 1), wanted, rtol=0, atol=2e-5)


def test_values_of_float32(kernel_memory: KernelMemory) -> None:
    for shape in shapes(kernel_memory):
        x, weight = case(*shape)
        if len(x) > 1:
            # values that are not finite stay in their rows
            x[0, 3], x[len(x) // 2, -1] = np.nan, np.inf
        close(in_kernel(kernel_memory, x, weight, shape[2]), x.astype(np.float64) @ weight)


def test_values_of_bfloat16_are_summed_in_float32(kernel_memory: KernelMemory) -> None:
    for shape in shapes(kernel_memory):
        x, weight = (ref_array(array) for array in case(*shape))
        keys, weights = in_kernel(kernel_memory, x, weight, shape[2], "bfloat16")
        wanted = x.astype(np.float64) @ weight
        # tensor cores cut each addition of 8 products off at the last bit, 2**-22 of sums below 4
        atol = 2e-5 + shape[1] / 8 * 2**-22
        # keys are rounded once, head weights not at all
        np.testing.assert_allclose(keys, wanted[:, : shape[2]], rtol=2**-8, atol=atol)
        np.testing.assert_allclose(weights, wanted[:, shape[2] :], rtol=0, atol=atol)
        # of sums in bfloat16 not even the last would pass
        rounded = ref_array(wanted[:, shape[2] :].astype(np.float32))
        assert np.abs(rounded - wanted[:, shape[2] :]).max() > 3 * atol


def test_every_tiling_gives_the_same_values(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops.indexer_projection import triton_kernel

    m = kernel_memory
    x, weight = case(*(LARGE[2] if m.large else SMALL[1]))
    wanted = x.astype(np.float64) @ weight
    tensors = m.put(x), m.put(weight[:, :128].copy()), m.put(weight[:, 128:].copy())
    scratch = dirty_scratch(m)
    for tiling in (*SPLIT, *WHOLE):
        out = m.poisoned((len(x), 128), "float32"), m.poisoned((len(x), 64), "float32")
        arguments = triton_kernel.kernel_arguments(*tensors, out, scratch)
        grid, options = triton_kernel.launch_options(arguments, tiling)
        triton_kernel.project_indexer_kernel[grid](**arguments, **options)
        close((m.get(out[0]), m.get(out[1])), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_never_depend_on_who_arrives_last(kernel_memory: KernelMemory, dtype: str) -> None:
    m, scratch = kernel_memory, dirty_scratch(kernel_memory)
    shape = LARGE[1] if m.large else SMALL[0]
    x, weight = (ref_array(array) for array in case(*shape))

    def bits() -> bytes:
        found = in_kernel(m, x, weight, shape[2], dtype, scratch)
        return b"".join(result.tobytes() for result in found)

    first = bits()
    assert all(bits() == first for _ in range(100))


def test_counters_are_zero_after_steps_of_any_length(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops.split_sums import NUM_COUNTERS

    m, shared = kernel_memory, dirty_scratch(kernel_memory)
    lengths = (1, 64, 17, 512, 128, 300, 513, 1) if m.large else (1, 33, 5, 17, 1)
    hidden, width, heads = (7168, 128, 64) if m.large else (72, 40, 5)
    for num_tokens in lengths:
        x, weight = case(num_tokens, hidden, width, heads)
        alone = in_kernel(m, x, weight, width, scratch=dirty_scratch(m))
        found = in_kernel(m, x, weight, width, scratch=shared)
        for result, wanted in zip(found, alone, strict=True):
            assert result.tobytes() == wanted.tobytes()
        assert not m.get(shared)[:NUM_COUNTERS].any(), num_tokens


def test_a_launch_that_ends_midway_leaves_no_counts(
    kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SMALL[1]
    x, weight = case(*shape)
    with ending_midway(kernel_memory, monkeypatch):
        in_kernel(kernel_memory, x, weight, shape[2])
    found = in_kernel(kernel_memory, x, weight, shape[2])
    close(found, x.astype(np.float64) @ weight)


def test_captured_before_the_first_run_it_does_without_scratch(
    kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fd_dsa.device.transfers import Transfers
    from fd_dsa.ops import split_sums as scratch

    monkeypatch.setattr(Transfers, "is_capturing", lambda self: True)
    monkeypatch.setattr(scratch, "SCRATCH", {})
    x, weight = case(*SMALL[1])
    close(in_kernel(kernel_memory, x, weight, 128), x.astype(np.float64) @ weight)
    assert "run a step before the capture" in caplog.text and not scratch.SCRATCH


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_weights_alone_are_those_beside_keys(kernel_memory: KernelMemory, dtype: str) -> None:
    from fd_dsa.ops.indexer_projection.triton_kernel import project_indexer as launch

    m = kernel_memory
    for num_tokens, hidden, width, heads in shapes(m):
        x, weight = (ref_array(array) for array in case(num_tokens, hidden, width, heads))
        _, wanted = in_kernel(m, x, weight, width, dtype)
        arrays = x, weight[:, width:].copy()
        given, own = (in_memory(m, array, dtype) for array in arrays)
        out = m.poisoned((num_tokens, width), dtype), m.poisoned((num_tokens, heads), "float32")
        before = m.get(out[0]).tobytes()
        assert launch(given, None, own, out) is out
        assert m.get(out[0]).tobytes() == before
        np.testing.assert_array_equal(m.get(out[1]), wanted)


def test_no_tokens(kernel_memory: KernelMemory) -> None:
    keys, weights = in_kernel(kernel_memory, *case(0, 40, 24, 5), 24)
    assert keys.shape == (0, 24) and weights.shape == (0, 5)


def test_on_a_cpu_it_is_two_products() -> None:
    x, weight = case(5, 40, 24, 5)
    wanted = x.astype(np.float64) @ weight
    wk, weights_proj = weight[:, :24].copy(), weight[:, 24:].copy()
    paddle = pytest.importorskip("paddle")
    parameters = paddle.to_tensor(wk), paddle.to_tensor(weights_proj)
    out = np.zeros((5, 24), np.float32), np.zeros((5, 5), np.float32)
    assert project_indexer(x, *parameters, out) is out
    close(out, wanted)
    keys, weights = out[0].copy(), out[1].copy()
    out[1][:] = 0
    assert project_indexer(x, None, parameters[1], out) is out
    np.testing.assert_array_equal(out[0], keys)
    np.testing.assert_array_equal(out[1], weights)
