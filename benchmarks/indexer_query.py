"""Preparation of the indexer's query: RoPE, quantisation, weight fold, in one launch.

The peer is vLLM's Triton kernel, with one program for each head of a token. "by positions" looks
cos and sin up itself, like vLLM's. The other launches have them gathered once for all layers of a
step, like the model. Bytes a head: 256 in, 128 out, 2 and 4 of its weight. A token reads 256 of cos
and sin.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import _gpu, _peers
from benchmarks._prepared import MAX_POSITION, ROPE, Launch, angles, as_numpy
from fd_dsa.ops.query import prepare_on_host
from fd_dsa.ops.query_kernels import (
    indexer_configuration,
    indexer_query_arguments,
    prepare_query_kernel,
)

DIM = 128
INTERLEAVED = {"rope_interleave": True}
# BLOCK_ROWS, num_warps
CANDIDATES = (
    *((4, 1), (8, 1), (16, 1), (8, 2), (16, 2), (32, 2), (64, 2)),
    *((32, 4), (64, 4), (128, 4), (64, 8), (128, 8)),
)


class Query(Launch):
    """The indexer's query of all heads in FP8, and its weights."""

    kernel, candidates, variants = prepare_query_kernel, CANDIDATES, ({}, INTERLEAVED)
    shapes = (
        *((tokens, 64) for tokens in (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192)),
        *((tokens, 32) for tokens in (128, 1024, 8192)),
    )
    quick = (128, 64), (8192, 64)
    subjects_of = (
        ("128 tokens, half-split", (128, 64), {}),
        ("1024 tokens, half-split", (1024, 64), {}),
        ("1024 tokens, interleaved", (1024, 64), INTERLEAVED),
    )
    find_peer = staticmethod(_peers.vllm_indexer_query)

    def __init__(self, num_tokens: int, heads: int) -> None:
        self.q = torch.randn(num_tokens, heads, DIM, device="cuda", dtype=torch.bfloat16)
        self.weights = torch.randn(num_tokens, heads, device="cuda", dtype=torch.bfloat16)
        self.positions = torch.randperm(MAX_POSITION, device="cuda")[:num_tokens]
        self.outputs = (
            torch.empty_like(self.q, dtype=torch.float8_e4m3fn),
            torch.empty_like(self.weights, dtype=torch.float32),
        )
        self.chosen = indexer_configuration(num_tokens * heads)
        self._options: dict[str, Any] = {"rope_interleave": False, "quantized": True}
        self._options |= {"hadamard": False, "scale_fmt": "ue8m0"}
        self._options["weights_scale"] = DIM**-0.5 * heads**-0.5

    @staticmethod
    def bytes_of(num_tokens: int, heads: int) -> int:
        """Return the smallest number of bytes."""
        return num_tokens * (heads * (2 * DIM + DIM + 2 + 4) + 4 * ROPE)

    def arguments(self, positions: Any, cos_sin: torch.Tensor, **variant: Any) -> dict[str, Any]:
        """Return the arguments by name. A variant is a keyword of the operator."""
        inputs = self.q, self.weights, positions, cos_sin, self.outputs
        return indexer_query_arguments(*inputs, **self._options | variant)

    def expected(self, **variant: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return bits of the codes, and folded weights."""
        inputs = as_numpy(self.q, self.weights, self.positions, angles())
        out = np.empty(self.q.shape, np.uint8), np.empty(self.weights.shape, np.float32)
        prepare_on_host(*inputs, **self._options | variant, out=out)
        return out

    def sides(self, peer: Any) -> dict[str, _gpu.Call]:
        """Return vLLM's launch, ours with a look-up, and ours with the other pairing."""
        arguments = self.positions, self.q, angles(), self.weights, *self.outputs
        theirs = partial(_peers.prepare_indexer_query, peer, *arguments)
        return ({} if peer is None else {"vLLM's kernel": theirs}) | {
            "by positions": self.call(gathered=False),
            "one launch, interleaved": self.call(**INTERLEAVED),
        }


subjects = Query.subjects
main = partial(_gpu.main, "indexer_query", __doc__, Query.cases)

if __name__ == "__main__":
    sys.exit(main())
