"""What calls the kernels of sparse MLA: its arguments, what it refuses, the probe before it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fd_dsa import custom_ops
from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.ops.mla.custom_op import (
    CustomAttention,
    NarrowAttention,
    WideAttention,
    choose_attention,
    kind_for,
)
from fd_dsa.ops.mla.records import Dequantized
from fd_dsa.ops.providers import CUSTOM_OP, TENSOR_CORE, Choice
from tests.custom_ops.adoption import HostApi, adopted
from tests.custom_ops.building import host_library
from tests.kernel_memory import KernelMemory, open_memory
from tests.ops.tensor_core_case import RANK, make

FP8 = "fp8_ds_mla"
KINDS = [NarrowAttention, WideAttention]
HEADS = {NarrowAttention: 5, WideAttention: 70}


@pytest.fixture(params=[pytest.param("interpreter", marks=pytest.mark.triton)])
def kernel_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KernelMemory]:
    """Host memory, and host code behind the C ABI that answers with the numbers it was given."""
    memory = open_memory(request.param)
    monkeypatch.setattr("fd_dsa.ops.mla.custom_op.api_for_type", lambda kind: HostApi())
    monkeypatch.setattr("fd_dsa.ops.topk.custom_op.INTERPRETING", False)
    with adopted(host_library(), monkeypatch, on_gpu=False):
        yield memory


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_serves_where_its_probe_agrees(
    kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch, kind: type[CustomAttention]
) -> None:
    from fd_dsa.ops.mla.tensor_core import attend_on_tensor_cores

    def triton(self: Any, *arguments: Any, kv_lora_rank: int, **options: Any) -> None:
        attend_on_tensor_cores(*arguments, **options)

    def choose() -> Choice:
        types = "bfloat16", FP8, 512, 64, 90
        return choose_attention("gpu", HEADS[kind], *types, kernel_memory.poisoned)

    monkeypatch.setattr(kind, "__call__", lambda *arguments, **options: None)
    choice, heads = choose(), kind.probed_heads[0]
    assert choice.provider == TENSOR_CORE
    assert f"fp8_ds_mla, {heads} heads: outputs of token 0 are off by" in choice.against[CUSTOM_OP]
    monkeypatch.setattr(kind, "__call__", triton)
    monkeypatch.setattr("fd_dsa.ops.mla.custom_op._differences", {})
    assert choose().provider == CUSTOM_OP


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("old", [{}, {"fd_dsa_sparse_mla_bytes": lambda: 8}])
def test_a_library_of_another_release_is_refused(
    kind: type[CustomAttention], old: dict[str, Any]
) -> None:
    with pytest.raises(BackendUnavailable, match="build it again"):
        kind(SimpleNamespace(**old))


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_kernel_is_given(kernel_memory: KernelMemory, kind: type[CustomAttention]) -> None:
    m, heads, attend = kernel_memory, HEADS[kind], kind(custom_ops.build().kernels)
    case = make(FP8, [9, 3], 11, heads=heads)
    q, cache, slots = case.inputs(m)
    pages = m.put(case.cache.reshape(4, 1, 64, -1))
    out, lse = m.poisoned((2, heads, RANK), "float32"), m.poisoned((2, heads), "float32")
    attend(q, pages, slots, out, softmax_scale=0.5, lse=lse, splits=4)
    assert m.get(out).reshape(-1)[:9].tolist() == [0.5, 2, heads, 11, 256, 1, 0, 4, 1]
    attend(q, cache, slots, out, softmax_scale=0.25)
    assert m.get(out).reshape(-1)[:9].tolist() == [0.25, 2, heads, 11, 256, 1, 0, 0, 0]


def test_what_it_is_given_of_dequantized_records(kernel_memory: KernelMemory) -> None:
    m, attend = kernel_memory, WideAttention(custom_ops.build().kernels)
    case, out = make(FP8, [5, 2], 6, heads=70), m.poisoned((2, 70, RANK), "float32")
    given = dequantized(m)
    attend(*case.inputs(m), out, softmax_scale=0.25, dequantized=given)
    found = m.get(out).reshape(-1)[9:16].tolist()
    assert found == [1, 3, 64, 128, 21, 32, 1]
    attend(*case.inputs(m), out, softmax_scale=0.25)
    assert m.get(out).reshape(-1)[9:16].tolist() == [0] * 7


def dequantized(m: KernelMemory, num_tokens: int = 2) -> Dequantized:
    """Records of two blocks, and of three rows."""
    blocks, flags = np.array([20, 21], np.int32), np.array([30, 31, 32], np.int32)
    ids = m.put(np.arange(num_tokens, dtype=np.int32))
    values = m.poisoned((128 * 288,), "float32")
    return Dequantized(values, m.put(blocks), m.put(flags), ids, 64, 128)


def test_latents_of_many_heads_may_be_bfloat16(kernel_memory: KernelMemory) -> None:
    m, attend = kernel_memory, WideAttention(custom_ops.build().kernels)
    case, out = make("bfloat16", [5], 6, heads=70), m.poisoned((1, 70, RANK), "float32")
    attend(*case.inputs(m), out, softmax_scale=0.25)
    assert m.get(out).reshape(-1)[:9].tolist() == [0.25, 1, 70, 6, 256, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("heads", "kinds"),
    [
        (1, (NarrowAttention, None)),
        (16, (NarrowAttention, None)),
        (17, (NarrowAttention, WideAttention)),
        (32, (NarrowAttention, WideAttention)),
        (33, (WideAttention,) * 2),
    ],
)
def test_which_kernel_is_for_so_many_heads(heads: int, kinds: tuple[Any, ...]) -> None:
    assert (kind_for(heads, True), kind_for(heads, False)) == kinds


@pytest.mark.parametrize(
    ("heads", "faster", "slower"),
    [
        (16, (1, 7, 8192), ()),
        (32, (8, 8192), (1, 7)),
        (64, (5, 8, 17, 32, 8192), (1, 4)),
        (128, (3, 8, 17, 1024), (1, 2)),
    ],
)
def test_where_it_is_faster(heads: int, faster: tuple[int, ...], slower: tuple[int, ...]) -> None:
    kind = kind_for(heads, True)
    assert kind is not None
    assert all(kind.is_faster(tokens, heads) for tokens in faster)
    assert not any(kind.is_faster(tokens, heads) for tokens in slower)
    assert (heads <= kind.always_heads) == (not slower)


@pytest.mark.parametrize("heads", [17, 32])
def test_prompts_over_bfloat16_are_padded_to_64_heads(heads: int) -> None:
    kind = kind_for(heads, False)
    assert kind is not None and heads > kind.always_heads
    assert kind.is_faster(1024, heads) and not kind.is_faster(1023, heads)
    assert not kind.is_faster(8192, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_with_gaps_is_refused(
    kernel_memory: KernelMemory, kind: type[CustomAttention]
) -> None:
    m, heads = kernel_memory, HEADS[kind]
    out = m.poisoned((2, RANK, heads), "float32").transpose([0, 2, 1])
    attend = kind(custom_ops.build().kernels)
    with pytest.raises(LaunchError, match=r"out of shape .*contiguous"):
        attend(*make(FP8, [6, 2], 6, heads=heads).inputs(m), out, softmax_scale=1.0)
