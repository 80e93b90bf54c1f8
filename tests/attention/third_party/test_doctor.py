"""The doctor says which packages of other projects would serve a device, and why not."""

from __future__ import annotations

import pytest

pytest.importorskip("paddle", reason="the doubles compute on Paddle's tensors")

from fd_dsa.doctor import tensor_cores, third_party
from tests.attention.third_party.kernel_case import Install
from tests.kernel_memory import KernelMemory

pytestmark = pytest.mark.triton


def test_a_cpu_is_served_by_no_package(doubles: Install) -> None:
    found = third_party.facts("cpu")
    assert [(x["package"], x["serves"], x["reason"]) for x in found] == [
        ("deep_gemm", False, "not installed"),
        ("flash_mla", False, "not installed"),
    ]
    doubles()
    reasons = {x["reason"] for x in third_party.facts("cpu")}
    assert reasons == {"not tried: it needs a GPU"}


@pytest.fixture
def device(memory: KernelMemory, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device whose memory is the interpreter's."""
    monkeypatch.setattr("fd_dsa.attention.device.empty_allocator", lambda device: memory.poisoned)
    return "hopper:0"


def test_packages_prove_themselves(device: str, doubles: Install) -> None:
    doubles()
    found = third_party.facts(device)
    lines = third_party.as_lines(found)
    assert [(x["package"], x["operator"], x["serves"]) for x in found] == [
        ("deep_gemm", "indexer_logits", True),
        ("flash_mla", "sparse_mla", True),
    ]
    assert all("agrees with our kernel to" in x["reason"] for x in found)
    assert lines[1].split()[:3] == ["deep_gemm", "indexer_logits", "yes"]
    assert "16 heads padded to 64, agrees" in lines[2]


def test_one_that_fails_is_no_illness(device: str, doubles: Install) -> None:
    doubles()
    import deep_gemm

    del deep_gemm.get_num_sms
    found = third_party.facts(device)
    assert [x["serves"] for x in found] == [False, True]
    (line,) = (x for x in third_party.as_lines(found) if "deep_gemm" in x)
    assert line.split()[:3] == ["deep_gemm", "indexer_logits", "no"] and "get_num_sms" in line


def test_kernels_on_tensor_cores_are_told(device: str) -> None:
    found = tensor_cores.facts(device)
    assert [(x["operator"], x["serves"]) for x in found] == [
        ("indexer_logits", True),
        ("sparse_mla", True),
    ]
    assert tensor_cores.as_lines(found)[1].split()[:2] == ["indexer_logits", "yes"]
    assert {x["reason"] for x in tensor_cores.facts("cpu")} == {"it needs a GPU"}


def test_another_gpu_is_told_why_not(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fd_dsa.triton_runtime.transfers import Transfers

    monkeypatch.setattr(Transfers, "capability", lambda self: 80)
    lines = tensor_cores.as_lines(tensor_cores.facts(device))
    assert lines[2].split()[:2] == ["sparse_mla", "no"] and "capability 80" in lines[2]
