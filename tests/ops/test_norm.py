"""RMSNorm and LayerNorm against the formula, one vector at a time."""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.ops._norm import layer_norm, rms_norm
from tests.reference.indexer import ref_layer_norm, ref_rms_norm


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_norms(epsilon: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    x = (scale * rng.standard_normal((5, 33)) + 2 * scale).astype(np.float32)
    weight, bias = rng.standard_normal((2, 33)).astype(np.float32)
    before = x.copy()
    found = rms_norm(x, weight, epsilon)
    wanted = [ref_rms_norm(row, weight, epsilon) for row in x]
    np.testing.assert_allclose(found, np.array(wanted), rtol=1e-5, atol=1e-6)
    found = layer_norm(x, weight, bias, epsilon)
    wanted = [ref_layer_norm(row, weight, bias, epsilon) for row in x]
    np.testing.assert_allclose(found, np.array(wanted), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(x, before)


def test_norm_of_a_slice_of_wider_rows() -> None:
    wide = np.random.default_rng(1).standard_normal((4, 20)).astype(np.float32)
    found = rms_norm(wide[:, 7:13], np.ones(6, np.float32), 1e-6)
    wanted = [ref_rms_norm(row, np.ones(6), 1e-6) for row in wide[:, 7:13]]
    np.testing.assert_allclose(found, np.array(wanted), rtol=1e-5)


def test_a_row_of_zeros_stays_zero() -> None:
    zeros, ones = np.zeros((2, 8), np.float32), np.ones(8, np.float32)
    assert (rms_norm(zeros, ones, 1e-6) == 0).all()
    assert (layer_norm(zeros, ones, 3 * ones, 1e-6) == 3).all()
