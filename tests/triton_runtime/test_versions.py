"""The tests of this folder under several Triton versions: `-m network tests/triton_runtime`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.3.0", "3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.mark.parametrize("version", VERSIONS)
def test_version(version: str, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, str(packages), f"triton=={version}"], check=True)
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stdout
    code = "import triton; print(triton.__version__)"
    found = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert found.strip() == version
