"""Dense attention of prompts within `index_topk`, by keys and values of every head.

The position of a prompt token decides: below `index_topk` it attends in this form, whatever its
chunk and whatever was cached before it. All other tokens attend in the absorbed form. The host
finds the tokens of each form from the lengths of the rows.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import cast

import numpy as np

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.attention.protocol import HostLengths, MlaLayer
from fd_dsa.device.allocation import Allocate
from fd_dsa.device.staging import StagedInputs
from fd_dsa.ops.device_matrix import DeviceMatrix
from fd_dsa.ops.fixed_order import row_dependence_refusal
from fd_dsa.ops.head_gemm import empty_heads
from fd_dsa.ops.linear import rows_at
from fd_dsa.ops.mla.prompt import (
    Group,
    attend_prompts,
    fitting,
    gather_keys,
    keys_and_values,
)
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.driver import GpuTraits

logger = logging.getLogger(__name__)
KEYS_BYTES = 512 << 20
"""Most memory for the keys and values of a group of rows, but those of `index_topk` are held."""


class DensePrompts:
    """Attention of the dense tokens of a step, one object for all layers.

    Args:
        config: one that `why_not` finds nothing against.
        gpu: what the tiles have to fit.

    Attributes:
        others: int32 [n]; the tokens of the step that do not attend densely. None: all of them, or
            none of them.
        other_step: the step of those tokens alone, as attention needs it.
        has_all: all tokens of the step attend densely.
        groups: rows whose keys are held at once; [] where none attends densely.
        latents, rope, rows, tiling: arguments of the launches for each group.
    """

    def __init__(self, config: DSABackendConfig, allocate: Allocate, gpu: GpuTraits) -> None:
        assert config.head_widths is not None
        nope, values = config.head_widths
        layout, tokens = config.cache_layout, config.max_num_tokens
        self._config, self._max_keys = config, max_keys(config)
        self.rows = 1 << (config.max_num_seqs - 1).bit_length()
        self.tiling = next(fitting(nope, layout.qk_rope_head_dim, values, gpu.shared_bytes))
        self.latents = allocate((self._max_keys, layout.kv_lora_rank), "bfloat16")
        self.rope = allocate((self._max_keys, layout.qk_rope_head_dim), "bfloat16")
        self._staged = StagedInputs(allocate, (tokens, tokens, config.max_num_seqs), 1, 1)
        self.groups: list[Group] = []
        # where the keys of each are gathered
        self._gathered: list[tuple[Tensor, Tensor]] = []
        self.others: Tensor | None = None
        self.other_step: ForwardMeta | None = None
        self.has_all = False

    def begin_step(self, step: ForwardMeta | None, lengths: HostLengths | None) -> None:
        """Find the tokens of a step that attend densely, as DeviceAttention.begin_step says."""
        self.groups, self.others, self.other_step, self.has_all = [], None, None, False
        if step is None or lengths is None or step.num_prefill_tokens == 0:
            return
        new, cached, this_time = lengths
        counts = np.clip(self._config.index_topk - cached, 0, new)
        self.groups = row_groups(counts, cached, self._max_keys)
        sizes = [group.num_keys for group in self.groups]
        self._gathered = [(self.latents[:size], self.rope[:size]) for size in sizes]
        self.has_all = counts.sum() == step.position_ids.shape[0]
        if not self.groups or self.has_all:
            return
        rows = np.repeat(np.arange(len(new)), this_time)
        # the tokens of a row that attend densely come first
        in_row = np.arange(len(rows)) - (np.cumsum(this_time) - this_time)[rows]
        others = np.flatnonzero(in_row >= counts[rows])
        left = new - counts
        self.others, batch_ids, left_new, _ = self._staged.upload(
            (others, rows[others], left), np.zeros((1, 1), np.int32)
        )
        self.other_step = replace(
            step,
            seq_lens_encoder=left_new,
            batch_id_per_token=batch_ids,
            num_prefill_tokens=int(left.sum()),
        )

    def attend(
        self, step: ForwardMeta, q: Tensor, cos_sin: Tensor, cache: Tensor, layer: MlaLayer
    ) -> Tensor:
        """Attend for the dense tokens of a layer. Rows of the others hold anything.

        Args:
            step: step of the tokens.
            q: bfloat16 [num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim], as projected.
            cos_sin: float32 [num_tokens, qk_rope_head_dim]; cos, then sin.
            cache: latents of the layer, with those of this step.
            layer: layer with the weights of keys and values, and with the reader of the result.

        Returns:
            bfloat16 [num_tokens, num_heads * v_head_dim], or Fp8Rows of it.
        """
        k_b, v_b, reader = _device_matrices(layer)
        rounds = v_b.scales_for(reader)
        heads, _, width = v_b.values.shape
        out = empty_heads(q, q.shape[0], heads, width, rounds)
        topk = self._config.index_topk
        for group, (latents, rope) in zip(self.groups, self._gathered, strict=True):
            gather_keys(cache, step, group, topk, latents, rope, self.rows)
            keys, values = keys_and_values(latents, k_b.values, v_b.values)
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
        """Return the rows of x [num_tokens, ...] whose tokens do not attend densely."""
        width = int(np.prod(x.shape[1:]))
        rows = rows_at(x.reshape([x.shape[0], width]), self.others)
        return rows.reshape([rows.shape[0], *x.shape[1:]])

    def with_others(self, dense: Tensor, latent: Tensor, layer: MlaLayer) -> Tensor:
        """Write the values of the other tokens to their rows of `dense`.

        Args:
            dense: result of `attend`.
            latent: attention of these tokens in absorbed form [n, num_heads, kv_lora_rank].
            layer: as for `attend`.
        """
        _, v_b, reader = _device_matrices(layer)
        return v_b.heads_joined(latent, reader, dense, self.others)


def _device_matrices(layer: MlaLayer) -> tuple[DeviceMatrix, DeviceMatrix, DeviceMatrix]:
    """Return `k_b_proj`, `v_b_proj` and `o_proj` of a layer on a device."""
    weights = layer.k_b_proj, layer.v_b_proj, layer.o_proj
    return cast("tuple[DeviceMatrix, DeviceMatrix, DeviceMatrix]", weights)


def max_keys(config: DSABackendConfig) -> int:
    """Return the number of keys that are held at once, from one row to a whole step."""
    assert config.head_widths is not None
    fit = KEYS_BYTES // (2 * config.num_heads * sum(config.head_widths))
    longest = min(config.index_topk, config.max_blocks_per_seq * config.cache_layout.block_size)
    return min(max(longest, fit), longest * config.max_num_seqs)


def workspace_bytes(config: DSABackendConfig) -> int:
    """Return the bytes that dense prompts take in addition to DeviceAttention's buffers."""
    if why_not(config) is not None:
        return 0
    assert config.head_widths is not None
    layout = config.cache_layout
    width = config.num_heads * sum(config.head_widths)
    width += layout.kv_lora_rank + layout.qk_rope_head_dim
    # what is staged of a step is there four times: three slabs and a tensor
    return 2 * max_keys(config) * width + 16 * (2 * config.max_num_tokens + config.max_num_seqs)


