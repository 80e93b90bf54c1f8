"""An attention backend that records the inputs and selections of every layer.

Layers pass everything that decides a selection to their backend: queries, weights and keys of the
indexer, absorbed queries of attention, and selections. So a subclass can record them without a
change of the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fd_dsa.attention import DSAAttentionBackend, DSABackendConfig
from fd_dsa.cache_formats import CacheLayout
from fd_dsa.ops.arrays import Scratch, as_numpy, on_device
from fd_dsa.ops.fp8 import decode_e4m3
from fd_dsa.ops.host_rows import gather_index_keys, gather_latents
from fd_dsa.runner.selections import positions_of
from fd_dsa.tensor import Array

if TYPE_CHECKING:
    from fd_dsa.runner.model_runner import ModelRunner


@dataclass
class LayerTrace:
    """Recorded values of one layer for the watched tokens of a sequence, by position.

    Attributes:
        queries: float32 [num_heads, kv_lora_rank + qk_rope_head_dim], absorbed.
        selected: int64 [n], ascending positions that the token attended to.
        index_queries: float32 [index_n_heads, index_head_dim].
        index_weights: float32 [index_n_heads]. Both are empty in a layer that shares the selection
            of another layer.
    """

    queries: dict[int, np.ndarray] = field(default_factory=dict)
    selected: dict[int, np.ndarray] = field(default_factory=dict)
    index_queries: dict[int, np.ndarray] = field(default_factory=dict)
    index_weights: dict[int, np.ndarray] = field(default_factory=dict)


class RecordingBackend(DSAAttentionBackend):
    """A DSAAttentionBackend that also records values of the watched tokens.

    A step must have one row, as in SingleSequenceRunner. Reading values back waits for the device,
    so steps are not suitable for timing.
    """

    def __init__(self, config: DSABackendConfig, device: str = "cpu") -> None:
        super().__init__(config, device)
        self.layers: dict[int, LayerTrace] = {}
        self.watched: frozenset[int] = frozenset()
        self._seen: tuple[Any, list[tuple[int, int]], np.ndarray] | None = None

    def watch(self, positions: Sequence[int]) -> None:
        """Clear the records, and record these positions from now on."""
        self.watched = frozenset(map(int, positions))
        self.layers = {}

    def select(self, q: Array, weights: Array, layer_id: int, forward_meta: Any) -> Any:
        selection = super().select(q, weights, layer_id, forward_meta)
        trace = self.layers.setdefault(layer_id, LayerTrace())
        for token, position in self._tokens(forward_meta)[0]:
            query = host_copy(q[token])
            is_coded = query.dtype == np.uint8
            trace.index_queries[position] = decode_e4m3(query) if is_coded else query
            trace.index_weights[position] = host_copy(weights[token])
        return selection

    def attend(self, q: Array, selection: Array | None, layer_id: int, forward_meta: Any) -> Any:
        out = super().attend(q, selection, layer_id, forward_meta)
        assert selection is not None
        trace = self.layers.setdefault(layer_id, LayerTrace())
        tokens, table = self._tokens(forward_meta)
        for token, position in tokens:
            trace.queries[position] = host_copy(q[token])
            slots = host_copy(selection[token]).reshape(-1)
            trace.selected[position] = positions_of(slots, table, self.block_size)
        return out

    def _tokens(self, forward_meta: Any) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Return (flat token, position) of a step's watched tokens, and the row's block table."""
        if self._seen is None or self._seen[0] is not forward_meta:
            step = self.current_step(forward_meta)
            tables = host_copy(step.block_tables)
            if len(tables) != 1:
                raise ValueError(f"a recorded step has one row, this one has {len(tables)}")
            positions = host_copy(step.position_ids).tolist()
            pairs = [(t, p) for t, p in enumerate(positions) if p in self.watched]
            self._seen = forward_meta, pairs, tables[0]
        return self._seen[1], self._seen[2]


@contextmanager
def recording(
    runner: ModelRunner, backend: type[RecordingBackend] = RecordingBackend
) -> Iterator[RecordingBackend]:
    """Replace the runner's backend with a recording one for the duration of the context."""
    own = runner.attn_backends[0]
    assert isinstance(own, DSAAttentionBackend), "only DSA layers select tokens"
    watching = backend(own.config, runner.device)
    runner.attn_backends[0] = watching
    try:
        yield watching
    finally:
        runner.attn_backends[0] = own


def read_latents(cache: Array, slots: np.ndarray, layout: CacheLayout) -> np.ndarray:
    """Return the latents that layers read, float32 [n, kv_lora_rank + qk_rope_head_dim].

    Args:
        slots: int64 [n].
    """
    out = np.empty((len(slots), layout.kv_lora_rank + layout.qk_rope_head_dim), np.float32)
    rows = _stored(cache).reshape(-1, layout.latent_row)
    gather_latents(rows, slots, out, Scratch())
    return out


def read_index_keys(cache: Array, slots: np.ndarray, layout: CacheLayout) -> np.ndarray:
    """Return index keys multiplied with their scales, float32 [n, index_head_dim].

    Args:
        slots: int64 [n].
    """
    out = np.empty((len(slots), layout.index_head_dim), np.float32)
    scales = gather_index_keys(_stored(cache), slots, out, Scratch())
    return out if scales is None else out * scales[:, None]


def host_copy(array: Array) -> np.ndarray:
    """Return a NumPy copy of an array, or of a tensor on any device."""
    if isinstance(array, np.ndarray):
        return array.copy()
    return np.array(array.numpy()) if on_device(array) else as_numpy(array).copy()


def _stored(cache: Array) -> np.ndarray:
    """Return the memory of a cache with the dtype that the CPU readers expect."""
    array = host_copy(cache)
    # bfloat16 of a device arrives as uint16
    return array.view(np.int16) if array.dtype == np.uint16 else array
