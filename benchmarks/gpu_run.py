"""Everything that is measured on one GPU, in one command that may be cut off at any time.

    python -m benchmarks.gpu_run --out DIR --peers DIR --budget-s 560

The sections are ceilings, the library of custom_ops/, correctness, benchmarks, memory checks
and repeats, in this order. With --rig they are the tests of the embedded engine on Paddle
tensors in CUDA memory, then its benchmarks, with vLLM if --vllm is given.

Every section is a process with its own time limit. Its output is DIR/<section>.log, and after each
one DIR/run.json is rewritten. A second run on the same DIR continues after the sections that
passed, and inside checks that had no time for all tests. A failure of the small correctness tests
ends the run. The results, DIR/<benchmark>.json, are copied to benchmarks/results by hand. --commit
names the commit of a copy of the tree without git.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks._harness import (
    LIMIT_VARIABLE,
    OUT_OF_TIME,
    ROOT,
    case_line,
    parser_of,
    write_json,
)

BENCHMARKS = {
    "v4_prepare": 150,
    "topk": 150,
    "indexer_logits": 200,
    "sparse_mla": 280,
    "step_metadata": 140,
    "launch_overhead": 80,
    "cache_write": 90,
    "indexer_query": 90,
    "mla_query": 120,
    "device_sampling": 60,
}
"""Module -> its time limit, seconds, in the order of their importance."""
_ENGINE = {
    "gpu_engine": ("gpu_engine --rig --out {out}", 220),
    "mixed_steps": ("mixed_steps --rig --out {out}", 240),
    "host_tier": ("host_tier --rig --out {out}", 240),
    "gpu_engine_peer": ("gpu_engine --earlier --peer {vllm} --out {out}", 340),
    "speculative_gpu": ("speculative_gpu --rig --out {out}", 380),
    "speculative": ("speculative --rig --rounds 2 --out {out}", 240),
    "gpu_engine_invariant": ("gpu_engine --batch-invariant --rig --out {out}", 220),
    "real_widths": ("real_widths --rig --folder /dev/shm --peer {vllm} --out {out}", 300),
    "once_per_step": ("once_per_step --rig --out {out}", 180),
    "prompt_attention": ("prompt_attention --rig --out {out}", 120),
    "four_bit_experts": ("four_bit_experts --rig --out {out}", 150),
    "gpu_experts": ("gpu_gemms --rig --only experts --peer {vllm} --out {out}", 150),
    "load": ("load --rig --lengths chat --seconds 45 --out {out}", 400),
    "load_peer": ("load --earlier --lengths chat --seconds 45 --peer {vllm} --out {out}", 560),
}
"""Section -> module and its flags, and its time limit, likewise."""

# a section that is cut off has printed the names of the tests that failed
_TESTS = (sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider")
_PYTEST = (
    *_TESTS,
    *("-m", "gpu"),
    # one file that cannot be imported fails the section, and the others still run; a warning of
    # another package's version is no wrong result
    *("--continue-on-collection-errors", "-W", "default"),
)
# the oracles of as many processes as there are cores, each with a thread for every core, are slow
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_SMALL = {"FD_DSA_SMALL_TESTS": "1"}
_LEAST_S = 10
# lines of pytest -v with and without processes of tests
_FAILED_TEST = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?:FAILED|ERROR) (.+?)"
    r"|(\S.*?) (?:FAILED|ERROR)(?: +\[ *\d+%\])?) *$",
    re.MULTILINE,
)
_MOST_FAILED = 20
_STATUS = {0: "passed", -1: "out of time", OUT_OF_TIME: "out of time", None: "not installed"}


@dataclass(frozen=True)
class Section:
    """A process of the run."""

    name: str
    command: tuple[str, ...]
    limit_s: int
    environment: Mapping[str, str] = field(default_factory=dict)
    ends_run: bool = False
    # a session that skipped all tests is no proof
    must_say: str = ""


def gpu_tests() -> list[str]:
    """Test files with a test for the GPU that runs on torch tensors."""
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "gpu_rig" not in path.parts
        and re.search("kernel_memory|mark.gpu\n", path.read_text("utf-8"))
    ]


def sections(args: argparse.Namespace) -> list[Section]:
    """Return all sections, in the order in which they run."""
    out, tests = args.out, args.tests or gpu_tests()
    flags = ("--out", str(out), *(("--peers", str(args.peers)) if args.peers else ()))
    flags += ("--quick",) if args.quick else ()

    def module(name: str, limit_s: int) -> Section:
        return Section(name, (sys.executable, "-m", f"benchmarks.{name}", *flags), limit_s)

    # launching has no memory of its own to check; the kernels have
    kernels = [path for path in tests if not path.startswith("tests/triton_runtime")]

    def checker(tool: str, paths: Sequence[str]) -> Section:
        command = (sys.executable, "-m", "benchmarks.sanitize", tool)
        options = ("--workers", str(args.workers), "--done", str(out / f"{tool}.done"))
        return Section(tool, (*command, *options, *paths), 280, _ONE_THREAD)

    # most of a test's time is the compiler's, on one core
    quick = (*_PYTEST, "-n", str(args.workers)) if find_spec("xdist") else _PYTEST
    threads = _ONE_THREAD if find_spec("xdist") else {}
    small = threads | _SMALL
    repeats = (sys.executable, "-m", "benchmarks.subjects", *BENCHMARKS, "tune")
    # once, not by every process of tests
    library = Section("custom_ops", (sys.executable, "-m", "custom_ops.build_library"), 240)
    return [
        module("ceilings", 90),
        library,
        Section("tests_small", (*quick, "--maxfail=10", *tests), 200, small, True, " passed"),
        Section("tests_all", (*quick, *tests), 400, threads, must_say=" passed"),
        *(module(name, limit_s) for name, limit_s in BENCHMARKS.items()),
        checker("memcheck", kernels),
        checker("racecheck", kernels),
        # only custom_ops/ has barriers written by hand
        checker("synccheck", [p for p in kernels if "custom_ops" in p] or kernels),
        Section("repeats", repeats, 150),
    ]


def engine_sections(args: argparse.Namespace) -> list[Section]:
    """Return sections of the embedded engine, in the order in which they run."""
    tests = (*_TESTS, "-W", "default")
    together = ("-n", str(args.workers), "--timeout", "200", "-m", "gpu_rig and not own_gpu")
    alone, real = ("-m", "gpu_rig and own_gpu", "tests/gpu_rig"), {"FD_DSA_RIG": "real"}
    found = [
        Section("tests_alone", (*tests, *alone), 120, real, must_say=" passed"),
        Section("tests_all", (*tests, *together, "tests"), 540, real, must_say=" passed"),
        # several GPUs, or the one that is here as all of them
        Section("tests_ranks", (*tests, "-m", "gpu", "tests/distributed"), 240),
    ]
    for name, (line, limit_s) in _ENGINE.items():
        if args.vllm is not None or "{vllm}" not in line:
            words = [word.format(out=args.out, vllm=args.vllm) for word in line.split()]
            command = (sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:])
            found.append(Section(name, command, limit_s))
    return found


class Run:
    """The state of a run, kept in DIR/run.json."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self._path = out, out / "run.json"
        self.done: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            self.done = json.loads(self._path.read_text())

    def gate(self) -> str:
        """Return the verdict of the correctness sections: passed, failed or not run."""
        names = "tests_small", "tests_alone", "tests_all"
        small, alone, every = (self.done.get(name, {}).get("status") for name in names)
        if every == "passed" and small != "failed" and alone in (None, "passed"):
            # all tests are the small ones and more
            return "passed"
        return "failed" if {small, alone, every} & {"failed", "out of time"} else "not run"

    def execute(self, section: Section, limit_s: float) -> dict[str, Any]:
        """Run a section. Returns its entry of run.json."""
        begin = time.monotonic()
        told = {"FD_DSA_GATE": self.gate(), LIMIT_VARIABLE: f"{limit_s:.0f}"}
        variables = os.environ | told | section.environment
        log = self.out / f"{section.name}.log"
        with log.open("w") as file:
            try:
                status = _wait(section.command, file, variables, limit_s)
            except FileNotFoundError as error:
                file.write(f"{error}\n")
                status = None
        text = log.read_text(errors="replace")
        if status == 0 and section.must_say not in text:
            status = 1
        entry: dict[str, Any] = {
            "status": _STATUS.get(status, "failed"),
            "exit": status,
            "seconds": round(time.monotonic() - begin, 1),
            "last": text.strip().rpartition("\n")[2][:160],
        }
        # a run that is killed has no summary of them
        failed = dict.fromkeys("".join(names) for names in _FAILED_TEST.findall(text))
        if failed:
            entry["failed_tests"] = list(failed)[:_MOST_FAILED]
        self.done[section.name] = entry
        write_json(self._path, self.done)
        return entry


