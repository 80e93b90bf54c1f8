"""What the GPU benchmarks share: the ceilings of the run, device time, poison, the result file.

The protocol of a benchmark module, which `gpu_run` and the report rely on:

    def main(argv=None) -> int:
        args = _gpu.arguments(__doc__, argv)         # --out DIR, --quick, --peers DIR
        with _gpu.Recorder("cache_write", args.out) as record:   # writes DIR/cache_write.json
            for shape in ...:                        # compare the outputs of both sides first
                times = _gpu.interleaved({"two writes": [f, ...], "one launch": [g, ...]})
                record.case("128 tokens", times, ours="one launch", bytes_moved=...)
        return 0

    def subjects() -> dict[str, tuple[Call, list[torch.Tensor]]]:
        # by label: one call of ours at a size of real serving and the tensors it writes;
        # ncu looks at it, and it is repeated ten thousand times to see the same bytes

    {"name", "env", "gate", "clocks": [before, after], "ceilings",
     "cases": [{"case", "tier", "times": {label: {"p20", "p50", "p80"}},    microseconds a call
                "ours": label, "ratios": {other label: its p50 / that of ours},
                "floor_us", "percent_of_floor", ...notes of the module}]}

The order of `times` is that of the columns in docs/performance.md; the first label that is not
ours is the baseline. `--quick` means one or two shapes. `--peers` is a folder as `_peers` says; a
peer that is absent leaves its label out. The file is rewritten after every case, so that a run
which is cut off leaves what it measured.

Each list in `interleaved` holds calls over input sets of their own: make `num_sets(bytes)` of them
with random data, so that a replay does not find its inputs in the L2.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks._harness import RESULTS, case_line, environment, percentiles, write_json

import triton

Call = Callable[[], Any]
Times = dict[str, dict[str, float]]

POISON = 0xA5
# replays of short calls and event pairs of long ones
_GRAPH_BELOW_US = 400.0
_REPLAY_US = 2000.0
_MAX_SETS = 48


def arguments(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of every GPU benchmark."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="one or two shapes")
    parser.add_argument("--peers", type=Path, help="folder with other projects' kernels")
    return parser.parse_args(argv)


def num_sets(bytes_per_set: int) -> int:
    """How many input sets to rotate: together four times the L2, at least one."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(_MAX_SETS, -(-4 * l2_bytes // max(bytes_per_set, 1))))


def poison(*tensors: torch.Tensor) -> None:
    """Fill outputs with bytes that no kernel writes by chance."""
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(POISON)


class _Replay:
    """Microseconds a call of a captured graph of many calls."""

    def __init__(self, calls: Sequence[Call], rough_us: float) -> None:
        rounds = max(1, round(_REPLAY_US / max(rough_us, 2.0) / len(calls)))
        self._num_calls = rounds * len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for index in range(self._num_calls):
                calls[index % len(calls)]()
        self()

    def __call__(self) -> float:
        return _between_events(self._graph.replay) / self._num_calls


class _Events:
    """Microseconds of one call, each time of the next input set."""

    def __init__(self, calls: Sequence[Call], rough_us: float) -> None:
        self._calls, self._next = calls, 0

    def __call__(self) -> float:
        self._next += 1
        return _between_events(self._calls[self._next % len(self._calls)])


class _Wall:
    """Microseconds a call on the host's clock, the device's work included."""

    wait_inside = True

    def __init__(self, calls: Sequence[Call], rough_us: float) -> None:
        self._calls = calls
        self._num_calls = max(len(calls), min(200, round(10_000 / rough_us)))

    def __call__(self) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        for index in range(self._num_calls):
            self._calls[index % len(self._calls)]()
        if self.wait_inside:
            torch.cuda.synchronize()
        elapsed = time.perf_counter_ns() - begin
        torch.cuda.synchronize()
        return elapsed / 1e3 / self._num_calls


class _Host(_Wall):
    """Microseconds a call keeps the host; the device's work is waited for outside the clock."""

    wait_inside = False


_MODES = {"graph": _Replay, "events": _Events, "wall": _Wall, "host": _Host}


def _between_events(call: Call) -> float:
    """Microseconds of device time of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def _rough(calls: Sequence[Call]) -> float:
    """Warm up every call on a side stream, as a capture asks, and time three roughly."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return _between_events(lambda: [calls[i % len(calls)]() for i in range(3)]) / 3


def interleaved(
    sides: Mapping[str, Sequence[Call]], *, mode: str = "auto", rounds: int = 30
) -> Times:
    """Percentiles of every side, measured in turn within one loop.

    Args:
        sides: label -> calls, each over its own input set.
        mode: "graph" replays a captured graph, "events" times one call between two events, "wall"
            is host time until the device is done, "host" without waiting for it; "auto" is
            "graph" for calls that are short on the device (below 400 us), else "events".
        rounds: samples of each side.

    Returns:
        label -> p20, p50, p80 in microseconds a call.
    """
    timers = {}
    for label, calls in sides.items():
        rough_us = _rough(calls)
        chosen = mode
        if mode == "auto":
            chosen = "graph" if rough_us < _GRAPH_BELOW_US else "events"
        timers[label] = _MODES[chosen](calls, rough_us)
    samples: dict[str, list[float]] = {label: [] for label in timers}
    for _ in range(rounds):
        for label, timer in timers.items():
            samples[label].append(timer())
    return {label: percentiles(values) for label, values in samples.items()}


def effects(call: Call) -> dict[str, int]:
    """What one warm call does: launches, copies, waits of the host, memory allocations."""
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
    """True for a profiler event of the host."""
    return event.device_type == torch.autograd.DeviceType.CPU


@triton.jit
def _empty_kernel(pointer):
    """Nothing: the shortest node of a graph."""


def ceilings() -> dict[str, float]:
    """What this GPU reaches at this moment.

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


_CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def clocks() -> dict[str, str]:
    """Clocks, power and temperature as found; they are never set."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    return dict(zip(_CLOCKS, done.stdout.strip().split(", "), strict=False))


class Recorder:
    """The result file of one benchmark, rewritten after every case.

    Args:
        name: name of the benchmark and of its file.
        folder: where `<name>.json` is written.

    Attributes:
        ceilings: those of this run, as `ceilings` returns them.
        cases: entries of the cases so far.
    """

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(1234)
        self._path = Path(folder) / f"{name}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.ceilings = ceilings()
        self._result: dict[str, Any] = {
            "name": name,
            "env": environment(),
            # whoever ran the tests before says so; without them a figure is not published
            "gate": os.environ.get("FD_DSA_GATE", "not run"),
            "clocks": [clocks()],
            "ceilings": self.ceilings,
            "cases": [],
        }
        self.cases = self._result["cases"]
        self._flush()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._result["clocks"].append(clocks())
        if error is not None:
            self._result["error"] = f"{type(error).__name__}: {error}"[:500]
        self._flush()

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
            times: what `interleaved` returned.
            ours: the label of our side.
            bytes_moved: fewest bytes that must be read and written; the floor is their time at
                the copy bandwidth of this run.
            floor_us: another floor, in microseconds, where bytes are not the bound.
            tier: what the figure proves (docs/performance.md).
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
