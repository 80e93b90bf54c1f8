"""The grouped GEMM of experts by the kernel of custom_ops/, against sums in float64.

On a GPU, in Paddle's memory, and on the CPU with emulated threads; see test_sparse_mla_kernel.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.errors import DeviceError, LaunchError
from fd_dsa.ops import expert_gemm_cuda
from fd_dsa.ops.expert_gemm import expert_gemm
from fd_dsa.ops.expert_gemm_cuda import ExpertGemm, kernel_for, suits
from fd_dsa.ops.expert_pairs import group_pairs
from fd_dsa.ops.split_sums import Tiling
from fd_dsa.tensor import Fp8Rows
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8
from tests.ops.block_fp8 import put_pair
from tests.ops.test_expert_kernels import Operands, choices

KERNELS = "expert_gemm"


@pytest.fixture
def launches(
    hopper_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch, count_calls: Any
) -> list[int]:
    """Number of tokens of each call of the kernel, which serves any number of pairs."""
    monkeypatch.setattr(expert_gemm_cuda, "MANY_PAIRS", 0)
    calls: list[int] = count_calls(ExpertGemm, lambda x, weight, pairs, *rest: pairs.shape[1])
    return calls


# one tile and several of an expert, at both sides of 64 and 128 rows; experts without a token; more
# row tiles of an expert than run beside each other; one, two and three blocks of columns
CASES = [
    ("random", 1, 1, 3, 128, 128),
    ("one for all", 64, 1, 3, 256, 384),
    ("one for all", 129, 2, 3, 640, 256),
    ("random", 90, 2, 3, 768, 128),
    ("padded", 120, 5, 6, 384, 256),
    ("one for all", 1100, 1, 2, 128, 384),
    ("random", 20, 3, 70, 128, 128),
]
LARGE = [
    ("random", 300, 8, 256, 256, 256),
    ("padded", 700, 2, 5, 2048, 384),
    ("one for all", 2300, 1, 8, 512, 512),
]


def cases(m: KernelMemory, number: int) -> list[tuple[Any, ...]]:
    return [CASES[number]] if number < len(CASES) else LARGE if m.large else []


def written(m: KernelMemory, found: Any, ids: np.ndarray) -> list[np.ndarray]:
    """The bits of all rows that pairs with an expert have."""
    live = ids.ravel() >= 0
    if isinstance(found, Fp8Rows):
        return [m.get(found.codes)[live], m.get(found.scales)[:, : ids.size][:, live]]
    return [m.get(found)[live]]


# on emulated threads these take seconds: scales that are no powers of two are few
FORMS = [(n, rounds) for n in range(len(CASES) + 1) for rounds in (None, True)]
FORMS += [(0, False), (3, False), (len(CASES), False)]


@pytest.mark.parametrize(("number", "round_scales"), FORMS)
def test_every_pair_meets_its_expert(
    paddle_memory: KernelMemory, launches: list[int], number: int, round_scales: bool | None
) -> None:
    """`round_scales` None: not gated, and a row for each pair."""
    m, gated = paddle_memory, round_scales is not None
    for which, num_tokens, top_k, experts, width, columns in cases(m, number):
        ids = choices(which, num_tokens, top_k, experts)
        lists = group_pairs(m.put(ids), experts)
        rows, of_expert = (num_tokens, 2 * columns) if gated else (ids.size, columns)
        case = Operands(m, "uint8", rows, of_expert, width, experts)
        options = {"top_k": top_k, "gated": gated, "round_scales": round_scales}
        found = expert_gemm(case.x, case.weight, *lists, **options)
        assert launches.pop() == num_tokens and not launches
        if round_scales is None:
            case.check_down(found, ids)
        else:
            case.check_gated(found, ids, round_scales)
        again = expert_gemm(case.x, case.weight, *lists, **options)
        assert launches.pop() == num_tokens
        for one, other in zip(written(m, found, ids), written(m, again, ids), strict=True):
            np.testing.assert_array_equal(one, other)


def test_rows_without_an_expert_are_not_written(
    paddle_memory: KernelMemory, launches: list[int]
) -> None:
    m, ids = paddle_memory, choices("padded", 70, 2)
    pairs, counts = group_pairs(m.put(ids), 6)
    case = Operands(m, "uint8", 70, 512, 256)
    kernel = kernel_for(case.x.codes)
    assert kernel is not None
    out = Fp8Rows(m.poisoned((140, 256), "uint8"), m.poisoned((2, 140), "float32"))
    kernel(case.x, case.weight, pairs, counts, out, round_scales=True)
    case.check_gated(out, ids, round_scales=True)
    gone = ids.ravel() < 0
    assert (m.get(out.codes)[gone] == 0xA5).all()
    assert (m.get(out.scales).view(np.uint32)[:, gone] == 0xA5A5A5A5).all()


def test_special_values(paddle_memory: KernelMemory, launches: list[int]) -> None:
    """A NaN stays in its row, a group of zeros has the smallest scale."""
    m, width = paddle_memory, 128
    rng = np.random.default_rng(0)
    codes, scales = block_fp8.activations(rng, 5, width)
    codes[1, 7], codes[3] = 0x7F, 0
    weight = block_fp8.weight(rng, 1, 256, width)
    lists = group_pairs(m.put(np.zeros((5, 1), np.int32)), 1)
    weight_pair = put_pair(m, weight)[:2]
    found = expert_gemm(
        put_pair(m, (codes, scales)), weight_pair, *lists, top_k=1, gated=True, round_scales=False
    )
    made, made_scales = m.get(found.codes), m.get(found.scales)[0, :5]
    assert (made[1] & 0x7F == 0x7F).all() and (made[3] & 0x7F == 0).all()
    assert made_scales[1] == made_scales[3] == np.float32(1e-12)
    assert not (made[[0, 2, 4]] & 0x7F == 0x7F).any()


def test_a_tiling_leaves_it_to_triton(paddle_memory: KernelMemory, launches: list[int]) -> None:
    m, ids = paddle_memory, choices("random", 9, 2)
    lists = group_pairs(m.put(ids), 6)
    case = Operands(m, "uint8", 18, 128, 128)
    found = expert_gemm(case.x, case.weight, *lists, top_k=2, tiling=Tiling(32, 64, 4, 3))
    case.check_down(found, ids)
    # sizes that the kernel does not take
    case = Operands(m, "uint8", 18, 130, 136)
    case.check_down(expert_gemm(case.x, case.weight, *lists, top_k=2), ids)
    assert not launches


def test_what_the_launcher_refuses(paddle_memory: KernelMemory, launches: list[int]) -> None:
    m = paddle_memory
    kernel = kernel_for(m.poisoned((1,), "uint8"))
    assert kernel is not None

    def call(width: int, columns: int, out: Any = None, experts: int = 1) -> None:
        x = Fp8Rows(m.poisoned((4, width), "uint8"), m.poisoned((1, 8), "float32"))
        weight = m.poisoned((experts, columns, width), "uint8"), m.poisoned((1,), "float32")
        lists = m.poisoned((experts, 4), "int32"), m.poisoned((experts,), "int32")
        out = m.poisoned((4, columns), "bfloat16") if out is None else out
        kernel(x, weight, *lists, out, round_scales=False)

    for sizes in ((100, 128), (128, 64), (192, 128)):
        with pytest.raises(DeviceError, match="fd_dsa_expert_gemm_cuda: CUDA error"):
            call(*sizes)
    with pytest.raises(DeviceError, match="CUDA error"):
        call(128, 128, experts=1025)
    with pytest.raises(LaunchError, match="out is not aligned to 16 bytes"):
        call(128, 128, m.poisoned((513,), "bfloat16")[1:].reshape([4, 128]))


def test_what_suits_it() -> None:
    # gate_up and down of 8,192 tokens
    assert suits(8192, 65536, 256, 2048, 7168) and suits(65536, 65536, 256, 7168, 2048)
    assert not suits(8192, 65536, 256, 2048, 7168 + 64) and not suits(8192, 65536, 256, 2112, 7168)
    assert not suits(512, 31 * 256, 256, 2048, 7168) and suits(1024, 32 * 256, 256, 2048, 7168)
    assert not suits(1024, 2**20, 2048, 128, 128) and not suits(2**29, 2**29, 8, 128, 128)


FAULTS = {
    "columns of the gate twice": ("tile.group + which * blocks", "tile.group"),
    "columns of the other block": ("(1 + kBlock) * kOperand", "(2 - kBlock) * kOperand"),
    "no wait for a GEMM": ("wgmma_wait<0>();\n    pin(part);\n    add<0>", "add<0>"),
    "scales of another group": ("scale += job.x_stride;", "scale += 0 * job.x_stride;"),
    "a scale of other columns": ("first_scale = load_shared_float(scales + kWeightScales)",
                                 "first_scale = load_shared_float(scales + kWeightScales + 4)"),
    "the largest of two lanes": ("top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));", ""),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(
    assert_fault_shows: Callable[..., None], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(expert_gemm_cuda, "MANY_PAIRS", 0)
    assert_fault_shows(check_both_gemms, f"{KERNELS}.cu", *FAULTS[fault])


def check_both_gemms(m: KernelMemory) -> None:
    """Assert results of both GEMMs of experts with an odd number of blocks of columns."""
    ids = choices("padded", 90, 2, 3)
    lists = group_pairs(m.put(ids), 3)
    case = Operands(m, "uint8", 90, 2 * 384, 384, 3)
    found = expert_gemm(case.x, case.weight, *lists, top_k=2, gated=True, round_scales=True)
    case.check_gated(found, ids, round_scales=True)
    case = Operands(m, "uint8", 180, 384, 384, 3)
    case.check_down(expert_gemm(case.x, case.weight, *lists, top_k=2), ids)
