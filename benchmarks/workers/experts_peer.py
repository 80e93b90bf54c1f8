"""Routed experts in FP8 by vLLM and by DeepGEMM: CHOICES and result as JSON files.

Imports nothing of this project: it runs where vLLM's packages are. CHOICES is a list of [tokens]
[top_k] expert ids; the result has an entry for each: microseconds of vLLM's `fused_experts`, which
quantises, sorts, multiplies twice and sums, and of DeepGEMM's two grouped GEMMs alone, by the
faster of its two layouts. What a package refuses is None, and a line says why.
"""

import json
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

EXPERTS, HIDDEN, WIDTH, BLOCK = 256, 7168, 2048, 128
_REPLAYS = 9


def codes(*shape: int) -> torch.Tensor:
    """Return random e4m3 numbers."""
    made = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
    for part in made if len(shape) == 3 else [made]:
        part.copy_(torch.randn(part.shape, device="cuda"))
    return made


def scales(*shape: int) -> torch.Tensor:
    """Return block scales."""
    return torch.full(shape, 2.0**-6, device="cuda")


def time_us(call: Callable[[], Any]) -> float:
    """Return median microseconds of a call in a graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return median(times[2:])


class Peers:
    """The weights of a layer's experts, and what multiplies by them."""

    def __init__(self) -> None:
        self._gate_up = codes(EXPERTS, 2 * WIDTH, HIDDEN), self._scales(2 * WIDTH, HIDDEN)
        self._down = codes(EXPERTS, HIDDEN, WIDTH), self._scales(HIDDEN, WIDTH)

    @staticmethod
    def _scales(rows: int, columns: int) -> torch.Tensor:
        return scales(EXPERTS, rows // BLOCK, columns // BLOCK)

    def fused_experts(self, ids: torch.Tensor) -> float:
        """Time vLLM's experts by its Triton kernel."""
        from vllm.model_executor.layers.fused_moe import fused_experts
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

        (w1, w1_scale), (w2, w2_scale) = self._gate_up, self._down
        how = fp8_w8a8_moe_quant_config(w1_scale, w2_scale, block_shape=[BLOCK, BLOCK])
        x = torch.randn(len(ids), HIDDEN, device="cuda", dtype=torch.bfloat16)
        shares = torch.full(ids.shape, 1 / ids.shape[1], device="cuda")
        return time_us(lambda: fused_experts(x, w1, w2, shares, ids, quant_config=how))

    def contiguous(self, ids: torch.Tensor) -> float:
        """Time DeepGEMM over the rows of all experts, each expert's from a multiple of 128 on."""
        from vllm.third_party import deep_gemm

        counts = torch.bincount(ids.flatten().long(), minlength=EXPERTS).tolist()
        owners: list[int] = []
        for expert, count in enumerate(counts):
            owners += [expert] * count + [-1] * (-count % BLOCK)
        groups = torch.tensor(owners, dtype=torch.int32, device="cuda")

        def gemm(weight: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], Any]:
            _, n, k = weight[0].shape
            rows = codes(len(owners), k), scales(len(owners), k // BLOCK)
            out = torch.empty(len(owners), n, dtype=torch.bfloat16, device="cuda")
            function = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
            return lambda: function(rows, weight, out, groups, disable_ue8m0_cast=True)

        return self._both(gemm)

    def masked(self, ids: torch.Tensor) -> float:
        """Time DeepGEMM with as many rows for each expert as the fullest one has."""
        from vllm.third_party import deep_gemm

        counts = torch.bincount(ids.flatten().long(), minlength=EXPERTS).int()
        most = -(-int(counts.max()) // BLOCK) * BLOCK
        expected = -(-ids.numel() // EXPERTS)

        def gemm(weight: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], Any]:
            _, n, k = weight[0].shape
            rows = codes(EXPERTS, most, k), scales(EXPERTS, most, k // BLOCK)
            out = torch.empty(EXPERTS, most, n, dtype=torch.bfloat16, device="cuda")
            function = deep_gemm.m_grouped_fp8_gemm_nt_masked
            return lambda: function(rows, weight, out, counts, expected, disable_ue8m0_cast=True)

        return self._both(gemm)

    def _both(self, gemm: Callable[[Any], Callable[[], Any]]) -> float:
        return sum(time_us(gemm(weight)) for weight in (self._gate_up, self._down))


def tried(call: Callable[[torch.Tensor], float], ids: torch.Tensor) -> float | None:
    """Return microseconds, or None after a printed reason."""
    try:
        return call(ids)
    except Exception as error:
        print(f"{call.__name__} of {len(ids)} tokens left out: {error}", flush=True)
        return None


def main() -> None:
    """Read the choices, write [{"vllm_us", "deep_gemm_us"}, ...]."""
    with open(sys.argv[1]) as file:
        choices = json.load(file)
    peers, found = Peers(), []
    for choice in choices:
        ids = torch.tensor(choice, dtype=torch.int32, device="cuda")
        layouts = [tried(peers.contiguous, ids)]
        # memory of the padded rows of every expert
        layouts += [tried(peers.masked, ids)] if len(ids) <= 2048 else []
        times = [time for time in layouts if time is not None]
        entry = {"vllm_us": tried(peers.fused_experts, ids)}
        found.append(entry | {"deep_gemm_us": min(times) if times else None})
        print(len(ids), found[-1], flush=True)
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
