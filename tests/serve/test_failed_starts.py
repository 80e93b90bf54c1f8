"""Starts that fail: one line on stderr that says what to change, and a traceback when asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.serve.test_cli import error_line, finish, run


def test_missing_paddle_names_the_extra(tmp_path: Path) -> None:
    body = """
        import importlib.util as u
        real = u.find_spec
        u.find_spec = lambda name, *a: None if name == "paddle" else real(name, *a)
        from fd_dsa.engine.plan import make_plan
        make_plan(config)
    """
    done = run(tmp_path, "--port", "0", body=body)
    assert "pip install 'fd_dsa[cpu]'" in error_line(done)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ["--engine", "fastdeploy"],
            "--engine fastdeploy: FastDeploy is not installed in this Python; install it from "
            "Paddle's own package index (docs/fastdeploy.md has the commands), then fd_dsa beside "
            "it. --engine embedded works without it, for models that fit one device",
        ),
        (
            ["--tensor-parallel-size", "8"],
            "--tensor-parallel-size is 8, which needs FastDeploy, and that is not installed in "
            "this Python; install it from Paddle's own package index (docs/fastdeploy.md has the "
            "commands), then fd_dsa beside it. --engine embedded serves on one device, without "
            "these flags",
        ),
    ],
)
def test_missing_fastdeploy_is_one_line(tmp_path: Path, argv: list[str], text: str) -> None:
    code = (
        "import sys, importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'fastdeploy' else real(name, *a)\n"
        f"from fd_dsa.serve.cli import main\nsys.exit(main({argv}))"
    )
    done = finish(tmp_path, [sys.executable, "-c", code], status=2)
    assert error_line(done) == text


RAISE_CONFIG = """
from fd_dsa.errors import CheckpointError
raise CheckpointError("model.safetensors: tensor x has shape [1], expected [2]")
"""
RAISE_BUG = "raise KeyError('surprise')"


def test_error_of_the_model_folder_is_one_line(tmp_path: Path) -> None:
    line = error_line(run(tmp_path, "--port", "0", body=RAISE_CONFIG))
    assert line == "model.safetensors: tensor x has shape [1], expected [2]"


def test_unexpected_error_points_to_debug(tmp_path: Path) -> None:
    line = error_line(run(tmp_path, "--port", "0", body=RAISE_BUG, status=1))
    assert "unexpected KeyError: 'surprise'" in line
    assert "--log-level debug" in line


RAISE_FULL = (
    r"raise MemoryError('\n---\nC++ Traceback\n0 f()\n\nResourceExhaustedError: Out of memory.')"
)
RAISE_CUDA = r"raise OSError('\n---\nExternalError: CUDA error(2), out of memory.\n  [x]')"


@pytest.mark.parametrize("body", [RAISE_FULL, RAISE_CUDA])
def test_a_full_device_is_one_line_with_the_flags_to_lower(tmp_path: Path, body: str) -> None:
    line = error_line(run(tmp_path, "--port", "0", body=body))
    assert line.startswith("not enough memory (") and "ut of memory" in line
    assert "lower --gpu-memory-utilization, --kv-cache-memory-bytes" in line


@pytest.mark.parametrize(("body", "status"), [(RAISE_CONFIG, 2), (RAISE_BUG, 1)])
def test_debug_shows_the_traceback(tmp_path: Path, body: str, status: int) -> None:
    args = ("--port", "0", "--log-level", "debug")
    done = run(tmp_path, *args, body=body, status=status)
    assert "Traceback" in done.stderr
    assert "build_engine" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("fd_dsa: error: ")
