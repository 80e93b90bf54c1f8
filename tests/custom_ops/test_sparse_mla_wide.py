"""What calls the kernel of sparse MLA for many heads: its arguments, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fd_dsa import custom_ops
from fd_dsa.errors import BackendUnavailable, LaunchError, ShapeError
from fd_dsa.ops.sparse_mla import device
from fd_dsa.ops.sparse_mla.custom_op import WideAttention
from tests.custom_ops.adoption import HostApi, adopted
from tests.custom_ops.building import host_library
from tests.kernel_memory import KernelMemory, open_memory
from tests.ops.tensor_core_case import RANK, make


@pytest.fixture(params=[pytest.param("interpreter", marks=pytest.mark.triton)])
def kernel_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KernelMemory]:
    """Host memory, and host code behind the C ABI that answers with the numbers it was given."""
    memory = open_memory(request.param)
    monkeypatch.setattr("fd_dsa.ops.sparse_mla.custom_op.api_for_type", lambda kind: HostApi())
    monkeypatch.setattr("fd_dsa.ops.sparse_mla.device.INTERPRETING", False)
    with adopted(host_library(), monkeypatch, on_gpu=False):
        yield memory


@pytest.fixture
def attend(kernel_memory: KernelMemory) -> WideAttention:
    """What calls it."""
    return WideAttention(custom_ops.build().kernels)


def test_a_kernel_that_computes_something_else_does_not_serve(
    kernel_memory: KernelMemory, attend: WideAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WideAttention, "__call__", lambda *arguments, **options: None)
    assert device.wide_attention(kernel_memory.poisoned) is None
    [choice] = custom_ops.choices()
    assert choice.operator == "sparse_mla_wide"
    assert not choice.serves and "64 heads of the probe are off by" in choice.reason


def test_the_probe_knows_what_is_right(
    kernel_memory: KernelMemory, attend: WideAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fd_dsa.ops.sparse_mla.tensor_core import attend_on_tensor_cores

    def triton(self: Any, *arguments: Any, **options: Any) -> None:
        attend_on_tensor_cores(*arguments, **options)

    monkeypatch.setattr(WideAttention, "__call__", triton)
    assert isinstance(device.wide_attention(kernel_memory.poisoned), WideAttention)


def test_a_library_of_another_release_is_refused() -> None:
    class Old:
        @staticmethod
        def fd_dsa_sparse_mla_wide_bytes() -> int:
            return 8

    with pytest.raises(BackendUnavailable, match="build it again"):
        WideAttention(Old())


def test_what_the_kernel_is_given(kernel_memory: KernelMemory, attend: WideAttention) -> None:
    m, case = kernel_memory, make("fp8_ds_mla", [9, 3], 11, heads=70)
    q, _, slots = case.inputs(m)
    pages = m.put(case.cache.reshape(4, 1, 64, -1))
    out, lse = m.poisoned((2, 70, RANK), "float32"), m.poisoned((2, 70), "float32")
    attend(q, pages, slots, out, softmax_scale=0.5, lse=lse, splits=4)
    assert m.get(out).reshape(-1)[:8].tolist() == [0.5, 2, 70, 11, 256, 1, 0, 4]
    other = make("bfloat16", [5], 6, heads=70)
    attend(*other.inputs(m), out[:1], softmax_scale=0.25)
    assert m.get(out).reshape(-1)[:8].tolist() == [0.25, 1, 70, 6, 256, 0, 0, 0]


@pytest.mark.parametrize(
    ("heads", "faster", "slower"),
    [(64, (8, 16, 33, 128, 8192), (1, 7, 17, 32)), (128, (4, 8, 17, 32, 1024), (1, 3, 9, 16))],
)
def test_where_it_is_faster(heads: int, faster: tuple[int, ...], slower: tuple[int, ...]) -> None:
    assert all(WideAttention.is_faster(tokens, heads) for tokens in faster)
    assert not any(WideAttention.is_faster(tokens, heads) for tokens in slower)
    assert not WideAttention.is_faster(8192, 32)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"splits": 3}, ShapeError, "splits: got 3, allowed are 0, 1, 2, 4, 8, 16"),
        ({"topk": 4}, ShapeError, "slots"),
        ({"transposed": True}, LaunchError, "out of shape .* is not contiguous"),
    ],
)
def test_what_it_refuses(
    kernel_memory: KernelMemory,
    attend: WideAttention,
    change: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    m = kernel_memory
    case = make("fp8_ds_mla", [6, 2], 6, heads=64)
    q, cache, slots = case.inputs(m)
    out = m.poisoned((2, 64, RANK), "float32")
    before = m.get(out)
    if "topk" in change:
        slots = m.put(case.slots[:1])
    if "transposed" in change:
        out = m.poisoned((2, RANK, 64), "float32").transpose([0, 2, 1])
    with pytest.raises(error, match=text):
        attend(q, cache, slots, out, softmax_scale=1.0, splits=change.get("splits", 0))
    assert "transposed" in change or np.array_equal(m.get(out), before)
