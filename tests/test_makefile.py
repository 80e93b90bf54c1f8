"""The Makefile's own help, and what an installation says first."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

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


def test_smoke_has_a_test_file_of_every_package() -> None:
    (command,) = [line for line in _make("-n", "smoke").splitlines() if "-m pytest" in line]
    files = re.findall(r"tests/\S+\.py", command)
    assert all((ROOT / file).is_file() for file in files)
    packages = {path.parent.name for path in (ROOT / "fd_dsa").glob("*/__init__.py")}
    tested = {name for name in packages if (ROOT / "tests" / name).is_dir()}
    assert len(tested) >= 14
    assert {file.split("/")[1] for file in files} >= tested
    assert len(files) == len({file.split("/")[1] for file in files})


def test_the_workflow_runs_what_ci_runs() -> None:
    """The workflow file says only where: its one command is .ci/run, which can be executed."""
    text = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for version in job["strategy"]["matrix"]["python"]:
        assert f"Programming Language :: Python :: {version}" in project


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
