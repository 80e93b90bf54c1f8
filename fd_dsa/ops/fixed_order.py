"""Batch-invariant mode: sums whose order does not depend on batch composition.

A float32 sum depends on its order, and a matrix library selects the order by the sizes of both
factors. So the last bits of a token's numbers depend on the number of tokens in its step: on chunk
sizes, prefix hits, preemption and the batch. With FD_DSA_BATCH_INVARIANT=1 they do not.

On a CPU, MKL keeps one order for all numbers of rows (its "strict" reproducible mode). Products
over keys go chunk by chunk, and a token attends in the same way for every length of its prompt.

On a device, one kernel of fd_dsa in one compiled form computes every GEMM, attention and score. Its
tiles are those for many rows, and no sum is split among programs. Only the C++ kernels for experts
in four bits have several forms, whose sums have one order. cuBLASLt, Paddle's matmul and the
kernels of custom_ops/ that depend on the number of rows are not used.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

import numpy as np

from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.environment import batch_invariant
from fd_dsa.errors import ConfigError
from fd_dsa.ops.arrays import as_numpy, matmul, staged

logger = logging.getLogger(__name__)
# keys of a chunk, which the library adds in order on all processors that were tried
_KEYS = 256
# numbers of rows, and (in, out) of the GEMMs that `check_fixed_order` tries
_PROBE_ROWS = (1, 2, 7, 64)
_PROBE_SIZES = ((384, 256), (1024, 128), (64, 512))
# of mkl_cbwr.h
_MKL_CBWR_ALL, _MKL_CBWR_STRICT = -1, 0x10000


@cache
def fixed_order() -> bool:
    """Return True in batch-invariant mode. Only the first call reads the environment."""
    return batch_invariant()


def row_dependence_refusal() -> str:
    """Return why a kernel whose order of sums depends on the number of rows is refused, else ""."""
    return "FD_DSA_BATCH_INVARIANT=1 keeps one form" if fixed_order() else ""


def two_rows(x: np.ndarray) -> np.ndarray:
    """Return `x` with its row repeated if it has one row, else `x`.

    For a single row the library runs another kind of GEMM.

    Args:
        x: array [..., rows, width].
    """
    return np.repeat(x, 2, axis=-2) if x.shape[-2] == 1 else x


def weighted_sum(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return weights [..., rows, keys] times values [..., keys, width], chunk by chunk of keys.

    Any number of keys with weight zero at the end leaves the result as it is.
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
    """Return sums over the last axis [..., 1], which do not depend on zeros at its end."""
    total = np.zeros((*x.shape[:-1], 1), x.dtype)
    for start in range(0, x.shape[-1], _KEYS):
        part = x[..., start : start + _KEYS]
        if part.shape[-1] < _KEYS:
            missing = _KEYS - part.shape[-1]
            part = np.pad(part, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        total += part.sum(axis=-1, keepdims=True)
    return total


def check_fixed_order(device: str, num_ranks: int = 1) -> None:
    """Refuse a device or a number of ranks without a batch-invariant mode, if the mode is on.

    Raises:
        ConfigError: sums over several devices depend on the number of rows, or those of the CPU's
            matrix library do.
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
            "FD_DSA_BATCH_INVARIANT=1: one order of the sums of a row for any number of rows, and "
            "no GEMMs of cuBLASLt or Paddle"
        )
        return
    orders = (False, True)
    agree = all(rows_agree(*sizes, order) for sizes in _PROBE_SIZES for order in orders)
    # the sizes of the probe agree on some processors on which others differ
    if not agree or library_is_strict() is False:
        raise ConfigError(
            "FD_DSA_BATCH_INVARIANT: got 1, but on this machine a row of a GEMM depends on the "
            "number of rows; set MKL_CBWR=AUTO,STRICT before the process starts, or unset it"
        )


def library_is_strict() -> bool | None:
    """Return True if MKL keeps its strict order of sums in this process, or None without MKL.

    MKL reads MKL_CBWR once, so a variable that is set after the first GEMM has no effect.
    """
    import paddle

    try:
        library = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libmklml_intel.so"))
        mode = library.mkl_serv_cbwr_get
    except (OSError, AttributeError):
        return None
    mode.restype = ctypes.c_int
    return bool(mode(_MKL_CBWR_ALL) & _MKL_CBWR_STRICT)


def rows_agree(width: int, out: int, transpose_y: bool) -> bool:
    """Return True if the rows of a GEMM have the same bits for all numbers of rows."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((max(_PROBE_ROWS), width)).astype(np.float32)
    shape = (out, width) if transpose_y else (width, out)
    weight = as_tensor(rng.standard_normal(shape).astype(np.float32))

    def result(rows: int) -> np.ndarray:
        return as_numpy(matmul(staged(x[:rows]), weight, transpose_y=transpose_y)).copy()

    whole = result(len(x))
    return all(np.array_equal(result(rows), whole[:rows]) for rows in _PROBE_ROWS)
