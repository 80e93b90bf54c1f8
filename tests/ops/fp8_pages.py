"""Random fp8_ds_mla index caches and queries for the tests of kernels that score them."""

from __future__ import annotations

import numpy as np

from tests.ops.e4m3 import E4M3_VALUES
from tests.ops.paged_rows import PagedRows

_NAN = 0x7F


def random_codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """uint8: e4m3 codes of every number, none of NaN."""
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7F) == _NAN] = 0
    return codes


def fp8_cache(rng: np.random.Generator, step: PagedRows, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [num_blocks, block_size, dim + 4] block-planar, and its values; NaN where unseen."""
    size = step.block_size
    keys = random_codes(rng, (step.num_blocks * size, dim))
    scales = np.exp2(rng.integers(-3, 4, len(keys))).astype(np.float32)
    unseen = np.setdiff1d(np.arange(len(keys)), step.seen_slots())
    keys[unseen], scales[unseen] = _NAN, np.nan
    cache = np.empty((step.num_blocks, size * (dim + 4)), np.uint8)
    cache[:, : size * dim] = keys.reshape(step.num_blocks, -1)
    cache[:, size * dim :] = scales.view(np.uint8).reshape(step.num_blocks, -1)
    values = E4M3_VALUES[keys].astype(np.float64) * scales[:, None]
    return cache.reshape(step.num_blocks, size, dim + 4), values
