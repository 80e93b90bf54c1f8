"""Processes with a GPU each: sums, repeats of a graph, a rank that is absent, whole engines.

The rig's processes load their plug-in themselves, so both kinds run in one session:
`pytest -m gpu tests/distributed`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.gpu_ranks import ROOT, num_gpus, run_ranks
from tests.distributed.rank_checks import FP8_FOLDER
from tests.distributed.rig_engine import CASES, fp8_folder
from tests.distributed.rig_rank import KILLED

pytestmark = pytest.mark.gpu
TIMEOUT_S = 240
# log-probabilities that are nearer to each other are equal in float32
CLEAR = 1e-3
SIZES = [size for size in (2, 4, 8) if size <= num_gpus()]


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    """Built once, before the ranks ask for it."""
    from custom_ops.build_library import build_library

    if not SIZES:
        pytest.skip(f"{num_gpus()} GPUs on this machine, 2 are needed")
    build_library()


def build_rig() -> None:
    """Before two ranks build it at the same time."""
    if importlib.util.find_spec("paddle") is None:
        pytest.skip("not installed: paddle")
    from tests.gpu_rig.build import build

    build("real")


@pytest.mark.parametrize("memory", ["torch", "rig"])
@pytest.mark.parametrize("size", SIZES or [2])
def test_all_ranks_have_the_same_bits(size: int, memory: str) -> None:
    if memory == "rig":
        build_rig()
    module = "tests.distributed.rank_checks"
    checks = "sums", "selections", "blocks", "repeats", "absent"
    found = run_ranks(module, size, memory, *checks, timeout_s=TIMEOUT_S)
    said = f"rank {size - 1} did not come to an all-reduce for 1 s"
    assert [one.pop("absent") for one in found] == [said] * (size - 1) + ["absent"]
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("size", SIZES or [2])
def test_ten_thousand_steps_give_the_same_bits_on_all_ranks(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_rig()
    monkeypatch.setenv(FP8_FOLDER, str(fp8_folder(tmp_path / "fp8")))
    found = run_ranks("tests.distributed.rank_checks", size, "rig", "steps", timeout_s=TIMEOUT_S)
    assert all(one == found[0] for one in found)


def said(path: Path) -> str:
    """A file of a process, empty where it has ended."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_a_rank_killed_in_a_capture_ends_the_server(tmp_path: Path) -> None:
    build_rig()
    files, killed = set(os.listdir("/dev/shm")), tmp_path / "killed"
    # a port is free and stays so until it is asked for
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "benchmarks.workers.rig_serve",
        "-tp",
        "2",
        "--port",
        str(port),
    ]
    command += ["--max-model-len", "1024", "--num-gpu-blocks-override", "64"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {KILLED: str(killed)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert time.monotonic() - float(killed.read_text()) < 10, done.stderr
    assert done.returncode == 2 and done.stdout == ""
    named = r"rank 1 \(process \d+\) ended by signal 9 \(SIGKILL\)"
    assert re.search(named, done.stderr), done.stderr
    # all processes of the server have its environment
    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if str(killed) in said(path)]
    assert set(os.listdir("/dev/shm")) <= files
    socket.create_server(("127.0.0.1", port)).close()


class Answers:
    """Answers of engines of several numbers of GPUs, computed when a test asks for them.

    So a run of one case starts no engine of another.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, size: int, case: str) -> dict[str, Any]:
        """Return the answers of one GPU, or the choices of several at each place of those."""
        path = self._folder / f"{size}-{case}.json"
        if not path.exists():
            if size > 1:
                self.of(1, case)
            name = "tests.distributed.rig_engine"
            command = [sys.executable, "-m", name, str(self._folder), str(size), case]
            subprocess.run(command, cwd=ROOT, check=True, timeout=2 * TIMEOUT_S)
        found: dict[str, Any] = json.loads(path.read_text())
        return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Answers of all cases."""
    build_rig()
    return Answers(tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("size", SIZES or [2])
@pytest.mark.parametrize("case", CASES)
def test_every_token_is_that_of_one_gpu(case: str, size: int, answers: Answers) -> None:
    found = compared(answers.of(1, case), answers.of(size, case))
    print(f"{case}:", ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    # as far from float32 as one GPU is, in the other direction, and as each rank rounds its part of
    # a sum once more; with one part a tenth too large a token of the demo model moves by 1
    bound = max(3 * found["one from float32"], CLEAR)
    assert found["lead"] <= bound and found["moved"] <= bound
    # a sum that is wrong moves all
    assert found["mean of several"] <= max(2 * found["mean of one"], CLEAR / 10)


@pytest.mark.parametrize("size", SIZES or [2])
def test_as_many_drafts_are_accepted_as_on_one_gpu(size: int, answers: Answers) -> None:
    """Ranks whose drafts differ would accept others, and then answer or wait wrongly."""
    one, several = (answers.of(number, "drafts")["acceptance"] for number in (1, size))
    print(f"accepted: {one:.3f} on one GPU, {several:.3f} on several")
    assert several > 0.9 * one > 0.2


def compared(one: dict[str, Any], several: dict[str, Any]) -> dict[str, float]:
    """Return the largest distances of several GPUs from one over all answers, in log-probability.

    `lead` is that of one GPU's token over another that several chose, in the eyes of one GPU;
    `moved` is how far its tokens are from where one GPU sees them.
    """
    rows = []
    for answer, exact, tops, chosen, theirs in zip(
        *(one["tokens"], one["exact"], one["tops"]), several["tokens"], several["tops"], strict=True
    ):
        for token, logprob, top, other, their_top in zip(
            answer, exact, tops, chosen, theirs, strict=True
        ):
            own, seen = dict(top), dict(their_top).get(token, -np.inf)
            lead = own[token] - own.get(other, -np.inf)
            rows.append(
                (token != other, lead, seen - own[token], own[token] - logprob, seen - logprob)
            )
    differs, lead, moved, error, errors = np.abs(rows).T
    return {
        "tokens": len(rows),
        "others": differs.sum(),
        "lead": lead.max(),
        "moved": moved.max(),
        "one from float32": error.max(),
        "mean of one": error.mean(),
        "mean of several": errors.mean(),
    }