def why_not(config: DSABackendConfig) -> str | None:
    """Return why all prompts attend in the absorbed form, or None if some attend densely."""
    cache, rope = config.cache_layout.kv_cache_dtype, config.cache_layout.qk_rope_head_dim
    if config.head_widths is None:
        return "the model's widths are not known"
    if one_form := row_dependence_refusal():
        return one_form
    if config.dtype != "bfloat16" or cache == "float32":
        return f"activations are {config.dtype} and the cache is {cache}, it takes neither float32"
    if rope < 16 or rope & (rope - 1) or config.head_widths[0] % 2:
        return f"heads of {config.head_widths[0]} + {rope} values"
    return None


def dense_prompts_for(
    config: DSABackendConfig, allocate: Allocate, gpu: GpuTraits
) -> DensePrompts | None:
    """Create and log the dense form, or return None if all prompts are absorbed."""
    reason = why_not(config)
    how = f"absorbed ({reason})" if reason else "dense"
    logger.info("attention of prompts below %d tokens: %s", config.index_topk, how)
    return None if reason else DensePrompts(config, allocate, gpu)


def row_groups(counts: np.ndarray, cached: np.ndarray, most: int) -> list[Group]:
    """Group rows in order, as many as have room for their keys."""
    groups: list[Group] = []
    for row in np.flatnonzero(counts).tolist():
        count, keys = int(counts[row]), int(counts[row] + cached[row])
        if groups and groups[-1].num_keys + keys <= most:
            last = groups[-1]
            groups[-1] = Group(last.first_row, row + 1, last.num_keys + keys, (*last.counts, count))
        else:
            groups.append(Group(row, row + 1, keys, (count,)))
    return groups
