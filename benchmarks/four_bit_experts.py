"""Routed experts in four bits alongside FP8 ones and bfloat16 ones, at the widths of V3.2.

    python -m benchmarks.four_bit_experts --rig              # TP4 and TP8, 1 to 8,192 tokens
    python -m benchmarks.four_bit_experts --rig --tilings --tokens 32   # and likely tilings
    python -m benchmarks.four_bit_experts --dry              # small widths on the CPU

A figure is the time of all launches of a layer's experts: their choice, both GEMMs and the sum.
It is the median of replays of a graph with a call for each of two layers, so that no weight is in
the L2. `ratio` is FP8's time divided by the time of a kind. The kinds take turns in one run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks._harness import rig_parser, rig_result, write_json, write_result

TOKENS = 1, 8, 32, 128, 512, 2048, 8192
WIDTHS = {"TP4": 512, "TP8": 256}
KINDS = {
    "fp8": None,
    "bfloat16": None,
    "nvfp4": ("e4m3", 16),
    "mxfp4": ("e8m0", 32),
    "int4": ("int4", 128),
}
"""Kinds of weights, and kind and group of those in four bits."""
# kinds whose tilings are timed; MXFP4 differs from NVFP4 by a few instructions
_TILED = "nvfp4", "int4"
_LAYERS = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer's experts."""

    experts: int = 256
    top_k: int = 8
    hidden: int = 7168
    width: int = 512


