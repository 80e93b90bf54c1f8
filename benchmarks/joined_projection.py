"""The first projections of a layer: wk in the FP8 GEMM of q_a and kv_a, beside a second stream.

    python -m benchmarks.joined_projection --rig
    python -m benchmarks.joined_projection --rig --tilings    # and every tiling of weights_proj

At the sizes of DeepSeek-V3.2. "fork": q_a and kv_a in FP8, wk and weights_proj in bfloat16 on a
second stream up to DEFAULT_OVERLAP_MAX_TOKENS rows, after it from there on. "served": q_a, wk and
kv_a in one FP8 GEMM, and weights_proj where those are, in the tiling that serves. "joined": the
same in the best tiling of weights_proj, after the GEMM; "joined, fork": on the second stream. Each
figure is a replay of a graph with a call for each of several weights, so that none is in the L2.
Writes benchmarks/results/joined_projection.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks._harness import environment, rig_parser, write_json
from benchmarks.gpu_gemms import Bench

HIDDEN, Q_A, KV_A, WK, HEADS = 7168, 1536, 576, 128, 64
ROWS = (1, 8, 32, 64, 128, 256, 2048, 8192)
_WEIGHTS = 12


class Projections:
    """Both forms of a number of rows.

    Args:
        bench: the device.
        num_rows: tokens of the step.
    """

    def __init__(self, bench: Bench, num_rows: int) -> None:
        from fd_dsa.attention.overlap import IndexerOverlap
        from fd_dsa.ops import split_sums
        from fd_dsa.ops.fill_kernels import fill_random
        from fd_dsa.ops.indexer_projection import triton_kernel

        self._kernel, self.num_rows = triton_kernel, num_rows

        def random(*shape: int) -> Any:
            made = bench.allocate(shape, "bfloat16")
            fill_random(made, 0, shape[0] * shape[1], [*shape], 0.1)
            return made

        self._fp8, self._plain = bench.rows(num_rows, HIDDEN), random(num_rows, HIDDEN)
        self._split = [bench.weight(Q_A + KV_A, HIDDEN) for _ in range(_WEIGHTS)]
        self._whole = [bench.weight(Q_A + WK + KV_A, HIDDEN) for _ in range(_WEIGHTS)]
        self._sides = [(random(HIDDEN, WK), random(HIDDEN, HEADS)) for _ in range(_WEIGHTS)]
        out = bench.allocate((num_rows, HEADS), "float32")
        self._out = bench.allocate((num_rows, WK), "bfloat16"), out
        self._overlap = IndexerOverlap(bench.device)
        # neither is made in a capture
        self._overlap.stream_for(self._plain)
        self._scratch = split_sums.scratch_beside(out, "project_indexer")

    def _down(self, weight: tuple[Any, Any]) -> Any:
        from fd_dsa.ops.device_matrix import DeviceMatrix

        return DeviceMatrix(*weight, round_scales=True).times(self._fp8)

    def _weights_proj(self, _: Any, weight: Any, tiling: Any) -> Any:
        """The head weights by the launch of both projections, without columns of wk."""
        scratch = self._scratch if self.num_rows <= self._kernel.MAX_SPLIT_TOKENS else None
        arguments = self._kernel.kernel_arguments(self._plain, None, weight, self._out, scratch)
        grid, options = self._kernel.launch_options(arguments, tiling)
        self._kernel.project_indexer_kernel[grid](**arguments, **options)
        return self._out

    def forms(self, *, tilings: bool) -> dict[str, list[Callable[[], Any]]]:
        """Calls of each form, one a weight; "joined" only with `tilings`."""
        from benchmarks._projection_tilings import SPLIT, WHOLE

        kernel, n = self._kernel, self.num_rows
        run = partial(self._overlap.run, n)
        few = SPLIT[:6] if n <= 32 else SPLIT[6:]
        tried = (few if n <= kernel.MAX_SPLIT_TOKENS else WHOLE) if tilings else ()

        def fork(i: int) -> Any:
            work = partial(self._down, self._split[i])
            return run(work, kernel.project_indexer, self._plain, *self._sides[i], self._out)

        def served(i: int) -> Any:
            work, weight = partial(self._down, self._whole[i]), self._sides[i][1]
            return run(work, kernel.project_indexer, self._plain, None, weight, self._out)

        def joined(i: int, tiling: Any) -> Any:
            down = self._down(self._whole[i])
            return down, self._weights_proj(None, self._sides[i][1], tiling)

        def joined_fork(i: int, tiling: Any) -> Any:
            work, side = partial(self._down, self._whole[i]), self._weights_proj
            return run(work, side, self._plain, self._sides[i][1], tiling)

        found = {
            name: [partial(form, i) for i in range(_WEIGHTS)]
            for name, form in (("fork", fork), ("served", served))
        }
        found["q_a and kv_a alone"] = [partial(self._down, weight) for weight in self._split]
        for tiling in tried:
            found[f"joined {tiling}"] = [partial(joined, i, tiling) for i in range(_WEIGHTS)]
        if n <= self._overlap.max_tokens:
            for tiling in tried:
                calls = [partial(joined_fork, i, tiling) for i in range(_WEIGHTS)]
                found[f"joined, fork {tiling}"] = calls
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the microseconds of each form, of those with tilings the best; 0."""
    parser = rig_parser(__doc__, is_dry=False)
    parser.add_argument("--tilings", action="store_true", help="every tiling of weights_proj")
    args = parser.parse_args(argv)
    bench = Bench(args.rig)
    result: dict[str, Any] = {"name": "joined_projection", "tier": "T1p"}
    result |= {"env": environment(), "cases": []}
    for num_rows in ROWS:
        best: dict[str, tuple[float, str]] = {}
        for name, calls in Projections(bench, num_rows).forms(tilings=args.tilings).items():
            time, kind = bench.time_us(calls), name.partition(" (")[0]
            best[kind] = min(best.get(kind, (time, name)), (time, name))
        shown = "  ".join(f"{name}: {time:.2f} us" for time, name in best.values())
        print(f"{num_rows} rows:  {shown}", flush=True)
        us = {kind: time for kind, (time, _) in best.items()}
        ratio = us["fork"] / us["served"]
        result["cases"].append({"rows": num_rows, "us": us, "ratio": ratio})
        write_json(args.out / "joined_projection.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
