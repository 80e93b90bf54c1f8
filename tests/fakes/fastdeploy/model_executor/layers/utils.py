"""Parameters and how checkpoint tensors get into them (`model_executor/layers/utils.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import numpy as np
import paddle
from paddle import nn


def zeros_parameter(layer: nn.Layer, shape: list[int], dtype: str | None = None) -> Any:
    """A parameter without gradient, in the default dtype unless one is given."""
    zero = nn.initializer.Constant(0.0)
    parameter = layer.create_parameter(shape, dtype=dtype, default_initializer=zero)
    parameter.stop_gradient = True
    return parameter


def fill(parameter: Any, array: np.ndarray) -> None:
    """Write an array of the parameter's shape into its memory."""
    if tuple(parameter.shape) != array.shape:
        raise ValueError(f"weight of shape {array.shape} for a parameter of {parameter.shape}")
    values = paddle.to_tensor(np.ascontiguousarray(array), place=parameter.place)
    parameter.copy_(values.astype(parameter.dtype), False)


def default_weight_loader(parameter: Any, array: np.ndarray, shard_id: str | None = None) -> None:
    """A tensor that is stored as the layer keeps it."""
    fill(parameter, array)


def loader_of(layer: Any) -> Callable[..., None]:
    """`layer.weight_loader`, for the layer's own parameters to keep.

    FastDeploy's keep the bound method. The garbage collector does not see what a parameter keeps,
    so the layer, its weights and its configuration would stay until the process ends: no harm in a
    worker with its one model, gigabytes in a test session that makes hundreds.
    """
    method = WeakMethod(layer.weight_loader)

    def weight_loader(*args: Any, **kwargs: Any) -> None:
        load = method()
        assert load is not None
        load(*args, **kwargs)

    return weight_loader
