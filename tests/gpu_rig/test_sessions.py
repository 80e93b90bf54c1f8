"""Quick tests on the device in host memory, and kernels in guarded memory."""

from __future__ import annotations

import pytest

from tests.gpu_rig.sessions import DEVICE, TIMEOUT_S, run_session

pytestmark = [pytest.mark.triton, pytest.mark.timeout(TIMEOUT_S)]

# tests of the device itself; kernels that run on it take longer
QUICK = ("operators", "counters", "capture", "step", "custom_ops")


def test_the_device_in_host_memory() -> None:
    files = [f"{DEVICE}/test_{name}.py" for name in QUICK]
    assert run_session("fake", *files, "tests/test_kernel_memory.py") >= 96


@pytest.mark.slow
def test_kernels_where_a_wrong_address_faults() -> None:
    assert run_session("guard", "tests/ops", "-k", "rig and kernel") >= 100
