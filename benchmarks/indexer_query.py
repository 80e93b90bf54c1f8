"""Preparation of the indexer's query: RoPE, quantisation, weight fold, in one launch.

Against vLLM's Triton kernel, one program a head of a token. "by positions" looks cos and sin up
itself, as vLLM's does; the other launches have them gathered once for all layers of a step, as the
model does it. Bytes a head: 256 in, 128 out, 2 and 4 of its weight; a token reads 256 of cos and
sin.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import _gpu
from benchmarks._peers import vllm_indexer_query
from benchmarks._torch_device import register
from fd_dsa.ops.query import paddle_impl
from fd_dsa.ops.query.triton_kernel import (
    CANDIDATES,
    configuration,
    kernel_arguments,
    prepare_query_kernel,
)

SHAPES = (
    *((tokens, 64) for tokens in (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192)),
    *((tokens, 32) for tokens in (128, 1024, 8192)),
)
DIM, ROPE = 128, 64
_MAX_POSITION = 1 << 16


class Query:
    """The inputs and outputs of one call."""

    def __init__(self, num_tokens: int, heads: int) -> None:
        self.q = torch.randn(num_tokens, heads, DIM, device="cuda", dtype=torch.bfloat16)
        self.weights = torch.randn(num_tokens, heads, device="cuda", dtype=torch.bfloat16)
        self.positions = torch.randperm(_MAX_POSITION, device="cuda")[:num_tokens]
        self.codes = torch.empty_like(self.q, dtype=torch.float8_e4m3fn)
        self.folded = torch.empty_like(self.weights, dtype=torch.float32)
        self.heads = heads

    @staticmethod
    def bytes_of(num_tokens: int, heads: int) -> int:
        """Bytes that a call must move."""
        return num_tokens * (heads * (2 * DIM + DIM + 2 + 4) + 4 * ROPE)

    def one_launch(
        self,
        cos_sin: torch.Tensor,
        rows_and_warps: tuple[int, int],
        *,
        interleaved: bool = False,
        gathered: bool = True,
    ) -> _gpu.Call:
        """Our launch with a configuration, arguments checked beforehand.

        Args:
            gathered: cos and sin of the tokens were gathered once for all layers of the step.
        """
        block_rows, num_warps = rows_and_warps
        arguments = kernel_arguments(
            self.q,
            self.weights,
            None if gathered else self.positions,
            cos_sin[self.positions] if gathered else cos_sin,
            (self.codes, self.folded),
            rope_interleave=interleaved,
            quantized=True,
            hadamard=False,
            scale_fmt="ue8m0",
            weights_scale=DIM**-0.5 * self.heads**-0.5,
        )
        launch = prepare_query_kernel.bind(
            (-(-arguments["num_rows"] // block_rows),),
            **arguments,
            BLOCK_ROWS=block_rows,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
        return launch

    def peer(self, kernel: Any, cos_sin: torch.Tensor) -> _gpu.Call:
        """vLLM's launch as vLLM makes it."""
        q, w, codes, folded = self.q, self.weights, self.codes, self.folded
        arguments = (
            *(self.positions, q, q.stride(0), q.stride(1), cos_sin, cos_sin.stride(0)),
            *(codes, codes.stride(0), codes.stride(1), w, w.stride(0), w.stride(1)),
            *(folded, folded.stride(0), folded.stride(1), DIM**-0.5, self.heads**-0.5),
        )
        grid = q.shape[:2]
        return lambda: kernel[grid](
            *arguments, fp8_min=-448.0, fp8_max=448.0, is_neox=True, num_warps=1
        )


def angles() -> torch.Tensor:
    """float32 [max_position, 64]; cos, then sin."""
    angle = torch.rand(_MAX_POSITION, ROPE // 2, device="cuda") * 6
    return torch.cat([angle.cos(), angle.sin()], 1)


def check_bytes(cos_sin: torch.Tensor) -> None:
    """Compare every configuration with the CPU, byte by byte.

    Raises:
        AssertionError: they differ.
    """
    for rows_and_warps in CANDIDATES:
        for interleaved in (False, True):
            query = Query(33, 7)
            _gpu.poison(query.codes, query.folded)
            query.one_launch(cos_sin, rows_and_warps, interleaved=interleaved)()
            inputs = (query.q.float(), query.weights.float(), query.positions, cos_sin)
            codes, folded = query.codes.view(torch.uint8).cpu(), query.folded.cpu()
            wanted = torch.empty_like(codes), torch.empty_like(folded)
            paddle_impl.prepare_indexer_query(
                *(x.cpu().numpy() for x in inputs),
                rope_interleave=interleaved,
                quantized=True,
                hadamard=False,
                scale_fmt="ue8m0",
                weights_scale=DIM**-0.5 * 7**-0.5,
                out=tuple(x.numpy() for x in wanted),
            )
            same = torch.equal(codes, wanted[0]) and torch.equal(folded, wanted[1])
            assert same, f"bytes of {rows_and_warps} differ from the CPU's"


def sets_of(num_tokens: int, heads: int) -> list[Query]:
    """Input sets past the L2 together."""
    count = _gpu.num_sets(Query.bytes_of(num_tokens, heads))
    return [Query(num_tokens, heads) for _ in range(count)]


def compare(
    record: _gpu.Recorder, kernel: Any, cos_sin: torch.Tensor, num_tokens: int, heads: int
) -> None:
    """One shape: the peer and ours, both pairings of ours."""
    sets, chosen = sets_of(num_tokens, heads), configuration(num_tokens * heads)
    sides: dict[str, list[_gpu.Call]] = {}
    if kernel is not None:
        sides["vLLM's kernel"] = [s.peer(kernel, cos_sin) for s in sets]
    sides["by positions"] = [s.one_launch(cos_sin, chosen, gathered=False) for s in sets]
    sides["one launch, interleaved"] = [
        s.one_launch(cos_sin, chosen, interleaved=True) for s in sets
    ]
    sides["one launch"] = [s.one_launch(cos_sin, chosen) for s in sets]
    record.case(
        f"{num_tokens} tokens, {heads} heads",
        _gpu.interleaved(sides),
        ours="one launch",
        bytes_moved=Query.bytes_of(num_tokens, heads),
        configuration="{} x {}".format(*chosen),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Check and compare; returns the exit status."""
    args = _gpu.arguments(__doc__, argv)
    register()
    cos_sin = angles()
    check_bytes(cos_sin)
    kernel = vllm_indexer_query(args.peers)
    with _gpu.Recorder("indexer_query", args.out) as record:
        for shape in ((128, 64), (8192, 64)) if args.quick else SHAPES:
            compare(record, kernel, cos_sin, *shape)
        record.note(peer="vLLM 0.26.0" if kernel is not None else "not run")
    return 0


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """Our launch at sizes of a decode step and of a prefill chunk, both pairings."""
    register()
    cos_sin, found = angles(), {}
    for num_tokens, interleaved in ((128, False), (1024, False), (1024, True)):
        query = Query(num_tokens, 64)
        chosen = configuration(num_tokens * 64)
        call = query.one_launch(cos_sin, chosen, interleaved=interleaved)
        name = f"{num_tokens} tokens, {'interleaved' if interleaved else 'half-split'}"
        found[name] = call, [query.codes, query.folded]
    return found


if __name__ == "__main__":
    sys.exit(main())
