"""One row through a package of another project and through our kernel, before it may serve."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.errors import BackendUnavailable
from fd_dsa.ops.indexer_gather.triton_kernel import gather_indexer_keys
from fd_dsa.ops.indexer_logits.deep_gemm import SCORE_TILE, DeepGemm, as_e4m3
from fd_dsa.ops.indexer_logits.triton_kernel import score_pages
from fd_dsa.ops.sparse_mla.flash_mla import FlashMla
from fd_dsa.ops.sparse_mla.triton_kernel import attend_slots
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime.transfers import Transfers

# relative, root mean square. FlashMLA rounds scales of the cache and weights to bfloat16; FP8
# products on Hopper are summed with fewer bits than float32 has
_ATTENTION_TOLERANCE, _SCORE_TOLERANCE = 2e-2, 1e-3
_BLOCKS, _KEYS, _SELECTED = 3, 100, 64

logger = logging.getLogger(__name__)


class Probe:
    """Makes and reads the tensors of a probe.

    Args:
        config: sizes.
        allocate: as of a DeviceAttention.
        transfers: copies to and from the device.
    """

    def __init__(self, config: DSABackendConfig, allocate: Allocate, transfers: Transfers) -> None:
        self._config, self._allocate, self._transfers = config, allocate, transfers
        self._rng = np.random.default_rng(0)

    def attention(self, mla: FlashMla) -> float:
        """Deviation of FlashMLA from our kernel: a row that names 50 keys, and one that names none.

        Raises:
            BackendUnavailable: they differ by more than rounding.
            Exception: whatever the package raises.
        """
        config = self._config
        layout = config.cache_layout
        rank, width = layout.kv_lora_rank, layout.kv_lora_rank + layout.qk_rope_head_dim
        q = self._put(self._bfloat16((2, config.num_heads, width)), "bfloat16")
        chosen = np.full((2, _SELECTED), -1, np.int32)
        chosen[0, :50] = np.sort(self._rng.permutation(_BLOCKS * layout.block_size)[:50])
        cache, slots = self._put(self._latent_cache(), "uint8"), self._put(chosen, "int32")
        out = self._allocate((2, config.num_heads, rank), "bfloat16")
        theirs = self._get(mla.attend(q, cache, slots, out))
        ours = self._allocate((2, config.num_heads, rank), "float32")
        scale = config.softmax_scale
        attend_slots(q, cache, slots, ours, softmax_scale=scale, kv_lora_rank=rank)
        deviation = _deviation(theirs[0], self._get(ours)[0], _ATTENTION_TOLERANCE)
        if np.any(theirs[1]):
            raise BackendUnavailable("a row without keys gives numbers other than 0")
        return deviation

    def scores(self, gemm: DeepGemm) -> float:
        """Deviation of DeepGEMM from our kernel: one token with keys in two pages.

        Learns what this release can do: `gemm.reads_gathered` is False afterwards where it gives
        no scores relative to a token's first key, or wrong ones.

        Raises:
            BackendUnavailable: scores of pages differ by more than rounding.
            Exception: whatever the package raises for pages.
        """
        config = self._config
        heads, dim = config.index_n_heads, config.cache_layout.index_head_dim
        cache = self._put(self._index_cache(), "uint8")
        q = self._put(self._codes((1, heads, dim)), "uint8")
        weights = self._put(self._rng.normal(0, 1, (1, heads)).astype(np.float32), "float32")
        # the token is of the second request
        tables = self._put(np.array([[1, 1], [2, 0]], np.int32), "int32")
        position = self._put(np.array([_KEYS - 1], np.int64), "int64")
        row, length = (self._put(np.array([x], np.int32), "int32") for x in (1, _KEYS))
        logits = self._allocate((1, SCORE_TILE), "float32")
        block_size = config.cache_layout.block_size
        score_pages(q, weights, cache, position, row, tables, logits, block_size=block_size)
        ours = self._get(logits)[0, :_KEYS]
        gemm.find_form(length)
        schedule = gemm.schedule(length)
        codes = as_e4m3(q)
        found = gemm.score_pages(codes, cache, weights, length, tables[1:], schedule, SCORE_TILE)
        deviation = _deviation(self._get(found)[0, :_KEYS], ours, _SCORE_TOLERANCE)
        try:
            found = self._gathered(gemm, codes, weights, cache, tables)
            _deviation(found, ours, _SCORE_TOLERANCE)
        except Exception as error:
            gemm.reads_gathered = False
            logger.info(
                "deep_gemm scores prompts in their pages: it gives no relative scores (%r)", error
            )
        return deviation

    def _gathered(
        self, gemm: DeepGemm, q: Any, weights: Any, cache: Any, tables: Any
    ) -> np.ndarray:
        """float32 [_KEYS]: the same scores, of keys gathered behind 4 of the first request."""
        codes = self._allocate((SCORE_TILE, cache.shape[2] - 4), "uint8")
        scales = self._allocate((SCORE_TILE,), "float32")
        starts = self._put(np.array([0, 4, 4 + _KEYS], np.int32), "int32")
        encoder = self._put(np.array([0, 1], np.int32), "int32")
        gather_indexer_keys(cache, tables, starts, encoder, codes, scales)
        window = starts[1:2], starts[2:3]
        keys = as_e4m3(codes), scales
        return self._get(gemm.score_gathered(q, *keys, weights, *window, SCORE_TILE))[0, :_KEYS]

    def _put(self, array: np.ndarray, dtype: str) -> Any:
        """A tensor of the values, or bits, of an array."""
        tensor = self._allocate(array.shape, dtype)
        self._transfers.to_device(tensor, np.ascontiguousarray(array))
        self._wait()
        return tensor

    def _get(self, tensor: Any) -> np.ndarray:
        """float32 values of a float32 or bfloat16 tensor."""
        tensor = tensor.contiguous()
        is_half = "bfloat16" in str(tensor.dtype)
        array = np.empty(tuple(tensor.shape), np.uint16 if is_half else np.float32)
        self._transfers.to_host(array, tensor)
        self._wait()
        return (array.astype(np.uint32) << 16).view(np.float32) if is_half else array

    def _wait(self) -> None:
        """Until all that is queued is done."""
        done = self._transfers.event()
        done.record()
        done.wait()

    def _bfloat16(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint16: bits of random bfloat16 numbers."""
        values = self._rng.normal(0, 1, shape).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    def _codes(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8: random e4m3 numbers of at most 15 in size."""
        return self._rng.integers(0, 0x58, shape, np.uint8) | self._rng.choice(
            np.array([0, 0x80], np.uint8), shape
        )

    def _latent_cache(self) -> np.ndarray:
        """uint8 [blocks, 1, block_size, record]: random latents whose scores are of about 1."""
        layout = self._config.cache_layout
        rows = (_BLOCKS, 1, layout.block_size)
        scales = self._rng.uniform(0.02, 0.08, (*rows, 4)).astype(np.float32)
        rope = self._bfloat16((*rows, layout.qk_rope_head_dim))
        parts = self._codes((*rows, layout.kv_lora_rank)), scales.view(np.uint8)
        return np.concatenate([*parts, rope.view(np.uint8)], axis=-1)

    def _index_cache(self) -> np.ndarray:
        """uint8 [blocks, block_size, record]: in each block the codes, then the scales."""
        size, dim = self._config.cache_layout.block_size, self._config.cache_layout.index_head_dim
        scales = np.exp2(self._rng.integers(-9, -5, (_BLOCKS, size))).astype(np.float32)
        planes = self._codes((_BLOCKS, size * dim)), scales.view(np.uint8)
        return np.concatenate(planes, axis=1).reshape(_BLOCKS, size, dim + 4)


def _deviation(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> float:
    """Root mean square of the differences, relative to that of `wanted`.

    Raises:
        BackendUnavailable: more than `tolerance`, or not a number.
    """
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    if not error <= tolerance:
        raise BackendUnavailable(f"results differ by {error:.2g}, allowed is {tolerance:.2g}")
    return error
