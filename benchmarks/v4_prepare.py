"""Decode steps of DeepSeek-V4 prepared in one launch, and on the host or by small operators.

    python -m benchmarks.v4_prepare           # 36 sizes; --quick: two of them

The sides are those of `_v4_sides.py`. Their outputs are compared before the timing. A size has
three cases:

- "host": host time of the preparation of a step, without a wait for the device.
- "exposed": time between the work of two steps on their stream, in which only preparation happens.
  A side that builds on the host starts at the end of the earlier step.
- "device": the preparation with its inputs on the device, in a graph and eagerly.

Host and exposed time have 200 steps, and the sides take turns of twenty steps. Contexts grow and
rows get new blocks as in serving.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch

from benchmarks import _gpu, _torch_device
from benchmarks._harness import percentiles
from benchmarks._v4_sides import (
    Operators,
    OperatorsSide,
    Ours,
    Side,
    VectorisedSide,
    check_equal,
    device_memory,
)
from benchmarks._v4_steps import NUM_STEPS, Decode, Size, config_of, sizes
from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4Prepare, V4PrepareConfig

OURS, WHOLE_TABLE, VECTORISED = "ours", "ours, whole table", "vectorised"
EAGER, GRAPH = "operators", "operators, graph"
HOST = (VECTORISED, EAGER, GRAPH, WHOLE_TABLE, OURS)
EXPOSED = (VECTORISED, EAGER, GRAPH, OURS)
QUICK = (Size(1, 1024, 0), Size(128, 8192, 1))
# a run that is cut off has these first
IMPORTANCE = (128, 256, 32, 1)
# the size at which launches and copies of every side are counted
COUNTED = Size(128, 8192, 1)
_TURN = 20
_WARM_STEPS = 8
# GEMMs of two square matrices that stand for a step's layers
_WORK_SIZE, _WORK_PRODUCTS = 4096, 2


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return percentiles, including the 99th."""
    return percentiles(values) | {"p99": float(np.percentile(values, 99))}


def step_work() -> _gpu.Call:
    """Return a graph of a few hundred microseconds in place of a step's layers."""
    matrix = torch.randn(_WORK_SIZE, _WORK_SIZE, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(matrix)
    torch.mm(matrix, matrix, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_WORK_PRODUCTS):
            torch.mm(matrix, matrix, out=out)

    def work(held: Any = (matrix, out)) -> None:
        graph.replay()

    return work


class Sides:
    """All sides of one configuration, and what they do at one context."""

    def __init__(self, config: V4PrepareConfig, work: _gpu.Call) -> None:
        self.config, self._work = config, work
        self.all: dict[str, Side] = {
            VECTORISED: VectorisedSide(config),
            EAGER: OperatorsSide(config, in_graph=False),
            GRAPH: OperatorsSide(config, in_graph=True),
            WHOLE_TABLE: Ours(config, whole_table=True),
            OURS: Ours(config),
        }

    def begin(self, labels: Iterable[str], context: int) -> dict[str, Decode]:
        """Return the rows of each side at a context, after compared first steps.

        Raises:
            AssertionError: two sides made different arrays.
        """
        decodes = {label: Decode(self.config, context) for label in labels}
        for label, decode in decodes.items():
            self.all[label].start()
            for _ in range(_WARM_STEPS):
                one_step(self.all[label], decode)
                torch.cuda.synchronize()
        check_equal({label: self.all[label] for label in decodes}, OURS)
        return decodes

    def host_times(self, context: int) -> tuple[_gpu.Times, dict[str, Any]]:
        """Return host microseconds of a step by side, and the parts of some."""
        decodes = self.begin(HOST, context)
        samples: dict[str, list[float]] = {label: [] for label in HOST}
        parts: dict[str, list[float]] = {label: [] for label in (VECTORISED, OURS)}
        for label in in_turns(HOST):
            side, decode = self.all[label], decodes[label]
            for _ in range(_TURN):
                samples[label].append(one_step(side, decode))
                torch.cuda.synchronize()
                if label in parts:
                    parts[label].append(side.part_us)
        both = [whole - part for whole, part in zip(samples[OURS], parts[OURS], strict=True)]
        notes = {
            "arrays_us": {VECTORISED: spread(parts[VECTORISED])},
            "stage_and_expand_us": spread(both),
        }
        return {label: spread(values) for label, values in samples.items()}, notes

    def exposed_times(self, context: int) -> _gpu.Times:
        """Return microseconds between the work of two steps, by side."""
        decodes = self.begin(EXPOSED, context)
        samples: dict[str, list[float]] = {label: [] for label in EXPOSED}
        for label in in_turns(EXPOSED):
            samples[label] += self._exposed(self.all[label], decodes[label])
        return {label: spread(values) for label, values in samples.items()}

    def _exposed(self, side: Side, decode: Decode) -> list[float]:
        """Return microseconds of one turn."""
        points = []
        for step in range(_TURN):
            grown = decode.advance()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._work()
            side.stage(decode, grown)
            before.record()
            if side.waits:
                before.synchronize()
            side.finish(decode)
            after.record()
            points.append((before, after))
            if step:
                # the host is one step ahead, no more
                points[step - 1][1].synchronize()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) * 1e3 for before, after in points]

    def effects(self, context: int, label: str) -> dict[str, int]:
        """Count what a step of a side does, as in `_gpu.effects`."""
        side, decode = self.all[label], Decode(self.config, context)
        side.start()
        one_step(side, decode)
        return _gpu.effects(lambda: one_step(side, decode))


