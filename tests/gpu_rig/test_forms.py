"""The forms of the test plug-in: what builds them, and the errors where that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_rig.build import LIBRARY, BuildError, build, find_tools, folder_of
from tests.gpu_rig.session import VARIABLE, built

ROOT = Path(__file__).parents[2]


def test_builds_are_found_again_and_not_shared() -> None:
    assert (built("real") / LIBRARY).is_file()
    folder = built("fake")
    made = (folder / LIBRARY).stat().st_mtime_ns
    assert build("fake") == folder != folder_of("guard")
    assert (folder / LIBRARY).stat().st_mtime_ns == made


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built("fake")
    with pytest.raises(BuildError, match="got 'cuda', allowed: fake, guard, null, real"):
        build("cuda")
    (tmp_path / "g++").symlink_to("/bin/true")
    monkeypatch.setattr("tests.gpu_rig.build.CUDA_FOLDER", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with monkeypatch.context() as without_nvcc:
        without_nvcc.setenv("PATH", str(tmp_path))
        with pytest.raises(BuildError, match="install the CUDA toolkit, or set CUDA_HOME"):
            find_tools("real")
    monkeypatch.setattr("tests.gpu_rig.build.CACHE", tmp_path)
    monkeypatch.setattr("tests.gpu_rig.build.CXX_FLAGS", ("--no-such-flag",))
    with pytest.raises(BuildError, match="no-such-flag"):
        build("fake")
    assert not list(tmp_path.glob(f"*/{LIBRARY}"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="install g\\+\\+ or set CXX"):
        find_tools("fake")


def test_a_form_that_is_not_there_ends_the_session() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/gpu_rig/device"],
        cwd=ROOT,
        env=os.environ | {VARIABLE: "cuda"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "form 'cuda'" in done.stderr
