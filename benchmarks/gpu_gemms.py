"""FP8 GEMMs and routed experts of DeepSeek-V3.2, on Paddle tensors in the memory of a GPU.

    python -m benchmarks.gpu_gemms --rig              # ours, and cuBLASLt: P25, P26
    python -m benchmarks.gpu_gemms --rig --tilings    # and every tiling that may serve
    python -m benchmarks.gpu_gemms --rig --only experts --peer DIR    # and vLLM and DeepGEMM
    python -m benchmarks.gpu_gemms --rig --only chain    # a few rows, between norms in a layer

DIR has a `run.sh` that runs `python SCRIPT ...` with vLLM's packages, see workers/experts_peer.py.
Each figure is a replay of a graph with a call for each of several weights, so that none is in the
L2. The floor of the bytes counts all weights, or those of the experts that are hit, at the copy
rate of an H200. The floor of the multiplications is its FP8 rate. Writes gpu_dense.json,
gpu_experts.json and gpu_chain.json of benchmarks/results.

Tilings of a few rows are chosen by the chain, because a tiling that is the fastest when launched
again and again may be slow between other launches. The baseline has one group in each stage.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks._harness import rig_parser, rig_result, run_peer, write_json

BYTES_PER_US, FP8_OPS_PER_US = 4.3e6, 1.5e9
# outputs x inputs
DENSE = {
    "q_a, kv_a": (2112, 7168),
    "q_b": (24576, 1536),
    "o_proj": (7168, 16384),
    "dense gate, up": (36864, 7168),
    "dense down": (7168, 18432),
    "shared gate, up": (4096, 7168),
    "shared down": (7168, 2048),
}
# most GEMMs of a layer of V4-Flash, wo_a with one group, and of V3.2 on a rank of eight
CHAINS = {
    "V4-Flash": ((1536, 4096), (32768, 1024), (8192, 4096), (4096, 8192), (4096, 2048)),
    "V3.2 of 8 ranks": ((2112, 7168), (3072, 1536), (7168, 2048), (7168, 256)),
}
_CHAIN_LAYERS = 12
ROWS = (1, 8, 32, 128, 2048, 8192)
EXPERTS, TOP_K, HIDDEN, WIDTH = 256, 8, 7168, 2048
_ROTATED_BYTES = 200 << 20
_REPLAYS = 7


class Bench:
    """Tensors of one device, and the time of launches there."""

    def __init__(self, rig: bool) -> None:
        self.device = "gpu:0"
        if rig:
            from tests.gpu_rig import load

            self.device = load("real").device
        import paddle

        from custom_ops.build_library import build_library
        from fd_dsa import custom_ops
        from fd_dsa.device.allocation import paddle_allocator, paddle_place

        custom_ops.use_library(build_library())
        paddle.set_device(self.device)
        self.place, self.allocate = paddle_place(self.device), paddle_allocator(self.device)
        self._seed = 0

    def codes(self, *shape: int) -> Any:
        """Return random e4m3 codes."""
        from fd_dsa.ops.fill_kernels import fill_random

        made, self._seed = self.allocate(shape, "uint8"), self._seed + 1
        fill_random(made, 0, int(np.prod(shape)), [self._seed], 1.0)
        return made

    def scales(self, *shape: int) -> Any:
        """Return scales of small numbers."""
        from fd_dsa.ops.fill_kernels import fill_constant

        made = self.allocate(shape, "float32")
        fill_constant(made, 0, int(np.prod(shape)), 2.0**-6)
        return made

    def weight(self, *shape: int) -> tuple[Any, Any]:
        """Return codes and scales."""
        *outer, rows, width = shape
        return self.codes(*shape), self.scales(*outer, -(-rows // 128), -(-width // 128))

    def rows(self, count: int, width: int) -> Any:
        """Return activations in FP8."""
        from fd_dsa.tensor import Fp8Rows

        stride = max(8, -(-count // 4) * 4)
        padded = self.codes(stride, width)
        return Fp8Rows(padded[:count], self.scales(-(-width // 128), stride), padded)

    def time_us(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Return the median microseconds of a call. All calls are captured together."""
        from benchmarks._events import device_us
        from fd_dsa.device.transfers import transfers_for
        from fd_dsa.runner.step_graphs import PaddleCapture

        def work() -> Any:
            return [call() for call in calls]

        _, replay = PaddleCapture(self.place)(work)
        stream = transfers_for(self._example()).stream().value or 0
        times = [device_us(0, replay, stream) for _ in range(_REPLAYS)]
        return median(times[2:]) / len(calls)

    def _example(self) -> Any:
        return self.allocate((1,), "float32")


def floor_us(nbytes: float, ops: float) -> float:
    """Return the shortest time for reading or multiplying, microseconds."""
    return max(nbytes / BYTES_PER_US, ops / FP8_OPS_PER_US)


