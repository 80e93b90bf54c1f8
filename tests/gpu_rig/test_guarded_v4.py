"""Other device tests of DeepSeek-V4, on a device whose memory host code cannot follow."""

from __future__ import annotations

import pytest

from tests.gpu_rig.sessions import DEVICE, FIRST, ROOT, TIMEOUT_S, run_guarded


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.timeout(TIMEOUT_S)
def test_other_files_of_deepseek_v4_where_host_access_faults() -> None:
    files = {path.name for path in (ROOT / DEVICE).glob("test_v4_*.py")} - {*FIRST}
    assert run_guarded(*(f"{DEVICE}/{file}" for file in sorted(files))) >= 30
