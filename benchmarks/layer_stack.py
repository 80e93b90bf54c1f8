"""A decode step of 61 DSA layers: ours, what FastDeploy did in every layer, and peers' kernels.

A layer is projections and DSA without experts, in bfloat16 on one rank (`_layer.py`), with the
sizes of DeepSeek-V3.2 and either all attention heads or those of one device of eight. Ours makes
metadata and schedules once a step. "A" computes `slot_mapping` twice in every layer, as FastDeploy
before #7367; "B" also makes the schedule in every layer and, where the host launches, waits for the
device once a layer; "B and rest" launches what FastDeploy's layers of a decode step do besides. All
three run the same kernels as ours and give the same bytes. Ours are those that the package serves
with where custom_ops/ is built; "peers" is a layer of other projects' kernels (`_stack_peers.py`).

Before a shape is timed, ours and peers are compared with sums in doubles, and ours with A, B and a
replay of its graph, byte by byte. A shape that fails is named, and the others go on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import _custom_ops, _gpu
from benchmarks._layer import Sizes, Weights
from benchmarks._stack import (
    Chained,
    Everything,
    Given,
    Pool,
    Scheduled,
    Stack,
    backend_of,
    plain_check,
    weights_of,
)
from benchmarks._stack_peers import PeerStack
from benchmarks._stack_shapes import (
    ALL,
    EAGER,
    GRAPH,
    HEADS,
    LAYERS,
    OURS,
    PEERS,
    SCHEDULES,
    SLOTS,
    Shape,
    shapes,
)
from benchmarks._torch_device import register
from benchmarks.ceilings import matrix_flops_per_s
from fd_dsa import custom_ops

MODES = {GRAPH: "graph", EAGER: "wall"}
DEVICE = "cuda"
MAX_ROWS, MAX_KEYS = 128, 128 << 10
ROUNDS, ROUNDS_OF_LONG = 9, 5
_LONG_KEYS = 4 << 20
# FlashMLA rounds latents, their scales and weights to bfloat16
_TOLERANCE, _LEAST_RECALL = 1e-2, 0.99


class Case:
    """All sides of a shape.

    Attributes:
        sides: label -> a stack, in the order of the table.
        left_out: label -> why a side is not among them.
        errors: label -> what `plain_check` found.
    """

    def __init__(
        self, shape: Shape, weights: Sequence[Weights], pool: Pool, peers: Path | None
    ) -> None:
        self.shape = shape
        sizes = Sizes(heads=shape.heads, context=shape.keys, max_rows=MAX_ROWS, max_tokens=MAX_ROWS)
        self.given = Given(shape, sizes, pool, DEVICE)
        self.left_out: dict[str, str] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.sides: dict[str, Any] = {}
        self.made_by: dict[str, str] = {}
        ours = self._checked(OURS, Stack(self.given, weights, backend_of(sizes, DEVICE)))
        baselines = {SLOTS: Chained, SCHEDULES: Scheduled, ALL: Everything}
        for label, kind in baselines.items():
            self.sides[label] = kind(self.given, weights, ours.backend)
        self._add_peers(weights, ours, peers)
        self.sides[OURS] = ours

    def _add_peers(self, weights: Sequence[Weights], ours: Stack, peers: Path | None) -> None:
        """The peers' stack, unless something of it is missing or wrong."""
        try:
            stack = PeerStack(self.given, weights, ours.backend, peers)
            self._judge(PEERS, plain_check(self.given, *stack.first_layer()))
        except (AssertionError, LookupError, RuntimeError) as error:
            self._leave_out(PEERS, error)
            return
        self.sides[PEERS], self.made_by = stack, stack.made_by

    def _leave_out(self, label: str, error: Exception) -> None:
        """Go on without a side, and say why."""
        self.left_out[label] = f"{type(error).__name__}: {error}"[:200]
        print(f"{self.shape.label}: {label} left out: {self.left_out[label]}", flush=True)

    def _checked(self, label: str, stack: Stack) -> Stack:
        """A stack of ours whose first layer agrees with sums in doubles."""
        found = stack.package_alone(stack.products(), layers=1)
        queries = stack.backend.query_buffers(self.shape.rows)
        self._judge(label, plain_check(self.given, *found, queries))
        return stack

    def _judge(self, label: str, found: dict[str, float]) -> None:
        """Remember what was found.

        Raises:
            AssertionError: it is more than rounding.
        """
        self.errors[label] = found
        good = found["recall"] >= _LEAST_RECALL and found["attention"] < _TOLERANCE
        assert good, f"{self.shape.label}, {label}: {found}"

    def check_bytes(self) -> None:
        """Compare the results of ours, of its graph and of the baselines.

        Raises:
            AssertionError: a bit differs.
        """
        ours, out = self.sides[OURS], self.given.out
        # else the first capture would make it
        ours.backend.overlap.stream_for(self.given.x)
        _gpu.poison(out)
        ours.step()
        wanted = out.view(torch.int16).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours.step()
        calls = {"a graph": graph.replay}
        calls |= {label: self.sides[label].step for label in (SLOTS, SCHEDULES, ALL)}
        for label, call in calls.items():
            _gpu.poison(out)
            call()
            same = torch.equal(out.view(torch.int16), wanted)
            assert same, f"{self.shape.label}: {label} differs from ours"


