"""All other device tests, on a device whose memory host code cannot follow."""

from __future__ import annotations

import pytest

from tests.gpu_rig.sessions import DEVICE, FIRST, TIMEOUT_S, run_guarded


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.timeout(TIMEOUT_S)
def test_all_other_files_where_host_access_faults() -> None:
    left_out = [f"--ignore={DEVICE}/{file}" for file in FIRST]
    left_out += [f"--ignore-glob={DEVICE}/test_v4_*.py"]
    files = [DEVICE, "tests/test_kernel_memory.py", "tests/test_doctor.py"]
    assert run_guarded(*files, *left_out) >= 200
