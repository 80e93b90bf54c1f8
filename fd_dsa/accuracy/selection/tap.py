"""A backend that replaces the runner's own and records what the layers ask of it.

The layers call their backend with all that decides a selection: queries, weights and keys of the
indexer, absorbed queries of the attention, selections. So a subclass sees all of it, and the engine
needs no change to be watched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fd_dsa.attention import DSAAttentionBackend, DSABackendConfig
from fd_dsa.cache_formats import CacheLayout
from fd_dsa.ops.arrays import Scratch, on_device
from fd_dsa.ops.fp8 import decode_e4m3
from fd_dsa.ops.gather import gather_index_keys, gather_latents


@dataclass
class LayerTrace:
    """What a layer did for the watched tokens of one sequence, by position.

    Attributes:
        queries: float32 [num_heads, kv_lora_rank + qk_rope_head_dim]; absorbed.
        selected: int64 [n], ascending; positions that the token attended to.
        index_queries: float32 [index_n_heads, index_head_dim]; empty in a layer that shares the
            selection of another, as are its `index_weights`, float32 [index_n_heads].
    """

    queries: dict[int, np.ndarray] = field(default_factory=dict)
    selected: dict[int, np.ndarray] = field(default_factory=dict)
    index_queries: dict[int, np.ndarray] = field(default_factory=dict)
    index_weights: dict[int, np.ndarray] = field(default_factory=dict)


class RecordingBackend(DSAAttentionBackend):
    """Serves as a DSAAttentionBackend does, and keeps what it saw of the watched tokens.

    A step holds one row, as those of OneSequence do. Reading a device back waits for it: this is
    for looking, not for timing.
    """

    def __init__(self, config: DSABackendConfig, device: str = "cpu") -> None:
        super().__init__(config, device)
        self.layers: dict[int, LayerTrace] = {}
        self.watched: frozenset[int] = frozenset()
        self._seen: tuple[Any, list[tuple[int, int]], np.ndarray] | None = None

    def watch(self, positions: Sequence[int]) -> None:
        """Forget what was seen, and record these positions from now on."""
        self.watched = frozenset(map(int, positions))
        self.layers = {}

    def select(self, q: Any, weights: Any, layer_id: int, forward_meta: Any) -> Any:
        selection = super().select(q, weights, layer_id, forward_meta)
        trace = self.layers.setdefault(layer_id, LayerTrace())
        for token, position in self._tokens(forward_meta)[0]:
            query = host_copy(q[token])
            is_coded = query.dtype == np.uint8
            trace.index_queries[position] = decode_e4m3(query) if is_coded else query
            trace.index_weights[position] = host_copy(weights[token])
        return selection

    def attend(self, q: Any, selection: Any, layer_id: int, forward_meta: Any) -> Any:
        out = super().attend(q, selection, layer_id, forward_meta)
        trace = self.layers.setdefault(layer_id, LayerTrace())
        tokens, position_of_block = self._tokens(forward_meta)
        for token, position in tokens:
            trace.queries[position] = host_copy(q[token])
            slots = host_copy(selection[token]).reshape(-1).astype(np.int64)
            block, offset = np.divmod(slots[slots >= 0], self.block_size)
            trace.selected[position] = np.sort(position_of_block[block] + offset)
        return out

    def _tokens(self, forward_meta: Any) -> tuple[list[tuple[int, int]], np.ndarray]:
        """(flat token, position) of the watched tokens of a step, first position of each block."""
        if self._seen is None or self._seen[0] is not forward_meta:
            step = self.current_step(forward_meta)
            tables = host_copy(step.block_tables)
            if len(tables) != 1:
                raise ValueError(f"a recorded step has one row, this one has {len(tables)}")
            first = np.full(1 + max(int(tables.max()), 0), -1, np.int64)
            used = tables[0][tables[0] >= 0]
            first[used] = np.arange(len(used)) * self.block_size
            positions = host_copy(step.position_ids).tolist()
            pairs = [(t, p) for t, p in enumerate(positions) if p in self.watched]
            self._seen = forward_meta, pairs, first
        return self._seen[1], self._seen[2]


@contextmanager
def recording(
    runner: Any, device: str, backend: type[RecordingBackend] = RecordingBackend
) -> Iterator[RecordingBackend]:
    """Replace the runner's backend with a recording one, for as long as the context lasts."""
    own = runner.attn_backends[0]
    watching = backend(own.config, device)
    runner.attn_backends[0] = watching
    try:
        yield watching
    finally:
        runner.attn_backends[0] = own


def read_latents(cache: Any, slots: np.ndarray, layout: CacheLayout) -> np.ndarray:
    """float32 [n, kv_lora_rank + qk_rope_head_dim]: what the layers read at these int64 slots."""
    out = np.empty((len(slots), layout.kv_lora_rank + layout.qk_rope_head_dim), np.float32)
    rows = _stored(cache).reshape(-1, layout.latent_row)
    gather_latents(rows, slots, out, Scratch())
    return out


def read_index_keys(cache: Any, slots: np.ndarray, layout: CacheLayout) -> np.ndarray:
    """float32 [n, index_head_dim]: index keys at these slots, their scales multiplied in."""
    out = np.empty((len(slots), layout.index_head_dim), np.float32)
    scales = gather_index_keys(_stored(cache), slots, out, Scratch())
    return out if scales is None else out * scales[:, None]


def host_copy(array: Any) -> np.ndarray:
    """A NumPy copy of an array or of a tensor on any device."""
    if isinstance(array, np.ndarray):
        return array.copy()
    return np.array(array.numpy()) if on_device(array) else np.from_dlpack(array).copy()


def _stored(cache: Any) -> np.ndarray:
    """The memory of a cache with the dtype that the CPU's readers know it by."""
    array = host_copy(cache)
    # a device's bfloat16 arrives as its bits, unsigned
    return array.view(np.int16) if array.dtype == np.uint16 else array
