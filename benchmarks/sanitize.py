"""The GPU tests under a tool of compute-sanitizer, divided among processes.

    python -m benchmarks.sanitize memcheck --workers 8 tests/ops tests/step tests/custom_ops
    python -m benchmarks.sanitize racecheck --rig tests/ops/test_fp8_gemm.py

A checked process is slow and uses one core. So several work, each on a few tests at a time, those
of custom_ops/ at the front. After FD_DSA_LIMIT_S seconds the running ones are ended, and their
tests count as not run. --done keeps the clean tests, and the next run checks the others. With --rig
the tests run on Paddle tensors, which the kernels of the embedded engine need.

These tests are not checked:

- captured graphs and ten thousand repeats, which launch kernels that were checked before
- refused calls, and caches past 2 GiB
- launches that wait for each other, which a tool runs in turn
- tests that count launches and objects, because a tool has its own
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks._harness import LIMIT_VARIABLE, OUT_OF_TIME, ROOT, parser_of

_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default")
_LEFT_OUT = ("graph", "capture", "replay", "thousand", "repeated", "every_time", "refus")
_LEFT_OUT += ("gigabytes", "to_the_31", "neither_waits", "outlive", "at_once_get")
# flags of pytest that choose the tests
PYTEST_OPTIONS = ("--hypothesis-profile=brief", "-k", "not " + " and not ".join(_LEFT_OUT))
# torch's own pool would hide an access past the end of a tensor
_VARIABLES = {"FD_DSA_SMALL_TESTS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# racecheck does not follow the order from lanes to the one that arrives at a barrier for them
_EVERY_LANE = {"NVCC_APPEND_FLAGS": "-DFD_DSA_EVERY_LANE_ARRIVES"}
# few, so that little is lost when the time ends; a process needs some seconds before its first one
MAX_TESTS_A_PROCESS = 3
# share of the time for the last lines of the output
_RESERVE = 0.05
# last line of a clean process, by tool
CLEAN = {
    "initcheck": r"ERROR SUMMARY: 0 errors",
    "memcheck": r"ERROR SUMMARY: 0 errors",
    "racecheck": r"RACECHECK SUMMARY: 0 hazards",
    "synccheck": r"ERROR SUMMARY: 0 errors",
}


class Checked(NamedTuple):
    """A checked process.

    Attributes:
        tests: identifiers.
        status: exit status, None after the time limit.
        text: its output.
    """

    tests: Sequence[str]
    status: int | None
    text: str


def collect(paths: Sequence[str], marker: str, variables: Mapping[str, str]) -> list[str]:
    """Return identifiers of the tests to check."""
    command = [*_PYTEST, "-m", marker, *PYTEST_OPTIONS, "--collect-only", *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    tests = re.findall(r"^tests/.*::.*$", done.stdout, re.MULTILINE)
    if done.returncode or not tests:
        raise SystemExit(f"no tests collected:\n{done.stdout}{done.stderr}")
    # the first ones have the best chance, and the others keep their order
    return sorted(tests, key=lambda test: not test.startswith("tests/custom_ops/"))


def verdict(tool: str, status: int, text: str) -> str:
    """Return the fault of a process by its exit status and output, or "" if it is clean.

    A process without a call of the driver makes the tool fail. So a process that skipped all of its
    tests is clean with any exit status.
    """
    if re.search(r"\d skipped", text) and not re.search(r"\d (passed|failed|errors?)", text):
        return ""
    if status:
        return f"exit status {status}"
    if not num_passed(text):
        return "no test ran"
    return "" if re.search(CLEAN[tool], text) else "the tool found errors, or said nothing"


def num_passed(text: str) -> int:
    """Return the number of passed tests."""
    return int((re.findall(r"(\d+) passed", text) or [0])[-1])


def checked(tool: str, end: float, variables: Mapping[str, str], tests: Sequence[str]) -> Checked:
    """Run tests in a process under a tool, until a second of the clock."""
    checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    # a driver call that is refused, and answered, is no wrong access
    checker += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [
        *checker,
        "--target-processes",
        "application-only",
        *_PYTEST,
        *PYTEST_OPTIONS,
        *tests,
    ]
    if time.time() > end:
        return Checked(tests, None, "")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # in a new session, because a killed tool would leave its target running
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, errors="replace", start_new_session=True, **pipes
    )
    try:
        left_s = None if end == float("inf") else end - time.time()
        text, _ = process.communicate(timeout=left_s)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return Checked(tests, None, process.communicate()[0])
    return Checked(tests, process.returncode, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the tests.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0 if every process was clean, 75 if there was no time for all tests, else 1. The output of
        processes that were not clean is printed.
    """
    parser = parser_of(__doc__)
    parser.add_argument("tool", choices=sorted(CLEAN))
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rig", action="store_true", help="on Paddle tensors of the test plug-in")
    parser.add_argument("--done", type=Path, help="tests that were clean before, kept here")
    parser.add_argument("paths", nargs="+", help="files, folders or identifiers of tests")
    args = parser.parse_args(argv)
    end = time.time() + (1 - _RESERVE) * float(os.environ.get(LIMIT_VARIABLE, "inf"))
    variables = os.environ | _VARIABLES | ({"FD_DSA_RIG": "real"} if args.rig else {})
    # makes the plug-in too
    every = collect(args.paths, "gpu_rig" if args.rig else "gpu", variables)
    if args.tool == "racecheck":
        variables |= _EVERY_LANE
    if any(test.startswith("tests/custom_ops/") for test in every):
        # once, not in every process
        build = [sys.executable, "-m", "custom_ops.build_library"]
        subprocess.run(build, cwd=ROOT, env=variables)
    has_done = args.done and args.done.exists()
    done = set(args.done.read_text().split("\n")) - {""} if has_done else set()
    tests = [test for test in every if test not in done]
    parts = [tests[i : i + MAX_TESTS_A_PROCESS] for i in range(0, len(tests), MAX_TESTS_A_PROCESS)]
    failures = passed = 0
    with ThreadPoolExecutor(args.workers) as pool:
        running = [pool.submit(checked, args.tool, end, variables, part) for part in parts]
        for one in map(Future.result, as_completed(running)):
            if one.status is None:
                continue
            if wrong := verdict(args.tool, one.status, one.text):
                failures += 1
                print(f"{one.text}\n{args.tool}: {wrong}: {' '.join(one.tests)}", flush=True)
                continue
            passed += num_passed(one.text)
            done.update(one.tests)
            print(f"clean: {len(done & set(every))} of {len(every)} tests", flush=True)
            if args.done:
                args.done.write_text("\n".join(sorted(done)) + "\n")
    known = len(done & set(every))
    print(
        f"{args.tool}: {known} of {len(every)} tests clean or skipped, "
        f"{passed} passed in this run; {failures} of {len(parts)} processes not clean"
    )
    if failures or (known and not passed and not has_done):
        return 1
    return 0 if known == len(every) else OUT_OF_TIME


if __name__ == "__main__":
    sys.exit(main())
