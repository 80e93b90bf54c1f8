"""A disk that fills up.

More of it, with a scripted engine: tests/serve/test_shutdown.py (a crash, a stalled tokenizer),
test_backpressure.py (slow readers), test_logs.py (a full disk under
the log), test_status.py (probes after a failure).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fd_dsa.accuracy.answers import read_run
from fd_dsa.client.own_server import own_server
from fd_dsa.errors import ConfigError
from tests.accuracy.test_answers import answer, write

ROOT = Path(__file__).resolve().parents[2]


def test_a_disk_that_is_full_under_the_log_of_a_server_of_our_own_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that says where it listens would be waited for in vain."""
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    log = tmp_path / "run/server.log"
    reason = f"no space left on the disk for {log}"
    with pytest.raises(ConfigError, match=reason), own_server(None, [], log):
        raise AssertionError("it has no room for its log")


def test_a_disk_that_fills_up_costs_no_answer_that_was_kept(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; the run goes on where it broke off."""
    path = tmp_path / "answers.jsonl"
    write(path, answer("a"))
    code = (
        "import pathlib, resource, sys\n"
        "from tests.accuracy.test_answers import answer, write\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "limit = path.stat().st_size + 400\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "write(path, answer('b'), answer('c', 'x' * 5000))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "OSError" in done.stderr
    assert f"ConfigError: --out: {path} cannot be written (file too large)" in done.stderr
    assert "the same command continues the run" in done.stderr
    assert read_run(path).answers.keys() == {"a", "b"}
    write(path, answer("c"))
    assert read_run(path).answers.keys() == {"a", "b", "c"}
