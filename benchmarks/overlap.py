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

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from benchmarks import _gpu, _projection_tilings
from benchmarks._fp8_linear import Fp8Linear
from benchmarks._layer import (
    BLOCK,
    Both,
    Given,
    Layer,
    Pool,
    Project,
    Sizes,
    Weights,
    Work,
    backend_of,
    cache_write,
    floor_us,
)
from benchmarks._logits_sides import Shape
from benchmarks._torch_device import TorchDeviceApi
from benchmarks.ceilings import matrix_flops_per_s
from fd_dsa.attention.overlap import IndexerOverlap
from fd_dsa.device.side_stream import SideStream
from fd_dsa.environment import DEFAULT_OVERLAP_MAX_TOKENS
from fd_dsa.ops.indexer_projection import triton_kernel
from fd_dsa.ops.split_sums import new_scratch

ONE, TWO, SERVED = "one stream", "two streams", "as served"
# what is measured of a number of tokens, and how a case of it is called
PLAIN, BESIDE, FP8 = "", ", k_norm beside", ", FP8 QKV-A"
SIZES = {
    PLAIN: (1, 8, 32, 64, 128, 256, 512, 1024, 2048),
    BESIDE: (1, 32, 128),
    FP8: (1, 8, 32, 64, 128, 256),
}
# kind of a case and how it is measured
MODES = {"graph": "graph", "eager": "wall"}
# up to here the host decides how long an eager step takes, which is noisier than the device
HOST_BOUND = 256
# a loss that the threshold allows, as a share of the layer
_ALLOWED_LOSS = 0.01
_CHECKED_RUNS = 50


class Step(Work):
    """One step of one layer: decode rows, or more tokens as a prompt's last chunk.

    The backend holds one step, so a new one ends the one before.
    """

    def __init__(self, layer: Layer, pool: Pool, num_tokens: int) -> None:
        s = layer.sizes
        shape = Shape(s.heads, num_tokens, s.context)
        if num_tokens > s.max_rows:
            shape = Shape(s.heads, 1, s.context, num_tokens, is_prompt=True)
        super().__init__(layer, Given(shape, s, pool, "cuda"))
        self._meta = self.given.begin(layer.backend)
        # index keys that `write_caches` norms, and those that come normed
        self._writes = {
            k_norm: cache_write(s, "cuda", layer_id, k_norm=k_norm)
            for layer_id, k_norm in enumerate((True, False))
        }

    def call(self, overlap: IndexerOverlap, project: Project, *, k_norm: bool) -> None:
        """The layer; `k_norm`: index keys are normed by the write."""
        self.run(overlap, project, self._writes[k_norm], self._meta)


def forms_of(step: Step) -> dict[str, Callable[..., Both]]:
    """The ways to make the projections of a step, of hidden states and two weights of a layer."""
    weights, out = step.layer.weights, outputs(step.num_tokens, step.layer.sizes)
    own = weights.wk, weights.weights_proj
    norm = own[0].shape[1:], weights.k_norm, weights.k_bias, 1e-6

    def ours(x: torch.Tensor, both: Both = own) -> Both:
        return triton_kernel.project_indexer(x, *both, out)

    def normed(x: torch.Tensor, both: Both = own) -> Both:
        keys, heads = ours(x, both)
        return torch.nn.functional.layer_norm(keys, *norm), heads

    def fp8(x: torch.Tensor, both: tuple[Fp8Linear, Fp8Linear] | None = None) -> Both:
        # each quantises its input
        wk, weights_proj = both or weights.indexer_in_fp8
        return wk(x), weights_proj(x)

    def cublas(x: torch.Tensor, both: Both = own) -> Both:
        return x @ both[0], x @ both[1]

    return {"ours": ours, "k_norm": normed, "cuBLAS": cublas, "FP8": fp8}


