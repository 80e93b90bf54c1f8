"""IFEval on the real demo model: a run that is killed ends its server, and the next one goes on."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fd_dsa.accuracy.answers import read_run
from fd_dsa.accuracy.cli import main
from fd_dsa.accuracy.prompts import read_prompts
from fd_dsa.accuracy.scores import read_scores

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS, TIMEOUT_S = 6, 250


@pytest.mark.slow
def test_a_killed_run_goes_on_and_loses_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the commit would be another one if somebody committed in between
    monkeypatch.setenv("FD_DSA_COMMIT", "0123")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    answers, log = tmp_path / "answers.jsonl", tmp_path / "server.log"
    command = ["ifeval", "--out", str(tmp_path), "--subset", str(NUM_PROMPTS), "--max-tokens", "32"]
    command += ["--concurrency", "2", "--", "--num-gpu-blocks-override", "200"]
    run = subprocess.Popen([sys.executable, "-m", "fd_dsa.accuracy", *command])
    deadline = time.monotonic() + TIMEOUT_S
    while not answers.exists() or answers.read_bytes().count(b"\n") < 3:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.kill()
    run.wait()
    kept = answers.read_bytes().split(b"\n")[:-1]
    assert len(kept) < 1 + NUM_PROMPTS, "the run was over before it was killed"
    host, port = re.search(r" on http://(\S+):(\d+)\n", log.read_text()).groups()  # type: ignore[union-attr]
    with pytest.raises(ConnectionError):
        while time.monotonic() < deadline:
            socket.create_connection((host, int(port)), timeout=5).close()
            time.sleep(0.05)

    assert main(command) == 0
    assert answers.read_bytes().split(b"\n")[: len(kept)] == kept
    assert log.read_text().count("POST /v1/chat/completions") == 1 + NUM_PROMPTS - len(kept)
    every = read_prompts()
    keys = {every[i * len(every) // NUM_PROMPTS].key for i in range(NUM_PROMPTS)}
    result = read_run(answers)
    assert result.answers.keys() == keys == {score.key for score in read_scores(tmp_path).prompts}
    assert all(1 <= (a.completion_tokens or 0) <= 32 for a in result.answers.values())
    server = result.settings.server
    assert (server["engine"], server["commit"]) == ("fd_dsa", "0123")
    assert (server["kv_cache_dtype"], server["enable_prefix_caching"]) == ("float32", False)