def in_turns(labels: Sequence[str]) -> Iterable[str]:
    """Return the sides in the order of their turns, for all their steps."""
    return (label for _ in range(NUM_STEPS // _TURN) for label in labels)


def one_step(side: Side, decode: Decode) -> float:
    """Make a step. Returns its host time, microseconds."""
    grown = decode.advance()
    begin = time.perf_counter_ns()
    side.stage(decode, grown)
    side.finish(decode)
    return (time.perf_counter_ns() - begin) / 1e3


def launches_of(
    config: V4PrepareConfig, decode: Decode, count: int
) -> list[tuple[_gpu.Call, V4Prepare]]:
    """Return the launch alone, over sets of buffers in turn, each with the same step."""
    launches: list[tuple[_gpu.Call, V4Prepare]] = []
    for _ in range(count):
        prepare = V4Prepare(config, "gpu:0", allocate=device_memory)
        # the first brings the whole table; of the second no cell comes with the step
        for table in (decode.block_table, None):
            prepare.stage(*decode.inputs(), table)
            slab = prepare.steps.staged[0][1]
            prepare.expand()
        launches.append((partial(prepare.steps.launch, slab), prepare))
    return launches


def least_bytes(config: V4PrepareConfig, decode: Decode) -> int:
    """Return the fewest bytes of a step: lengths, slots and cells in, every output out."""
    counts = (decode.ctx - decode.q)[:, None] + np.arange(1, config.spec_tokens + 2)
    entries = int((counts // config.hca_ratio).sum())
    values = sum(int(np.prod(s)) for name, s in OUTPUT_SHAPES(config).items() if name != "hca_idx")
    cells = int((-(-decode.ctx // config.block_size)).sum())
    return 4 * (values + cells + 3 * len(decode.q) + (entries if config.hca_mode == "list" else 0))


def device_times(config: V4PrepareConfig, decode: Decode) -> _gpu.Times:
    """Return device microseconds in a graph, and of eager calls under their own labels."""
    calls = [c for c, _ in launches_of(config, decode, _gpu.num_sets(least_bytes(config, decode)))]
    operators = Operators(config)
    operators.inputs.copy_(torch.from_numpy(np.stack([decode.ctx, decode.slot])))
    sides = {GRAPH: [operators], OURS: calls}
    times = _gpu.interleaved(sides, mode="graph", rounds=15)
    eager = {EAGER: [operators], "ours, eager": calls[:1]}
    return _gpu.interleaved(eager, mode="events", rounds=50) | times


def measure(record: _gpu.Recorder, sides: Sides, size: Size) -> None:
    """Measure the three cases of a size."""
    config, notes = sides.config, asdict(size)
    times, parts = sides.host_times(size.context)
    labels = HOST if size == COUNTED else (OURS,)
    counts = {label: sides.effects(size.context, label) for label in labels}
    parts |= {"effects": counts} | counts[OURS]
    name = size.label
    record.case(f"{name}, host", times, ours=OURS, kind="host", **notes, **parts)
    times = sides.exposed_times(size.context)
    record.case(f"{name}, exposed", times, ours=OURS, kind="exposed", **notes)
    decode = Decode(config, size.context)
    times, least = device_times(config, decode), least_bytes(config, decode)
    record.case(f"{name}, device", times, ours=OURS, bytes_moved=least, kind="device", **notes)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all sizes. Returns 0."""
    args = _gpu.arguments(__doc__, argv)
    _torch_device.register()
    chosen = QUICK if args.quick else sorted(sizes(), key=lambda s: IMPORTANCE.index(s.batch))
    gc.collect()
    gc.freeze()
    with _gpu.Recorder("v4_prepare", args.out) as record:
        work = step_work()
        for (batch, drafts), group in groupby(chosen, key=lambda s: (s.batch, s.drafts)):
            sides = Sides(config_of(batch, drafts), work)
            for size in group:
                measure(record, sides, size)
    return 0


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """Return the launch at a size of real serving, and at the largest size."""
    _torch_device.register()
    found: dict[str, tuple[_gpu.Call, list[torch.Tensor]]] = {}
    for size in (COUNTED, Size(256, 131072, 3)):
        config = config_of(size.batch, size.drafts)
        ((call, prepare),) = launches_of(config, Decode(config, size.context), 1)
        outputs = [getattr(prepare.buffers, name) for name in OUTPUT_SHAPES(config)]
        found[size.label] = call, outputs
    return found


if __name__ == "__main__":
    sys.exit(main())
