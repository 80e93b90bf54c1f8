"""Launches of the sparse MLA kernels: arguments, errors and the self-check."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fd_dsa import custom_ops
from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.ops.mla.custom_op import (
    CustomAttention,
    NarrowAttention,
    SparseMla,
    WideAttention,
    kind_for,
)
from fd_dsa.ops.mla.records import Dequantized
from fd_dsa.ops.providers import CUSTOM_OP, TENSOR_CORE
from tests.kernel_memory import KernelMemory
from tests.ops.tensor_core_case import RANK, make

KERNELS = "sparse_mla"
FP8 = "fp8_ds_mla"
KINDS = [NarrowAttention, WideAttention]
HEADS = {NarrowAttention: 5, WideAttention: 70}


class Recording:
    """A library whose launchers keep the structures that they are called with."""

    fd_dsa_sparse_mla_bytes = staticmethod(lambda: ctypes.sizeof(SparseMla))

    def __init__(self) -> None:
        self.jobs: list[SparseMla] = []

    def launch(self, job: Any, stream: Any) -> int:
        self.jobs.append(SparseMla.from_buffer_copy(job._obj))
        return 0

    fd_dsa_sparse_mla_narrow_cuda = fd_dsa_sparse_mla_wide_cuda = launch

    def numbers(self, *names: str) -> list[float]:
        """Fields of the last structure."""
        return [getattr(self.jobs[-1], name) for name in names]


GIVEN = ("softmax_scale", "num_tokens", "num_heads", "topk", "num_slots", "is_fp8")
GIVEN += ("out_is_bfloat16", "splits")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_that_computes_something_else_does_not_serve(
    emulated_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch, kind: type[CustomAttention]
) -> None:
    from fd_dsa.ops.mla.tensor_core import select_attention

    monkeypatch.setattr(kind, "__call__", lambda *arguments, **options: None)
    types = "bfloat16", FP8, RANK, 64, 90
    choice = select_attention("gpu", HEADS[kind], *types, emulated_memory.poisoned)
    assert choice.provider == TENSOR_CORE
    heads = kind.probed_heads[0]
    assert f"fp8_ds_mla, {heads} heads: outputs of token 0 are off by" in choice.rejected[CUSTOM_OP]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("old", [{}, {"fd_dsa_sparse_mla_bytes": lambda: 8}])
def test_a_library_of_another_release_is_refused(
    kind: type[CustomAttention], old: dict[str, Any]
) -> None:
    with pytest.raises(BackendUnavailable, match="build it again"):
        kind(SimpleNamespace(**old))


@pytest.mark.parametrize(
    ("kind", "cache_dtype"),
    [(NarrowAttention, FP8), (WideAttention, FP8), (WideAttention, "bfloat16")],
)
def test_what_the_kernel_is_given(
    emulated_memory: KernelMemory, kind: type[CustomAttention], cache_dtype: str
) -> None:
    m, heads, kernels = emulated_memory, HEADS[kind], Recording()
    attend, is_fp8 = kind(kernels), cache_dtype == FP8
    case = make(cache_dtype, [9, 3], 11, heads=heads)
    q, cache, slots = case.inputs(m)
    pages = cache.reshape([4, 1, 64, -1])
    out, lse = m.poisoned((2, heads, RANK), "float32"), m.poisoned((2, heads), "float32")
    attend(q, pages, slots, out, softmax_scale=0.5, lse=lse, splits=4)
    assert kernels.numbers(*GIVEN) == [0.5, 2, heads, 11, 256, is_fp8, 0, 4]
    tensors = {"q": q, "cache": pages, "slots": slots, "out": out, "lse": lse}
    assert kernels.numbers(*tensors) == [tensor.data_ptr() for tensor in tensors.values()]
    narrow = m.poisoned((2, heads, RANK), "bfloat16")
    attend(q, cache, slots, narrow, softmax_scale=0.25)
    assert kernels.numbers(*GIVEN) == [0.25, 2, heads, 11, 256, is_fp8, 1, 0]
    assert kernels.numbers("lse", "dequantized") == [None, None]


def test_what_it_is_given_of_dequantized_records(emulated_memory: KernelMemory) -> None:
    m, kernels = emulated_memory, Recording()
    case, out = make(FP8, [5, 2], 6, heads=70), m.poisoned((2, 70, RANK), "float32")
    given = dequantized(m)
    attend = WideAttention(kernels)
    attend(*case.inputs(m), out, softmax_scale=0.25, dequantized=given)
    assert kernels.numbers("num_rows", "block_size", "dequantized_slots") == [3, 64, 128]
    names = "dequantized", "dequantized_blocks", "is_dequantized", "batch_id_per_token"
    assert kernels.numbers(*names) == [tensor.data_ptr() for tensor in given[:4]]
    attend(*case.inputs(m), out, softmax_scale=0.25)
    assert kernels.numbers("dequantized") == [None]


def dequantized(m: KernelMemory) -> Dequantized:
    """Records of two blocks, and of three rows."""
    blocks, flags = np.array([20, 21], np.int32), np.array([30, 31, 32], np.int32)
    ids = m.put(np.arange(2, dtype=np.int32))
    values = m.poisoned((128 * 288,), "float32")
    return Dequantized(values, m.put(blocks), m.put(flags), ids, 64, 128)


@pytest.mark.parametrize(
    ("heads", "kinds", "faster", "slower"),
    [
        (1, (NarrowAttention, None), (1, 8192), ()),
        (16, (NarrowAttention, None), (1, 7, 8192), ()),
        (17, (NarrowAttention, WideAttention), (8, 8192), (1, 7)),
        (32, (NarrowAttention, WideAttention), (8, 8192), (1, 7)),
        (33, (WideAttention, WideAttention), (5, 8192), (1, 4)),
        (64, (WideAttention, WideAttention), (5, 8, 17, 32, 8192), (1, 4)),
        (128, (WideAttention, WideAttention), (3, 8, 17, 1024), (1, 2)),
    ],
)
def test_which_kernel_is_for_so_many_heads_and_where_it_is_faster(
    heads: int, kinds: tuple[Any, Any], faster: tuple[int, ...], slower: tuple[int, ...]
) -> None:
    records, bfloat16 = kind_for(heads, True), kind_for(heads, False)
    assert records is not None and (records, bfloat16) == kinds
    assert all(records.is_faster(tokens, heads) for tokens in faster)
    assert not any(records.is_faster(tokens, heads) for tokens in slower)
    if 16 < heads <= 32:
        # prompts over bfloat16 are padded to 64 heads
        assert bfloat16 is not None
        assert bfloat16.is_faster(1024, heads) and not bfloat16.is_faster(1023, heads)
        assert not bfloat16.is_faster(8192, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_with_gaps_is_refused(
    emulated_memory: KernelMemory, kind: type[CustomAttention]
) -> None:
    m, heads = emulated_memory, HEADS[kind]
    out = m.poisoned((2, RANK, heads), "float32").transpose([0, 2, 1])
    attend = kind(custom_ops.build().kernels)
    with pytest.raises(LaunchError, match=r"out of shape .*contiguous"):
        attend(*make(FP8, [6, 2], 6, heads=heads).inputs(m), out, softmax_scale=1.0)
