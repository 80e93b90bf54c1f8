"""Steps for the tests of position ids, and what is expected of them."""

from __future__ import annotations

import numpy as np

from tests.reference.step_metadata import ref_step_metadata

Rows = list[tuple[int, int, int]]
MANY = {
    "more rows than a block has threads": [(0, n, 1 + n % 3) for n in range(2500)],
    "tokens of a whole prompt": [(9000, 123, 9000), (0, 5, 1), (4000, 0, 4000)],
    "idle rows between": [(0, 0, 0)] * 1300 + [(300, 7, 300)] + [(0, 0, 0)] * 1300 + [(0, 3, 2)],
    "one row": [(0, 77, 1)],
    "nothing": [(0, 5, 0)],
}


def lengths_of(rows: Rows) -> list[np.ndarray]:
    """Encoder, decoder and new lengths, int32."""
    return [np.array(lengths, np.int32) for lengths in zip(*rows, strict=True)]


def expected(rows: Rows, size: int) -> np.ndarray:
    """Return the positions of a step's tokens, then the entries that stay unchanged."""
    tables = np.zeros((len(rows), 1), np.int32)
    wide = ref_step_metadata(*lengths_of(rows), tables, 2**30)
    found = np.full(size, -91, np.int32)
    positions = wide["position_ids_int32"][:size]
    found[: len(positions)] = positions
    return found
