"""Exact top-k of indexer scores: the kernels of custom_ops/, Triton and other projects.

Every selection is checked before the timing. Ours equals a sort of every row, position by position.
Exact peers are checked by the scores that they select. For the others ("~") the right share is
noted. A case "warm" finds its scores in the L2, like a step that has just written them. The others
rotate input sets. Small shapes are warm anyway, and are timed once.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import _gpu
from benchmarks._topk_sides import OURS, SLOTS, TRITON, Side, Sides
from custom_ops.build_library import build_library
from fd_dsa import custom_ops

K = 2048
SHAPES = [(rows, k << 10) for k in (4, 16, 32, 64, 128) for rows in (1, 8, 32, 64, 128)]
SHAPES += [(2048, 8 << 10), (2048, 32 << 10), (4096, 64 << 10)]
QUICK = [(1, 64 << 10), (64, 64 << 10)]
# scores that are not spread as N(0, 1), of shapes that stay in the L2
OTHERS = [(1, 64 << 10), (64, 64 << 10), (2048, 8 << 10)]
_COMPARED_ROWS = 256
_L2_BYTES = 50 << 20


def normal(rows: int, width: int) -> torch.Tensor:
    """Return scores from N(0, 1)."""
    return torch.randn(rows, width, device="cuda")


def indexer_scores(rows: int, width: int) -> torch.Tensor:
    """Return weighted sums of the positive parts of dot products, like the indexer's scores."""
    keys = torch.randn(width, 128, device="cuda")
    scores = torch.zeros(rows, width, device="cuda")
    for _ in range(16):
        products = (torch.randn(rows, 128, device="cuda") @ keys.T).relu_()
        scores += products * torch.rand(rows, 1, device="cuda")
    return scores


def uniform(rows: int, width: int) -> torch.Tensor:
    """Return scores from U(0, 1)."""
    return torch.rand(rows, width, device="cuda")


KINDS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "indexer": indexer_scores,
    # one score in a hundred is positive, all others are exactly zero
    "zeros": lambda rows, width: normal(rows, width) * (uniform(rows, width) > 0.98),
    # a thousand values that share their upper 17 bits
    "100 + U(0, .01)": lambda rows, width: 100 + uniform(rows, width) / 100,
    "ascending": lambda rows, width: normal(rows, width).sort(dim=1).values,
}


def reference(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return int32 [rows, k]: positions by a sort of score and position, without NaN."""
    bits = (scores + 0.0).view(torch.int32).long()
    image = torch.where(bits < 0, ~bits & 0xFFFFFFFF, bits | 0x80000000)
    column = torch.arange(scores.shape[1], device="cuda")
    best = ((image << 31) | (0x7FFFFFFF - column)).topk(k, dim=1).values
    return (0x7FFFFFFF - (best & 0x7FFFFFFF)).sort(dim=1).values.int()


def share_right(sides: Sides, label: str, side: Side, scores: torch.Tensor) -> float:
    """Call a side, and return its share of scores that are among the best.

    Raises:
        AssertionError: an exact side is not.
    """
    _gpu.poison(sides.out)
    side(scores)
    part = slice(_COMPARED_ROWS)
    found, scores = sides.out[part], scores[part]
    wanted = reference(scores, sides.k)
    if label in (OURS, SLOTS, TRITON):
        # pages are in order, so that slots are positions
        assert torch.equal(found, wanted), f"{label}: other positions than a sort"
        return 1.0
    best = scores.gather(1, wanted.long()).sort(dim=1).values
    found = found.long().sort(dim=1).values
    chosen = scores.gather(1, found.clamp(0, scores.shape[1] - 1)).sort(dim=1).values
    if not label.startswith("~"):
        assert (found[:, 1:] > found[:, :-1]).all(), f"{label}: a position twice"
        assert torch.equal(chosen, best), f"{label}: other scores than a sort"
    return float((chosen >= best[:, :1]).float().mean())


def compare(record: _gpu.Recorder, case: str, sides: Sides, sets: list[torch.Tensor]) -> None:
    """Check all sides on the first set, then time them over all sets."""
    all_sides = {**sides.exact(), **sides.inexact(), **sides.ours()}
    calls = {k: [partial(side, scores) for scores in sets] for k, side in all_sides.items()}
    calls, missed, _ = _gpu.checked(
        case, calls, lambda k: 1 - share_right(sides, k, all_sides[k], sets[0]), most=2
    )
    times = _gpu.interleaved(calls, rounds=15)
    notes: dict[str, Any] = {"rows": sides.rows, "width": sides.width}
    notes["share_right"] = {label: 1 - share for label, share in missed.items() if share}
    floor = 4 * sides.rows * (sides.width + sides.k)
    record.case(case, times, ours=OURS, bytes_moved=floor, **notes)


def name_of(rows: int, width: int) -> str:
    """Return a shape in words."""
    return f"{rows} x {width >> 10}k"


def run(record: _gpu.Recorder, peers: Any, others: bool, rows: int, width: int) -> None:
    """Compare a shape of N(0, 1) in rotation, and warm if that differs and is possible.

    Args:
        others: instead scores that are spread otherwise, warm.
    """
    sides, name, num_bytes = Sides(rows, width, K, peers), name_of(rows, width), 4 * rows * width
    if others:
        for kind, make in KINDS.items():
            compare(record, f"{name}, {kind}, warm", sides, [make(rows, width)])
        return
    sets = [normal(rows, width) for _ in range(_gpu.num_sets(num_bytes))]
    compare(record, name, sides, sets)
    if num_bytes <= _L2_BYTES < num_bytes * len(sets):
        compare(record, f"{name}, warm", sides, sets[:1])


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """Yield the cases of each shape."""
    custom_ops.use_library(build_library())
    for shape in QUICK if args.quick else SHAPES:
        yield name_of(*shape), partial(run, record, args.peers, False, *shape)
    for shape in [] if args.quick else OTHERS:
        yield f"{name_of(*shape)}, others", partial(run, record, args.peers, True, *shape)


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """Return selections of a decode step, of one row with a plateau, and of a prompt's chunk."""
    custom_ops.use_library(build_library())
    found: dict[str, tuple[_gpu.Call, list[torch.Tensor]]] = {}
    for rows, width in ((64, 64 << 10), (1, 128 << 10), (2048, 8 << 10)):
        sides, scores = Sides(rows, width, K, None), normal(rows, width).relu_()
        scores[:, ::3] = 0.0
        call = sides.ours()[OURS]
        # the kernel has addresses of memory of `sides`
        held = partial(lambda _, f, x: f(x), sides, call, scores)
        found[f"top-k, {name_of(rows, width)}"] = held, [sides.out]
    return found


main = partial(_gpu.main, "topk", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