def _wait(command: Sequence[str], log: Any, variables: Mapping[str, str], limit_s: float) -> int:
    """Return the exit status of a command, or -1 after its time limit.

    At the limit the command and its children are killed.
    """
    process = subprocess.Popen(
        command, stdout=log, stderr=log, env=variables, cwd=ROOT, start_new_session=True
    )
    try:
        return abs(process.wait(limit_s))
    except subprocess.TimeoutExpired:
        return -1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def table(run: Run) -> str:
    """Return a summary of the run: sections and figures."""
    lines = []
    for name, entry in run.done.items():
        lines.append(
            f"{name:<16} {entry['status']:<13} {entry['seconds']:>6.1f} s  {entry['last']}"
        )
        lines += [f"failed: {test}" for test in entry.get("failed_tests", ())]
    for path in sorted(run.out.glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("cases") or result.get("failed"):
            gate = f" (gate {result['gate']})" if "gate" in result else ""
            lines.append(f"-- {path.stem}{gate} {result.get('error', '')}")
        lines += [f"failed: {name}: {why}" for name, why in result.get("failed", {}).items()]
        lines += [f"not run: {', '.join(result['not_run'])}"] if result.get("not_run") else []
        # other programs than the sections may leave results there
        lines += [case_line(e) for e in result.get("cases", ()) if "percent_of_floor" in e]
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_run")
    parser.add_argument("--peers", type=Path, help="folder with other projects' kernels")
    parser.add_argument("--rig", action="store_true", help="the embedded engine")
    parser.add_argument("--vllm", type=Path, help="folder with vLLM's run.sh, with --rig")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION")
    parser.add_argument("--tests", nargs="+", help="test files, instead of all for the GPU")
    parser.add_argument("--workers", type=int, default=14, help="processes of tests")
    parser.add_argument("--budget-s", type=float, default=1e9, help="seconds for the whole run")
    parser.add_argument("--quick", action="store_true", help="one or two shapes a benchmark")
    parser.add_argument("--commit", help="full hash of this tree, with -dirty if it differs")
    args = parser.parse_args(argv)
    # sections run in the root of the tree
    args.out, args.peers = args.out.resolve(), args.peers and args.peers.resolve()
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the selected sections. Returns 0 if all of them passed."""
    args = parse_arguments(argv)
    every = engine_sections(args) if args.rig else sections(args)
    unknown = {*args.only} - {section.name for section in every}
    if unknown:
        names = ", ".join(section.name for section in every)
        sys.exit(f"gpu_run: no section {', '.join(sorted(unknown))}; there are {names}")
    chosen = [section for section in every if not args.only or section.name in args.only]
    if args.commit:
        os.environ["FD_DSA_COMMIT"] = args.commit
    end = time.monotonic() + args.budget_s
    run = Run(args.out)
    for section in chosen:
        if run.done.get(section.name, {}).get("status") == "passed":
            continue
        left = end - time.monotonic()
        if left < _LEAST_S:
            print(f"no time for {section.name}", flush=True)
            continue
        entry = run.execute(section, min(section.limit_s, left))
        print(f"{section.name:<16} {entry['status']:<13} {entry['seconds']:>6.1f} s", flush=True)
        if section.ends_run and entry["status"] == "failed":
            print((args.out / f"{section.name}.log").read_text(errors="replace")[-6000:])
            break
    print(table(run), flush=True)
    return int(any(run.done.get(s.name, {}).get("status") != "passed" for s in chosen))


if __name__ == "__main__":
    sys.exit(main())