def effects(case: Case, all_sides: bool) -> dict[str, Any]:
    """Launches, waits and allocations of an eager step: whole, and of the package alone."""
    ours = case.sides[OURS]
    products = ours.products()
    found = _gpu.effects(ours.step) | {
        "package_alone": _gpu.effects(lambda: ours.package_alone(products))
    }
    if all_sides:
        found["effects"] = {label: _gpu.effects(side.step) for label, side in case.sides.items()}
    return found


def compare(record: _gpu.Recorder, case: Case, weights: Weights, all_effects: bool) -> None:
    """Check and time one shape, in a graph and eagerly."""
    case.check_bytes()
    shape = case.shape
    rounds = ROUNDS_OF_LONG if shape.rows * shape.keys >= _LONG_KEYS else ROUNDS
    for kind, mode in MODES.items():
        calls: dict[str, list[_gpu.Call]] = {
            label: [side.step] for label, side in case.sides.items()
        }
        times = _gpu.interleaved(calls, mode=mode, rounds=rounds)
        ours = times[OURS]["p50"]
        notes: dict[str, Any] = {"kind": kind, **vars(shape), "errors": case.errors}
        notes |= {"made_by": case.made_by, "left_out": case.left_out}
        notes["wanted"] = {label: shape.wanted(label, kind) for label in (SLOTS, SCHEDULES)}
        notes["layer_us"] = ours / LAYERS
        notes["caches"] = len(case.given.caches)
        if kind == EAGER:
            host = _gpu.interleaved({OURS: calls[OURS]}, mode="host", rounds=5)
            notes |= {"host_us": host[OURS]["p50"], **effects(case, all_effects)}
        floor_us = shape.floor_us(weights.num_bytes(), record.ceilings)
        record.case(f"{shape.label}, {kind}", times, ours=OURS, floor_us=floor_us, **notes)


def warm_host(stack: Stack) -> None:
    """A second of eager steps: the first ones of a process are slower than all others."""
    end = time.monotonic() + 1
    while time.monotonic() < end:
        stack.step()
        torch.cuda.synchronize()


def run(
    record: _gpu.Recorder, shape: Shape, weights: Sequence[Weights], pool: Pool, peers: Path | None
) -> None:
    """Check and time one shape."""
    is_first = not record.cases
    case = Case(shape, weights, pool, peers)
    if is_first:
        warm_host(case.sides[OURS])
    compare(record, case, weights[0], is_first)


def main(argv: Sequence[str] | None = None) -> int:
    """Check and compare; returns the exit status."""
    args = _gpu.arguments(__doc__, argv)
    register()
    custom_ops.use_library(_custom_ops.library())
    with _gpu.Recorder("layer_stack", args.out) as record:
        record.ceilings["matrix_flops_per_s"] = matrix_flops_per_s()
        pool, heads = Pool(MAX_ROWS * MAX_KEYS // 64), HEADS[:1] if args.quick else HEADS
        weights = {n: weights_of(Sizes(heads=n), DEVICE) for n in heads}
        for shape in shapes(heads, args.quick):
            case = partial(run, record, shape, weights[shape.heads], pool, args.peers)
            record.attempt(shape.label, case)
            torch.cuda.empty_cache()
            record.note(layers=LAYERS, custom_ops=_custom_ops.serving())
    return record.status()


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """None: its kernels are subjects of their own benchmarks."""
    return {}


if __name__ == "__main__":
    sys.exit(main())
