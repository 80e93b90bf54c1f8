"""The harness of the GPU benchmarks: ceilings, device time, poison, the result file.

The protocol of a benchmark module, which `gpu_run` and the report rely on:

    def cases(record, args):                     # name and function of each case
        for shape in ...:
            yield "128 tokens", partial(compare, record, shape)

    def compare(record, shape):                  # compares the outputs of both sides first
        times = _gpu.interleaved({"two writes": [f, ...], "one launch": [g, ...]})
        record.case("128 tokens", times, ours="one launch", bytes_moved=...)

    main = partial(_gpu.main, "cache_write", __doc__, cases)

    def subjects():                              # for `subjects`; a module may have none
        return {"128 tokens": (call, [tensors that it writes])}

    {"name", "env", "gate", "clocks": [before, after], "ceilings",
     "cases": [{"case", "tier", "times": {label: {"p20", "p50", "p80"}},    microseconds a call
                "ours": label, "ratios": {other label: its p50 / that of ours},
                "floor_us", "percent_of_floor", ...notes of the module}]}

A case that fails is named in "failed". None is begun when the time of the section is up; those are
in "not_run".

The order of `times` is that of the columns in docs/results; the first label that is not
ours is the baseline. `--quick` means one or two shapes. `--peers` is a folder as `_peers` says; a
peer that is absent leaves its label out. The file is rewritten after every case, so that a run
which is cut off leaves what it measured.

Each list in `interleaved` holds calls over input sets of their own: make `num_sets(bytes)` of them
with random data, so that a replay does not find its inputs in the L2.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import (
    LIMIT_VARIABLE,
    OUT_OF_TIME,
    case_line,
    environment,
    gpu_state,
    out_parser,
    write_json,
)
from benchmarks._timers import Call, Times, interleaved
from benchmarks._torch_device import register

import triton

# measures and records a case; returns False if a side is wrong
Case = Callable[[], "bool | None"]
POISON = 0xA5
_MAX_SETS = 48

# share of the time at whose end no case is begun
_RESERVE = 0.2


def arguments(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags of every GPU benchmark."""
    parser = out_parser(description)
    parser.add_argument("--quick", action="store_true", help="one or two shapes")
    parser.add_argument("--peers", type=Path, help="folder with other projects' kernels")
    return parser.parse_args(argv)


def main(
    name: str,
    description: str | None,
    cases: Callable[[Recorder, argparse.Namespace], Iterable[tuple[str, Case]]],
    argv: Sequence[str] | None = None,
) -> int:
    """Run the cases of a benchmark. Returns the exit status.

    Args:
        name: name of the result.
        description: its module's docstring.
        cases: name and function of each; a generator that sets up what several of them share.
    """
    args = arguments(description, argv)
    register()
    with Recorder(name, args.out) as record:
        for case, run in cases(record, args):
            record.attempt(case, run)
            torch.cuda.empty_cache()
    return record.status()


def num_sets(bytes_per_set: int) -> int:
    """Return the number of rotated input sets: together four times the L2, at least one."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(_MAX_SETS, -(-4 * l2_bytes // max(bytes_per_set, 1))))


def gemm_flops_per_s(kind: torch.dtype, product: Callable[[Any, Any], Any]) -> float:
    """Return the rate of a GEMM of random 8192 x 8192 matrices.

    Args:
        kind: dtype of the matrices.
        product: multiplies two of them.
    """
    size = 8192
    left, right = (torch.randn(size, size, device="cuda").to(kind) for _ in range(2))
    times = interleaved({"product": [partial(product, left, right)]}, mode="events")
    return 2 * size**3 / times["product"]["p50"] * 1e6


def checked(
    case: str, sides: Mapping[str, Sequence[Call]], check: Callable[[str], float], most: float
) -> tuple[dict[str, Sequence[Call]], dict[str, float], dict[str, str]]:
    """Check sides, and drop those that fail or are wrong.

    Args:
        case: its name.
        sides: label -> calls.
        check: makes the first call of a label and returns its error; an assertion fails the
            case.
        most: the largest error that rounding explains.
    """
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for label in sides:
        try:
            error = check(label)
            # errors of a launch are raised by the first wait
            torch.cuda.synchronize()
        except AssertionError:
            raise
        except Exception as problem:
            left_out[label] = str(problem)[:200]
            continue
        errors[label] = error
        if not error < most:
            left_out[label] = f"off by {error:.1e} of sums in doubles"
    for label, why in left_out.items():
        print(f"{case}: {label} left out: {why}", flush=True)
    return {k: calls for k, calls in sides.items() if k not in left_out}, errors, left_out


def poison(*tensors: torch.Tensor) -> None:
    """Fill outputs with bytes that no kernel writes by chance."""
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(POISON)


def effects(call: Call) -> dict[str, int]:
    """Count what one warm call does: launches, copies, waits of the host, allocations."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    before = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function("measured call"):
            call()
        after = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
        torch.cuda.synchronize()
    events = list(profiler.events())
    whole = next(e for e in events if e.name == "measured call" and _on_host(e)).time_range
    inside = [e.name for e in events if whole.start <= e.time_range.start <= whole.end]
    queued = [e.name for e in events if not _on_host(e) and e.name != "measured call"]
    copies = sum(name.startswith("Memcpy") for name in queued)
    return {
        "launches": len(queued) - copies,
        "copies": copies,
        "host_waits": sum("Synchronize" in name for name in inside),
        "allocations": after - before,
    }


