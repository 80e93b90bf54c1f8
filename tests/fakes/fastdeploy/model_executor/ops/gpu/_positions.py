"""Positions, slots and launch buffers: custom_ops/gpu_ops/get_position_ids*.cu and
get_block_shape_and_split_kv_block.cu.

One block with one thread a row: each thread adds up the lengths of the rows before it, then walks
its tokens one after the other, and a batch of more rows than a block has threads cannot launch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdeploy import _counters
from fastdeploy._arrays import host, writable

from ._checks import check_dtypes

THREADS_OF_A_BLOCK = 1024


def get_position_ids(
    seq_lens_encoder: Any, seq_lens_decoder: Any, seq_lens_this_time: Any, position_ids: Any
) -> None:
    """Positions of each row's tokens in a buffer of the step, int32 (#7367)."""
    op = "get_position_ids"
    _start(op, seq_lens_decoder)
    check_dtypes(op, "int32", position_ids=position_ids)
    place = 0
    with writable(position_ids) as positions:
        for _, decoder, this_time in _rows(seq_lens_encoder, seq_lens_decoder, seq_lens_this_time):
            _fill(positions, place, decoder + np.arange(this_time))
            place += this_time


def get_position_ids_and_slot_mapping(
    seq_lens_encoder: Any,
    seq_lens_decoder: Any,
    seq_lens_this_time: Any,
    batch_id_per_token: Any,
    block_tables: Any,
    position_ids: Any,
    slot_mapping: Any,
    block_size: int,
) -> None:
    """The fused form, int64. What lies past the last token stays as it was; -1 is not guarded."""
    op = "get_position_ids_and_slot_mapping"
    _start(op, seq_lens_decoder)
    check_dtypes(op, "int64", position_ids=position_ids, slot_mapping=slot_mapping)
    tables = host(block_tables)
    place = 0
    rows = _rows(seq_lens_encoder, seq_lens_decoder, seq_lens_this_time)
    with writable(position_ids) as positions, writable(slot_mapping) as slots:
        for row, (_, decoder, this_time) in enumerate(rows):
            here = decoder + np.arange(this_time)
            # past the last column a thread reads the next row's first ones
            block = tables.reshape(-1).take(row * tables.shape[1] + here // block_size, mode="clip")
            _fill(positions, place, here)
            _fill(slots, place, block.astype(np.int64) * block_size + here % block_size)
            place += this_time


def get_block_shape_and_split_kv_block(
    seq_lens_encoder: Any,
    seq_lens_decoder: Any,
    seq_lens_this_time: Any,
    decoder_batch_ids: Any,
    decoder_tile_ids_per_batch: Any,
    decoder_num_blocks_cpu: Any,
    decoder_num_blocks_device: Any,
    decoder_chunk_size_device: Any,
    max_len_tensor_cpu: Any,
    encoder_batch_ids: Any,
    encoder_tile_ids_per_batch: Any,
    encoder_num_blocks_x_cpu: Any,
    kv_batch_ids: Any,
    kv_tile_ids_per_batch: Any,
    kv_num_blocks_x_cpu: Any,
    encoder_block_shape_q: int,
    decoder_block_shape_q: int,
    group_size: int,
    block_size: int,
) -> None:
    """Six maxima to the host, with a wait for the stream, and tile counts by block shapes of -1."""
    _fill_maxima(seq_lens_encoder, seq_lens_decoder, seq_lens_this_time, max_len_tensor_cpu)
    for counts in (decoder_num_blocks_cpu, encoder_num_blocks_x_cpu, kv_num_blocks_x_cpu):
        with writable(counts) as values:
            # numbers of tiles of minus one token: never read by the DSA backend
            values[...] = -int(host(max_len_tensor_cpu)[0])


def _fill_maxima(encoder: Any, decoder: Any, this_time: Any, max_len_tensor_cpu: Any) -> None:
    _counters.launch("get_block_shape_and_split_kv_block")
    if _counters.capturing:
        # the copy is left out while a graph is recorded: the values of the run before stay
        return
    _counters.sync("get_block_shape_and_split_kv_block")
    encoder, decoder, now = np.array(_rows(encoder, decoder, this_time)).reshape(-1, 3).T
    active = now > 0
    values = (
        now,
        encoder,
        decoder,
        (decoder + now)[active],
        decoder[active & (encoder == 0)],
        (decoder + now)[active & (decoder > 0)],
    )
    with writable(max_len_tensor_cpu) as out:
        out[: len(values)] = [value.max(initial=0) for value in values]


def _start(op: str, seq_lens_decoder: Any) -> None:
    _counters.launch(op)
    rows = seq_lens_decoder.shape[0]
    if rows > THREADS_OF_A_BLOCK:
        raise RuntimeError(f"{op}: {rows} rows, a block has {THREADS_OF_A_BLOCK} threads")


def _rows(*lengths: Any) -> list[tuple[int, ...]]:
    """(encoder, decoder, this_time) of each row; the shortest says how many rows there are."""
    columns = [host(column).reshape(-1).tolist() for column in lengths]
    return list(zip(*columns, strict=False))


def _fill(out: np.ndarray, start: int, values: np.ndarray) -> None:
    """Write from `start` on; what would lie past the buffer is dropped."""
    end = min(start + len(values), len(out))
    out[start:end] = values[: max(end - start, 0)]


POSITION_OPS = {
    "get_position_ids_and_mask_encoder_batch": get_position_ids,
    "get_position_ids_and_slot_mapping": get_position_ids_and_slot_mapping,
}