class Host:
    """Tensors in host memory, for a dry run."""

    @staticmethod
    def allocate(shape: Sequence[int], dtype: str) -> Any:
        """Make a tensor."""
        import paddle

        return paddle.empty(shape, dtype)

    def time_us(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Return the microseconds of a call."""
        begin = time.perf_counter()
        for call in calls:
            call()
        return 1e6 * (time.perf_counter() - begin) / len(calls)


def layer_of(bench: Any, kind: str, shape: Shape, prefix: str) -> tuple[Any, Any]:
    """Return gate_up and down of a layer with random weights of a kind."""
    from fd_dsa.models.device_weights import DeviceWeights
    from fd_dsa.models.four_bits import FourBits
    from fd_dsa.models.sources import RandomTensor

    shapes = {
        f"{prefix}{i}.{part}_proj.weight": (
            (shape.hidden, shape.width) if part == "down" else (shape.width, shape.hidden)
        )
        for i in range(shape.experts)
        for part in ("gate", "up", "down")
    }
    names, form = frozenset(shapes), KINDS[kind]
    fp8 = names if kind == "fp8" else frozenset()
    four_bits = None if form is None else FourBits(names, *form)
    weights = DeviceWeights("bfloat16", bench.allocate, fp8, four_bits=four_bits)
    experts = weights.experts(prefix, shape.experts, shape.hidden, shape.width)
    for name, sizes in shapes.items():
        weights.loaders[name](RandomTensor(name, sizes, 0))
    weights.finish()
    return experts


class Tokens:
    """Activations of a number of tokens that choose experts evenly."""

    def __init__(self, bench: Any, shape: Shape, tokens: int) -> None:
        from fd_dsa.device.transfers import uploaded
        from fd_dsa.ops.dense_kernels import quantize_rows
        from fd_dsa.ops.fill_kernels import fill_random
        from fd_dsa.tensor import Normed

        logits = np.random.default_rng(tokens).random((tokens, shape.experts), np.float32)
        self._top_k = shape.top_k
        self.num_hit = len(np.unique(np.argsort(logits)[:, -shape.top_k :]))
        self._logits, self._bias, self._slots = (
            uploaded(bench.allocate, array)
            for array in (logits, np.zeros(shape.experts, np.float32), np.arange(tokens))
        )
        self._shared = bench.allocate((tokens, shape.hidden), "bfloat16")
        plain = bench.allocate((tokens, shape.hidden), "bfloat16")
        for seed, tensor in enumerate((self._shared, plain)):
            fill_random(tensor, 0, tokens * shape.hidden, [seed], 1.0)
        # a norm of the model quantises its result
        self._x = Normed(plain, quantize_rows(plain, True))

    def _choice(self) -> Any:
        """Choose the experts of each token, as a layer without groups does."""
        from fd_dsa.ops.expert_kernels import choose_experts

        how = {"n_group": 1, "topk_group": 1, "norm": True, "scaling": 1.0}
        return choose_experts(
            self._logits, self._bias, top_k=self._top_k, slot_mapping=self._slots, **how
        )

    def run(self, experts: tuple[Any, Any]) -> Any:
        """Run a layer's experts."""
        from fd_dsa.models.moe import routed_on_device

        return routed_on_device(self._x, self._shared, self._choice(), experts)

    def gate_up(self, experts: tuple[Any, Any], tiling: Any) -> Any:
        """Run the first GEMM of experts in four bits with a tiling."""
        from fd_dsa.ops.expert_pairs import group_pairs
        from fd_dsa.ops.four_bit_gemm import four_bit_gemm

        ids, (gate_up, _) = self._choice().ids, experts
        pairs = group_pairs(ids, gate_up.shape[0])
        how = {"top_k": ids.shape[1], "tiling": tiling}
        return four_bit_gemm(self._x.plain, gate_up.weight, *pairs, **how)


def likely_tilings(mean: float) -> list[Any]:
    """Return the tilings that may be the fastest for a mean number of pairs of an expert."""
    from benchmarks import _tilings

    rows = next((rows for rows in (16, 32, 64) if mean <= rows / 2), 128)
    return [one for one in _tilings.experts("four bits", True) if one.rows in (rows, rows // 2)]


def tried_tilings(
    bench: Any, kind: str, rows: Tokens, layers: Sequence[Any], tilings: Sequence[Any]
) -> Iterator[Any]:
    """Yield the microseconds of the first GEMM with each tiling, and print them as they come."""
    from benchmarks.gpu_gemms import tried

    for tiling in tilings:
        [found] = tried(
            bench, [tiling], lambda tiling: [partial(rows.gate_up, one, tiling) for one in layers]
        )
        print(f"  {kind}: {tuple(tiling.options.values())} {found[0]}", flush=True)
        yield found


def cases(
    bench: Any, name: str, shape: Shape, tokens: Sequence[int], *, tilings: bool
) -> Iterator[dict[str, Any]]:
    """Yield the times of all kinds for each number of tokens."""
    layers = {
        kind: [layer_of(bench, kind, shape, f"{i}.experts.") for i in range(_LAYERS)]
        for kind in KINDS
    }
    for count in tokens:
        rows = Tokens(bench, shape, count)
        times = {
            kind: bench.time_us([partial(rows.run, one) for one in each])
            for kind, each in layers.items()
        }
        entry: dict[str, Any] = {"case": f"{name}, {count} tokens", "tokens": count, "us": times}
        entry |= {"width": shape.width, "experts_hit": rows.num_hit}
        entry["ratio"] = {kind: times["fp8"] / one for kind, one in times.items()}
        if tilings:
            likely = likely_tilings(count * shape.top_k / shape.experts)
            entry["gate_up_tilings"] = {
                kind: list(tried_tilings(bench, kind, rows, layers[kind], likely))
                for kind in _TILED
            }
        yield entry


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = rig_parser(__doc__)
    parser.add_argument("--tilings", action="store_true", help="likely tilings, too")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="default: 1 to 8,192")
    args = parser.parse_args(argv)
    bench: Any
    if args.dry:
        bench, tokens = Host(), args.tokens or (1, 8)
        shapes = {"dry": Shape(experts=4, top_k=2, hidden=256, width=128)}
    else:
        from benchmarks.gpu_gemms import Bench

        bench, tokens = Bench(args.rig), args.tokens or TOKENS
        shapes = {name: Shape(width=width) for name, width in WIDTHS.items()}
    result = rig_result("four_bit_experts", args)
    for name, shape in shapes.items():
        for entry in cases(bench, name, shape, tokens, tilings=args.tilings):
            result["cases"].append(entry)
            figures = (f"{k} {v:.1f} us ({entry['ratio'][k]:.2f}x)" for k, v in entry["us"].items())
            print(f"{entry['case']:<18} {', '.join(figures)}", flush=True)
            # kept if a later case has no time left
            write_json(args.out / f"{result['name']}.json", result)
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
