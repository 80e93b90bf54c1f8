"""The absorbed query of MLA: RoPE, and both parts into one buffer, in one launch.

The other side is the operators of a plain implementation. They gather cos and sin by positions,
rotate interleaved pairs in float32, and concatenate. The concatenation also transposes the heads'
result [num_heads, num_tokens, kv_lora_rank]. Ours has cos and sin gathered once for all layers of a
step, and "by positions" looks them up itself. Bytes a head: 1,152 in and 1,152 out. A token reads
256 of cos and sin.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import _gpu
from benchmarks._prepared import MAX_POSITION, ROPE, Launch, angles, as_numpy
from fd_dsa.ops.mla_query import prepare_on_host
from fd_dsa.ops.query_kernels import (
    MLA_BLOCK_ROWS,
    MLA_NUM_WARPS,
    mla_query_arguments,
    prepare_mla_query_kernel,
)

RANK, NOPE = 512, 128


class Query(Launch):
    """The query of all heads, as a layer has its parts."""

    kernel, chosen = prepare_mla_query_kernel, (MLA_BLOCK_ROWS, MLA_NUM_WARPS)
    candidates = (
        *((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)),
        *((8, 2), (8, 4), (16, 4), (16, 8)),
    )
    shapes = (
        *((tokens, 128) for tokens in (1, 8, 32, 128, 512, 2048, 8192)),
        *((tokens, heads) for heads in (64, 32, 16) for tokens in (1, 128)),
    )
    quick = (128, 128), (8192, 128)
    subjects_of = tuple(
        (f"{tokens} tokens x {heads} heads", (tokens, heads), {})
        for tokens, heads in ((128, 16), (128, 128), (1024, 128))
    )

    def __init__(self, num_tokens: int, heads: int) -> None:
        make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self.latent = torch.randn(heads, num_tokens, RANK, **make).transpose(0, 1)
        self.pe = torch.randn(num_tokens, heads, NOPE + ROPE, **make)[:, :, NOPE:]
        self.positions = torch.randperm(MAX_POSITION, device="cuda")[:num_tokens]
        self.outputs = (torch.empty(num_tokens, heads, RANK + ROPE, **make),)

    @staticmethod
    def bytes_of(num_tokens: int, heads: int) -> int:
        """Return the smallest number of bytes."""
        return num_tokens * (heads * 4 * (RANK + ROPE) + 4 * ROPE)

    def arguments(self, positions: Any, cos_sin: torch.Tensor) -> dict[str, Any]:
        """Return the kernel's arguments by name."""
        return mla_query_arguments(self.latent, self.pe, positions, cos_sin, *self.outputs)

    def expected(self) -> list[np.ndarray]:
        """Return the query as made by the CPU."""
        inputs = as_numpy(self.latent, self.pe, self.positions, angles())
        return [prepare_on_host(*inputs, None)]

    def sides(self, peer: Any) -> dict[str, _gpu.Call]:
        """Return operators, and ours with a look-up of cos and sin."""
        return {"operators": self.operators, "by positions": self.call(gathered=False)}

    def operators(self) -> torch.Tensor:
        """Make the query by operators."""
        cos, sin = angles()[self.positions].unsqueeze(1).chunk(2, dim=-1)
        first, second = self.pe.float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
        return torch.cat([self.latent, rotated.flatten(-2).to(self.pe.dtype)], -1)


subjects = Query.subjects
main = partial(_gpu.main, "mla_query", __doc__, Query.cases)

if __name__ == "__main__":
    sys.exit(main())
