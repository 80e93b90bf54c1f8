"""Frequencies, cos and sin of a step, plain and YaRN, against formula and published numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa.models.config import RopeConfig
from fd_dsa.models.registry import config_from_dict
from fd_dsa.models.rope import cos_sin_table, inverse_frequencies
from tests.models.folders import TINY, YARN
from tests.reference.rope import ref_frequencies, ref_yarn_frequencies

# DeepSeek-V3.2's config.json
V32 = TINY | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "index_head_dim": 128}


def rope_of(fields: dict[str, Any]) -> RopeConfig:
    return config_from_dict(fields).rope


@pytest.mark.parametrize(("dim", "theta"), [(64, 10000.0), (64, 1000000.0), (4, 10000.0)])
def test_plain_frequencies(dim: int, theta: float) -> None:
    found = inverse_frequencies(RopeConfig(theta=theta), dim)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, ref_frequencies(dim, theta), rtol=1e-6)


def test_yarn_of_deepseek_v32() -> None:
    low, high, wanted = ref_yarn_frequencies(64, 10000.0, 40.0, 4096, 32.0, 1.0)
    assert (low, high) == (10, 23)
    found = inverse_frequencies(rope_of(V32 | {"rope_scaling": YARN}), 64)
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
    # untouched up to the first pair of the blend, divided from its last pair on, between else
    plain = inverse_frequencies(RopeConfig(), 64)
    np.testing.assert_array_equal(found[: low + 1], plain[: low + 1])
    np.testing.assert_allclose(found[high:], plain[high:] / 40, rtol=1e-6)
    between = found[low + 1 : high] / plain[low + 1 : high]
    assert (np.diff(between) < 0).all()
    assert ((between < 1) & (between > 1 / 40)).all()


@pytest.mark.parametrize(
    ("factor", "original", "beta_fast", "beta_slow", "theta", "dim"),
    [(8.0, 64, 32.0, 1.0, 10000.0, 16), (4.0, 32768, 16.0, 2.0, 1000000.0, 64)],
)
def test_yarn_of_other_settings(factor, original, beta_fast, beta_slow, theta, dim) -> None:
    rope = RopeConfig(theta, "yarn", factor, original, beta_fast, beta_slow, 1.0, 1.0)
    _, _, wanted = ref_yarn_frequencies(dim, theta, factor, original, beta_fast, beta_slow)
    np.testing.assert_allclose(inverse_frequencies(rope, dim), wanted, rtol=2e-6)


def test_table_of_all_positions() -> None:
    rope = rope_of(V32 | {"rope_scaling": YARN})
    table = cos_sin_table(rope, 64, 100_001)
    assert table.shape == (100_001, 64)
    assert table.dtype == np.float32
    positions = np.array([0, 1, 7, 4096, 100_000], np.int64)
    cos, sin = np.split(table[positions], 2, axis=1)
    angles = np.outer(positions, inverse_frequencies(rope, 64).astype(np.float64))
    # an angle of 1e5 radians is known to about 4e-3 in float32
    np.testing.assert_allclose(cos[:4], np.cos(angles[:4]), rtol=0, atol=3e-4)
    np.testing.assert_allclose(sin[:4], np.sin(angles[:4]), rtol=0, atol=3e-4)
    np.testing.assert_allclose(sin**2 + cos**2, 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "wanted"),
    [
        (1.0, 1.0, 1.0),
        (0.5, 1.0, (0.05 * np.log(40) + 1) / (0.1 * np.log(40) + 1)),
        (0.0, 0.0, 0.1 * np.log(40) + 1),
        (1.0, 0.0, 0.1 * np.log(40) + 1),
    ],
)
def test_multiplier_of_cos_and_sin(mscale: float, mscale_all_dim: float, wanted: float) -> None:
    rope = RopeConfig(10000.0, "yarn", 40.0, 4096, 32.0, 1.0, mscale, mscale_all_dim)
    cos, sin = np.split(cos_sin_table(rope, 64, 1), 2, axis=1)
    np.testing.assert_allclose(cos, wanted, rtol=1e-6)
    assert (sin == 0).all()
