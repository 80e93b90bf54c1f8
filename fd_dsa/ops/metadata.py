"""Operator that builds the metadata of one step without a builder of the caller."""

from __future__ import annotations

from fd_dsa.ops.arrays import as_numpy, check_array, on_device
from fd_dsa.ops.providers import device_kind, device_name, function, select_provider
from fd_dsa.step import ForwardMeta, StepMetadataBuilder
from fd_dsa.tensor import Array


def step_metadata(
    seq_lens_encoder: Array,
    seq_lens_decoder: Array,
    seq_lens_this_time: Array,
    block_tables: Array,
    *,
    block_size: int,
    num_blocks: int | None = None,
    num_tokens: int | None = None,
    num_prefill_tokens: int | None = None,
    max_seqlen_k: int | None = None,
    out: StepMetadataBuilder | None = None,
) -> ForwardMeta:
    """Build the positions, rows, slots and windows of a step's tokens for all layers.

    Args:
        seq_lens_encoder, seq_lens_decoder, seq_lens_this_time: int32 [num_rows], see
            `StepMetadataBuilder.build`.
        block_tables: int32 [num_rows, max_blocks], physical block of each logical block.
        block_size: tokens of a block.
        num_blocks: blocks of the cache, to check the tables; None = no upper bound.
        num_tokens: tokens of the step. This and the next two may be upper bounds on a device. The
            operator computes those that are None, and waits for the device to do so.
        num_prefill_tokens: tokens of prompt rows.
        max_seqlen_k: keys of the longest row.
        out: builder for tensors of this place, whose buffers are filled. It has a `block_size` and
            `num_blocks` of its own. None makes a builder for this step only.

    Returns:
        ForwardMeta of Paddle tensors, valid until `out` builds another step.

    Raises:
        ShapeError, DtypeError, CapacityError, ValueError: see `StepMetadataBuilder.build`.
        ConfigError, BackendUnavailable: FD_DSA_OP_PROVIDER, see `providers.select_provider`.

    Source: PaddlePaddle/FastDeploy #7367 and #7598.
    """
    name = "step_metadata"
    check_array(name, "block_tables", block_tables, (None, None), ("int32",))
    num_rows, max_blocks = block_tables.shape
    inputs = seq_lens_encoder, seq_lens_decoder, seq_lens_this_time
    names = "seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time"
    for argument, lengths in zip(names, inputs, strict=True):
        check_array(name, argument, lengths, (num_rows,), ("int32",))
    kind = device_kind(block_tables)
    counts = {"num_prefill_tokens": num_prefill_tokens, "max_seqlen_k": max_seqlen_k}
    if num_tokens is None or None in counts.values():
        encoder, decoder, new = (x.numpy() if on_device(x) else as_numpy(x) for x in inputs)
        computed = (
            int(new.sum()),
            int(new[encoder > 0].sum()),
            int(((decoder + new) * (new > 0)).max(initial=0)),
        )
        num_tokens = computed[0] if num_tokens is None else num_tokens
        known = zip(counts.items(), computed[1:], strict=True)
        counts = {key: other if value is None else value for (key, value), other in known}
    builder = function(name, select_provider(name, kind).provider)
    if out is None:
        sizes = max(num_rows, 1), max(num_tokens, 1), max(max_blocks, 1), block_size, num_blocks
        out = builder(*sizes, device="cpu" if kind == "cpu" else device_name(block_tables))
    return out.build(*inputs, block_tables, num_tokens=num_tokens, **counts)
