"""Sums whose order does not depend on what else a step holds, where that is asked for.

A float32 sum depends on its order, and a matrix library chooses the order by the sizes of both
factors. So the last bits of a token's numbers depend on how many tokens share its step: on chunk
sizes, prefix hits, preemption and the batch. With FD_DSA_BATCH_INVARIANT=1 they do not.

On a CPU, MKL keeps one order for all numbers of rows (its "strict" reproducible mode), products
over keys go chunk by chunk, and a token attends in the same way however long its prompt is.

On a device, every GEMM, every attention and every score is by one kernel of ours, compiled in one
form: tiles as for many rows, and no sum split among programs. cuBLASLt, Paddle's matmul and the
kernels of custom_ops/ that choose by the number of rows serve nothing.
"""

from __future__ import annotations

import logging
from functools import cache

import numpy as np

from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.environment import batch_invariant
from fd_dsa.errors import ConfigError
from fd_dsa.ops.arrays import as_numpy, matmul, staged

logger = logging.getLogger(__name__)
# rows that a launch on a device is cut for in one order: so many that no sum is split
_MANY_ROWS = 8192
# keys of a chunk: on every processor that was tried, the library adds this many up in order
_KEYS = 256
# rows, and (in, out) of GEMMs that are tried
_PROBE_ROWS = (1, 2, 7, 64)
_PROBE_SIZES = ((384, 256), (1024, 128), (64, 512))


@cache
def fixed_order() -> bool:
    """True if this process keeps one order; read from the environment once."""
    return batch_invariant()


def rows_of_tiles(num_rows: int) -> int:
    """Rows that the tiles of a launch on a device are chosen for; in one order always as many."""
    return _MANY_ROWS if fixed_order() else num_rows


def why_not_by_rows() -> str:
    """Why what adds in another order for other numbers of rows cannot serve; "" if it can."""
    return "FD_DSA_BATCH_INVARIANT=1 keeps one form" if fixed_order() else ""


def two_rows(x: np.ndarray) -> np.ndarray:
    """`x` with its only row twice: for a single row the library runs another kind of GEMM.

    Args:
        x: [..., rows, width].
    """
    return np.repeat(x, 2, axis=-2) if x.shape[-2] == 1 else x


def weighted_sum(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """weights [..., rows, keys] times values [..., keys, width], chunk after chunk of the keys.

    Keys of weight zero at the end change nothing, whatever their number.
    """
    total = None
    for start in range(0, weights.shape[-1], _KEYS):
        chunk = slice(start, start + _KEYS)
        rows = np.ascontiguousarray(weights[..., chunk])
        keys = as_tensor(np.ascontiguousarray(values[..., chunk, :]))
        part = as_numpy(matmul(staged(two_rows(rows)), keys))[..., : rows.shape[-2], :]
        total = part if total is None else total + part
    assert total is not None, "weights without keys"
    return total


def row_sums(x: np.ndarray) -> np.ndarray:
    """Sums of the last axis, kept as an axis; zeros at its end change nothing."""
    total = np.zeros((*x.shape[:-1], 1), x.dtype)
    for start in range(0, x.shape[-1], _KEYS):
        part = x[..., start : start + _KEYS]
        if part.shape[-1] < _KEYS:
            missing = _KEYS - part.shape[-1]
            part = np.pad(part, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        total += part.sum(axis=-1, keepdims=True)
    return total


def check_fixed_order(device: str, num_ranks: int = 1) -> None:
    """Refuse a device, or a number of ranks, where one order is asked for and cannot be had.

    Raises:
        ConfigError: several devices, whose sums are made in one of two ways by the number of rows,
            or a CPU's matrix library whose rows depend on their number.
    """
    if not fixed_order():
        return
    if device != "cpu":
        if num_ranks > 1:
            raise ConfigError(
                f"FD_DSA_BATCH_INVARIANT: got 1 with --tensor-parallel-size {num_ranks} on "
                f"{device}, allowed is one device or a CPU: sums over ranks depend on the rows"
            )
        logger.info(
            "FD_DSA_BATCH_INVARIANT=1: one form of our own kernels for any number of rows, and no "
            "GEMMs of cuBLASLt or Paddle"
        )
        return
    orders = (False, True)
    if not all(rows_agree(*sizes, order) for sizes in _PROBE_SIZES for order in orders):
        raise ConfigError(
            "FD_DSA_BATCH_INVARIANT: got 1, but on this machine a row of a GEMM depends on the "
            "number of rows; set MKL_CBWR=AUTO,STRICT before the process starts, or unset it"
        )


def rows_agree(width: int, out: int, transpose_y: bool) -> bool:
    """Whether rows of a GEMM have the same bits beside any number of other rows."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((max(_PROBE_ROWS), width)).astype(np.float32)
    shape = (out, width) if transpose_y else (width, out)
    weight = as_tensor(rng.standard_normal(shape).astype(np.float32))

    def result(rows: int) -> np.ndarray:
        return as_numpy(matmul(staged(x[:rows]), weight, transpose_y=transpose_y)).copy()

    whole = result(len(x))
    return all(np.array_equal(result(rows), whole[:rows]) for rows in _PROBE_ROWS)
