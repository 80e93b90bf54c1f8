"""IFEval on the real demo model: a run that is killed on the way and goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from fd_dsa.accuracy.answers import read_run
from fd_dsa.accuracy.prompts import read_prompts
from fd_dsa.accuracy.scores import read_scores

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS = 16
TIMEOUT_S = 250
COMMAND = [
    *(sys.executable, "-m", "fd_dsa.accuracy", "ifeval", "--out", "run"),
    *("--subset", str(NUM_PROMPTS), "--max-tokens", "32", "--concurrency", "4"),
    *("--", "--num-gpu-blocks-override", "400"),
]


def lines_of(path: Path) -> list[bytes]:
    """Whole lines of a file that may not be there yet."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def is_gone(url: str) -> bool:
    """Whether nobody listens there."""
    try:
        httpx.get(f"{url}/health", timeout=5, trust_env=False)
    except httpx.ConnectError:
        return True
    except httpx.HTTPError:
        return False
    return False


@pytest.mark.slow
def test_a_killed_run_goes_on_and_loses_no_answer(tmp_path: Path) -> None:
    # the commit would be another one if somebody committed in between
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FD_DSA_COMMIT": "0123"}
    out = tmp_path / "run"
    answers = out / "answers.jsonl"
    run = subprocess.Popen(COMMAND, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    while len(lines_of(answers)) < 5:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.kill()
    run.wait()
    kept = lines_of(answers)
    assert len(kept) < 1 + NUM_PROMPTS, "the run was over before it was killed"

    # the server ended with the run
    url = re.search(r"on (http://\S+) \(ready", (out / "server.log").read_text()).group(1)  # type: ignore[union-attr]
    while not is_gone(url):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    # as if the machine had gone down while a line was written
    with answers.open("ab") as file:
        file.write(b'{"key": "1000", "te')
    done = subprocess.run(
        COMMAND, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    after = lines_of(answers)
    assert after[: len(kept)] == kept
    assert len(after) == 1 + NUM_PROMPTS
    log = (out / "server.log").read_text()
    assert log.count("POST /v1/chat/completions") == 1 + NUM_PROMPTS - len(kept)

    every = read_prompts()
    wanted = {every[i * len(every) // NUM_PROMPTS].key for i in range(NUM_PROMPTS)}
    found = read_run(answers)
    assert found.answers.keys() == wanted
    assert all(1 <= (a.completion_tokens or 0) <= 32 for a in found.answers.values())
    server = found.settings.server
    assert (server["engine"], server["commit"]) == ("fd_dsa", "0123")
    assert (server["kv_cache_dtype"], server["enable_prefix_caching"]) == ("float32", False)
    scores = read_scores(out)
    assert {score.key for score in scores.prompts} == wanted
    assert "Inst-level-loose-accuracy" in done.stdout
    assert json.loads((out / "scores.json").read_text())["metrics"]
