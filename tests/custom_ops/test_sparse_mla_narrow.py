"""What calls the kernel of sparse MLA for few heads: its arguments, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fd_dsa import custom_ops
from fd_dsa.errors import BackendUnavailable, DtypeError, LaunchError, ShapeError
from fd_dsa.ops.sparse_mla import device
from fd_dsa.ops.sparse_mla.custom_op import NarrowAttention
from tests.custom_ops.adoption import HostApi, adopted
from tests.custom_ops.building import host_library
from tests.kernel_memory import KernelMemory, open_memory
from tests.ops.tensor_core_case import RANK, make

FP8 = "fp8_ds_mla"


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
def attend(kernel_memory: KernelMemory) -> NarrowAttention:
    """What calls it."""
    return NarrowAttention(custom_ops.build().kernels)


def test_a_kernel_that_computes_something_else_does_not_serve(
    kernel_memory: KernelMemory, attend: NarrowAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NarrowAttention, "__call__", lambda *arguments, **options: None)
    assert device.narrow_attention(kernel_memory.poisoned) is None
    [choice] = custom_ops.choices()
    assert not choice.serves and "7 heads of the probe are off by" in choice.reason


def test_a_library_of_another_release_is_refused() -> None:
    class Old:
        @staticmethod
        def fd_dsa_sparse_mla_narrow_bytes() -> int:
            return 8

    with pytest.raises(BackendUnavailable, match="build it again"):
        NarrowAttention(Old())


def test_what_the_kernel_is_given(kernel_memory: KernelMemory, attend: NarrowAttention) -> None:
    m = kernel_memory
    case = make(FP8, [9, 3], 11, heads=5)
    q, cache, slots = case.inputs(m)
    pages = m.put(case.cache.reshape(4, 1, 64, -1))
    out, lse = m.poisoned((2, 5, RANK), "float32"), m.poisoned((2, 5), "float32")
    attend(q, pages, slots, out, softmax_scale=0.5, lse=lse, splits=3)
    assert m.get(out).reshape(-1)[:8].tolist() == [0.5, 2, 5, 11, 256, 0, 3, 1]
    attend(q, cache, slots, out, softmax_scale=0.25)
    assert m.get(out).reshape(-1)[:8].tolist() == [0.25, 2, 5, 11, 256, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"heads": 33}, ShapeError, "33 heads, allowed are 1 to 32"),
        ({"cache": "bfloat16"}, DtypeError, "cache: got dtype .*allowed is uint8"),
        ({"splits": 17}, ShapeError, "splits: got 17, allowed are 0 to 16"),
        ({"topk": 4}, ShapeError, "slots"),
        ({"transposed": True}, LaunchError, "out of shape .* is not contiguous"),
    ],
)
def test_what_it_refuses(
    kernel_memory: KernelMemory,
    attend: NarrowAttention,
    change: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    m, heads = kernel_memory, change.get("heads", 4)
    case = make(change.get("cache", FP8), [6, 2], 6, heads=heads)
    q, cache, slots = case.inputs(m)
    out = m.poisoned((2, heads, RANK), "float32")
    if "topk" in change:
        slots = m.put(case.slots[:1])
    if "transposed" in change:
        q, out = q[:, :4], m.poisoned((2, RANK, heads), "float32").transpose(1, 2)
    with pytest.raises(error, match=text):
        attend(q, cache, slots, out, softmax_scale=1.0, splits=change.get("splits", 0))
