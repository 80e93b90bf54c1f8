"""The Makefile's own help, and what an installation says first."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _make(*arguments: str) -> str:
    """Output of make, which installs nothing."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # the make of `make test` passes its own flags on
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    line = ["make", *arguments]
    return subprocess.run(
        line, cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout


def test_make_alone_lists_every_target() -> None:
    targets = re.search(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"))
    assert targets is not None
    listed = re.findall(r"(?m)^  (\S+) +\S", _make())
    assert listed and sorted(listed) == sorted(targets[1].split())


@pytest.mark.parametrize("target", ["serve", "test", "test-oracle"])
def test_an_installation_says_its_size_first(target: str) -> None:
    lines = _make("-n", "-W", "pyproject.toml", target).splitlines()
    pip = next(index for index, line in enumerate(lines) if "pip install" in line)
    assert "--quiet" not in lines[pip]
    assert re.search(r'echo "installing fd_dsa\[cpu.*\] into .*: .* GB', lines[pip - 1])


def test_another_interpreter_for_an_environment_that_is_there_is_told(tmp_path: Path) -> None:
    line = f"make: PYTHON=python3.99 is not used, {tmp_path} exists"
    flags = ("-n", "serve", f"VENV={tmp_path}")
    assert line not in _make(*flags, "PYTHON=python3.99")
    (tmp_path / ".made").touch()
    assert _make(*flags, "PYTHON=python3.99").startswith(line)
    assert "is not used" not in _make(*flags)
