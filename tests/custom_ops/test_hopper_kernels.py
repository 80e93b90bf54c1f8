"""The choice of the kernels of custom_ops/ for Hopper."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.ops import (
    expert_gemm_cuda,
    expert_gemm_fp4_cuda,
    expert_gemm_w4a16_cuda,
    library_kernel,
    v4_attend_cuda,
)

pytestmark = pytest.mark.triton


@pytest.mark.parametrize(
    ("kernel_for", "served"),
    [
        (expert_gemm_cuda.kernel_for, "experts of 32 pairs and more on average, in FP8"),
        (expert_gemm_fp4_cuda.kernel_for, "experts in MXFP4"),
        (
            expert_gemm_w4a16_cuda.kernel_for,
            "experts of more than 24 pairs on average in NVFP4, or 12 in INT4",
        ),
        (v4_attend_cuda.kernel_for, "attention of DeepSeek-V4 in steps of many tokens"),
    ],
)
def test_the_log_has_the_reason_once(
    kernel_for: Callable[[Any], Any],
    served: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(library_kernel, "interpreter_refusal", lambda: "for this test")
    with caplog.at_level(logging.INFO, logger="fd_dsa.ops.library_kernel"):
        for _ in range(2):
            assert kernel_for(None) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"{served}: triton (not custom_op: for this test)"
    ]


def test_the_log_names_a_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("interpreter_refusal", "unsupported_reason"):
        monkeypatch.setattr(library_kernel, name, lambda *tensors: "")
    with caplog.at_level(logging.INFO, logger="fd_dsa.ops.library_kernel"):
        tensor: Any = None
        assert expert_gemm_cuda.kernel_for(tensor, 10.0) is None
    assert caplog.messages == [
        "experts of 32 pairs and more on average, in FP8, gated and clamped: "
        "triton (not custom_op: the kernel does not clamp)"
    ]
