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
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import _custom_ops, _gpu
from benchmarks._layer import (
    LAYERS,
    Given,
    Pool,
    Sizes,
    Weights,
    backend_of,
    floor_us,
    weights_of,
)
from benchmarks._logits_sides import Shape
from benchmarks._stack import Chained, Everything, PackageAlone, Scheduled, Stack, plain_check
from benchmarks._stack_peers import PeerStack
from benchmarks.ceilings import matrix_flops_per_s
from fd_dsa import custom_ops

# heads of DeepSeek-V3.2 on one device, and on each of eight
HEADS = (128, 16)
OURS, PEERS, EAGER = "ours", "peers", "eager"
BASELINES = {"A": Chained, "B": Scheduled, "B and rest": Everything}
MODES = {"graph": "graph", EAGER: "wall"}
DEVICE = "cuda"
MAX_ROWS, MAX_KEYS = 128, 128 << 10
ROUNDS, ROUNDS_OF_LONG = 9, 5
_LONG_KEYS = 4 << 20
# FlashMLA rounds latents, their scales and weights to bfloat16
_TOLERANCE, _LEAST_RECALL = 1e-2, 0.99


def name_of(shape: Shape) -> str:
    """Decode rows in words."""
    return f"{shape.heads} heads, {shape.rows} x {shape.keys >> 10}k"


def shapes(heads: Sequence[int], quick: bool = False) -> Iterator[Shape]:
    """All that are timed, the shortest contexts first."""
    if quick:
        yield from (Shape(n, rows, 4096) for n in heads for rows in (1, 32))
        return
    for keys in (4, 32, 128):
        for n in heads:
            for rows in (1, 32, 128):
                yield Shape(n, rows, keys << 10)


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
        self.made_by: dict[str, str] = {}
        inputs = self.given, weights, backend_of(sizes, DEVICE)
        self.package = PackageAlone(*inputs)
        found = self.package.step(layers=1)
        self._judge(OURS, found, self.package.backend.attention.query_buffers(shape.rows))
        self.sides: dict[str, Stack] = {k: kind(*inputs) for k, kind in BASELINES.items()}
        try:
            stack = PeerStack(*inputs, peers)
            self._judge(PEERS, stack.step(layers=1), stack.queries)
            self.sides[PEERS], self.made_by = stack, stack.made_by
        except (AssertionError, LookupError, RuntimeError) as error:
            self.left_out[PEERS] = f"{type(error).__name__}: {error}"[:200]
            print(f"{name_of(shape)}: {PEERS} left out: {self.left_out[PEERS]}", flush=True)
        self.sides[OURS] = Stack(*inputs)

    def _judge(self, label: str, found: Sequence[Any], queries: Any) -> None:
        """Compare a side's first layer with sums in doubles, and remember its error.

        Raises:
            AssertionError: it is more than rounding.
        """
        error = self.errors[label] = plain_check(self.given, *found, queries)
        good = error["recall"] >= _LEAST_RECALL and error["attention"] < _TOLERANCE
        assert good, f"{name_of(self.shape)}, {label}: {error}"

    def check_bytes(self) -> None:
        """Compare the results of ours, of its graph and of the baselines.

        Raises:
            AssertionError: a bit differs.
        """
        ours, out = self.sides[OURS], self.given.out
        # else the first capture would make it
        ours.overlap.stream_for(self.given.x)
        _gpu.poison(out)
        ours.step()
        wanted = out.view(torch.int16).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours.step()
        calls = {"a graph": graph.replay} | {label: self.sides[label].step for label in BASELINES}
        for label, call in calls.items():
            _gpu.poison(out)
            call()
            same = torch.equal(out.view(torch.int16), wanted)
            assert same, f"{name_of(self.shape)}: {label} differs from ours"


def run(
    record: _gpu.Recorder, shape: Shape, weights: Sequence[Weights], pool: Pool, peers: Path | None
) -> None:
    """Check and time one shape, in a graph and eagerly."""
    case = Case(shape, weights, pool, peers)
    if not record.cases:
        _gpu.warm_host(case.sides[OURS].step)
    case.check_bytes()
    layer = shape, case.given.sizes, weights[0].num_bytes()
    least_us = LAYERS * floor_us(*layer, record.ceilings)
    rounds = ROUNDS_OF_LONG if shape.rows * shape.keys >= _LONG_KEYS else ROUNDS
    calls: dict[str, list[_gpu.Call]] = {label: [side.step] for label, side in case.sides.items()}
    for kind, mode in MODES.items():
        times = _gpu.interleaved(calls, mode=mode, rounds=rounds)
        notes: dict[str, Any] = {"kind": kind, **vars(shape), "errors": case.errors}
        notes |= {"made_by": case.made_by, "left_out": case.left_out}
        if kind == EAGER:
            notes |= _gpu.effects(case.sides[OURS].step)
            notes["package_alone"] = _gpu.effects(case.package.step)
        record.case(f"{name_of(shape)}, {kind}", times, ours=OURS, floor_us=least_us, **notes)


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """One for each shape."""
    custom_ops.use_library(_custom_ops.library())
    record.ceilings["matrix_flops_per_s"] = matrix_flops_per_s()
    pool, heads = Pool(MAX_ROWS * MAX_KEYS // 64), HEADS[:1] if args.quick else HEADS
    weights = {n: weights_of(Sizes(heads=n), DEVICE) for n in heads}
    for shape in shapes(heads, args.quick):
        yield name_of(shape), partial(run, record, shape, weights[shape.heads], pool, args.peers)
        record.note(layers=LAYERS, custom_ops=_custom_ops.serving())


main = partial(_gpu.main, "layer_stack", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
