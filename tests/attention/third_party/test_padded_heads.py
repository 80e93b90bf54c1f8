"""FlashMLA with another number of heads than its kernels have: heads of zeros beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the doubles compute on Paddle's tensors")

from fd_dsa.ops._third_party import third_party_table
from tests.attention.third_party.kernel_case import Install, KernelCase, serving
from tests.kernel_memory import KernelMemory

pytestmark = pytest.mark.triton

ROWS = [(0, 140, 1), (0, 0, 0), (0, 20, 2)]
PADDED = {8: 64, 16: 64, 32: 64, 64: 64, 96: 128, 128: 128}


def case_of(memory: KernelMemory, num_heads: int, layers: int = 1) -> KernelCase:
    return KernelCase(memory, ROWS, layers, config={"num_heads": num_heads})


@pytest.fixture
def given() -> list[Any]:
    """Queries of each call of FlashMLA, filled by `watch`."""
    return []


@pytest.fixture
def watch(doubles: Install, given: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the doubles and remembers what FlashMLA is called with."""
    doubles()
    import flash_mla

    whole = flash_mla.flash_mla_with_kvcache

    def watched(q: Any, *args: Any, **kwargs: Any) -> Any:
        given.append(q)
        return whole(q, *args, **kwargs)

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", watched)


@pytest.mark.parametrize("num_heads", PADDED)
def test_results_are_those_of_our_kernel(
    memory: KernelMemory, watch: None, given: list[Any], num_heads: int
) -> None:
    case = case_of(memory, num_heads)
    slots = case.select()
    wanted = case.attend(slots)
    case.begin()
    assert serving()["sparse_mla"] == "flash_mla"
    found = case.attend(slots)
    assert found.shape == (5, num_heads, 512) and (found[3:] == 0).all()
    assert np.linalg.norm(found - wanted) <= 1e-2 * np.linalg.norm(wanted)
    # two rows of the probe, then the step
    assert [list(q.shape) for q in given] == [[n, 1, PADDED[num_heads], 576] for n in (2, 5)]
    assert all((memory.get(q)[:, :, num_heads:] == 0).all() for q in given)


@pytest.mark.parametrize("num_heads", PADDED)
def test_the_reason_says_so(memory: KernelMemory, doubles: Install, num_heads: int) -> None:
    doubles()
    case_of(memory, num_heads).begin()
    (found,) = (x for x in third_party_table() if x.package == "flash_mla")
    padding = f"{num_heads} heads padded to {PADDED[num_heads]}, "
    exact = num_heads in (64, 128)
    assert found.reason.startswith(("" if exact else padding) + "agrees with our kernel to")


def test_layers_and_captured_steps_share_the_buffers(
    memory: KernelMemory, watch: None, given: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, ...]] = []
    allocate = memory.poisoned

    def counting(shape: tuple[int, ...], dtype: str) -> Any:
        taken.append(shape)
        return allocate(shape, dtype)

    monkeypatch.setattr(memory, "poisoned", counting)
    case = case_of(memory, 16, layers=2)
    slots = case.select()
    wanted = [case.attend(slots, layer) for layer in (0, 1)]
    case.begin()
    del taken[:]
    for capturing in (False, True):
        monkeypatch.setattr(
            case.attention._third_party._transfers, "is_capturing", lambda x=capturing: x
        )
        outs = [
            case.attention.attend(case.step, layer.q, layer.latents, slots) for layer in case.layers
        ]
        assert outs[0].data_ptr() == outs[1].data_ptr() and outs[0].is_contiguous()
        for layer in (0, 1):
            found = case.attend(slots, layer)
            assert np.linalg.norm(found - wanted[layer]) <= 1e-2 * np.linalg.norm(wanted[layer])
    assert not taken
    assert len({q.data_ptr() for q in given}) == 1


def test_steps_in_pieces(memory: KernelMemory, watch: None, given: list[Any]) -> None:
    case = case_of(memory, 96)
    slots = case.begin().select()
    whole = case.attend(slots)
    flash = case.attention._third_party.attention
    assert flash is not None
    flash.max_rows = 2
    del given[:]
    np.testing.assert_array_equal(case.attend(slots), whole)
    assert [q.shape[0] for q in given] == [2, 2, 1]


def test_a_failure_after_the_probe(memory: KernelMemory, doubles: Install) -> None:
    doubles()
    case = case_of(memory, 16)
    slots = case.select()
    wanted = case.attend(slots)
    case.begin()
    import flash_mla

    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    flash_mla.flash_mla_with_kvcache = failing
    np.testing.assert_array_equal(case.attend(slots), wanted)
    assert "sparse_mla" not in serving()


@pytest.mark.parametrize("num_heads", [16, 64])
@pytest.mark.parametrize("max_num_tokens", [7, 100_000])
def test_memory_that_it_takes_is_counted(num_heads: int, max_num_tokens: int) -> None:
    from types import SimpleNamespace

    from fd_dsa.attention.cache_layout import CacheLayout
    from fd_dsa.attention.config import DSABackendConfig
    from fd_dsa.ops.sparse_mla.flash_mla import SCRATCH_BYTES, FlashMla, workspace_bytes

    layout = CacheLayout("fp8_ds_mla", 64, 512, 64, 128)
    config = DSABackendConfig(
        num_heads, 64, 2048, 0.1, layout, 4, max_num_tokens, 8, dtype="bfloat16"
    )
    taken = []

    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        taken.append(int(np.prod(shape)) * {"int32": 4, "bfloat16": 2}[dtype])
        return SimpleNamespace(zero_=lambda: None)

    mla = FlashMla(None, config, allocate, None)
    # 64 heads of 512 float32 a token in half a GiB at most
    assert mla.max_rows == min(max_num_tokens, 2048)
    result = 2 * mla.max_rows * 64 * 512
    assert workspace_bytes(config) == SCRATCH_BYTES + sum(taken) + result
