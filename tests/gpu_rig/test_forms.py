"""The forms of the test plug-in: what builds them, and the errors where that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_rig.build import LIBRARY, BuildError, build, find_tools
from tests.gpu_rig.session import VARIABLE, built

ROOT = Path(__file__).parents[2]


def test_the_form_for_a_gpu_compiles() -> None:
    assert (built("real") / LIBRARY).is_file()


def test_a_build_is_found_again() -> None:
    folder = built("fake")
    library = folder / LIBRARY
    made = library.stat().st_mtime_ns
    assert build("fake") == folder and library.stat().st_mtime_ns == made


def test_forms_do_not_share_a_build() -> None:
    assert built("fake") != built("guard")


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(BuildError, match="got 'cuda', allowed: fake, guard, real"):
        build("cuda")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="install g\\+\\+ or set CXX"):
        find_tools("fake")


def test_a_missing_nvcc_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built("fake")
    (tmp_path / "g++").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("tests.gpu_rig.build.CUDA_FOLDER", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(BuildError, match="install the CUDA toolkit, or set CUDA_HOME"):
        find_tools("real")


def test_what_a_compiler_says_is_in_the_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built("fake")
    monkeypatch.setattr("tests.gpu_rig.build.CACHE", tmp_path)
    monkeypatch.setattr("tests.gpu_rig.build.CXX_FLAGS", ("--no-such-flag",))
    with pytest.raises(BuildError, match="no-such-flag"):
        build("fake")
    assert not list(tmp_path.glob(f"*/{LIBRARY}"))


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
