"""The GPU tests under a tool of compute-sanitizer, shared out among processes.

    python -m benchmarks.sanitize memcheck --workers 8 tests/ops tests/step tests/custom_ops

A checked process is slow and uses one core, so each of the workers checks its own part of the
tests, those of custom_ops/ first. Near the end of FD_DSA_LIMIT_S seconds no test is begun; what was
clean until then is kept in --done, and the next run checks the others.

Left out are captured graphs and ten thousand repeats, which launch what was launched under the tool
before, calls that are refused, caches past 2 GiB, and tests that count launches and objects, of
which the tool has some of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks._deadline import DONE_VARIABLE, END_VARIABLE, NO_TIME
from benchmarks._harness import LIMIT_VARIABLE, OUT_OF_TIME, ROOT

_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default")
_LEFT_OUT = ("graph", "capture", "replay", "thousand", "repeated", "every_time", "refus")
_LEFT_OUT += ("gigabytes", "to_the_31", "neither_waits", "outlive")
# whose GEMMs are torch's: racecheck finds races in them, or breaks on them
_WITH_PRODUCTS = ("overlap_streams",)
# torch's own pool would hide an access past the end of a tensor
_VARIABLES = {"FD_DSA_SMALL_TESTS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# racecheck does not follow the order from lanes to the one that arrives at a barrier for them
_EVERY_LANE = {"NVCC_APPEND_FLAGS": "-DFD_DSA_EVERY_LANE_ARRIVES"}
# share of the time for the tests that are running when it ends
_RESERVE = 0.3
# what a tool says at the end of a clean process
CLEAN = {
    "initcheck": r"ERROR SUMMARY: 0 errors",
    "memcheck": r"ERROR SUMMARY: 0 errors",
    "racecheck": r"RACECHECK SUMMARY: 0 hazards",
    "synccheck": r"ERROR SUMMARY: 0 errors",
}


def choice(tool: str) -> tuple[str, ...]:
    """Flags of pytest that choose the tests for a tool."""
    left_out = _LEFT_OUT + (_WITH_PRODUCTS if tool == "racecheck" else ())
    return "-m", "gpu", "--hypothesis-profile=brief", "-k", "not " + " and not ".join(left_out)


def collect(tool: str, paths: Sequence[str]) -> list[str]:
    """Identifiers of the tests to check."""
    command = [*_PYTEST, *choice(tool), "--collect-only", *paths]
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


class Worker:
    """A checked process with a part of the tests.

    Args:
        tool: of compute-sanitizer.
        tests: identifiers.
        end: second of the clock after which no test is begun.
        folder: for what it writes.
        number: of the worker.
    """

    def __init__(
        self, tool: str, tests: Sequence[str], end: float, folder: Path, number: int
    ) -> None:
        checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        # a driver call that is refused, and answered, is no wrong access
        checker += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [*checker, "--target-processes", "application-only", *_PYTEST]
        command += ["-p", "benchmarks._deadline", "-rs", *choice(tool), *tests]
        self._tool, self._num_tests = tool, len(tests)
        self._log, self._done = folder / f"{number}.log", folder / f"{number}.done"
        self._done.touch()
        names = {END_VARIABLE: str(end), DONE_VARIABLE: str(self._done)}
        names |= _EVERY_LANE if tool == "racecheck" else {}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | _VARIABLES | names
            )

    def finish(self) -> tuple[str, list[str]]:
        """Wait; what is wrong, and the tests that are done in a process that is clean."""
        status = self._process.wait()
        text = self._log.read_text(errors="replace")
        done = self._done.read_text().splitlines()
        wrong = verdict(self._tool, status, text)
        if wrong:
            print(f"{text}\n{self._tool}: {wrong}", flush=True)
        else:
            print(f"clean: {len(done)} of {self._num_tests} tests", flush=True)
        return wrong, [] if wrong else done


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
    every = collect(args.tool, args.paths)
    done = _known(args.done)
    tests = [test for test in every if test not in done]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        parts = [tests[i :: args.workers] for i in range(min(args.workers, len(tests)))]
        workers = [Worker(args.tool, p, end, Path(folder), i) for i, p in enumerate(parts)]
        for worker in workers:
            wrong, found = worker.finish()
            failures += bool(wrong)
            done.update(found)
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


def _known(path: Path | None) -> set[str]:
    """Tests that were clean before."""
    return set(path.read_text().split("\n")) - {""} if path and path.exists() else set()


if __name__ == "__main__":
    sys.exit(main())
