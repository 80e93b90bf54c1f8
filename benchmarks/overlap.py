"""A layer whose indexer projections run on a second stream, against the same layer on one.

The layer of `_layer.py` at decode sizes and, for the thresholds, prompt chunks; eager and in CUDA
graphs, all forms in turn. "cuBLAS" projects by two GEMMs of torch as FastDeploy does, the other
forms by the one launch of `project_indexer`; "k_norm beside" norms the index keys with them, as
where the cache write does not. "two streams" forks in every step, "as served" where the package
does by default. The share of the projections that is hidden is the time saved in a graph by the
time that they take alone, their weights not in the L2.

"FP8 QKV-A" is the layer of a block-FP8 checkpoint: QKV-A in FP8 by cuBLASLt. There "FP8 GEMMs"
projects by two of them, each of which quantises its input, as FastDeploy does; ours multiplies by
both weights dequantised.
"""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch

from benchmarks import _gpu
from benchmarks._fp8_linear import Fp8Linear
from benchmarks._layer import Both, Layer, Project, Sizes, Step, Weights
from benchmarks._timeline import traced
from benchmarks._torch_device import TorchDeviceApi
from benchmarks.ceilings import matrix_flops_per_s
from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.environment import DEFAULT_OVERLAP_MAX_TOKENS
from fd_dsa.ops.indexer_projection import triton_kernel
from fd_dsa.ops.indexer_projection.scratch import new_scratch
from fd_dsa.triton_runtime.streams import SideStream

SIZES = (1, 8, 32, 64, 128, 256, 512, 1024, 2048)
NORMED = (1, 32, 128)
FP8_SIZES = (1, 8, 32, 64, 128, 256)
TRACED = 32
ONE, TWO, SERVED = "one stream", "two streams", "as served"
# what is measured of a number of tokens, and how a case of it is called
PLAIN, BESIDE, FP8 = "", ", k_norm beside", ", FP8 QKV-A"
# kind of a case and how it is measured
MODES = {"graph": "graph", "eager": "wall"}
# up to here the host decides how long an eager step takes, which is noisier than the device
HOST_BOUND = 256
# a loss that the threshold allows, as a share of the layer
_ALLOWED_LOSS = 0.01
_CHECKED_RUNS = 50


@cache
def preferred_stream() -> SideStream:
    """A second stream of higher priority."""
    return SideStream(TorchDeviceApi(), 0, high_priority=True)


class Forms:
    """The ways to run one step's projections, and the forks for them."""

    def __init__(self, step: Step) -> None:
        self._layer, self._weights = step.layer, step.layer.weights
        s, how = step.layer.sizes, {"device": step.x.device}
        self._out = (
            torch.empty(step.num_tokens, s.index_dim, dtype=torch.bfloat16, **how),
            torch.empty(step.num_tokens, s.index_heads, **how),
        )
        self.one, self.two, self.preferred = (
            IndexerOverlap("gpu", n) for n in (0, 1 << 30, 1 << 30)
        )
        self.served = IndexerOverlap("gpu")
        self.preferred.side_stream = preferred_stream()

    def ours(self, x: torch.Tensor, both: Both | None = None) -> Both:
        """One launch; with `both` on other weights than the layer's, as in all forms."""
        wk, weights_proj = both or (self._weights.wk, self._weights.weights_proj)
        with self._layer.span("projections"):
            return triton_kernel.project_indexer(x, wk, weights_proj, self._out)

    def cublas(self, x: torch.Tensor, both: Both | None = None) -> Both:
        """Two GEMMs."""
        wk, weights_proj = both or (self._weights.wk, self._weights.weights_proj)
        return x @ wk, x @ weights_proj

    def fp8(self, x: torch.Tensor, both: tuple[Fp8Linear, Fp8Linear] | None = None) -> Both:
        """Two FP8 GEMMs, each with its own quantisation of the input."""
        wk, weights_proj = both or self._weights.indexer_in_fp8
        return wk(x), weights_proj(x)

    def normed(self, x: torch.Tensor, both: Both | None = None) -> Both:
        """One launch and the norm of the keys."""
        keys, weights = self.ours(x, both)
        norm = keys.shape[1:], self._weights.k_norm, self._weights.k_bias, 1e-6
        return torch.nn.functional.layer_norm(keys, *norm), weights