def dense_cases(bench: Bench, *, tilings: bool) -> Iterator[dict[str, Any]]:
    """Yield the times of cuBLASLt and our kernel for each shape and number of rows."""
    from benchmarks import _tilings
    from fd_dsa.ops import fp8_gemm
    from fd_dsa.ops.cublaslt import cublaslt_for

    library = cublaslt_for(bench.allocate((1,), "float32"), bench.allocate)
    for name, (outputs, width) in DENSE.items():
        count = max(2, -(-_ROTATED_BYTES // (outputs * width)))
        weights = [bench.weight(outputs, width) for _ in range(count)]
        for num_rows in ROWS:
            x = bench.rows(num_rows, width)
            out = bench.allocate((x.padded.shape[0], outputs), "bfloat16")

            by_library = partial(library.fp8_linear, x.padded, x.scales)

            def ours(tiling: Any = None, x: Any = x, weights: Any = weights) -> list[Any]:
                linear = partial(fp8_gemm.fp8_linear, x, tiling=tiling)
                return [partial(linear, *pair) for pair in weights]

            entry = {"case": name, "shape": [outputs, width], "rows": num_rows}
            entry["floor_us"] = floor_us(outputs * width, 2 * num_rows * outputs * width)
            entry["cublaslt_us"] = bench.time_us(
                [partial(by_library, *pair, out) for pair in weights]
            )
            chosen = fp8_gemm.configuration(num_rows, outputs, width)
            entry["ours_us"], entry["tiling"] = bench.time_us(ours()), chosen
            if tilings:
                entry["tilings"] = tried(bench, _tilings.fp8_gemms(num_rows), ours)
            yield entry


def chain_cases(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield the times of a layer's FP8 GEMMs with a norm after each, of both tilings."""
    from fd_dsa.ops.dense_kernels import rms_norm
    from fd_dsa.ops.fp8_gemm import fp8_linear
    from fd_dsa.ops.split_sums import PROCESSORS, Tiling

    plain = Tiling(16, 64, 4, 3, 4 * PROCESSORS)
    for name, shapes in CHAINS.items():
        layers = [[bench.weight(*shape) for shape in shapes] for _ in range(_CHAIN_LAYERS)]
        for num_rows in (1, 8):
            inputs = [bench.rows(num_rows, width) for _, width in shapes]
            hidden = bench.allocate((num_rows, HIDDEN), "bfloat16")
            norm = partial(rms_norm, hidden, None, bench.scales(HIDDEN), 1e-6)

            def chain(
                tiling: Any, layers: Any = layers, inputs: Any = inputs, norm: Any = norm
            ) -> list[Callable[[], Any]]:
                """Return the launches of all layers."""
                return [
                    call
                    for weights in layers
                    for x, weight in zip(inputs, weights, strict=True)
                    for call in (partial(fp8_linear, x, *weight, tiling=tiling), norm)
                ]

            entry: dict[str, Any] = {"case": name, "rows": num_rows}
            entry["floor_us"] = floor_us(sum(columns * width for columns, width in shapes), 0)
            for key, tiling in (("plain_us", plain), ("ours_us", None)):
                # of a launch times the launches of a layer
                entry[key] = bench.time_us(chain(tiling)) * 2 * len(shapes)
            entry["ratio"] = entry["plain_us"] / entry["ours_us"]
            yield entry


def tried(bench: Bench, tilings: Sequence[Any], calls: Callable[[Any], Any]) -> list[Any]:
    """Return the microseconds of each tiling, the fastest at the front, refused ones last."""
    found, refused = [], []
    for tiling in tilings:
        try:
            found.append((round(bench.time_us(calls(tiling)), 2), tiling))
        except Exception as error:
            refused.append((str(error)[:80], tiling))
    return sorted(found) + refused


class Experts:
    """The experts of a number of tokens that choose evenly."""

    def __init__(self, bench: Bench, gate_up: Any, down: Any, tokens: int) -> None:
        from fd_dsa.device.transfers import uploaded
        from fd_dsa.ops import expert_kernels
        from fd_dsa.ops.expert_gemm import expert_gemm
        from fd_dsa.ops.fill_kernels import fill_random

        self._kernels, self._weights = expert_kernels, (gate_up, down)
        self._gemm = expert_gemm
        self._logits = bench.allocate((tokens, EXPERTS), "float32")
        fill_random(self._logits, 0, tokens * EXPERTS, [9, tokens], 1.0)
        self._bias, self._x = bench.scales(EXPERTS), bench.rows(tokens, HIDDEN)
        self._slots = uploaded(bench.allocate, np.zeros(tokens, np.int64))
        self._shared = bench.allocate((tokens, HIDDEN), "bfloat16")
        self._choose()
        self._hidden = self.gate_up()
        self.ids = self._ids.numpy()

    def _choose(self) -> None:
        from fd_dsa.ops.expert_pairs import group_pairs

        self._ids, self._shares, lists = self._kernels.choose_experts(
            *(self._logits, self._bias),
            top_k=TOP_K,
            n_group=8,
            topk_group=4,
            norm=True,
            scaling=2.5,
            slot_mapping=self._slots,
        )
        self._pairs = lists or group_pairs(self._ids, EXPERTS)

    def gate_up(self, tiling: Any = None) -> Any:
        """Run the first GEMM."""
        how: dict[str, Any] = {"top_k": TOP_K, "gated": True, "round_scales": True}
        weight = self._weights[0]
        return self._gemm(self._x, weight, *self._pairs, tiling=tiling, **how)

    def down(self, tiling: Any = None) -> Any:
        """Run the second GEMM."""
        rows, weight = self._hidden, self._weights[1]
        return self._gemm(rows, weight, *self._pairs, top_k=TOP_K, tiling=tiling)

    def everything(self) -> Any:
        """Run all launches of a layer."""
        self._choose()
        self._hidden = self.gate_up()
        return self._kernels.sum_experts(self.down(), self._shares, self._ids, self._shared)


def of_peers(peer: Path, choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the times of vLLM and DeepGEMM for each choice of experts."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "choices.json"), Path(folder, "found.json")
        given.write_text(json.dumps([ids.tolist() for ids in choices]))
        run_peer(peer, "experts_peer.py", given, found)
        return json.loads(found.read_text())


def expert_cases(bench: Bench, *, tilings: bool, peer: Path | None) -> Iterator[dict[str, Any]]:
    """Yield the times of experts by number of tokens: all launches, both GEMMs, peers."""
    from benchmarks import _tilings
    from fd_dsa.ops import expert_gemm

    gate_up, down = bench.weight(EXPERTS, 2 * WIDTH, HIDDEN), bench.weight(EXPERTS, HIDDEN, WIDTH)
    layers = [Experts(bench, gate_up, down, tokens) for tokens in ROWS]
    theirs = of_peers(peer, [experts.ids for experts in layers]) if peer else [{}] * len(ROWS)
    for tokens, experts, beside in zip(ROWS, layers, theirs, strict=True):
        each, num_hit = 3 * WIDTH * HIDDEN, len(np.unique(experts.ids))
        entry = {"case": "experts", "rows": tokens, "experts_hit": num_hit, **beside}
        entry["floor_us"] = floor_us(num_hit * each, 2 * tokens * TOP_K * each)
        entry["ours_us"] = bench.time_us([experts.everything])
        for name, call, is_gated in (
            ("gate_up", experts.gate_up, True),
            ("down", experts.down, False),
        ):
            entry[f"{name}_us"] = bench.time_us([call])
            sizes = "uint8", tokens * TOP_K, EXPERTS, is_gated
            columns = WIDTH if is_gated else HIDDEN
            chosen = expert_gemm.configuration(*sizes, columns, 227 << 10)
            tiling = entry[f"{name}_tiling"] = chosen
            entry[f"{name}_triton_us"] = bench.time_us([partial(call, tiling)])
            if tilings:
                entry[f"{name}_tilings"] = tried(
                    bench,
                    _tilings.experts("uint8", is_gated),
                    lambda tiling, call=call: [partial(call, tiling)],
                )
        yield entry


def line(entry: dict[str, Any]) -> str:
    """Format an entry."""
    figures = {k: v for k, v in entry.items() if k.endswith("_us") and k != "floor_us" and v}
    shown = "  ".join(f"{k} {v:8.1f} ({entry['floor_us'] / v:4.0%})" for k, v in figures.items())
    return f"{entry['case']:<16} {entry['rows']:5}  floor {entry['floor_us']:8.1f}  {shown}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 0."""
    parser = rig_parser(__doc__, is_dry=False)
    parser.add_argument("--tilings", action="store_true", help="every tiling that may serve")
    parser.add_argument("--only", choices=["dense", "experts", "chain"])
    parser.add_argument("--peer", type=Path, help="folder with vLLM's run.sh")
    args = parser.parse_args(argv)
    bench = Bench(args.rig)
    kinds: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "experts": partial(expert_cases, bench, tilings=args.tilings, peer=args.peer),
        "dense": partial(dense_cases, bench, tilings=args.tilings),
        "chain": partial(chain_cases, bench),
    }
    for kind, cases in kinds.items():
        result = rig_result(f"gpu_{kind}", args)
        if args.only in (None, kind):
            for entry in cases():
                result["cases"].append(entry)
                print(line(entry), flush=True)
                for key, value in entry.items():
                    if key.endswith("tilings"):
                        print(*(f"    {key} {best}" for best in value[:5]), sep="\n", flush=True)
                write_json(args.out / f"gpu_{kind}.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
