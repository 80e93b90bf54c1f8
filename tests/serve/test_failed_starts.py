"""Starts that fail: one line on stderr that says what to change, and a traceback when asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from tests.serve.processes import command, error_line, finish, run

WITHOUT_PADDLE = """
    import importlib.util as u
    real = u.find_spec
    u.find_spec = lambda name, *a: None if name == "paddle" else real(name, *a)
    from fd_dsa.engine.plan import make_plan
    make_plan(config)
"""
DAMAGED = """
    from fd_dsa.errors import CheckpointError
    raise CheckpointError("model.safetensors: tensor x has shape [1], expected [2]")
"""
BUG = "raise KeyError('surprise')"
FULL_HOST = (
    r"raise MemoryError('\n---\nC++ Traceback\n0 f()\n\nResourceExhaustedError: Out of memory.')"
)
FULL_GPU = r"raise OSError('\n---\nExternalError: CUDA error(2), out of memory.\n  [x]')"
NO_MEMORY = "lower --gpu-memory-utilization, --kv-cache-memory-bytes"


@pytest.mark.parametrize(
    ("body", "status", "texts"),
    [
        (WITHOUT_PADDLE, 2, ["pip install 'fd_dsa[cpu]'"]),
        (DAMAGED, 2, ["model.safetensors: tensor x has shape [1], expected [2]"]),
        (BUG, 1, ["unexpected KeyError: 'surprise'", "--log-level debug"]),
        (FULL_HOST, 2, ["not enough memory (", "Out of memory", NO_MEMORY]),
        (FULL_GPU, 2, ["not enough memory (", "out of memory", NO_MEMORY]),
    ],
)
def test_an_engine_that_is_not_built_is_one_line(
    tmp_path: Path, body: str, status: int, texts: list[str]
) -> None:
    line = error_line(run(tmp_path, "--port", "0", body=body, status=status))
    assert all(text in line for text in texts)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, "--port", "0", "--log-level", "debug", body=BUG, status=1)
    assert "Traceback" in done.stderr
    assert "build_engine" in done.stderr
    assert done.stderr.splitlines()[-1] == "fd_dsa: error: unexpected KeyError: 'surprise'"


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


@pytest.mark.parametrize("kib", [100_000, 1_500_000])
def test_too_little_address_space_is_one_line(tmp_path: Path, kib: int) -> None:
    line = ["bash", "-c", f'ulimit -v {kib} && exec "$@"', "bash", *command("--port", "0")]
    message = error_line(finish(tmp_path, line, status=2))
    assert message.startswith(f"ulimit -v: got {kib}, allowed: at least 1572864 (1.5 GiB)")


@pytest.mark.slow
def test_the_caches_fit_into_a_limited_address_space(tmp_path: Path) -> None:
    line = ["bash", "-c", 'ulimit -v 3000000 && exec "$@"', "bash", *command("--dry-run")]
    plan = yaml.safe_load(finish(tmp_path, line, status=0).stdout)
    assert 0 < plan["memory"]["kv_cache_bytes"] < plan["memory"]["free_bytes"] < 3_000_000 << 10


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".cache").touch()
    line = ["env", f"HOME={tmp_path}", *command("--port", "0")]
    message = error_line(finish(tmp_path, line, status=2))
    assert message.startswith("HOME: Paddle needs a folder .cache/paddle below it")