def in_fp8(layer: Layer) -> Layer:
    """The same layer with QKV-A in FP8, and the indexer's projections in FP8 beside ours."""
    other, weights = copy.copy(layer), copy.copy(layer.weights)
    weights.down = Fp8Linear(weights.down)
    weights.indexer_in_fp8 = Fp8Linear(weights.wk), Fp8Linear(weights.weights_proj)
    other.weights = weights
    return other


def sides_of(step: Step, kind: str, what: str = PLAIN) -> dict[str, list[_gpu.Call]]:
    """Every form of a step as calls; in a graph it is served as on two streams."""
    forms = Forms(step)

    def call(overlap: IndexerOverlap, project: Project) -> list[_gpu.Call]:
        return [lambda: step.run(overlap, project, k_norm=what != BESIDE)]

    if what == BESIDE:
        return {ONE: call(forms.one, forms.normed), TWO: call(forms.two, forms.normed)}
    if what == FP8:
        return {
            "one stream, FP8 GEMMs": call(forms.one, forms.fp8),
            ONE: call(forms.one, forms.ours),
            TWO: call(forms.two, forms.ours),
        }
    if kind == "eager":
        other = {SERVED: call(forms.served, forms.ours)}
    else:
        other = {"two streams, priority": call(forms.preferred, forms.ours)}
    return {
        "one stream, cuBLAS": call(forms.one, forms.cublas),
        "two streams, cuBLAS": call(forms.two, forms.cublas),
        **other,
        ONE: call(forms.one, forms.ours),
        TWO: call(forms.two, forms.ours),
    }


def check(step: Step, sides: dict[str, list[_gpu.Call]]) -> None:
    """Compare what two streams make with what one makes, eagerly and in a graph, many times.

    Raises:
        AssertionError: a bit differs.
    """
    _gpu.poison(step.out)
    sides[ONE][0]()
    wanted = step.out.view(torch.int16).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sides[TWO][0]()
    for kind, run in (("eager", sides[TWO][0]), ("graph", graph.replay)):
        differing = torch.zeros((), device=step.out.device, dtype=torch.int64)
        for _ in range(_CHECKED_RUNS):
            _gpu.poison(step.out)
            run()
            differing += (step.out.view(torch.int16) != wanted).any()
        assert int(differing) == 0, (
            f"{step.num_tokens} tokens, {kind}: {int(differing)} runs differ"
        )


def copies_of(weights: Weights) -> list[Both]:
    """Both weights of the projections again and again, together past the L2."""
    widths = weights.wk.shape[1], weights.weights_proj.shape[1]
    count = _gpu.num_sets(2 * weights.indexer.numel())
    return [weights.indexer.clone().split(widths, 1) for _ in range(count)]


def alone(step: Step) -> dict[str, float]:
    """Median microseconds of the projections and of QKV-A with its norm, nothing in the L2."""
    forms, copies = Forms(step), copies_of(step.layer.weights)
    down = step.layer.weights.down
    downs = [down.clone() for _ in range(_gpu.num_sets(down.nbytes))]
    sides = {
        "projections": [partial(forms.ours, step.x, both) for both in copies],
        "projections, cuBLAS": [partial(forms.cublas, step.x, both) for both in copies],
        "projections, k_norm": [partial(forms.normed, step.x, both) for both in copies],
        "QKV-A": [partial(step.down, one) for one in downs],
    }
    if isinstance(down, Fp8Linear):
        both = step.layer.weights.indexer_in_fp8
        clones = [tuple(one.clone() for one in both) for _ in copies]
        sides["projections, FP8"] = [partial(forms.fp8, step.x, one) for one in clones]
    return {label: t["p50"] for label, t in _gpu.interleaved(sides, mode="graph", rounds=9).items()}


