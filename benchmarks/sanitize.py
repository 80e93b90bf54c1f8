"""The GPU tests under a tool of compute-sanitizer, shared out among processes.

    python -m benchmarks.sanitize memcheck --workers 8 tests/ops tests/step tests/custom_ops

A checked process is slow and uses one core, so each of the workers checks its own part of the
tests, those of custom_ops/ first. Near the end of FD_DSA_LIMIT_S seconds no test is begun; what was
clean until then is kept in --done, and the next run checks the others.

Left out are captured graphs and ten thousand repeats, which launch what was launched under the tool
before, calls that are refused, caches past 2 GiB, launches that wait for each other, which a tool
runs in turn, and tests that count launches and objects, of which it has some of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from benchmarks._harness import LIMIT_VARIABLE, OUT_OF_TIME, ROOT

_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default")
_LEFT_OUT = ("graph", "capture", "replay", "thousand", "repeated", "every_time", "refus")
_LEFT_OUT += ("gigabytes", "to_the_31", "neither_waits", "outlive", "at_once_get")
# flags of pytest that choose the tests
_CHOICE = ("-m", "gpu", "--hypothesis-profile=brief")
_CHOICE += ("-k", "not " + " and not ".join(_LEFT_OUT))
# torch's own pool would hide an access past the end of a tensor
_VARIABLES = {"FD_DSA_SMALL_TESTS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# racecheck does not follow the order from lanes to the one that arrives at a barrier for them
_EVERY_LANE = {"NVCC_APPEND_FLAGS": "-DFD_DSA_EVERY_LANE_ARRIVES"}
# for a checked process: when no test is begun any more, and the file of those that are done
_END, _DONE = "FD_DSA_TESTS_END", "FD_DSA_TESTS_DONE"
NO_TIME = "no time left"
# share of the time for the tests that are running when it ends
_RESERVE = 0.3
# what a tool says at the end of a clean process
CLEAN = {
    "initcheck": r"ERROR SUMMARY: 0 errors",
    "memcheck": r"ERROR SUMMARY: 0 errors",
    "racecheck": r"RACECHECK SUMMARY: 0 hazards",
    "synccheck": r"ERROR SUMMARY: 0 errors",
}


def collect(paths: Sequence[str]) -> list[str]:
    """Identifiers of the tests to check."""
    command = [*_PYTEST, *_CHOICE, "--collect-only", *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    tests = re.findall(r"^tests/.*::.*$", done.stdout, re.MULTILINE)
    if done.returncode or not tests:
        raise SystemExit(f"no tests collected:\n{done.stdout}{done.stderr}")
    # what is checked first has the best chance; else the order stays
    return sorted(tests, key=lambda test: not test.startswith("tests/custom_ops/"))


def verdict(tool: str, status: int, text: str) -> str:
    """What is wrong with a worker that ended with `status` and printed `text`; "" if nothing."""
    if status:
        return f"exit status {status}"
    if " passed" not in text and NO_TIME not in text:
        return "no test ran"
    return "" if re.search(CLEAN[tool], text) else "the tool found errors, or said nothing"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """In a checked process: skip what there is no time for."""
    if time.time() > float(os.environ[_END]):
        pytest.skip(NO_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In a checked process: note a test that passed, or had nothing to do here."""
    report = yield
    passed = report.when == "call" and report.passed
    if passed or (report.skipped and NO_TIME not in str(report.longrepr)):
        with Path(os.environ[_DONE]).open("a") as file:
            file.write(f"{item.nodeid}\n")
    return report


def checked(tool: str, tests: Sequence[str], end: float, stem: Path) -> subprocess.Popen[bytes]:
    """A checked process with a part of the tests.

    Args:
        tool: of compute-sanitizer.
        tests: identifiers.
        end: second of the clock after which no test is begun.
        stem: of two files, .log for its output and .done for the tests that are done.
    """
    checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    # a driver call that is refused, and answered, is no wrong access
    checker += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [*checker, "--target-processes", "application-only", *_PYTEST]
    command += ["-p", "benchmarks.sanitize", "-rs", *_CHOICE, *tests]
    done = stem.with_suffix(".done")
    done.touch()
    variables = os.environ | _VARIABLES | {_END: str(end), _DONE: str(done)}
    variables |= _EVERY_LANE if tool == "racecheck" else {}
    with stem.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=variables)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the tests.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0 if every process was clean, 75 if there was no time for all tests, else 1, with the output
        of the processes that were not clean.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tool", choices=sorted(CLEAN))
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--done", type=Path, help="tests that were clean before, kept here")
    parser.add_argument("paths", nargs="+", help="files, folders or identifiers of tests")
    args = parser.parse_args(argv)
    limit_s = float(os.environ.get(LIMIT_VARIABLE, "inf"))
    end = time.time() + (1 - _RESERVE) * limit_s
    every = collect(args.paths)
    has_done = args.done and args.done.exists()
    done = set(args.done.read_text().split("\n")) - {""} if has_done else set()
    tests = [test for test in every if test not in done]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        parts = [tests[i :: args.workers] for i in range(min(args.workers, len(tests)))]
        stems = [Path(folder) / str(number) for number in range(len(parts))]
        workers = [
            checked(args.tool, part, end, stem) for part, stem in zip(parts, stems, strict=True)
        ]
        for worker, part, stem in zip(workers, parts, stems, strict=True):
            status, text = worker.wait(), stem.with_suffix(".log").read_text(errors="replace")
            wrong = verdict(args.tool, status, text)
            if wrong:
                failures += 1
                print(f"{text}\n{args.tool}: {wrong}", flush=True)
                continue
            new = stem.with_suffix(".done").read_text().splitlines()
            print(f"clean: {len(new)} of {len(part)} tests", flush=True)
            done.update(new)
            if args.done:
                args.done.write_text("\n".join(sorted(done)) + "\n")
    clean, known = len(workers) - failures, len(done & set(every))
    print(
        f"{args.tool}: {known} of {len(every)} tests passed and clean, in {clean} of "
        f"{len(workers)} processes"
    )
    if failures:
        return 1
    return 0 if known == len(every) else OUT_OF_TIME


if __name__ == "__main__":
    sys.exit(main())
