"""The doctor says which packages of other projects would serve a device, and why not."""

from __future__ import annotations

import pytest

pytest.importorskip("paddle", reason="the doubles compute on Paddle's tensors")

from fd_dsa.doctor import third_party
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
