"""What a machine cannot run is skipped with a reason, and the summary says what ran."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = """
import pytest
def test_plain(): pass
@pytest.mark.gpu
def test_gpu(): pass
@pytest.mark.gpu_rig
def test_rig(): pass
@pytest.mark.oracle
def test_oracle(): pass
@pytest.mark.network
def test_network(): pass
"""


def _run(folder: Path, requirements: str, *flags: str) -> str:
    """Output of pytest on CASES, with the project's settings and these REQUIREMENTS."""
    conftest = (ROOT / "tests/conftest.py").read_text("utf-8")
    (folder / "conftest.py").write_text(f"{conftest}\n\nREQUIREMENTS.update({requirements})\n")
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8"))
    (folder / "test_case.py").write_text(CASES)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags, "test_case.py"]
    # the copy imports what the tests share
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment
    ).stdout


def test_missing_things_are_skipped_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import pytest\npytest.skip('not today', allow_module_level=True)\n"
    )
    missing = "gpu=lambda: 'no card', gpu_rig=lambda: 'no card'"
    output = _run(tmp_path, f"{missing}, oracle=lambda: 'not installed: torch'", "test_other.py")
    assert "1 passed, 5 skipped" in output
    assert output.count("no card") == 2 and "not today" in output
    assert "needs a package index; select it with -m network" in output
    assert "GPU tests skipped: 2" in output
    mode = "parity with Hugging Face: from the committed goldens (not installed: torch)"
    # before the tests and after them
    assert output.count(mode) == 2


def test_what_is_there_runs_and_live_parity_names_the_versions(tmp_path: Path) -> None:
    for name, version in (("torch", "9.1"), ("transformers", "8.2")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    there = ", ".join(f"{marker}=lambda: None" for marker in ("gpu", "gpu_rig", "oracle"))
    output = _run(tmp_path, there, "-m", "gpu or gpu_rig or network or oracle")
    assert "4 passed, 1 deselected" in output
    assert "GPU tests skipped: 0" in output
    assert "parity with Hugging Face: live (torch 9.1, transformers 8.2)" in output
