"""Cache writes of a layer: norms, RoPE, quantisation and both scatters in one launch.

Against vLLM's two writes alone (they take keys that are normed and rotated already), and against
the same two after the torch operations that they need. Decode sizes write random slots, prefill
sizes (from 1024 tokens) whole blocks in random order; positions are random. "by positions" looks
cos and sin up itself, the other launch has them gathered once for all layers of a step, as the
model does it. Bytes a token: 1152 of the latent and k_pe, 256 of the index key, 256 of cos and
sin, 8 of the slot, 788 written.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import _gpu
from benchmarks._peers import vllm_cache_ops, vllm_writes
from fd_dsa.ops._fp8 import INDEX_RECORD_BYTES, LATENT_RECORD_BYTES
from fd_dsa.ops.cache_write import CacheWriteParams, paddle_impl
from fd_dsa.ops.cache_write.triton_kernel import (
    CANDIDATES,
    configuration,
    kernel_arguments,
    write_caches,
    write_caches_kernel,
)

SIZES = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192)
RANK, ROPE, DIM, BLOCK = 512, 64, 128, 64
FUSED_WIDTH = 1536 + RANK + ROPE
BYTES_PER_TOKEN = 2 * (RANK + ROPE) + 2 * DIM + 4 * ROPE + 8
BYTES_PER_TOKEN += LATENT_RECORD_BYTES + INDEX_RECORD_BYTES
_MAX_POSITION = 1 << 16


class Layer:
    """The caches, norms and angles of one layer.

    Attributes:
        latent, index: both caches in fp8_ds_mla.
        cos_sin: float32 [max_position, 64].
        params: what `write_caches` takes.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.latent = torch.empty(
            (num_blocks, 1, BLOCK, LATENT_RECORD_BYTES), device="cuda", dtype=torch.uint8
        )
        self.index = torch.empty(
            (num_blocks, BLOCK, INDEX_RECORD_BYTES), device="cuda", dtype=torch.uint8
        )
        _gpu.poison(self.latent, self.index)
        angles = torch.rand(_MAX_POSITION, ROPE // 2, device="cuda") * 6
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
        self.params = CacheWriteParams(
            "fp8_ds_mla",
            kv_norm_weight=torch.randn(RANK, device="cuda"),
            k_norm_weight=torch.randn(DIM, device="cuda"),
            k_norm_bias=torch.randn(DIM, device="cuda"),
        )

    def inputs(self, num_tokens: int) -> tuple[Any, ...]:
        """kv_a (columns of a fused projection), index_k, position_ids, slot_mapping."""
        wide = torch.randn(num_tokens, FUSED_WIDTH, device="cuda", dtype=torch.bfloat16)
        index_k = torch.randn(num_tokens, DIM, device="cuda", dtype=torch.bfloat16)
        positions = torch.randperm(_MAX_POSITION, device="cuda")[:num_tokens]
        if num_tokens < 1024:
            slots = torch.randperm(self.num_blocks * BLOCK, device="cuda")[:num_tokens]
        else:
            blocks = torch.randperm(self.num_blocks, device="cuda")[: -(-num_tokens // BLOCK)]
            slots = blocks[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")
        slots = slots.reshape(-1)[:num_tokens].contiguous()
        return wide[:, -RANK - ROPE :], index_k, positions, slots

    def arguments(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """All arguments of `write_caches`."""
        return *inputs, self.cos_sin, self.latent, self.index, self.params

    def one_launch(
        self, inputs: tuple[Any, ...], how: tuple[int, int, int | None], gathered: bool = True
    ) -> _gpu.Call:
        """Our launch with a configuration, arguments checked beforehand.

        Args:
            gathered: cos and sin of the tokens were gathered once for all layers of the step.
        """
        block_tokens, num_warps, maxnreg = how
        arguments = list(self.arguments(inputs))
        if gathered:
            arguments[2], arguments[4] = None, self.cos_sin[inputs[2]]
        launch = write_caches_kernel.bind(
            (-(-inputs[0].shape[0] // block_tokens),),
            **kernel_arguments(*arguments),
            BLOCK_TOKENS=block_tokens,
            num_warps=num_warps,
            maxnreg=maxnreg,
            enable_fp_fusion=False,
        )
        return launch

    def two_writes(self, ops: Any, inputs: tuple[Any, ...]) -> _gpu.Call:
        """vLLM's two writes of finished keys."""
        kv_a, index_k, _, slots = inputs
        latent, k_pe = kv_a[:, :RANK].contiguous(), kv_a[:, RANK:].contiguous()
        caches = self.latent, self.index, slots, self.cos_sin[0, :1]
        return lambda: vllm_writes(ops, latent, k_pe, index_k, *caches)

    def unfused(self, ops: Any, inputs: tuple[Any, ...]) -> _gpu.Call:
        """Norms and rotations by torch, then vLLM's two writes."""
        kv_a, index_k, positions, slots = inputs
        p, functional = self.params, torch.nn.functional
        kv_weight, weight, bias = (
            x.bfloat16() for x in (p.kv_norm_weight, p.k_norm_weight, p.k_norm_bias)
        )

        def call() -> None:
            latent = functional.rms_norm(kv_a[:, :RANK], (RANK,), kv_weight, p.kv_norm_eps)
            key = functional.layer_norm(index_k, (DIM,), weight, bias, p.k_norm_eps)
            cos, sin = self.cos_sin[positions].chunk(2, 1)
            first, second = kv_a[:, RANK::2].float(), kv_a[:, RANK + 1 :: 2].float()
            pairs = first * cos - second * sin, second * cos + first * sin
            k_pe = torch.stack(pairs, 2).flatten(1).bfloat16()
            first, second = key[:, :32].float(), key[:, 32:64].float()
            halves = first * cos - second * sin, second * cos + first * sin
            key = torch.cat([*(x.bfloat16() for x in halves), key[:, 64:]], 1)
            scale = self.cos_sin[0, :1]
            vllm_writes(ops, latent, k_pe, key, self.latent, self.index, slots, scale)

        return call


def check_bytes() -> None:
    """Compare one write with the CPU's, byte by byte.

    Raises:
        AssertionError: they differ.
    """
    for how in CANDIDATES:
        layer = Layer(num_blocks=4)
        inputs = layer.inputs(129)
        wanted = [x.cpu().numpy().copy() for x in (layer.latent, layer.index)]
        arrays = [x.float() if x.is_floating_point() else x for x in inputs]
        p = layer.params
        norms = (p.kv_norm_weight, p.k_norm_weight, p.k_norm_bias)
        kv_weight, weight, bias = (x.cpu().numpy() for x in norms)
        params = CacheWriteParams(
            "fp8_ds_mla", kv_norm_weight=kv_weight, k_norm_weight=weight, k_norm_bias=bias
        )
        host = [x.cpu().numpy() for x in (*arrays, layer.cos_sin)]
        paddle_impl.write_caches(*host, *wanted, params)
        layer.one_launch(inputs, how)()
        for found, want in zip((layer.latent, layer.index), wanted, strict=True):
            same = torch.equal(found.cpu(), torch.from_numpy(want))
            assert same, f"bytes of {how} differ from the CPU's"


def name_of(how: tuple[int, int, int | None]) -> str:
    """A configuration in words: tokens a program, warps, registers where they are limited."""
    tokens, warps, registers = how
    return f"{tokens} x {warps}" + (f" in {registers}" if registers else "")


def compare(record: _gpu.Recorder, layer: Layer, ops: Any, num_tokens: int) -> None:
    """One size: the peers' writes, the unfused chain and our launch, in graphs."""
    # what is read: the activations, angles, positions and slots
    sets = [layer.inputs(num_tokens) for _ in range(_gpu.num_sets(num_tokens * 1700))]
    sides: dict[str, list[_gpu.Call]] = {}
    eager: dict[str, list[_gpu.Call]] = {}
    if ops is not None:
        sides["vLLM's two writes"] = [layer.two_writes(ops, s) for s in sets]
        sides["torch ops + two writes"] = [layer.unfused(ops, s) for s in sets]
        eager["torch ops + two writes"] = sides["torch ops + two writes"]
    chosen = configuration(num_tokens)
    sides["by positions"] = [layer.one_launch(s, chosen, gathered=False) for s in sets]
    sides["one launch"] = [layer.one_launch(s, chosen) for s in sets]
    eager["one launch"] = [partial(write_caches, *layer.arguments(s)) for s in sets]
    times = _gpu.interleaved(sides)
    wall = _gpu.interleaved(eager, mode="wall", rounds=9)
    record.case(
        f"{num_tokens} tokens",
        times,
        ours="one launch",
        bytes_moved=num_tokens * BYTES_PER_TOKEN,
        eager_us=wall,
        configuration=name_of(chosen),
    )


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """One for each number of tokens."""
    check_bytes()
    ops, layer = vllm_cache_ops(args.peers), Layer(num_blocks=16384)
    record.note(peer="vLLM 0.26.0" if ops is not None else "not run")
    for num_tokens in (128, 8192) if args.quick else SIZES:
        yield f"{num_tokens} tokens", partial(compare, record, layer, ops, num_tokens)


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """Our launch at sizes of a decode step and of a prefill chunk, on small caches."""
    found = {}
    for num_tokens in (128, 8192):
        layer = Layer(num_blocks=num_tokens // BLOCK + 2)
        call = layer.one_launch(layer.inputs(num_tokens), configuration(num_tokens))
        found[f"{num_tokens} tokens"] = call, [layer.latent, layer.index]
    return found


main = partial(_gpu.main, "cache_write", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
