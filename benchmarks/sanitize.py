"""The GPU tests under a tool of compute-sanitizer, shared out among processes.

    python -m benchmarks.sanitize memcheck --workers 8 tests/ops tests/step tests/custom_ops

A checked process is slow and uses one core, so each of the workers checks its own part of the
tests. Left out are captured graphs and ten thousand repeats, which launch what was launched under
the tool before, calls that are refused, caches past 2 GiB, and tests that count launches and
objects, of which the tool has some of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from benchmarks._harness import ROOT

_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default")
_LEFT_OUT = ("graph", "capture", "replay", "thousand", "repeated", "every_time", "refus")
_LEFT_OUT += ("gigabytes", "to_the_31", "neither_waits", "outlive")
# whose products are torch's: racecheck finds races in them, or breaks on them
_WITH_PRODUCTS = ("overlap_streams",)
# torch's own pool would hide an access past the end of a tensor
_VARIABLES = {"FD_DSA_SMALL_TESTS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
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
    return tests


def verdict(tool: str, status: int, text: str) -> str:
    """What is wrong with a worker that ended with `status` and printed `text`; "" if nothing."""
    if status:
        return f"exit status {status}"
    if " passed" not in text:
        return "no test ran"
    return "" if re.search(CLEAN[tool], text) else "the tool found errors, or said nothing"


def main(argv: Sequence[str] | None = None) -> int:
    """Check the tests; 0 if every process was clean, else 1 with the output of those that were not.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tool", choices=sorted(CLEAN))
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("paths", nargs="+", help="files, folders or identifiers of tests")
    args = parser.parse_args(argv)
    tests = collect(args.tool, args.paths)
    checker = ["compute-sanitizer", "--tool", args.tool, "--error-exitcode", "9"]
    # a driver call that is refused, and answered, is no wrong access
    checker += ["--report-api-errors", "no"] if args.tool == "memcheck" else []
    command = [*checker, "--target-processes", "application-only", *_PYTEST]
    command += choice(args.tool)
    workers = [
        subprocess.Popen(
            [*command, *tests[i :: args.workers]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | _VARIABLES,
        )
        for i in range(min(args.workers, len(tests)))
    ]
    failures = 0
    for worker in workers:
        text = worker.communicate()[0]
        wrong = verdict(args.tool, worker.returncode, text)
        if wrong:
            failures += 1
            print(f"{text}\n{args.tool}: {wrong}")
    clean = len(workers) - failures
    print(f"{args.tool}: {len(tests)} tests, {clean} of {len(workers)} processes passed and clean")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
