"""Proof that copies for a step run beside the work of the step before, and never race.

    python -m tests.gpu_rig.overlap_proof --out DIR          # on a GPU; writes DIR/staging.json
    python -m tests.gpu_rig.overlap_proof --form fake --out DIR --steps 20

Real Paddle tensors in CUDA memory (the plug-in of this folder), raw events with timing around each
copy and around the work of each step, which is a graph of kernels that spin. The engine is one
step ahead of the device: it stages step n+1 when step n-1 is done. The share of a copy
inside the work of a step is its overlap. `control` is the same with a copy stream that first waits
for the main stream, as in ROCm/ATOM #728: it shows that the meter can say no.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.gpu_rig.rig import Rig, load

if TYPE_CHECKING:
    from tests.gpu_rig.staged_steps import StagedSteps

Span = tuple[float, float]

BUSY_US = 2000.0
STEPS = 200
RACE_STEPS = 10_000
# without guards; enough for the host to run far ahead of what is late
SPOILED_STEPS, _LATE_US = 200, 2000.0
# the first steps have no work beside them, or bring whole tables
_WARM_UP = 3


def covered(span: Span, work: Sequence[Span]) -> float:
    """The share of a span inside spans which do not overlap each other."""
    begin, end = span
    inside = sum(max(0.0, min(end, last) - max(begin, first)) for first, last in work)
    return inside / (end - begin)


@dataclass
class Run:
    """Spans of one run in microseconds: of each step's copy, and of each step's work."""

    copies: list[Span]
    work: list[Span]

    def overlaps(self) -> list[float]:
        """The share of each step's copy that ran beside work, without the first steps."""
        return [covered(copy, self.work) for copy in self.copies[_WARM_UP:]]

    def figures(self) -> dict[str, Any]:
        """Return the published figures of a run."""
        found = self.overlaps()
        return {
            "steps": len(found),
            "median": float(np.median(found)),
            "p5": float(np.percentile(found, 5)),
            "share_of_steps_above_80": float(np.mean(np.array(found) >= 0.8)),
            "copy_us": float(np.median([end - begin for begin, end in self.copies[_WARM_UP:]])),
            "work_us": float(np.median([end - begin for begin, end in self.work[_WARM_UP:]])),
        }


def engine_steps(
    steps: StagedSteps, num_steps: int, work: Callable[[], Any], clock: Any
) -> list[tuple[int, int]]:
    """Run steps as an engine does that prepares one while the device computes another.

    Returns:
        Points before and after the work of each step.
    """
    points: list[tuple[int, int]] = []
    steps.stage(0)
    for step in range(num_steps):
        steps.expand(step)
        begin = clock.mark()
        work()
        points.append((begin, clock.mark()))
        if step:
            # the sampled ids of the step before are here
            clock.wait(points[step - 1][1])
        if step + 1 < num_steps:
            steps.stage(step + 1)
    return points


def overlap_run(
    rig: Rig, steps: StagedSteps, num_steps: int, work: Callable[[], Any], control: bool = False
) -> Run:
    """Time the copies and the work of steps.

    Args:
        rig: where.
        steps: the way to the device.
        num_steps: steps to run.
        work: queues the work of a step.
        control: the stream of a copy first waits for all work queued on the main stream.
    """
    from fd_dsa.device.transfers import transfers_for
    from tests.gpu_rig.timing import Clock, timed_copies

    clock = Clock(rig, 4 * num_steps)
    queued = transfers_for(steps.found).event()

    def wait_for_main(copy: Any) -> None:
        queued.record()
        queued.precede(copy.stream)

    with timed_copies(clock, wait_for_main if control else None) as copies:
        points = engine_steps(steps, num_steps, work, clock)
    times = clock.times_us()
    copied, worked = ([(times[a], times[b]) for a, b in spans] for spans in (copies, points))
    return Run(copied, worked)


