"""Selection and attention of a step on a device: launches over pages, in buffers that never move.

Every token is treated alike, whether of a prompt or of a decode row: the kernels work from
`position_ids`, `batch_id_per_token` and `block_tables` alone. Grids and views follow from what the
host knows of the step, so nothing is read back and, once the views of a size exist, nothing is
allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import Any

from fd_dsa.attention.cache_layout import CacheLayout
from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.ops._host import check_shape
from fd_dsa.ops._provider import provider_for
from fd_dsa.ops.indexer_logits.triton_kernel import score_pages
from fd_dsa.ops.sparse_mla.triton_kernel import attend_slots
from fd_dsa.ops.topk.triton_kernel import select_slots
from fd_dsa.step import ForwardMeta
from fd_dsa.step.device import Allocate, paddle_place

LOGITS_BYTES = 512 << 20
"""Most memory for the scores of a layer; the tokens of a longer step are scored in chunks."""

# views are small; lengths are rounded to powers of two, so a server sees few of them
_CACHED_VIEWS = 512


class DeviceAttention:
    """Reads the caches that `write_caches` fills; its buffers serve every layer and step.

    Args:
        config: sizes and scale.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        logits_bytes: most memory for scores; at least one token's are always held.
    """

    def __init__(
        self, config: DSABackendConfig, allocate: Allocate, logits_bytes: int = LOGITS_BYTES
    ) -> None:
        self.config = config
        self.block_size = config.cache_layout.block_size
        self._max_keys = config.max_blocks_per_seq * self.block_size
        buffers = _buffers(config, logits_bytes)
        self._buffers = {name: allocate((size,), dtype) for name, (size, dtype) in buffers.items()}
        self._num_logits = buffers["logits"][0]
        self._view = lru_cache(maxsize=_CACHED_VIEWS)(partial(_view, self._buffers))
        self._everything: Any = None
        for operator in ("indexer_logits", "topk", "sparse_mla"):
            provider_for(operator, self._buffers["slots"])

    def begin_step(self) -> None:
        """Forget the selection that the layers of the step before shared."""
        self._everything = None

    def query_buffers(self, num_tokens: int) -> tuple[Any, Any]:
        """Where `prepare_indexer_query` writes: queries and head weights of a step's tokens.

        Returns:
            `config.dtype`, for an fp8_ds_mla cache uint8, [num_tokens, index_n_heads,
            index_head_dim], and float32 [num_tokens, index_n_heads].
        """
        heads, dim = self.config.index_n_heads, self.config.cache_layout.index_head_dim
        queries = self._view("index_q", num_tokens, heads, dim)
        return queries, self._view("index_weights", num_tokens, heads)

    def select(self, step: ForwardMeta, q: Any, weights: Any, cache: Any) -> Any:
        """See DSAAttentionBackend.indexer_forward; `cache` is the layer's indexer cache.

        Where no row is longer than `index_topk`, every token sees all of its keys: nothing is
        scored, and the layers of the step share one selection.
        """
        if step.max_seqlen_k <= self.config.index_topk:
            if self._everything is None:
                self._everything = self._all_keys(step, cache)
            return self._everything
        num_tokens = step.position_ids.shape[0]
        slots = self._view("slots", num_tokens, self.config.index_topk)
        width = self._rounded(step.max_seqlen_k, self._max_keys)
        rows = max(1, self._num_logits // width)
        tokens = step.position_ids, step.batch_id_per_token, step.block_tables
        for first in range(0, num_tokens, rows):
            logits = self._view("logits", min(rows, num_tokens - first), width)
            score_pages(
                q,
                weights,
                cache,
                *tokens,
                logits,
                block_size=self.block_size,
                first_token=first,
                max_seqlen_k=step.max_seqlen_k,
            )
            select_slots(
                logits,
                *tokens,
                slots,
                block_size=self.block_size,
                num_blocks=cache.shape[0],
                first_token=first,
            )
        return slots

    def attend(self, step: ForwardMeta, q: Any, cache: Any, selection: Any) -> Any:
        """See DSAAttentionBackend.forward; `cache` is the layer's latent cache."""
        num_tokens, num_heads = q.shape[0], q.shape[1]
        rank = self.config.cache_layout.kv_lora_rank
        if len(selection.shape) == 3:
            selection = selection.reshape([num_tokens, -1])
        check_shape("forward_mixed", "v", selection, (num_tokens, None))
        out = self._view("latents", num_tokens, num_heads, rank)
        scale = self.config.softmax_scale
        attend_slots(q, cache, selection, out, softmax_scale=scale, kv_lora_rank=rank)
        return out

    def _all_keys(self, step: ForwardMeta, cache: Any) -> Any:
        """The selection of a step whose tokens see all of their keys."""
        num_tokens = step.position_ids.shape[0]
        width = self._rounded(step.max_seqlen_k, self.config.index_topk)
        slots = self._view("slots", num_tokens, width)
        select_slots(
            self._view("logits", 1, 1),
            step.position_ids,
            step.batch_id_per_token,
            step.block_tables,
            slots,
            block_size=self.block_size,
            num_blocks=cache.shape[0],
            num_rows=num_tokens,
        )
        return slots

    @staticmethod
    def _rounded(length: int, limit: int) -> int:
        """The next power of two, at least 64, but no more than `limit`."""
        return min(max(64, 1 << max(length - 1, 0).bit_length()), limit)


def _buffers(config: DSABackendConfig, logits_bytes: int) -> dict[str, tuple[int, str]]:
    """Length and dtype of each buffer of a DeviceAttention."""
    layout, tokens = config.cache_layout, config.max_num_tokens
    max_keys = config.max_blocks_per_seq * layout.block_size
    index_heads = tokens * config.index_n_heads
    return {
        "logits": (min(max(logits_bytes // 4, max_keys), tokens * max_keys), "float32"),
        "slots": (tokens * config.index_topk, "int32"),
        "latents": (tokens * config.num_heads * layout.kv_lora_rank, config.dtype),
        "index_q": (index_heads * layout.index_head_dim, "uint8" if layout.is_fp8 else config.dtype),
        "index_weights": (index_heads, "float32"),
    }


def workspace_bytes(config: DSABackendConfig, logits_bytes: int = LOGITS_BYTES) -> int:
    """Bytes of the buffers that a DeviceAttention of this configuration holds."""
    widths = {"float32": 4, "bfloat16": 2, "int32": 4, "uint8": 1}
    return sum(size * widths[dtype] for size, dtype in _buffers(config, logits_bytes).values())


def empty_allocator(device: str) -> Allocate:
    """Makes uninitialised Paddle tensors on a device; see `fd_dsa.step.device.paddle_place`.

    Raises:
        BackendUnavailable: Paddle is missing, or serves no such device.
    """
    place = paddle_place(device)
    import paddle

    return lambda shape, dtype: paddle.empty(list(shape), dtype, device=place)


def cache_allocator(layout: CacheLayout, device: str) -> Callable[[list[int]], Any]:
    """Makes uninitialised caches of a layout on a device: nothing reads what was not written."""
    allocate = empty_allocator(device)
    dtype = "uint8" if layout.is_fp8 else layout.kv_cache_dtype
    return lambda shape: allocate(tuple(shape), dtype)


def _view(buffers: dict[str, Any], name: str, *shape: int) -> Any:
    """The start of a buffer as a tensor of `shape`."""
    return buffers[name][: prod(shape)].reshape(list(shape))
