"""Random weights in place of a checkpoint's, for measurements and dry runs of large models."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np

from fd_dsa.models.config import ModelConfig
from fd_dsa.models.expected_tensors import expected_tensors

_SPREAD = 0.02


def load_dummy_weights(
    config: ModelConfig,
    loaders: Mapping[str, Callable[[np.ndarray], None]],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Hand each loader a random tensor: normal with a deviation of 0.02, norms are ones.

    A tensor depends on its name and the seed alone.

    Args:
        config: of the model.
        loaders: as for `load_weights`; each gets float32 in the stored shape.
        seed: of all tensors.
        progress: called with the bytes done and the bytes in all.
    """
    expected = expected_tensors(config)
    total = 4 * sum(tensor.num_elements for tensor in expected.values())
    done = 0
    for name, tensor in expected.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if len(tensor.shape) == 1 and name.endswith("weight"):
            values = np.ones(tensor.shape, np.float32)
        else:
            values = rng.standard_normal(tensor.shape, np.float32) * np.float32(_SPREAD)
        loaders[name](values)
        done += 4 * tensor.num_elements
        if progress is not None:
            progress(done, total)
