"""Slots and windows as FastDeploy's layers made them, for the engine of `once_per_step`.

Before #7367 every layer made its slots twice, by six operators. Before #7598 the indexer of every
layer made the windows of prompts in a loop over the requests. The loop waited for lengths on the
device. Paddle's CPU wheel has no kernels for these operators in the memory of the test plug-in.
There each operator is one Triton kernel with its own output, launched like the engine's kernels.
Paddle's own operators take longer on the host.

Source: `compute_slot_mapping` and `Indexer.forward` of PaddlePaddle/FastDeploy's deepseek_v3.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from fd_dsa.device.transfers import on_host, transfers_for
from fd_dsa.ops.step_kernel import step_kernel

import triton.language as tl  # isort: skip

_BLOCK = 256


@step_kernel()
def operator_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    count,
    OPERATOR: tl.constexpr,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Apply an elementwise operator to x and a number, or to x and y."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0)
    if OPERATOR == "divide":
        x = x // NUMBER
    elif OPERATOR == "remainder":
        x = x % NUMBER
    elif OPERATOR == "multiply":
        x = x * NUMBER
    elif OPERATOR == "add":
        x = x + tl.load(y_ptr + at, mask=at < count, other=0)
    tl.store(out_ptr + at, x, mask=at < count)


@step_kernel()
def gather_kernel(tables_ptr, rows_ptr, columns_ptr, out_ptr, count, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gather entries of a table at pairs of row and column. Rows of padding give -1."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + at, mask=at < count, other=-1).to(tl.int64)
    column = tl.load(columns_ptr + at, mask=at < count, other=0)
    entry = tl.load(tables_ptr + row * width + column, mask=row >= 0, other=-1)
    tl.store(out_ptr + at, entry, mask=at < count)


@step_kernel()
def write_range_kernel(out_ptr, first, stride, count, value, increment, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write values from `value` on to places from `first` on, a stride apart."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + first + at * stride, value + at * increment, mask=at < count)


def slot_chain(step: Any, block_size: int, by_kernels: bool) -> Any:
    """Make the slots of a step from its positions and rows by six operators.

    Args:
        by_kernels: each operator is a kernel of this module, else Paddle's.

    Returns:
        int64 [num_tokens]; any negative number for padding.
    """
    positions, rows, tables = step.position_ids, step.batch_id_per_token, step.block_tables
    if not by_kernels:
        # Paddle adds no int32 to int64
        blocks = tables[rows, positions // block_size].cast("int64")
        return blocks * block_size + positions % block_size
    columns = _operator("divide", positions, "int64", block_size)
    blocks, count = _empty(rows, "int32"), rows.shape[0]
    gather_kernel[(-(-count // _BLOCK),)](
        tables, rows, columns, blocks, count, tables.shape[1], BLOCK=_BLOCK
    )
    blocks = _operator("cast", blocks, "int64")
    starts = _operator("multiply", blocks, "int64", block_size)
    offsets = _operator("remainder", positions, "int64", block_size)
    return _operator("add", starts, "int64", other=offsets)


def write_windows(step: Any, by_kernels: bool) -> None:
    """Make the windows of a step's prompts by a loop over its requests, where layers read them.

    The loop reads four lengths of each request from the device and launches two writes;
    FastDeploy's reads them six times and launches four operators. Then it waits for the longest
    window, which is left out here.
    """
    offsets = step.indexer_attn_mask_offsets
    read, write = (_copied, _written) if by_kernels else (_item, _assigned)
    for begin in range(2):
        write(offsets, begin, offsets.shape[0] // 2, 0, 0)
    for row in range(step.seq_lens_encoder.shape[0]):
        new = read(step.seq_lens_encoder, row)
        if new <= 0:
            continue
        first, start = read(step.cu_seqlens_q, row), read(step.cu_seqlens_kg, row)
        cached = read(step.cu_seqlens_kg, row + 1) - start - new
        write(offsets, 2 * first, new, start, 0)
        write(offsets, 2 * first + 1, new, start + cached + 1, 1)


def values_of(tensor: Any, dtype: str) -> np.ndarray:
    """Return a copy of a tensor's values. The host waits for the device."""
    if not tensor.place.is_custom_place():
        return np.array(tensor)
    return on_host(tensor, np.empty(tuple(tensor.shape), dtype))


def _empty(like: Any, dtype: str) -> Any:
    return paddle.empty(like.shape, dtype, device=like.place)


def _operator(name: str, x: Any, dtype: str, number: int = 0, other: Any = None) -> Any:
    out, count = _empty(x, dtype), x.shape[0]
    operator_kernel[(-(-count // _BLOCK),)](
        x, other, out, count, OPERATOR=name, NUMBER=number, BLOCK=_BLOCK
    )
    return out


def _copied(tensor: Any, index: int) -> int:
    """Return an int32 value of a tensor by a copy of four bytes, and wait for the device."""
    value, transfers = np.empty(1, np.int32), transfers_for(tensor)
    transfers.copy("d2h", value.ctypes.data, tensor.data_ptr() + 4 * index).queue(4)
    transfers.finish()
    return int(value[0])


def _item(tensor: Any, index: int) -> int:
    """Return an int32 value of a tensor by Paddle."""
    return int(tensor[index])


def _written(out: Any, first: int, count: int, value: int, increment: int) -> None:
    """Write to every second place of an int32 tensor from `first` on."""
    grid = (-(-count // _BLOCK),)
    write_range_kernel[grid](out, first, 2, count, value, increment, BLOCK=_BLOCK)


def _assigned(out: Any, first: int, count: int, value: int, increment: int) -> None:
    """Write to every second place of an int32 tensor by Paddle."""
    values = paddle.arange(count, dtype="int32") * increment + value
    out[first : first + 2 * count : 2] = values
