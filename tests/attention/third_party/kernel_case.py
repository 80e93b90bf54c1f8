"""A step through a DeviceAttention of fp8_ds_mla caches, random but with scores that are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np

from fd_dsa.attention.cache_layout import CacheLayout
from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.ops import _third_party
from fd_dsa.step import StepMetadataBuilder
from tests.kernel_memory import KernelMemory
from tests.strategies import make_batch

Install = Callable[..., None]
BOTH = {"indexer_logits": "deep_gemm", "sparse_mla": "flash_mla"}
PADDING = 2
RANK, ROPE, DIM, BLOCK = 512, 64, 128, 64
# e4m3 codes of 0, 1, 2, -1 and -2: a sum of their products is exact in every order
_SMALL = np.array([0x00, 0x38, 0x40, 0xB8, 0xC0], np.uint8)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """uint16 bits of float32 values, cut off."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


class KernelCase:
    """A step, its caches and queries for every layer, in a memory.

    Args:
        rows: (encoder, decoder, this_time) of each request.
        layers: how many caches; every layer has queries of its own.
        config: fields of DSABackendConfig that differ from 64 heads, 32 index heads, 64 keys.
        options: of DeviceAttention.
    """

    def __init__(
        self,
        memory: KernelMemory,
        rows: list[Any],
        layers: int = 1,
        config: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        from fd_dsa.attention.device import DeviceAttention

        self.memory, self._rng = memory, np.random.default_rng(0)
        num_tokens = sum(new for _, _, new in rows) + PADDING
        batch = make_batch(rows, BLOCK, num_padded_tokens=num_tokens)
        sizes = {
            "num_heads": 64,
            "index_n_heads": 32,
            "index_topk": 64,
            "softmax_scale": 0.1,
            "cache_layout": CacheLayout("fp8_ds_mla", BLOCK, RANK, ROPE, DIM),
            "max_num_seqs": len(rows),
            "max_num_tokens": num_tokens,
            "max_blocks_per_seq": batch.block_tables.shape[1],
            "dtype": "bfloat16",
        }
        self.config = DSABackendConfig(**(sizes | (config or {})))
        self.attention = DeviceAttention(self.config, memory.poisoned, **options)
        self.step = self._step(batch)
        self.layers = [self._layer(num_tokens, batch.num_blocks) for _ in range(layers)]

    def begin(self) -> KernelCase:
        """Begin the step, in which packages are tried."""
        self.attention.begin_step(self.step)
        return self

    def ours(self) -> KernelCase:
        """Begin the step without a try of any package: our kernels serve."""
        kernels = self.attention._third_party
        pending, kernels._pending = kernels._pending, []
        self.begin()
        kernels._pending = pending
        return self

    def select(self, layer: int = 0) -> Any:
        """Slots of a layer, as a tensor."""
        given = self.layers[layer]
        return self.attention.select(self.step, given.index_q, given.weights, given.keys)

    def attend(self, selection: Any, layer: int = 0) -> np.ndarray:
        """float32 outputs of a layer."""
        given = self.layers[layer]
        out = self.memory.get(self.attention.attend(self.step, given.q, given.latents, selection))
        if out.dtype == np.float32:
            return out
        return (out.astype(np.uint32) << 16).view(np.float32)

    def run(self, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Slots and outputs of a layer."""
        selection = self.select(layer)
        return self.memory.get(selection), self.attend(selection, layer)

    def _step(self, batch: Any) -> Any:
        """The metadata, as tensors."""
        limits = (self.config.max_num_seqs, self.config.max_num_tokens)
        columns = batch.block_tables.shape[1]
        builder = StepMetadataBuilder(*limits, columns, BLOCK, device="numpy")
        meta = builder.build(*batch.inputs(), batch.num_padded_tokens)
        values = {field.name: getattr(meta, field.name) for field in fields(meta)}
        return SimpleNamespace(
            **{k: self.memory.put(np.array(v)) if hasattr(v, "shape") else v
               for k, v in values.items()}
        )  # fmt: skip

    def _layer(self, num_tokens: int, num_blocks: int) -> SimpleNamespace:
        """Random queries, head weights and caches."""
        rng, put = self._rng, self.memory.put
        small = lambda *shape: rng.choice(_SMALL, shape)  # noqa: E731
        scales = np.exp2(rng.integers(-2, 2, (num_blocks, BLOCK))).astype(np.float32)
        keys = np.concatenate([small(num_blocks, BLOCK * DIM), scales.view(np.uint8)], axis=1)
        rows = (num_blocks, 1, BLOCK)
        latents = [
            rng.integers(0x20, 0x48, (*rows, RANK), np.uint8)
            | rng.choice([0, 0x80], (*rows, RANK)),
            rng.uniform(0.1, 0.5, (*rows, 4)).astype(np.float32).view(np.uint8),
            bfloat16(rng.standard_normal((*rows, ROPE))).view(np.uint8),
        ]
        heads, index_heads = self.config.num_heads, self.config.index_n_heads
        q = rng.standard_normal((num_tokens, heads, RANK + ROPE)).astype(np.float32)
        half = self.config.dtype == "bfloat16"
        weights = rng.integers(-2, 3, (num_tokens, index_heads)).astype(np.float32) / 2
        return SimpleNamespace(
            q=put(bfloat16(q), "bfloat16") if half else put(q),
            index_q=put(small(num_tokens, index_heads, DIM)),
            weights=put(weights),
            latents=put(np.concatenate(latents, axis=-1).astype(np.uint8)),
            keys=put(keys.reshape(num_blocks, BLOCK, DIM + 4)),
        )


def serving() -> dict[str, str]:
    """operator -> package that serves it."""
    return {x.operator: x.package for x in _third_party.third_party_table() if x.serves}


def launches(name: str) -> int:
    """How often the doubles launched a kernel whose name contains this."""
    from fastdeploy import _counters

    return sum(name in event.name for event in _counters._events if event.kind == "launch")
