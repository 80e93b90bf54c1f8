"""Starts that fail: one line on stderr that says what to change, and a traceback when asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from tests.serve.test_cli import command, error_line, finish, run


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


@pytest.mark.parametrize("kib", [100_000, 1_500_000])
def test_too_little_address_space_is_one_line(tmp_path: Path, kib: int) -> None:
    line = ["bash", "-c", f'ulimit -v {kib} && exec "$@"', "bash", *command("--port", "0")]
    said = error_line(finish(tmp_path, line, status=2))
    assert said.startswith(f"ulimit -v: got {kib}, allowed: at least 1572864 (1.5 GiB)")


@pytest.mark.slow
def test_the_caches_fit_into_a_limited_address_space(tmp_path: Path) -> None:
    line = ["bash", "-c", 'ulimit -v 3000000 && exec "$@"', "bash", *command("--dry-run")]
    plan = yaml.safe_load(finish(tmp_path, line, status=0).stdout)
    assert 0 < plan["memory"]["kv_cache_bytes"] < plan["memory"]["free_bytes"] < 3_000_000 << 10


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".cache").touch()
    line = ["env", f"HOME={tmp_path}", *command("--port", "0")]
    said = error_line(finish(tmp_path, line, status=2))
    assert said.startswith("HOME: Paddle needs a folder .cache/paddle below it")
