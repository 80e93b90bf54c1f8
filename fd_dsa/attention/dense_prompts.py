"""Dense attention of prompts within `index_topk`, by keys and values of every head.

The position of a prompt token decides: below `index_topk` it attends densely, for any chunk and any
number of cached tokens. All other tokens attend in the absorbed form. The host counts the tokens of
each form from the lengths of the rows, and the device lists them. In a capture the host knows only
limits, and kernels read the counts on the device.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from typing import cast

import numpy as np

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.protocol import HostLengths, MlaLayer, PromptLimits
from fd_dsa.device.allocation import CACHED_VIEWS, Allocate
from fd_dsa.ops.dense_kernels import rows_at
from fd_dsa.ops.device_matrix import DeviceMatrix
from fd_dsa.ops.fixed_order import row_dependence_refusal
from fd_dsa.ops.head_gemm import empty_heads
from fd_dsa.ops.mla.prompt import (
    Group,
    attend_prompts,
    fitting,
    gather_keys,
    keys_and_values,
    list_absorbed,
)
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.driver import GpuTraits

logger = logging.getLogger(__name__)
KEYS_BYTES = 512 << 20
"""Max memory for the keys and values of a group of rows, or `index_topk` keys if they take more."""


class DensePrompts:
    """Attention of the dense tokens of a step, one object for all layers.

    Args:
        config: supported configuration, see `unsupported_reason`.
        gpu: traits of the device, whose shared memory bounds the tiles.

    Attributes:
        groups: neighbouring rows whose keys are held at once.
        has_all: True if all tokens of the step attend densely.
        others: int32 [n], tokens of the step in the absorbed form, None if `has_all`. In a capture
            -1 follows them.
        other_step: step of only these tokens, as sparse attention needs it; None if `has_all`.
        max_keys: maximum number of keys that are held at once.
        latents, rope: buffers of a group's keys, bfloat16 [max_keys, width].
        rows: max rows of a step, rounded up to a power of two.
        tiling: tiles of the attention kernel.
    """

    def __init__(self, config: DSABackendConfig, allocate: Allocate, gpu: GpuTraits) -> None:
        assert config.head_widths is not None
        nope, values = config.head_widths
        layout, tokens = config.cache_layout, config.max_num_tokens
        self._config, self.max_keys = config, max_keys(config)
        self.rows = 1 << (config.max_num_seqs - 1).bit_length()
        self.tiling = next(fitting(nope, layout.qk_rope_head_dim, values, gpu.shared_bytes))
        self.latents = allocate((self.max_keys, layout.kv_lora_rank), "bfloat16")
        self.rope = allocate((self.max_keys, layout.qk_rope_head_dim), "bfloat16")
        # tokens in the absorbed form, the row of each one, and such prompt tokens of each row
        sizes = tokens, tokens, config.max_num_seqs
        self._lists = [allocate((size,), "int32") for size in sizes]
        self._lists_of = lru_cache(maxsize=CACHED_VIEWS)(self._first_values)
        self._count = allocate((1,), "int32")
        # number of keys of a captured step on the device, None in other steps
        self._captured_count: Tensor | None = None
        self.groups: list[Group] = []
        # views of the buffers, one pair for each group
        self._gathered: list[tuple[Tensor, Tensor]] = []
        self.others: Tensor | None = None
        self.other_step: ForwardMeta | None = None
        self.has_all = False

    def begin_step(self, step: ForwardMeta, lengths: HostLengths | PromptLimits) -> bool:
        """Find the dense tokens of a step.

        Args:
            step: step with prompt tokens.
            lengths: lengths of its rows, or their limits in a capture.

        Returns:
            False if the step has no dense token. The attributes then do not describe it.
        """
        num_tokens, topk = step.position_ids.shape[0], self._config.index_topk
        self._captured_count, self.others, self.other_step = None, None, None
        if isinstance(lengths, PromptLimits):
            self.has_all, self._captured_count = False, self._count
            self.groups = [largest_group(step.seq_lens_this_time.shape[0], num_tokens, lengths)]
            # in a step of short rows only decode tokens attend in the absorbed form
            num_left = num_tokens if step.max_seqlen_k > topk else 0
            num_others = max(num_left, min(num_tokens, lengths.num_samples))
        else:
            new, cached, _ = lengths
            counts = np.clip(topk - cached, 0, new)
            self.groups, num_dense = row_groups(counts, cached, self.max_keys), int(counts.sum())
            num_others, num_left = num_tokens - num_dense, int(new.sum()) - num_dense
            self.has_all = not num_others
        if not self.groups:
            return False
        sizes = [group.num_keys for group in self.groups]
        self._gathered = [(self.latents[:size], self.rope[:size]) for size in sizes]
        if num_others:
            self._list_others(step, num_others, num_left)
        return True

    def _list_others(self, step: ForwardMeta, num_others: int, num_prompt_tokens: int) -> None:
        """Enqueue the list of the tokens in the absorbed form.

        Args:
            num_others: number of these tokens.
            num_prompt_tokens: number of those that are of a prompt.
        """
        num_rows = step.seq_lens_this_time.shape[0]
        tokens, batch_ids, left = self._lists_of(num_others, num_others, num_rows)
        rows, count = self.rows, self._captured_count
        list_absorbed(step, self._config.index_topk, tokens, batch_ids, left, rows, count)
        self.others = tokens
        self.other_step = replace(
            step,
            seq_lens_encoder=left,
            batch_id_per_token=batch_ids,
            num_prefill_tokens=num_prompt_tokens,
        )

    def _first_values(self, *sizes: int) -> tuple[Tensor, ...]:
        """Return the first values of each list."""
        return tuple(values[:size] for values, size in zip(self._lists, sizes, strict=True))

    def attend(
        self, step: ForwardMeta, q: Tensor, cos_sin: Tensor, cache: Tensor, layer: MlaLayer
    ) -> Tensor:
        """Attend for the dense tokens of a layer. Rows of other tokens are arbitrary.

        Args:
            step: step of the tokens.
            q: bfloat16 [num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim], as projected.
            cos_sin: float32 [num_tokens, qk_rope_head_dim]; cos, then sin.
            cache: latents of the layer, this step's included.
            layer: layer with the up-projections, and with `o_proj`, which reads the result.

        Returns:
            [num_tokens, num_heads * v_head_dim], in bfloat16 or as Fp8Rows.
        """
        k_b, v_b, reader = _device_matrices(layer)
        rounds = v_b.scales_for(reader)
        heads, _, width = v_b.values.shape
        out = empty_heads(q, q.shape[0], heads, width, rounds)
        topk = self._config.index_topk
        for group, (latents, rope) in zip(self.groups, self._gathered, strict=True):
            gather_keys(cache, step, group, topk, latents, rope, self.rows)
            keys, values = keys_and_values(latents, k_b.values, v_b.values, self._captured_count)
            attend_prompts(
                *(q, cos_sin, keys, values, rope, step, group, out),
                index_topk=topk,
                softmax_scale=self._config.softmax_scale,
                rows=self.rows,
                tiling=self.tiling,
                round_scales=bool(rounds),
            )
        return out if rounds is not None else out.reshape([out.shape[0], -1])

    def of_others(self, x: Tensor) -> Tensor:
        """Return the rows of x [num_tokens, ...] of the tokens that attend in the absorbed form."""
        assert self.others is not None, "only called for a step with such tokens"
        return rows_at(x, self.others)

    def slots_of_others(self, selection: Tensor) -> Tensor:
        """Return the selected slots of the tokens that attend in the absorbed form."""
        assert self.others is not None, "only called for a step with such tokens"
        return rows_at(selection, self.others, missing=-1)

    def with_others(self, dense: Tensor, latent: Tensor, layer: MlaLayer) -> Tensor:
        """Write the values of the absorbed tokens to their rows of `dense`.

        Args:
            dense: result of `attend`.
            latent: [n, num_heads, kv_lora_rank], attention of the absorbed tokens.
            layer: layer of `attend`.

        Returns:
            `dense`.
        """
        _, v_b, reader = _device_matrices(layer)
        return v_b.matmul_join_heads(latent, reader, dense, self.others)


def _device_matrices(layer: MlaLayer) -> tuple[DeviceMatrix, DeviceMatrix, DeviceMatrix]:
    """Return `k_b_proj`, `v_b_proj` and `o_proj` of a layer on a device."""
    weights = layer.k_b_proj, layer.v_b_proj, layer.o_proj
    return cast("tuple[DeviceMatrix, DeviceMatrix, DeviceMatrix]", weights)


def max_keys(config: DSABackendConfig) -> int:
    """Return the max keys that are held at once, at least one row's and at most a step's."""
    assert config.head_widths is not None
    fit = KEYS_BYTES // (2 * config.num_heads * sum(config.head_widths))
    longest = min(config.index_topk, config.max_blocks_per_seq * config.cache_layout.block_size)
    return min(max(longest, fit), longest * config.max_num_seqs)


def workspace_bytes(config: DSABackendConfig) -> int:
    """Return the bytes of dense prompts in addition to the buffers of DeviceAttention."""
    if unsupported_reason(config) is not None:
        return 0
    assert config.head_widths is not None
    layout = config.cache_layout
    width = config.num_heads * sum(config.head_widths)
    width += layout.kv_lora_rank + layout.qk_rope_head_dim
    return 2 * max_keys(config) * width + 4 * (2 * config.max_num_tokens + config.max_num_seqs)


def unsupported_reason(config: DSABackendConfig) -> str | None:
    """Return why all prompts attend in the absorbed form, or None if some attend densely."""
    cache, rope = config.cache_layout.kv_cache_dtype, config.cache_layout.qk_rope_head_dim
    if config.head_widths is None:
        return "the model's widths are not known"
    if one_form := row_dependence_refusal():
        return one_form
    if config.dtype != "bfloat16" or cache == "float32":
        return f"activations are {config.dtype} and the cache is {cache}, neither may be float32"
    if rope < 16 or rope & (rope - 1) or config.head_widths[0] % 2:
        return f"heads of {config.head_widths[0]} + {rope} values"
    return None


def dense_prompts_for(
    config: DSABackendConfig, allocate: Allocate, gpu: GpuTraits
) -> DensePrompts | None:
    """Make and log the dense attention, or return None if all prompts are absorbed."""
    reason = unsupported_reason(config)
    how = f"absorbed ({reason})" if reason else "dense"
    logger.info("attention of prompts below %d tokens: %s", config.index_topk, how)
    return None if reason else DensePrompts(config, allocate, gpu)


def largest_group(num_rows: int, num_tokens: int, limits: PromptLimits) -> Group:
    """Return the group of all rows of a captured step, whose grids fit every replay."""
    # rows of one token have the most tiles, with the rest of the tokens in one row
    ones = min(limits.num_prompts, num_tokens) - 1
    return Group(0, num_rows, limits.num_keys, (*[1] * ones, num_tokens - ones))


def row_groups(counts: np.ndarray, cached: np.ndarray, limit: int) -> list[Group]:
    """Group neighbouring rows with dense tokens, up to `limit` keys or one row.

    Args:
        counts: dense tokens of each row.
        cached: cached tokens of each row.
    """
    groups: list[Group] = []
    for row in np.flatnonzero(counts).tolist():
        count, keys = int(counts[row]), int(counts[row] + cached[row])
        if groups and groups[-1].num_keys + keys <= limit:
            last = groups[-1]
            groups[-1] = Group(last.first_row, row + 1, last.num_keys + keys, (*last.counts, count))
        else:
            groups.append(Group(row, row + 1, keys, (count,)))
    return groups
