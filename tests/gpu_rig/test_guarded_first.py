"""First part of the device tests, on a device whose memory host code cannot follow."""

from __future__ import annotations

import pytest

from tests.gpu_rig.sessions import DEVICE, FIRST, TIMEOUT_S, run_guarded


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.timeout(TIMEOUT_S)
def test_the_first_files_where_host_access_faults() -> None:
    assert run_guarded(*(f"{DEVICE}/{file}" for file in FIRST)) >= 34