def in_fp8(layer: Layer) -> Layer:
    """The same layer with QKV-A in FP8, and the indexer's projections in FP8 beside ours."""
    weights = copy(layer.weights)
    weights.down = Fp8Linear(weights.down)
    weights.indexer_in_fp8 = Fp8Linear(weights.wk), Fp8Linear(weights.weights_proj)
    return replace(layer, weights=weights)


@cache
def preferred_stream() -> SideStream:
    """A second stream of higher priority."""
    return SideStream(TorchDeviceApi(high_priority=True), 0)


def sides_of(step: Step, kind: str, what: str = PLAIN) -> dict[str, list[_gpu.Call]]:
    """Every form of a step as calls; in a graph it is served as on two streams."""
    forms = forms_of(step)
    one, two, preferred = (IndexerOverlap("gpu", n) for n in (0, 1 << 30, 1 << 30))
    preferred.side_stream = preferred_stream()
    ours = forms["k_norm" if what == BESIDE else "ours"]
    sides: dict[str, tuple[IndexerOverlap, Project]] = {}
    if what == FP8:
        sides["one stream, FP8 GEMMs"] = one, forms["FP8"]
    if what == PLAIN:
        sides["one stream, cuBLAS"] = one, forms["cuBLAS"]
        sides["two streams, cuBLAS"] = two, forms["cuBLAS"]
        if kind == "eager":
            sides[SERVED] = IndexerOverlap("gpu"), ours
        else:
            sides["two streams, priority"] = preferred, ours
    sides |= {ONE: (one, ours), TWO: (two, ours)}
    return {k: [partial(step.call, *how, k_norm=what != BESIDE)] for k, how in sides.items()}


def check(step: Step, sides: dict[str, list[_gpu.Call]]) -> None:
    """Compare what two streams make with what one makes, eagerly and in a graph, many times.

    Raises:
        AssertionError: a bit differs.
    """
    out = step.given.out
    _gpu.poison(out)
    sides[ONE][0]()
    wanted = out.view(torch.int16).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sides[TWO][0]()
    for kind, run in (("eager", sides[TWO][0]), ("graph", graph.replay)):
        differing = torch.zeros((), device=out.device, dtype=torch.int64)
        for _ in range(_CHECKED_RUNS):
            _gpu.poison(out)
            run()
            differing += (out.view(torch.int16) != wanted).any()
        wrong = int(differing)
        assert wrong == 0, f"{step.num_tokens} tokens, {kind}: {wrong} runs differ"


def copies_of(weights: Weights) -> list[Both]:
    """Both weights of the projections again and again, together past the L2."""
    widths = weights.wk.shape[1], weights.weights_proj.shape[1]
    count = _gpu.num_sets(2 * weights.indexer.numel())
    return [weights.indexer.clone().split(widths, 1) for _ in range(count)]


def alone(step: Step) -> dict[str, float]:
    """Median microseconds of the projections and of QKV-A with its norm, nothing in the L2."""
    forms, weights, x = forms_of(step), step.layer.weights, step.given.x
    copies, down = copies_of(weights), weights.down
    downs = [down.clone() for _ in range(_gpu.num_sets(down.nbytes))]
    sides = {
        "projections": [partial(forms["ours"], x, both) for both in copies],
        "projections, k_norm": [partial(forms["k_norm"], x, both) for both in copies],
        "QKV-A": [partial(step.down, one) for one in downs],
    }
    if isinstance(down, Fp8Linear):
        clones = [tuple(one.clone() for one in weights.indexer_in_fp8) for _ in copies]
        sides["projections, FP8"] = [partial(forms["FP8"], x, one) for one in clones]
    return {label: t["p50"] for label, t in _gpu.interleaved(sides, mode="graph", rounds=9).items()}


