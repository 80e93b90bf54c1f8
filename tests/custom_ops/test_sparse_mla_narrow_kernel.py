"""The kernel of sparse MLA for few heads through its C ABI on a GPU, against doubles."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fd_dsa import custom_ops
from fd_dsa.ops.sparse_mla import device
from fd_dsa.ops.sparse_mla.custom_op import MAX_SPLITS, NarrowAttention
from tests.custom_ops.adoption import adopted
from tests.kernel_memory import KernelMemory, open_memory
from tests.ops.tensor_core_case import RANK, SCALE, Case, make, widened

FP8 = "fp8_ds_mla"


@pytest.fixture(params=[pytest.param("torch", marks=pytest.mark.gpu)])
def kernel_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KernelMemory]:
    """Memory of a GPU alone: the kernel has no form for the host's."""
    from custom_ops.build_library import build_library

    memory = open_memory(request.param)
    with adopted(build_library(), monkeypatch, on_gpu=True):
        yield memory


@pytest.fixture
def attend(kernel_memory: KernelMemory) -> NarrowAttention:
    """The kernel."""
    return NarrowAttention(custom_ops.build().kernels)


def run(
    m: KernelMemory, attend: NarrowAttention, case: Case, dtype: str = "float32", splits: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel writes to poisoned memory."""
    num_tokens, num_heads, _ = case.q.shape
    out = m.poisoned((num_tokens, num_heads, RANK), dtype)
    lse = m.poisoned((num_tokens, num_heads), "float32")
    attend(*case.inputs(m), out, softmax_scale=case.scale, lse=lse, splits=splits)
    return m.get(out), m.get(lse)


@pytest.mark.parametrize(
    ("heads", "counts"),
    [
        (1, [65, 0]),
        (7, [31, 32, 33]),
        (8, [64, 0]),
        (12, [0, 1, 63, 64, 65, 130]),
        (16, [129]),
        (17, [5, 300]),
        (32, [127, 129, 0]),
    ],
)
def test_heads_and_edges_of_tiles(
    kernel_memory: KernelMemory, attend: NarrowAttention, heads: int, counts: list[int]
) -> None:
    case = make(FP8, counts, max(counts) + 3, heads=heads)
    case.check(*run(kernel_memory, attend, case))


@pytest.mark.parametrize("heads", [5, 16, 20])
@pytest.mark.parametrize("splits", [1, 2, 3, 8, MAX_SPLITS])
def test_splits(
    kernel_memory: KernelMemory, attend: NarrowAttention, heads: int, splits: int
) -> None:
    case = make(FP8, [0, 64, 65, 300, 700, 1], 700, heads=heads)
    case.check(*run(kernel_memory, attend, case, splits=splits))


@pytest.mark.parametrize("heads", [8, 16, 32])
@pytest.mark.parametrize("tokens", [1, 8, 140, 300])
def test_rows_of_serving(
    kernel_memory: KernelMemory, attend: NarrowAttention, heads: int, tokens: int
) -> None:
    if not kernel_memory.large:
        pytest.skip("a size for a GPU")
    case = make(FP8, [2048 - t for t in range(tokens)], 2048, heads=heads, num_slots=4096)
    case.check(*run(kernel_memory, attend, case))


@pytest.mark.parametrize("heads", [4, 16, 32])
@pytest.mark.parametrize("splits", [0, 1, 2])
def test_slots_without_a_place_are_skipped_anywhere(
    kernel_memory: KernelMemory, attend: NarrowAttention, heads: int, splits: int
) -> None:
    case = make(FP8, [640] * 5, 640, heads=heads)
    case.slots[0, [0, 1, 63, 64, 139]] = -1
    case.slots[1, :65] = [-1, -(2**31), 2**31 - 1, len(case.latents), -5] * 13
    case.slots[2, 10:] = len(case.latents)
    # whole tiles of none: more than are copied ahead, before, between and behind keys
    case.slots[3, :500], case.slots[4, 40:600] = -1, -1
    case.check(*run(kernel_memory, attend, case, splits=splits))


@pytest.mark.parametrize("heads", [8, 16, 32])
def test_bfloat16_is_the_float32_result_rounded(
    kernel_memory: KernelMemory, attend: NarrowAttention, heads: int
) -> None:
    case = make(FP8, [100, 0], 100, heads=heads)
    for splits in (1, 2):
        found, lse = run(kernel_memory, attend, case, "bfloat16", splits)
        whole, wanted = run(kernel_memory, attend, case, splits=splits)
        error = np.abs(widened(found) - whole)
        assert (error <= 2.0**-8 * np.abs(whole)).all()
        np.testing.assert_array_equal(lse, wanted)


@pytest.mark.parametrize("heads", [8, 16, 32])
def test_same_bits_every_time(
    kernel_memory: KernelMemory, attend: NarrowAttention, heads: int
) -> None:
    case = make(FP8, [500, 77], 500, heads=heads)
    for splits in (1, 2, 5):
        first = run(kernel_memory, attend, case, splits=splits)
        for one, other in zip(first, run(kernel_memory, attend, case, splits=splits), strict=True):
            np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_selected_code_that_is_no_number_spoils_its_own_rows(
    kernel_memory: KernelMemory, attend: NarrowAttention, code: int
) -> None:
    case = make(FP8, [5, 5], 5, heads=2)
    case.slots[1] = np.setdiff1d(case.slots, case.slots[0])[-1]
    case.cache[case.slots[0, 3], 400] = code
    found, lse = run(kernel_memory, attend, case)
    assert np.isnan(found[0]).all() and np.isnan(lse[0]).all()
    case.slots, case.q = case.slots[1:], case.q[1:]
    case.check(found[1:], lse[1:])


@pytest.mark.parametrize("power", [-60, 60])
def test_queries_outside_the_range_of_float16(
    kernel_memory: KernelMemory, attend: NarrowAttention, power: int
) -> None:
    case = make(FP8, [70], 70, heads=3)
    bits = case.q_bits.view(np.uint16)
    # one head far from the others, one of zeros
    bits[:, 1] += np.uint16((power % 512) << 7)
    bits[:, 2] = 0
    case.q = widened(bits.view(np.int16)).astype(np.float64)
    case.scale = 2.0**-power * SCALE if power > 0 else SCALE
    case.check(*run(kernel_memory, attend, case))


@pytest.mark.parametrize("power", [-100, 30, 100])
def test_scales_outside_the_range_of_float16(
    kernel_memory: KernelMemory, attend: NarrowAttention, power: int
) -> None:
    case = make(FP8, [200], 200, heads=3)
    scales = case.cache[:, RANK : RANK + 16].copy().view(np.float32) * np.float32(2.0**power)
    case.cache[:, RANK : RANK + 16] = scales.view(np.uint8)
    case.latents[:, :RANK] *= 2.0**power
    case.scale = SCALE * min(1.0, 2.0**-power)
    found, _ = run(kernel_memory, attend, case)
    exact = case.exact(0)
    assert np.linalg.norm(found[0] - exact) < 1e-3 * np.linalg.norm(exact)


def test_it_serves_where_it_agrees(kernel_memory: KernelMemory) -> None:
    assert isinstance(device.narrow_attention(kernel_memory.poisoned), NarrowAttention)
    [choice] = custom_ops.choices()
    assert (choice.operator, choice.serves) == ("sparse_mla", True), choice
