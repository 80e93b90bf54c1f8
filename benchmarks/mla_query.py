"""The absorbed query of MLA: RoPE, and both parts into one buffer, in one launch.

Against the operators of a plain implementation: cos and sin of each token by their positions, the
rotation of interleaved pairs in float32, and a concatenation, which also transposes the heads'
result [num_heads, num_tokens, kv_lora_rank]. Ours is given cos and sin gathered once for all layers
of a step, and "by positions" looks them up itself. Bytes a head: 1,152 in and 1,152 out; a token
reads 256 of cos and sin.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import _gpu
from benchmarks.indexer_query import angles, bound
from fd_dsa.ops.mla_query import paddle_impl
from fd_dsa.ops.mla_query.triton_kernel import (
    BLOCK_ROWS,
    NUM_WARPS,
    kernel_arguments,
    prepare_mla_query_kernel,
)

SHAPES = (
    *((tokens, 128) for tokens in (1, 8, 32, 128, 512, 2048, 8192)),
    *((tokens, heads) for heads in (64, 32, 16) for tokens in (1, 128)),
)
RANK, ROPE, NOPE = 512, 64, 128
CHOSEN = (BLOCK_ROWS, NUM_WARPS)
CANDIDATES = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2), (8, 4), (16, 4), (16, 8))
_MAX_POSITION = 1 << 16


class Query:
    """The inputs and the output of one call, as a layer has them."""

    def __init__(self, num_tokens: int, heads: int) -> None:
        make = {"device": "cuda", "dtype": torch.bfloat16}
        self.latent = torch.randn(heads, num_tokens, RANK, **make).transpose(0, 1)
        self.pe = torch.randn(num_tokens, heads, NOPE + ROPE, **make)[:, :, NOPE:]
        self.positions = torch.randperm(_MAX_POSITION, device="cuda")[:num_tokens]
        self.out = torch.empty(num_tokens, heads, RANK + ROPE, **make)

    @staticmethod
    def bytes_of(num_tokens: int, heads: int) -> int:
        """Bytes that a call must move."""
        return num_tokens * (heads * 4 * (RANK + ROPE) + 4 * ROPE)

    def one_launch(
        self, cos_sin: torch.Tensor, rows_and_warps: tuple[int, int], *, gathered: bool = True
    ) -> _gpu.Call:
        """Our launch with a configuration, arguments checked beforehand.

        Args:
            gathered: cos and sin of the tokens were gathered once for all layers of the step.
        """
        arguments = kernel_arguments(
            self.latent,
            self.pe,
            None if gathered else self.positions,
            cos_sin[self.positions] if gathered else cos_sin,
            self.out,
        )
        return bound(prepare_mla_query_kernel, arguments, rows_and_warps)

    def operators(self, cos_sin: torch.Tensor) -> None:
        """The same by operators."""
        cos, sin = cos_sin[self.positions].unsqueeze(1).chunk(2, dim=-1)
        first, second = self.pe.float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
        self.out = torch.cat([self.latent, rotated.flatten(-2).to(self.pe.dtype)], -1)


def check_bytes(cos_sin: torch.Tensor) -> None:
    """Compare every configuration with the CPU, byte by byte.

    Raises:
        AssertionError: they differ.
    """
    for rows_and_warps in CANDIDATES:
        for gathered in (False, True):
            query = Query(33, 7)
            _gpu.poison(query.out)
            query.one_launch(cos_sin, rows_and_warps, gathered=gathered)()
            inputs = (query.latent.float(), query.pe.float(), query.positions, cos_sin)
            wanted = paddle_impl.prepare_mla_query(*(x.cpu().numpy() for x in inputs), None)
            same = torch.equal(query.out.cpu(), torch.from_numpy(wanted).to(torch.bfloat16))
            assert same, f"bytes of {rows_and_warps} differ from the CPU's"


def sets_of(num_tokens: int, heads: int) -> list[Query]:
    """Input sets past the L2 together."""
    count = _gpu.num_sets(Query.bytes_of(num_tokens, heads))
    return [Query(num_tokens, heads) for _ in range(count)]


def compare(record: _gpu.Recorder, cos_sin: torch.Tensor, num_tokens: int, heads: int) -> None:
    """One shape: operators, and ours with and without a look-up of cos and sin."""
    sets = sets_of(num_tokens, heads)
    sides: dict[str, list[_gpu.Call]] = {
        "operators": [lambda s=s: s.operators(cos_sin) for s in sets],
        "by positions": [s.one_launch(cos_sin, CHOSEN, gathered=False) for s in sets],
        "one launch": [s.one_launch(cos_sin, CHOSEN) for s in sets],
    }
    record.case(
        f"{num_tokens} tokens, {heads} heads",
        _gpu.interleaved(sides),
        ours="one launch",
        bytes_moved=Query.bytes_of(num_tokens, heads),
    )


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """One for each shape."""
    cos_sin = angles()
    check_bytes(cos_sin)
    for tokens, heads in ((128, 128), (8192, 128)) if args.quick else SHAPES:
        yield f"{tokens} x {heads}", partial(compare, record, cos_sin, tokens, heads)


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """One rank's share of the heads and all of them, warm."""
    cos_sin, found = angles(), {}
    for num_tokens, heads in ((128, 16), (128, 128), (1024, 128)):
        query = Query(num_tokens, heads)
        call = query.one_launch(cos_sin, CHOSEN)
        found[f"{num_tokens} tokens x {heads} heads"] = (call, [query.out])
    return found


main = partial(_gpu.main, "mla_query", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
