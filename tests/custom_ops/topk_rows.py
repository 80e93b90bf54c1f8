"""Rows of scores for the tests of top-k, what is right for them, and calls of the C ABI."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fd_dsa.ops.topk import ordered_bits
from fd_dsa.ops.topk.custom_op import TopkRows

DENORMAL = float(np.uint32(1).view(np.float32))
SPECIAL = np.float32(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, DENORMAL, -DENORMAL, 3.4e38, -3.4e38]
)
SPECIAL = np.append(SPECIAL, np.uint32(0xFFC00000).view(np.float32))
KINDS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "relu": lambda rng, shape: np.maximum(rng.standard_normal(shape), 0),
    "zeros": lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) > 0.97),
    "minus zeros": lambda rng, shape: rng.integers(-1, 2, shape) * rng.choice([-0.0, 1.0], shape),
    "3 + N(0, 0.1)": lambda rng, shape: 3 + rng.standard_normal(shape) / 10,
    "100 + U(0, 0.01)": lambda rng, shape: 100 + rng.random(shape) / 100,
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-6,
    "denormal": lambda rng, shape: rng.integers(-9, 9, shape) * DENORMAL,
    "equal": lambda rng, shape: np.zeros(shape),
    "few values": lambda rng, shape: rng.integers(-3, 3, shape),
    "special": lambda rng, shape: rng.choice(SPECIAL, shape),
    "nan": lambda rng, shape: np.where(rng.random(shape) < 0.99, np.nan, 1.0),
    "minus inf": lambda rng, shape: np.where(
        rng.random(shape) < 0.5, -np.inf, rng.standard_normal(shape)
    ),
    "sinks": lambda rng, shape: np.where(
        rng.random(shape) < 0.01, 1e30, rng.standard_normal(shape)
    ),
    "ascending": lambda rng, shape: np.sort(rng.standard_normal(shape), axis=1),
    "descending": lambda rng, shape: -np.sort(rng.standard_normal(shape), axis=1),
    "recent": lambda rng, shape: (
        rng.standard_normal(shape) + 9 * (np.arange(shape[1]) > 0.95 * shape[1])
    ),
    "every 64th": lambda rng, shape: (
        rng.standard_normal(shape) + 9 * (np.arange(shape[1]) % 64 == 5)
    ),
}


def scores_of(kind: str, rows: int, width: int, seed: int) -> np.ndarray:
    """float32 [rows, width]."""
    return KINDS[kind](np.random.default_rng(seed), (rows, width)).astype(np.float32)


def best(scores: np.ndarray, lengths: Any, k: int) -> np.ndarray:
    """Select by a sort of score and position: int32 [rows, k]. Lengths may be any numbers."""
    width = scores.shape[1]
    image = ordered_bits(scores).astype(np.uint64)
    image[np.isnan(scores)] = 0
    keys = (image << np.uint64(32)) | (np.uint64(0xFFFFFFFF) - np.arange(width, dtype=np.uint64))
    out = np.full((len(scores), k), -1, np.int32)
    for row, length in enumerate(np.clip(lengths, 0, width)):
        chosen = np.sort(np.argsort(keys[row, :length])[::-1][:k])
        out[row, : len(chosen)] = chosen
    return out


def rows_of(logits: Any, lengths: Any, out: Any, width: int, row_stride: int) -> TopkRows:
    """Return the argument of the C ABI for tensors or arrays, without a reference to them."""
    address = [a.ctypes.data if isinstance(a, np.ndarray) else a.data_ptr() for a in (logits, out)]
    counts = lengths.ctypes.data if isinstance(lengths, np.ndarray) else lengths.data_ptr()
    return TopkRows(
        logits=address[0],
        lengths=counts,
        out=address[1],
        num_rows=out.shape[0],
        width=width,
        k=out.shape[1],
        row_stride=row_stride,
    )


def call(kernels: Any, rows: TopkRows, stream: int = 0) -> None:
    """Launch, and fail on an error."""
    code = kernels.fd_dsa_topk_cuda(ctypes.byref(rows), ctypes.c_void_p(stream))
    assert code == 0, f"CUDA error {code}"
