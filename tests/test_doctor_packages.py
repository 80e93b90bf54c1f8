"""The doctor names packages that cannot be imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fd_dsa.doctor.packages import REQUIRED

ROOT = Path(__file__).resolve().parent.parent
RAISING = {
    "fastapi": 'raise AttributeError("pydantic is too old")',
    "orjson": 'raise ImportError("libc.so.9: not found")',
    "llguidance": 'raise ImportError("no such symbol")',
}


def test_a_broken_package_of_the_server_is_named(tmp_path: Path) -> None:
    for name, body in RAISING.items():
        (tmp_path / f"{name}.py").write_text(body)
    done = doctor_of(tmp_path)
    assert done.returncode == 1 and not done.stderr
    assert "\nBROKEN     fastapi: AttributeError: pydantic is too old\n" in done.stdout
    assert "\nBROKEN     orjson: ImportError: libc.so.9: not found\n" in done.stdout
    assert "\nBROKEN     llguidance: ImportError: no such symbol\n" in done.stdout
    assert done.stdout.count(" -m pip install --force-reinstall ") == 2
    assert "NOT healthy" in done.stdout


@pytest.mark.parametrize("name", ["numpy", "paddle"])
def test_a_broken_package_of_the_doctor_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("raise AttributeError('it is damaged')")
    done = doctor_of(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    reason = f"{name} cannot be imported (AttributeError: it is damaged); install it again"
    assert done.stderr == f"fd_dsa: error: {reason}, then run this again\n"


def doctor_of(packages: Path) -> subprocess.CompletedProcess[str]:
    """Run the doctor with modules in front of the installed ones."""
    path = os.pathsep.join([str(packages), str(ROOT)])
    command = [sys.executable, "-m", "fd_dsa.doctor", "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "1000"}
    return subprocess.run(command, capture_output=True, text=True, cwd=packages, env=env)


def test_every_required_package_is_imported() -> None:
    projects = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [\n")[2]
    listed = re.findall(r'^    "([a-z0-9-]+)>=', projects.partition("\n]\n")[0], re.MULTILINE)
    modules = [{"pyyaml": "yaml"}.get(name, name.replace("-", "_")) for name in listed]
    assert sorted(REQUIRED) == sorted(modules)