def compare(record: _gpu.Recorder, layer: Layer, num_tokens: int, what: str) -> None:
    """One number of tokens: a case in a graph, and an eager one."""
    step = Step(layer, num_tokens)
    parts = alone(step)
    check(step, sides_of(step, "graph", what))
    side_us = parts["projections, k_norm" if what == BESIDE else "projections"]
    for kind, mode in MODES.items():
        sides = sides_of(step, kind, what)
        rounds = {"graph": 25, "eager": 31 if num_tokens <= HOST_BOUND else 9}[kind]
        times = _gpu.interleaved(sides, mode=mode, rounds=rounds)
        one, two = (times[label]["p50"] for label in (ONE, TWO))
        notes = {
            "num_tokens": num_tokens,
            "kind": f"{kind}{what}",
            "alone_us": parts,
            "saved": 1 - two / one,
        }
        if kind == "graph":
            notes["hidden"] = (one - two) / side_us
        else:
            host = _gpu.interleaved({k: sides[k] for k in (ONE, TWO)}, mode="host", rounds=5)
            notes["host_us"] = {label: time["p50"] for label, time in host.items()}
        floor_us = 1e6 * step.floor_s(record.ceilings)
        name = f"{num_tokens} tokens, {notes['kind']}"
        record.case(name, times, ours=TWO, floor_us=floor_us, **notes)


def thresholds(cases: Sequence[dict[str, Any]]) -> dict[str, int]:
    """`threshold` of the steps in graphs and of the eager ones."""
    return {kind: threshold([c for c in cases if c["kind"].startswith(kind)]) for kind in MODES}


def threshold(cases: Sequence[dict[str, Any]]) -> int:
    """Most tokens before the first size that loses more than 1% of the layer by its fork."""
    allowed = 0
    for num_tokens in sorted({case["num_tokens"] for case in cases}):
        own = [c for c in cases if c["num_tokens"] == num_tokens]
        if any(case["saved"] < -_ALLOWED_LOSS for case in own):
            break
        # up to here and no further is known
        allowed = num_tokens
    return allowed


def inputs(num_tokens: int, sizes: Sizes) -> tuple[torch.Tensor, Both]:
    """Hidden states, and where index keys and head weights go."""
    how: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    weights = torch.empty(num_tokens, sizes.index_heads, device="cuda")
    keys = torch.empty(num_tokens, sizes.index_dim, **how)
    return torch.randn(num_tokens, sizes.hidden, **how), (keys, weights)


@cache
def scratch() -> torch.Tensor:
    """Memory of split sums."""
    return new_scratch(torch.empty(0, device="cuda"))


def launch(x: torch.Tensor, both: Both, out: Both, tiling: triton_kernel.Tiling) -> _gpu.Call:
    """One launch with a tiling, its arguments checked beforehand."""
    memory = scratch() if tiling in triton_kernel.SPLIT else None
    arguments = triton_kernel.kernel_arguments(x, *both, out, memory)
    grid, options = triton_kernel.launch_options(arguments, tiling)
    return triton_kernel.project_indexer_kernel.bind(grid, **arguments, **options)


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """One for each number of tokens of each layer; then the thresholds and a timeline."""
    record.ceilings["matrix_flops_per_s"] = matrix_flops_per_s()
    layer = Layer(Sizes())
    eager = sides_of(Step(layer, 1), "eager").values()
    _gpu.warm_host(lambda: [calls[0]() for calls in eager])
    for what, sizes in {PLAIN: SIZES, BESIDE: NORMED, FP8: FP8_SIZES}.items():
        measured = in_fp8(layer) if what == FP8 else layer
        for num_tokens in (1, 128) if args.quick else sizes:
            name = f"{num_tokens} tokens{what}"
            yield name, partial(compare, record, measured, num_tokens, what)
    most = thresholds(record.cases)
    record.note(thresholds_tokens=most, default_tokens=DEFAULT_OVERLAP_MAX_TOKENS)
    step = Step(layer, TRACED)
    sides = sides_of(step, "graph")
    record.note(timeline={label: traced(step, sides[label][0]) for label in (ONE, TWO)})


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """The launch of the projections at sizes of decode steps and of a prompt's chunk."""
    sizes, found = Sizes(), {}
    weight = torch.randn(sizes.hidden, 192, device="cuda", dtype=torch.bfloat16)
    both = weight[:, : sizes.index_dim], weight[:, sizes.index_dim :]
    for num_tokens in (1, 128, 1024):
        x, out = inputs(num_tokens, sizes)
        call = launch(x, both, out, triton_kernel.configuration(num_tokens))
        found[f"projections, {num_tokens} tokens"] = call, list(out)
    return found


main = partial(_gpu.main, "overlap", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
