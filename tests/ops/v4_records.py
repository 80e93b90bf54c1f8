"""FP8 records of DeepSeek-V4's keys and entries by definition, and a CPU that rounds to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa.models.deepseek_v4.compressor import Compressor
from fd_dsa.v4_attention import V4AttentionBackend
from tests.ops import block_fp8
from tests.ops.e4m3 import E4M3_VALUES

ROPE = 8
"""Rotated channels of the kernel tests and of tiny models, which are a group."""
POSITIVE = E4M3_VALUES[:127].astype(np.float64)


def exponents(largest: np.ndarray) -> np.ndarray:
    """Biased exponents of the scales of values up to `largest`, rounded up to a power of two."""
    scale = np.maximum(largest, np.float32(1e-4)) / np.float32(448)
    mantissa, exponent = np.frexp(scale)
    return np.where(mantissa == 0.5, exponent - 1, exponent) + 127


def codes(x: np.ndarray) -> np.ndarray:
    """The nearest e4m3 codes, of two the even one."""
    size = np.abs(x).astype(np.float64)
    above = np.searchsorted(POSITIVE, size).clip(1, 126)
    low, high = size - POSITIVE[above - 1], POSITIVE[above] - size
    nearest = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    return (nearest | np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def records(keys: np.ndarray, rope: int = ROPE) -> np.ndarray:
    """The records of keys float32 [n, width], by definition."""
    groups = keys.reshape(len(keys), -1, rope)
    powers = exponents(np.abs(groups).max(axis=2))
    coded = codes(groups / 2.0 ** (powers[..., None] - 127))[:, :-1].reshape(len(keys), -1)
    rotated = block_fp8.rounded(groups[:, -1], "bfloat16").view(np.uint32) >> 16
    return np.concatenate(
        (coded, rotated.astype(np.uint16).view(np.uint8), powers.astype(np.uint8)), axis=1
    )


def values(found: np.ndarray, rope: int = ROPE) -> np.ndarray:
    """The keys of records [n, bytes], float64."""
    count, width = len(found), (found.shape[1] - rope) * rope // (rope + 1)
    coded, rotated, powers = np.split(found, [width - rope, width + rope], axis=1)
    scales = 2.0 ** (powers[:, :-1].astype(np.float64) - 127)
    tail = rotated.copy().view(np.uint16).astype(np.uint32) << 16
    groups = E4M3_VALUES[coded].reshape(count, -1, rope) * scales[..., None]
    return np.concatenate((groups.reshape(count, -1), tail.view(np.float32)), axis=1)


def rounded(keys: np.ndarray, rope: int = ROPE) -> np.ndarray:
    """Keys float32 [n, width] as their records hold them."""
    return values(records(np.ascontiguousarray(keys), rope), rope).astype(np.float32)


def rounded_rows(x: np.ndarray) -> np.ndarray:
    """Rows float32 [..., width] as FP8 codes of the indexer with one scale hold them."""
    scales = 2.0 ** (exponents(np.abs(x).max(axis=-1, keepdims=True)) - 127)
    return (E4M3_VALUES[codes(x / scales)] * scales).astype(np.float32)


def round_on_the_cpu(monkeypatch: pytest.MonkeyPatch, rope: int = ROPE) -> None:
    """Round keys and entries on the CPU as records do, and index queries as FP8 codes."""
    write, select = V4AttentionBackend.write, V4AttentionBackend.select
    entries = Compressor.entries

    def write_rounded(backend: Any, kv: np.ndarray, *rest: Any) -> None:
        write(backend, rounded(kv, rope), *rest)

    def select_rounded(backend: Any, q: np.ndarray, *rest: Any) -> np.ndarray:
        return select(backend, rounded_rows(q), *rest)

    def entries_rounded(compressor: Any, *given: Any) -> list[np.ndarray]:
        key, *index = entries(compressor, *given)
        return [rounded(key, rope), *map(rounded_rows, index)]

    monkeypatch.setattr(V4AttentionBackend, "write", write_rounded)
    monkeypatch.setattr(V4AttentionBackend, "select", select_rounded)
    monkeypatch.setattr(Compressor, "entries", entries_rounded)