def race(rig: Rig, steps: StagedSteps, num_steps: int, seed: int = 0, **held: float) -> np.ndarray:
    """Run steps with random sleeps of the host, of the copies and of the main stream.

    The host runs as far ahead as the staging lets it.

    Args:
        rig: where.
        steps: the way to the device.
        num_steps: steps to run.
        seed: of the sleeps.
        held: `copy` or `main`, microseconds of a sleep before every copy, or every reader, in the
            place of random ones.

    Returns:
        Steps whose readers found something else than the values of the step.
    """
    from tests.gpu_rig.timing import HostDelay, Spin, around_copies, stream_of

    rng, spin, delay = random.Random(seed), Spin(rig), HostDelay(rig)

    def before_copy(copy: Any) -> None:
        if "copy" in held or (not held and rng.random() < 0.1):
            delay(stream_of(copy), round(held.get("copy", rng.uniform(1, 300))))

    with around_copies(before_copy, lambda copy: None):
        for step in range(num_steps):
            if not held and rng.random() < 0.05:
                time.sleep(rng.uniform(0, 3e-4))
            steps.stage(step)
            if "main" in held or (not held and rng.random() < 0.3):
                spin(held.get("main", rng.uniform(1, 100)))
            steps.expand(step)
    return steps.wrong(num_steps)


GUARDS = ("wait of the host for a copy", "wait of a copy for readers", "wait of readers for a copy")


def without_guards(names: Sequence[str]) -> ExitStack:
    """Inside the block these guards of every staging are gone: nothing is waited for there."""
    from fd_dsa.device.staging import InputStaging
    from fd_dsa.device.transfers import Event
    from tests.gpu_rig.transfers import replaced

    stack = ExitStack()

    def go_on(original: Callable[..., Any]) -> Any:
        return lambda self: None

    def let_pass(original: Callable[..., Any]) -> Any:
        def precede(self: Any, stream: Any = None) -> None:
            if GUARDS[2 if stream is None else 1] not in names:
                original(self, stream)

        return precede

    if GUARDS[0] in names:
        stack.enter_context(replaced(InputStaging, "wait_for_copy", go_on))
    stack.enter_context(replaced(Event, "precede", let_pass))
    return stack


def spoiled(rig: Rig, steps: StagedSteps, names: Sequence[str]) -> np.ndarray:
    """The wrong steps of SPOILED_STEPS without some guards, where what they wait for is late."""
    late = "main" if list(names) == [GUARDS[1]] else "copy"
    with without_guards(names):
        return race(rig, steps, SPOILED_STEPS, **{late: _LATE_US})


def all_steps(rig: Rig, max_steps: int) -> list[StagedSteps]:
    """New objects of the ways to the device."""
    from tests.gpu_rig.staged_steps import RunnerSteps, SlabSteps, V4Steps

    return [way(rig, max_steps) for way in (SlabSteps, RunnerSteps, V4Steps)]


def case_of(rig: Rig, steps: StagedSteps, num_steps: int, num_raced: int) -> dict[str, Any]:
    """All figures of one way to the device."""
    from tests.gpu_rig.timing import Clock, Spin

    # without a GPU nothing is ever late
    guards = GUARDS if rig.is_real else ()
    work = Spin(rig).graph(BUSY_US)
    runs = {"overlap": overlap_run(rig, steps, num_steps, work)}
    runs["control"] = overlap_run(rig, steps, num_steps, work, control=True)
    clock = Clock(rig, 2 * num_steps)
    with rig.counting() as counted:
        # the clock's own waits are not among those that are counted
        engine_steps(steps, num_steps, lambda: None, clock)
    clock.times_us()
    raced = race(rig, steps, num_raced)
    waits = sum(number for name, number in counted.delta.items() if name.endswith("_syncs"))
    return {
        "case": steps.name,
        "tier": "T1p",
        **{name: run.figures() for name, run in runs.items()},
        "host_waits": waits,
        "copies_a_step": counted.delta["h2d_async"] / num_steps,
        "bytes_a_step": counted.delta["h2d_bytes"] / num_steps,
        "raced_steps": num_raced,
        "wrong_steps": len(raced),
        "unguarded": {f"no {name}": len(spoiled(rig, steps, [name])) for name in guards},
        "unguarded_steps": SPOILED_STEPS,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all ways to the device; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of staging.json")
    parser.add_argument("--form", default="real", help="real, fake or guard")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--raced", type=int, default=RACE_STEPS)
    args = parser.parse_args(argv)
    rig = load(args.form)
    import paddle

    from benchmarks._harness import environment, write_json

    paddle.set_device(rig.device)
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "name": "staging",
        "env": environment() | {"tier": "T1p", "form": rig.form},
        "gate": os.environ.get("FD_DSA_GATE", "not run"),
        "cases": [],
    }
    for steps in all_steps(rig, max(args.steps, args.raced, SPOILED_STEPS)):
        case = case_of(rig, steps, args.steps, args.raced)
        result["cases"].append(case)
        write_json(args.out / "staging.json", result)
        print(case, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
