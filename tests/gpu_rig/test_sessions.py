"""The forms that need no GPU: their tests run in sessions of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_rig.session import VARIABLE, built

# a test here is a whole session, each of whose tests has the usual limit
pytestmark = pytest.mark.timeout(3600)

ROOT = Path(__file__).parents[2]
DEVICE = "tests/gpu_rig/device"
# the device itself; the kernels that run on it take longer
QUICK = ("operators", "counters", "capture", "step", "custom_ops")
# the longest of those that go other tests' way with another type; a GPU runs all
TWINS = (
    "test_captured_decode.py::test_logits_are_those_of_eager_steps[v32]",
    "test_mtp.py::test_outputs_are_those_without_drafts_and_drafts_those_of_the_cpu[eager]",
    "test_demo_end_to_end.py::test_greedy_tokens_of_the_demo_model[float32]",
    "test_demo_end_to_end.py::test_every_write_leaves_the_bytes_of_the_cpu[float32]",
)


def run_session(form: str, *arguments: str) -> int:
    """Run tests on a form in a process of its own; how many passed. Fails with their report."""
    built(form)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {VARIABLE: form}, capture_output=True, text=True
    )
    report = f"{done.stdout}{done.stderr}"
    assert done.returncode == 0, report
    passed = re.search(r"(\d+) passed", report)
    return int(passed[1]) if passed else 0


@pytest.mark.triton
def test_the_device_in_host_memory() -> None:
    files = [f"{DEVICE}/test_{name}.py" for name in QUICK]
    assert run_session("fake", *files, "tests/test_kernel_memory.py") >= 96


@pytest.mark.slow
@pytest.mark.triton
def test_the_device_where_host_access_faults() -> None:
    files = ["tests/test_kernel_memory.py", "tests/test_doctor.py"]
    left_out = [f"--deselect={DEVICE}/{test}" for test in TWINS]
    assert run_session("guard", DEVICE, *files, *left_out) >= 202


@pytest.mark.slow
@pytest.mark.triton
def test_kernels_where_a_wrong_address_faults() -> None:
    assert run_session("guard", "tests/ops", "-k", "rig and kernel") >= 100