def compare(record: _gpu.Recorder, layer: Layer, pool: Pool, num_tokens: int, what: str) -> None:
    """One number of tokens: a case in a graph, and an eager one."""
    step = Step(layer, pool, num_tokens)
    parts = alone(step)
    check(step, sides_of(step, "graph", what))
    side_us = parts["projections, k_norm" if what == BESIDE else "projections"]
    weight_bytes = layer.weights.num_bytes()
    least_us = floor_us(step.given.shape, layer.sizes, weight_bytes, record.ceilings)
    for kind, mode in MODES.items():
        sides = sides_of(step, kind, what)
        rounds = {"graph": 25, "eager": 31 if num_tokens <= HOST_BOUND else 9}[kind]
        times = _gpu.interleaved(sides, mode=mode, rounds=rounds)
        one, two = (times[label]["p50"] for label in (ONE, TWO))
        notes = {"num_tokens": num_tokens, "kind": f"{kind}{what}"}
        notes |= {"alone_us": parts, "saved": 1 - two / one}
        if kind == "graph":
            notes["hidden"] = (one - two) / side_us
        name = f"{num_tokens} tokens, {notes['kind']}"
        record.case(name, times, ours=TWO, floor_us=least_us, **notes)


def thresholds(cases: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Most tokens before the first size that loses more than 1% of the layer by its fork.

    Of the steps in graphs and of the eager ones.
    """
    most = {}
    for kind in MODES:
        own = [case for case in cases if case["kind"].startswith(kind)]
        lost = [case["num_tokens"] for case in own if case["saved"] < -_ALLOWED_LOSS]
        # up to the largest and no further is known
        good = [c["num_tokens"] for c in own if c["num_tokens"] < min(lost, default=1 << 30)]
        most[kind] = max(good, default=0)
    return most


def outputs(num_tokens: int, sizes: Sizes) -> Both:
    """Where index keys and head weights go."""
    keys = torch.empty(num_tokens, sizes.index_dim, device="cuda", dtype=torch.bfloat16)
    return keys, torch.empty(num_tokens, sizes.index_heads, device="cuda")


@cache
def scratch() -> torch.Tensor:
    """Memory of split sums."""
    return new_scratch(torch.empty(0, device="cuda"))


def launch(x: torch.Tensor, both: Both, out: Both, tiling: triton_kernel.Tiling) -> _gpu.Call:
    """One launch with a tiling, its arguments checked beforehand."""
    memory = scratch() if tiling in _projection_tilings.SPLIT else None
    arguments = triton_kernel.kernel_arguments(x, *both, out, memory)
    grid, options = triton_kernel.launch_options(arguments, tiling)
    return triton_kernel.project_indexer_kernel.bind(grid, **arguments, **options)


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """One for each number of tokens of each layer; then the thresholds."""
    record.ceilings["matrix_flops_per_s"] = matrix_flops_per_s()
    s = Sizes()
    layer = Layer(s, Weights(s, "cuda"), backend_of(s, "cuda"))
    pool = Pool(s.max_rows * s.context // BLOCK)
    eager = sides_of(Step(layer, pool, 1), "eager").values()
    _gpu.warm_host(lambda: [calls[0]() for calls in eager])
    for what, sizes in SIZES.items():
        measured = in_fp8(layer) if what == FP8 else layer
        for num_tokens in (1, 128) if args.quick else sizes:
            name = f"{num_tokens} tokens{what}"
            yield name, partial(compare, record, measured, pool, num_tokens, what)
    most = thresholds(record.cases)
    record.note(thresholds_tokens=most, default_tokens=DEFAULT_OVERLAP_MAX_TOKENS)


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """The launch of the projections at sizes of decode steps and of a prompt's chunk."""
    sizes, found = Sizes(), {}
    weight = torch.randn(sizes.hidden, 192, device="cuda", dtype=torch.bfloat16)
    both = weight[:, : sizes.index_dim], weight[:, sizes.index_dim :]
    for num_tokens in (1, 128, 1024):
        x = torch.randn(num_tokens, sizes.hidden, device="cuda", dtype=torch.bfloat16)
        out = outputs(num_tokens, sizes)
        call = launch(x, both, out, triton_kernel.configuration(num_tokens))
        found[f"projections, {num_tokens} tokens"] = call, list(out)
    return found


main = partial(_gpu.main, "overlap", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
