"""Sparse MLA by FlashMLA, in the place of our kernel: its FP8 decode kernel, for every token.

A token of a prompt is treated like one of a decode row: a batch of its own with one query, whose
keys lie in the cache. So each token is attended once, whatever the step is made of.

The kernel exists for 64 and for 128 heads. Other numbers get heads of zeros beside them: it takes
as long as for all 64, which is still far less than our kernel takes for a few.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.ops._copy import copy_heads

PACKAGE = "flash_mla"
_HEADS = (64, 128)
_SELECTED_TILE = 64
SCRATCH_BYTES = 256 << 20
"""Most memory for partial results: it takes num_heads * 512 float32 values for a token."""


def reason_against(config: Any) -> str | None:
    """Why FlashMLA cannot serve a DSABackendConfig; None if it can."""
    if not config.cache_layout.is_fp8:
        return f"the cache is {config.cache_layout.kv_cache_dtype}, it reads fp8_ds_mla"
    if config.dtype != "bfloat16":
        return f"activations are {config.dtype}, it takes bfloat16"
    if config.num_heads > _HEADS[-1]:
        return f"{config.num_heads} heads, it takes up to {_HEADS[-1]}"
    if config.index_topk % _SELECTED_TILE:
        return f"index_topk {config.index_topk}, it takes multiples of {_SELECTED_TILE}"
    return None


def padded_heads(num_heads: int) -> int:
    """The least number of heads with a kernel that has room for as many."""
    return next(heads for heads in _HEADS if heads >= num_heads)


def workspace_bytes(config: Any) -> int:
    """Bytes that a FlashMla holds for a DSABackendConfig, with what the package allocates."""
    layout, heads, rows = config.cache_layout, padded_heads(config.num_heads), _max_rows(config)
    # lengths, and the package's result
    total = SCRATCH_BYTES + rows * (4 + 2 * heads * layout.kv_lora_rank)
    if heads != config.num_heads:
        total += 2 * rows * heads * (layout.kv_lora_rank + layout.qk_rope_head_dim)
    return total


def _max_rows(config: Any) -> int:
    """Tokens that are attended at once."""
    per_row = 4 * padded_heads(config.num_heads) * config.cache_layout.kv_lora_rank
    return min(SCRATCH_BYTES // per_row, config.max_num_tokens)


class FlashMla:
    """FlashMLA for one number of heads, whatever the release.

    Args:
        module: the package.
        config: a DSABackendConfig that it can serve.
        allocate: as of a DeviceAttention.
        is_capturing: whether the current stream is captured into a graph.

    Attributes:
        heads: those of its kernel.
        max_rows: tokens that it attends at once.
    """

    def __init__(self, module: Any, config: Any, allocate: Any, is_capturing: Any) -> None:
        layout = config.cache_layout
        self._module = module
        self._scale = config.softmax_scale
        self._width = layout.kv_lora_rank
        self.heads, self.max_rows = padded_heads(config.num_heads), _max_rows(config)
        self._padded = None
        if self.heads != config.num_heads:
            shape = (self.max_rows, self.heads, self._width + layout.qk_rope_head_dim)
            # nothing writes the heads behind those of the model again
            self._padded = allocate(shape, "bfloat16").zero_()
        # releases of 2025 ask for lengths, which they do not read where keys are selected
        self._lengths = allocate((self.max_rows,), "int32")
        self._schedules = _Schedules(is_capturing)

    def attend(self, q: Any, cache: Any, slots: Any, out: Any) -> Any:
        """Attention of each token over the cache slots that its row names.

        Args:
            q: bfloat16 [num_tokens, num_heads, 576]; absorbed.
            cache: uint8 [num_blocks, 1, 64, 656], the layer's latent cache.
            slots: int32 [num_tokens, topk]; -1 = none.
            out: bfloat16 [num_tokens, num_heads, 512], for results that are copied: those of
                padded heads, and those that come in pieces.

        Returns:
            `out`, or a new tensor like it; zeros where a row names no slot.

        Cost: two launches and the allocations of the package; with padded heads two more
        launches, that copy. A schedule more at the first call for a number of tokens and a width.
        """
        num_tokens = q.shape[0]
        if num_tokens == 0:
            return out
        num_blocks, _, block_size, record = cache.shape
        pages = cache.reshape([num_blocks, block_size, 1, record])
        if self._padded is None and num_tokens <= self.max_rows:
            return self._attend(q, pages, slots)
        for first in range(0, num_tokens, self.max_rows):
            rows = slice(first, min(first + self.max_rows, num_tokens))
            copy_heads(self._attend(self._with_all_heads(q[rows]), pages, slots[rows]), out[rows])
        return out

    def _with_all_heads(self, q: Any) -> Any:
        """Queries of at most `max_rows` tokens with as many heads as the kernel takes."""
        if self._padded is None:
            return q
        wide = self._padded[: q.shape[0]]
        copy_heads(q, wide)
        return wide

    def _attend(self, q: Any, pages: Any, slots: Any) -> Any:
        """At most `max_rows` tokens."""
        rows, width = slots.shape
        lengths = self._lengths[:rows]
        schedule = self._schedules.take((rows, width), lambda: self._new_schedule(lengths, width))
        scheduler, num_splits = schedule
        old = num_splits is not None
        out, _ = self._module.flash_mla_with_kvcache(
            q.reshape([rows, 1, self.heads, -1]),
            pages,
            block_table=slots if old else None,
            cache_seqlens=lengths if old else None,
            head_dim_v=self._width,
            tile_scheduler_metadata=scheduler,
            num_splits=num_splits,
            softmax_scale=self._scale,
            causal=False,
            is_fp8_kvcache=True,
            indices=slots.reshape([rows, 1, width]),
        )
        return out.reshape([rows, self.heads, self._width])

    def _new_schedule(self, lengths: Any, width: int) -> tuple[Any, Any]:
        """A holder that the first call with it fills, and None; of old releases two tensors."""
        try:
            return self._module.get_mla_metadata()
        except TypeError:
            heads = self.heads
            return self._module.get_mla_metadata(
                lengths, heads, 1, num_heads_q=heads, is_fp8_kvcache=True, topk=width
            )


class _Schedules:
    """Schedules by shape: a function of it alone, so all layers and steps of a shape share one.

    What a captured graph refers to is kept for good, of the others the newest few.
    """

    _KEPT = 16

    def __init__(self, is_capturing: Any) -> None:
        self._is_capturing = is_capturing
        self._held: dict[tuple[int, int], Any] = {}
        self._captured: dict[tuple[int, int], Any] = {}
        self._made_in_captures: list[Any] = []

    def take(self, shape: tuple[int, int], make: Any) -> Any:
        """The schedule of a shape, made if there is none."""
        if shape in self._captured:
            return self._captured[shape]
        if self._is_capturing():
            if shape in self._held:
                self._captured[shape] = self._held.pop(shape)
                return self._captured[shape]
            # without a warm-up: it holds values in replays of this graph alone
            self._made_in_captures.append(make())
            return self._made_in_captures[-1]
        schedule = self._held.pop(shape) if shape in self._held else make()
        self._held[shape] = schedule
        if len(self._held) > self._KEPT:
            del self._held[next(iter(self._held))]
        return schedule
