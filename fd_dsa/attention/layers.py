"""Small layers that both attention and MLP use, and how parameters are filled.

Parameters are Paddle's, and are filled in place on a CPU. A layer looks up what it reads of its
parameters in its first step, when the model is on the device where it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from paddle import nn

from fd_dsa.ops._host import as_numpy, readable

WeightLoader = Callable[[np.ndarray], None]


def zeros_parameter(layer: nn.Layer, shape: list[int]) -> Any:
    """A float32 parameter of `layer`; loading overwrites it, so it starts as plain zeros."""
    zero = nn.initializer.Constant(0.0)
    parameter = layer.create_parameter(shape, default_initializer=zero)
    parameter.stop_gradient = True
    return parameter


class RMSNorm(nn.Layer):
    """Parameters of x * rsqrt(mean(x^2) + eps) * weight over the last axis, as `rms_norm` takes."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = zeros_parameter(self, [width])

    @cached_property
    def bound(self) -> tuple[Any, float]:
        """Weight and epsilon as `rms_norm` takes them."""
        return readable(self.weight), self.epsilon


class LayerNorm(nn.Layer):
    """Parameters of a LayerNorm with bias over the last axis; `write_caches` applies it."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = zeros_parameter(self, [width])
        self.bias = zeros_parameter(self, [width])


def loads(parameter: Any, *where: Any, transpose: bool = False, scale: float = 1.0) -> WeightLoader:
    """Loader that writes a checkpoint tensor into `parameter[where]`, without indices into all.

    Hugging Face stores [out, in], Paddle multiplies by [in, out]: projections pass `transpose`.
    """

    def load(array: np.ndarray) -> None:
        target = as_numpy(parameter.detach())[where]
        np.copyto(target, array.T if transpose else array)
        if scale != 1.0:
            target *= np.float32(scale)

    return load
