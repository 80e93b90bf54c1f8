"""The one call of a step that computes what all layers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from fd_dsa.errors import BackendUnavailable
from fd_dsa.step import checks
from fd_dsa.step.forward_meta import Array, ForwardMeta
from fd_dsa.step.host import HostBuffers

_View = Callable[[Any], Array]
# views are small; a server sees few row counts and, when decoding, few token counts
_CACHED_VIEWS = 256


class StepMetadataBuilder:
    """Builds the `ForwardMeta` of every step in buffers that are allocated once.

    Args:
        max_num_seqs: rows a step may have.
        max_num_tokens: tokens a step may have, padding included.
        max_blocks_per_seq: columns of the block table.
        block_size: tokens per cache block.
        num_blocks: physical blocks of the cache, for the check of block ids; None = no upper
            bound.
        device: "cpu" = the arrays of a step are Paddle CPU tensors over the builder's memory;
            "numpy" = they are the NumPy arrays themselves, and Paddle is never imported.

    Attributes:
        num_builds: metadata computations so far; it grows by one a step whatever the number of
            layers is, and not at all when `build` refuses its inputs.

    Raises:
        ValueError: a size below 1 or past int32.
        BackendUnavailable: no provider serves the device, or Paddle is missing.

    Not thread-safe: one builder serves one stream of steps.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks_per_seq: int,
        block_size: int,
        num_blocks: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.limits = checks.StepLimits(
            max_num_seqs, max_num_tokens, max_blocks_per_seq, block_size, num_blocks
        )
        self.device = device
        self.num_builds = 0
        view = _view_for(device)
        self._buffers = HostBuffers(self.limits)
        # partials of functions, not of methods: the caches then do not keep the builder alive
        cached = lru_cache(maxsize=_CACHED_VIEWS)
        self._row_views = cached(partial(_row_views, self._buffers, view))
        self._token_views = cached(partial(_token_views, self._buffers, view))
        self._prefill_views = cached(partial(_prefill_views, self._buffers, view))

    def build(
        self,
        seq_lens_encoder: Array,
        seq_lens_decoder: Array,
        seq_lens_this_time: Array,
        block_tables: Array,
        num_padded_tokens: int | None = None,
        *,
        num_tokens: int | None = None,
        num_prefill_tokens: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> ForwardMeta:
        """Metadata of one step, valid until the next `build` of this builder.

        The inputs are NumPy arrays or Paddle CPU tensors; they are copied, so that the caller may
        change them while the step runs. All checks come before the first write: a refused step
        leaves the metadata of the step before it as it was.

        Args:
            seq_lens_encoder: int32 [B]; tokens of a prefill row, 0 for a decode or idle row.
            seq_lens_decoder: int32 [B]; tokens of the row already in the cache.
            seq_lens_this_time: int32 [B]; tokens of the row in this step, 0 = idle.
            block_tables: int32 [B, max_blocks_per_seq]; physical block of each logical block.
                Entries past a row's length are copied but not looked at.
            num_padded_tokens: T of the token arrays; None = the number of tokens.
            num_tokens: tokens of the step, if the caller knows it; must agree.
            num_prefill_tokens: tokens of prefill rows, likewise.
            max_seqlen_k: keys of the longest row, or an upper bound, which is then what the
                metadata says.

        Returns:
            ForwardMeta with B rows and T tokens. B may be below `max_num_seqs`, and a step may
            have no token at all.

        Raises:
            DtypeError, ShapeError: an input is not int32, or shapes disagree.
            CapacityError: more rows, tokens, padding or blocks than this builder was made for.
            ValueError: negative or inconsistent lengths, a needed block id that is no block, a
                keyword that disagrees with the arrays; row and value are named.
            BackendUnavailable: a tensor on a device.

        Cost: a fixed number of NumPy calls; no allocation that grows with the capacity.
        Source: PaddlePaddle/FastDeploy #7367 and #7598.
        """
        inputs = checks.StepInputs(
            checks.host_array("seq_lens_encoder", seq_lens_encoder),
            checks.host_array("seq_lens_decoder", seq_lens_decoder),
            checks.host_array("seq_lens_this_time", seq_lens_this_time),
            checks.host_array("block_tables", block_tables),
        )
        checks.check_layout(inputs, self.limits)
        totals = checks.check_values(inputs, self.limits)
        padded_tokens, max_keys = checks.check_host_counts(
            totals, self.limits, num_padded_tokens, num_tokens, num_prefill_tokens, max_seqlen_k
        )
        self._buffers.write(inputs, totals)
        self.num_builds += 1

        num_rows = len(inputs.seq_lens_this_time)
        has_prefill = totals.num_prefill_tokens > 0
        encoder, decoder, this_time, cu_q, tables, cache_lens = self._row_views(num_rows)
        batch_ids, positions, slots = self._token_views(padded_tokens)
        offsets, cu_kg = (
            self._prefill_views(num_rows, padded_tokens) if has_prefill else (None, None)
        )
        return ForwardMeta(
            seq_lens_encoder=encoder,
            seq_lens_decoder=decoder,
            seq_lens_this_time=this_time,
            cu_seqlens_q=cu_q,
            block_tables=tables,
            batch_id_per_token=batch_ids,
            position_ids=positions,
            slot_mapping=slots,
            cache_seqlens=cache_lens,
            indexer_attn_mask_offsets=offsets,
            cu_seqlens_kg=cu_kg,
            num_prefill_tokens=totals.num_prefill_tokens,
            num_decode_tokens=totals.num_tokens - totals.num_prefill_tokens,
            max_seqlen_k=max_keys,
        )


def _view_for(device: str) -> _View:
    """How a NumPy buffer becomes an array of the step on `device`, sharing its memory."""
    if device == "numpy":
        return lambda array: array
    if device != "cpu":
        raise BackendUnavailable(
            f"device: got {device!r}, the NumPy provider serves 'cpu' (Paddle tensors) and 'numpy' "
            "(no Paddle); the Triton provider for 'gpu' comes with a later release"
        )
    try:
        from paddle.utils.dlpack import from_dlpack
    except ImportError as error:
        raise BackendUnavailable(
            "device: 'cpu' needs Paddle, which is not installed; install fd_dsa[cpu], or build "
            "with device='numpy'"
        ) from error
    view: _View = from_dlpack
    return view


def _row_views(buffers: HostBuffers, view: _View, num_rows: int) -> tuple[Array, ...]:
    """The arrays of a step that have one entry for each row."""
    return (
        view(buffers.seq_lens_encoder[:num_rows]),
        view(buffers.seq_lens_decoder[:num_rows]),
        view(buffers.seq_lens_this_time[:num_rows]),
        view(buffers.cu_seqlens_q[: num_rows + 1]),
        view(buffers.block_tables[:num_rows]),
        view(buffers.cache_seqlens[:num_rows]),
    )


def _token_views(buffers: HostBuffers, view: _View, num_tokens: int) -> tuple[Array, ...]:
    """The arrays of a step that have one entry for each token."""
    return (
        view(buffers.batch_id_per_token[:num_tokens]),
        view(buffers.position_ids[:num_tokens]),
        view(buffers.slot_mapping[:num_tokens]),
    )


def _prefill_views(
    buffers: HostBuffers, view: _View, num_rows: int, num_tokens: int
) -> tuple[Array, Array]:
    """The arrays that only a step with a prefill token has."""
    return (
        view(buffers.indexer_attn_mask_offsets[: 2 * num_tokens]),
        view(buffers.cu_seqlens_kg[: num_rows + 1]),
    )