def _on_host(event: Any) -> bool:
    """Return True for a profiler event of the host."""
    return event.device_type == torch.autograd.DeviceType.CPU


@triton.jit
def _empty_kernel(pointer):
    """Do no work: the shortest node of a graph."""


def ceilings() -> dict[str, float]:
    """Measure the ceilings of this GPU.

    Returns:
        `copy_bytes_per_s`, bytes read plus bytes written of a 1 GiB copy, and `node_us`, the time
        of an empty kernel as a node of a graph.
    """
    source = torch.randint(0, 255, (1 << 30,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    one = torch.zeros(1, device="cuda")
    copy = interleaved({"copy": [lambda: target.copy_(source)]}, mode="events")["copy"]["p50"]
    node = interleaved({"node": [lambda: _empty_kernel[(1,)](one)]}, mode="graph")["node"]["p50"]
    return {"copy_bytes_per_s": 2 * source.numel() / copy * 1e6, "node_us": node}


def clocks() -> dict[str, str]:
    """Return clocks, power and temperature as found. They are never set."""
    return gpu_state("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


class Recorder:
    """The result file of one benchmark, rewritten after every case.

    Args:
        name: name of the benchmark and of its file.
        folder: folder of `<name>.json`.

    Attributes:
        ceilings: those of this run, as `ceilings` returns them.
        cases: entries of the cases so far.
    """

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(1234)
        self._path = Path(folder) / f"{name}.json"
        limit_s = float(os.environ.get(LIMIT_VARIABLE, "inf"))
        # a case that has begun must end
        self.end_s = time.monotonic() + (1 - _RESERVE) * limit_s
        # the gate is set by the run that passed the tests; without it a figure is not published
        gate = os.environ.get("FD_DSA_GATE", "not run")
        self._result = {"name": name, "env": environment(), "gate": gate, "clocks": [clocks()]}
        self._result |= {"ceilings": ceilings(), "cases": [], "failed": {}, "not_run": []}
        self.ceilings, self.cases = self._result["ceilings"], self._result["cases"]
        self._flush()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._result["clocks"].append(clocks())
        if error is not None:
            self._result["error"] = f"{type(error).__name__}: {error}"[:500]
        self._flush()

    def attempt(self, name: str, case: Case) -> None:
        """Run a case, or several that belong together, unless there is no time.

        One that raises, or says False, is noted as failed.

        Args:
            name: none of another attempt.
            case: adds its cases to this record.
        """
        result = self._result
        if time.monotonic() > self.end_s:
            result["not_run"].append(name)
            self._flush()
            return
        try:
            wrong = "a side is wrong" if case() is False else ""
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            wrong = f"{type(error).__name__}: {error}"[:300]
        if wrong:
            result["failed"][name] = wrong
            print(f"failed: {name}: {wrong}", flush=True)
        self._flush()

    def status(self) -> int:
        """Exit status of a benchmark that makes attempts."""
        if self._result["failed"]:
            return 1
        return OUT_OF_TIME if self._result["not_run"] else 0

    def case(
        self,
        case: str,
        times: Times,
        *,
        ours: str,
        bytes_moved: float = 0,
        floor_us: float | None = None,
        tier: str = "T1",
        **notes: Any,
    ) -> None:
        """Add one case, print it and rewrite the file.

        Args:
            case: the row's name, for example "128 tokens".
            times: result of `interleaved`.
            ours: the label of our side.
            bytes_moved: fewest bytes that must be read and written; the floor is their time at
                the copy bandwidth of this run.
            floor_us: another floor, in microseconds, where bytes are not the bound.
            tier: tier of the figure (docs/results/index.md).
            notes: further figures that belong to the case, plain JSON values.
        """
        middle = times[ours]["p50"]
        if floor_us is None:
            floor_us = bytes_moved / self.ceilings["copy_bytes_per_s"] * 1e6
        entry = {
            "case": case,
            "tier": tier,
            "times": times,
            "ours": ours,
            "ratios": {label: t["p50"] / middle for label, t in times.items() if label != ours},
            "floor_us": floor_us,
            "percent_of_floor": 100 * floor_us / middle,
        }
        self.cases.append(entry | notes)
        self._flush()
        print(case_line(entry), flush=True)

    def note(self, **values: Any) -> None:
        """Add figures of the whole benchmark, plain JSON values."""
        self._result.update(values)
        self._flush()

    def _flush(self) -> None:
        write_json(self._path, self._result)
