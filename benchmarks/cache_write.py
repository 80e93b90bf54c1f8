"""Cache writes of a layer: norms, RoPE, quantisation and both scatters in one launch.

One peer is vLLM's two writes of keys that are normed and rotated already. Another is the same two
after the torch operations that they need. Decode sizes write random slots. Prefill sizes (from 1024
tokens) write whole blocks in random order. Positions are random. "by positions" looks cos and sin
up itself. The other launch has them gathered once for all layers of a step, like the model. Bytes a
token: 1152 of the latent and k_pe, 256 of the index key, 256 of cos and sin, 8 of the slot, 788
written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from benchmarks import _gpu
from benchmarks._peers import vllm_cache_ops, vllm_writes
from benchmarks._prepared import MAX_POSITION, ROPE, Launch, angles, as_numpy
from fd_dsa.cache_formats import INDEX_RECORD_BYTES, LATENT_RECORD_BYTES
from fd_dsa.ops.cache_write import CacheWriteParams, write_on_host
from fd_dsa.ops.cache_write.triton_kernel import (
    configuration,
    kernel_arguments,
    write_caches_kernel,
)

RANK, DIM, BLOCK = 512, 128, 64
FUSED_WIDTH = 1536 + RANK + ROPE
BYTES_PER_TOKEN = 2 * (RANK + ROPE) + 2 * DIM + 4 * ROPE + 8
BYTES_PER_TOKEN += LATENT_RECORD_BYTES + INDEX_RECORD_BYTES
# BLOCK_TOKENS, num_warps, maxnreg
CANDIDATES = (
    *((1, 1, None), (1, 1, 64), (2, 1, None), (2, 1, 80), (4, 1, None), (4, 1, 128)),
    *((2, 2, None), (4, 4, None), (4, 4, 48), (8, 2, None), (8, 2, 128)),
)


class Layer:
    """The caches and norms of one layer.

    Attributes:
        caches: latents and index keys in fp8_ds_mla.
        norms: weight of the latent's norm, weight and bias of the index key's norm.
        rounded: the same in bfloat16.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks, make = num_blocks, {"device": "cuda", "dtype": torch.uint8}
        self.caches = (
            torch.empty((num_blocks, 1, BLOCK, LATENT_RECORD_BYTES), **make),
            torch.empty((num_blocks, BLOCK, INDEX_RECORD_BYTES), **make),
        )
        _gpu.poison(*self.caches)
        self.norms = tuple(torch.randn(size, device="cuda") for size in (RANK, DIM, DIM))
        self.rounded = tuple(x.bfloat16() for x in self.norms)


def params_of(norms: Sequence[Any]) -> CacheWriteParams:
    """Return the parameters of `write_caches`."""
    names = "kv_norm_weight", "k_norm_weight", "k_norm_bias"
    return CacheWriteParams("fp8_ds_mla", **dict(zip(names, norms, strict=True)))


@cache
def large_layer() -> Layer:
    """Return caches past the L2, for all input sets."""
    return Layer(num_blocks=16384)


class Write(Launch):
    """The keys of some tokens, columns of a fused projection, into slots of a layer."""

    kernel, candidates, name = write_caches_kernel, CANDIDATES, "{} tokens"
    shapes = tuple((n,) for n in (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192))
    quick = (128,), (8192,)
    subjects_of = tuple((f"{n} tokens", (n,), {}) for n in (128, 8192))
    find_peer = staticmethod(vllm_cache_ops)

    def __init__(self, num_tokens: int, layer: Layer | None = None) -> None:
        self.layer = layer = layer or large_layer()
        self.outputs, self.chosen = layer.caches, configuration(num_tokens)
        make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self.kv_a = torch.randn(num_tokens, FUSED_WIDTH, **make)[:, -RANK - ROPE :]
        self.index_k = torch.randn(num_tokens, DIM, **make)
        self.positions = torch.randperm(MAX_POSITION, device="cuda")[:num_tokens]
        if num_tokens < 1024:
            slots = torch.randperm(layer.num_blocks * BLOCK, device="cuda")[:num_tokens]
        else:
            blocks = torch.randperm(layer.num_blocks, device="cuda")[: -(-num_tokens // BLOCK)]
            slots = blocks[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")
        self.slots = slots.reshape(-1)[:num_tokens].contiguous()

    @classmethod
    def small(cls, shape: tuple[int, ...] = (129,)) -> Launch:
        """Return a launch on small caches."""
        return cls(*shape, Layer(num_blocks=shape[0] // BLOCK + 2))

    @staticmethod
    def bytes_of(num_tokens: int) -> int:
        """Return the smallest number of bytes."""
        return num_tokens * BYTES_PER_TOKEN

    def arguments(self, positions: Any, cos_sin: torch.Tensor) -> dict[str, Any]:
        """Return the kernel's arguments by name."""
        inputs = self.kv_a, self.index_k, positions, self.slots, cos_sin
        return kernel_arguments(*inputs, *self.outputs, params_of(self.layer.norms))

    def expected(self) -> list[np.ndarray]:
        """Return both caches as written by the CPU."""
        caches = as_numpy(*self.outputs)
        inputs = as_numpy(self.kv_a, self.index_k, self.positions, self.slots, angles())
        write_on_host(*inputs, *caches, params_of(as_numpy(*self.layer.norms)))
        return caches

    def sides(self, peer: Any) -> dict[str, _gpu.Call]:
        """Return vLLM's writes, alone and after torch's operators, and ours with a look-up."""
        found: dict[str, _gpu.Call] = {}
        if peer is not None:
            latent, k_pe = self.kv_a[:, :RANK].contiguous(), self.kv_a[:, RANK:].contiguous()
            finished = latent, k_pe, self.index_k
            found["vLLM's two writes"] = lambda: self._write(peer, *finished)
            found["torch ops + two writes"] = lambda: self._write(peer, *self.finished())
        return found | {"by positions": self.call(gathered=False)}

    def _write(self, ops: Any, *finished: torch.Tensor) -> None:
        vllm_writes(ops, *finished, *self.outputs, self.slots, angles()[0, :1])

    def finished(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return normed and rotated keys, by torch."""
        functional, kv_a = torch.nn.functional, self.kv_a
        kv_weight, *k_norm = self.layer.rounded
        latent = functional.rms_norm(kv_a[:, :RANK], (RANK,), kv_weight, 1e-6)
        key = functional.layer_norm(self.index_k, (DIM,), *k_norm, 1e-6)
        cos, sin = angles()[self.positions].chunk(2, 1)
        first, second = kv_a[:, RANK::2].float(), kv_a[:, RANK + 1 :: 2].float()
        pairs = first * cos - second * sin, second * cos + first * sin
        k_pe = torch.stack(pairs, 2).flatten(1).bfloat16()
        first, second = key[:, :32].float(), key[:, 32:64].float()
        halves = first * cos - second * sin, second * cos + first * sin
        return latent, k_pe, torch.cat([*(x.bfloat16() for x in halves), key[:, 64:]], 1)


subjects = Write.subjects
main = partial(_gpu.main, "cache_write", __doc__, Write.cases)

if __name__ == "__main__":
    sys.exit(main())
