"""Rotation in place, both pairings, against the formula pair by pair."""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.ops.host_rows import cos_sin_of, rotate_
from tests.reference.rope import ref_rotate


def tables(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of tokens, and a table [positions, dim] with their angles [tokens, pairs]."""
    order = np.random.default_rng(9).permutation(len(angles) + 2)[: len(angles)]
    table = np.full((len(angles) + 2, 2 * angles.shape[1]), np.nan, np.float32)
    table[order] = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return order, table


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("dim", [2, 8, 64])
def test_against_the_formula(interleaved: bool, dim: int) -> None:
    rng = np.random.default_rng(dim)
    x = rng.standard_normal((4, 3, dim)).astype(np.float32)
    angles = rng.uniform(-10, 10, (4, dim // 2))
    wanted = [[ref_rotate(head, angles[t], interleaved) for head in x[t]] for t in range(4)]
    rotate_(x, cos_sin_of("rope", *tables(angles)), interleaved=interleaved)
    np.testing.assert_allclose(x, np.array(wanted), rtol=0, atol=1e-6)


def test_only_the_view_that_is_given_turns() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 2, 12)).astype(np.float32)
    before = x.copy()
    rotate_(x[:, :, :4], cos_sin_of("rope", *tables(rng.uniform(1, 2, (3, 2)))), interleaved=False)
    np.testing.assert_array_equal(x[:, :, 4:], before[:, :, 4:])
    assert (x[:, :, :4] != before[:, :, :4]).all()
