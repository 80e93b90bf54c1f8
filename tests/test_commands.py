"""Commands of messages: each runs in the shell that started the process, whatever its folder is."""

from __future__ import annotations

import ast
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fd_dsa import commands
from fd_dsa.commands import (
    core_command,
    extra_command,
    own_command,
    pip_command,
    project_folder,
    python_command,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["checkout", "a folder with 'spaces'"])
def environment(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Folder of a virtual environment whose programs print their names and arguments."""
    folder = tmp_path / str(request.param) / ".venv"
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "fd-dsa"):
        program = folder / "bin" / name
        program.write_text('#!/bin/sh\necho "${0##*/} $*"\n')
        program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "bin/python"))
    # another program of the name comes first on PATH
    (tmp_path / "others").mkdir()
    (tmp_path / "others/fd-dsa").write_text("#!/bin/sh\necho another\n")
    (tmp_path / "others/fd-dsa").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'others'}:/usr/bin:/bin")
    return folder


def _pasted(line: str) -> str:
    """Return the output of a shell in the current folder for a line."""
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    return done.stdout.rstrip("\n")


def test_a_command_runs_from_every_folder(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, python = ("serve", "a b", "--port", "1"), ("-m", "pip", "install", "x>=1,<2")
    for folder in (environment.parent, environment, environment / "bin", tmp_path, Path("/")):
        monkeypatch.chdir(folder)
        assert _pasted(own_command(*own)) == "fd-dsa serve a b --port 1"
        assert _pasted(python_command(*python)) == "python -m pip install x>=1,<2"
    monkeypatch.chdir(environment.parent)
    assert own_command("doctor") == ".venv/bin/fd-dsa doctor"
    assert pip_command("x") == ".venv/bin/python -m pip install x"


def test_an_activated_environment_needs_no_folder(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{environment / 'bin'}:/usr/bin:/bin")
    assert own_command("doctor") == "fd-dsa doctor"
    assert _pasted(own_command("doctor")) == "fd-dsa doctor"


def test_a_folder_on_pythonpath_has_no_script(environment: Path) -> None:
    (environment / "bin/fd-dsa").unlink()
    assert _pasted(own_command("doctor")) == "python -m fd_dsa doctor"


def test_a_deleted_folder(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert shlex.split(own_command("doctor")) == [str(environment / "bin/fd-dsa"), "doctor"]


def test_an_extra_is_installed_by_the_names_of_its_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = [
        "numpy<2.6,>=1.26",
        'llguidance<2,>=1.8; extra == "structured"',
        "paddlepaddle<3.4,>=3.3; extra == 'cpu'",
        'triton<3.10,>=3.3; sys_platform == "linux" and extra == "gpu"',
    ]
    monkeypatch.setattr(commands, "requires", lambda _: listed)
    for extra, package in (("structured", "llguidance<2,>=1.8"), ("gpu", "triton<3.10,>=3.3")):
        assert shlex.split(extra_command(extra))[-4:] == ["-m", "pip", "install", package]
    # not installed: the folder of the project has the list
    monkeypatch.setattr(commands, "requires", lambda _: None)
    assert shlex.split(extra_command("cpu"))[-1] == f"{ROOT}[cpu]"


def test_core_packages_are_those_of_the_project_or_of_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shlex.split(core_command("--quiet"))[-2:] == ["--quiet", str(ROOT)]
    # installed as a wheel
    monkeypatch.setattr(commands, "project_folder", lambda name=".": str(tmp_path / name))
    monkeypatch.setattr(commands, "requires", lambda _: ["a<2,>=1", "b; extra == 'cpu'"])
    assert shlex.split(core_command())[-2:] == ["install", "a<2,>=1"]


def test_folders_of_the_project_are_no_names_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert (project_folder(), project_folder("custom_ops")) == (".", "./custom_ops")
    monkeypatch.chdir("/")
    assert Path(project_folder("custom_ops")).samefile(ROOT / "custom_ops")


@pytest.mark.slow
def test_pip_accepts_the_cures(tmp_path: Path) -> None:
    for extra in ("structured", "cpu", "accuracy"):
        line = f"{extra_command(extra)} --dry-run --no-deps --quiet --disable-pip-version-check"
        subprocess.run(["sh", "-c", line], check=True, timeout=300)


def _texts(tree: ast.Module) -> Iterator[ast.Constant]:
    """String constants of a module that are no docstrings."""
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node


def test_no_message_writes_a_command_by_itself() -> None:
    """A name that a message writes out is on PATH in an activated environment only."""
    typed = ("pip install", "python -m", "python3 -m", "fd-dsa ")
    found = []
    for path in sorted((ROOT / "fd_dsa").rglob("*.py")):
        source = path.read_text("utf-8")
        if not any(word in source for word in typed):
            continue
        for node in _texts(ast.parse(source)):
            words = [word for word in typed if f" {word}" in f" {node.value}"]
            if words:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {words}")
    assert found == []
