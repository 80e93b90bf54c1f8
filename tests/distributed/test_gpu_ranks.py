"""Processes with a GPU each: sums, repeats of a graph, a rank that is absent, whole engines.

The rig's processes load their plug-in themselves, so both kinds run in one session:
`pytest -m gpu tests/distributed`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.gpu_ranks import ROOT, num_gpus, run_ranks
from tests.distributed.rig_engine import CASES

pytestmark = pytest.mark.gpu
TIMEOUT_S = 150
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
    module, checks = "tests.distributed.rank_checks", ("sums", "repeats", "absent")
    found = run_ranks(module, size, memory, *checks, timeout_s=TIMEOUT_S)
    said = f"rank {size - 1} did not come to an all-reduce for 1 s"
    assert [one.pop("absent") for one in found] == [said] * (size - 1) + ["absent"]
    assert all(one == found[0] for one in found)


def answers(folder: Path, size: int, *cases: str) -> dict[str, Any]:
    """What an engine of so many GPUs answers."""
    command = [sys.executable, "-m", "tests.distributed.rig_engine", str(folder), str(size), *cases]
    subprocess.run(command, cwd=ROOT, check=True, timeout=TIMEOUT_S)
    return {case: json.loads((folder / f"{size}-{case}.json").read_text()) for case in cases}


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answers of one GPU."""
    build_rig()
    return answers(tmp_path_factory.mktemp("one"), 1, *CASES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES or [2])
def test_tokens_are_those_of_one_gpu(
    size: int, case: str, of_one: dict[str, Any], tmp_path: Path
) -> None:
    found, room = answers(tmp_path, size, case)[case], 0.001 if case == "float32" else 0.1
    same = 0
    for ours, one in zip(found, of_one[case], strict=True):
        assert abs(ours["best"][0][0] - one["best"][0][0]) <= room
        pairs = zip(ours["tokens"], one["tokens"], strict=True)
        same += len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
    # where rounding chooses another key, expert or token, another text follows; a sum that is
    # wrong leaves hardly any token what it was
    num_tokens = sum(len(one["tokens"]) for one in found)
    assert same >= (1 if case == "float32" else 0.2) * num_tokens
