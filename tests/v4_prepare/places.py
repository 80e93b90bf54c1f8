"""Where `V4Prepare` may put its outputs, each with a way to look at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from fd_dsa.v4_prepare import V4Prepare, V4PrepareConfig
from tests.v4_prepare.kernel_case import outputs_of

PLACES = [
    pytest.param("numpy", id="numpy"),
    pytest.param("cpu", id="cpu"),
    pytest.param("interpreter", id="interpreter", marks=pytest.mark.triton),
    pytest.param("torch", id="torch", marks=pytest.mark.gpu),
    pytest.param("rig", id="rig", marks=pytest.mark.gpu_rig),
]


@dataclass(frozen=True)
class Place:
    """One place: how builders and arrays are made there.

    Attributes:
        name: as in `PLACES`.
        prepare: a builder there; on a device its memory starts as garbage.
        put: an array of the place with the values of a NumPy array.
        get: the values of an array of the place, a copy.
        address: where an array lies.
    """

    name: str
    prepare: Callable[[V4PrepareConfig], V4Prepare]
    put: Callable[[np.ndarray], Any]
    get: Callable[[Any], np.ndarray]
    address: Callable[[Any], int]

    def outputs(self, prepare: V4Prepare) -> dict[str, np.ndarray]:
        """Copies of all outputs that mean something, by name."""
        return outputs_of(prepare.buffers, self.get)


def open_place(name: str) -> Place:
    """The place of this name; skips the test where it is not there."""
    if name == "numpy":
        return Place(name, _on(name), np.copy, np.copy, lambda array: array.ctypes.data)
    if name == "cpu":
        if find_spec("paddle") is None:
            pytest.skip("not installed: paddle")
        import paddle

        return Place(
            name,
            _on(name),
            paddle.to_tensor,
            lambda tensor: np.array(tensor.numpy()),
            lambda tensor: tensor.data_ptr(),
        )
    from tests.kernel_memory import open_memory

    memory = open_memory(name)
    return Place(
        name,
        lambda cfg: V4Prepare(cfg, name, memory.poisoned),
        memory.put,
        memory.get,
        lambda tensor: tensor.data_ptr(),
    )


def _on(place: str) -> Callable[[V4PrepareConfig], V4Prepare]:
    return lambda cfg: V4Prepare(cfg, place)
