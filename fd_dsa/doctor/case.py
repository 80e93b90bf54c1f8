"""What the checks of operators share: where a case lives, and how a wrong result is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.ops._provider import TRITON, provider_for

Outputs = dict[str, np.ndarray]

UNTOUCHED = 0xA5
"""Every byte of the memory that a case lets an operator fill."""


class Memory:
    """Where a check's arrays live: NumPy's memory, or Paddle tensors on a device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.on_host = device == "cpu"

    def put(self, array: np.ndarray) -> Any:
        """A copy of an array in this memory."""
        if self.on_host:
            return array.copy()
        import paddle

        kind, _, number = self.device.partition(":")
        index = int(number or 0)
        place = paddle.CUDAPlace(index) if kind == "gpu" else paddle.CustomPlace(kind, index)
        return paddle.to_tensor(array, place=place)

    def get(self, array: Any) -> np.ndarray:
        """The values of what `put` made or a step returned."""
        return array if isinstance(array, np.ndarray) else array.numpy()

    def uses_kernel(self, operator: str) -> bool:
        """Whether a Triton kernel serves an operator on tensors of this memory."""
        return provider_for(operator, self.put(np.zeros(1, np.int32))) == TRITON


@dataclass(frozen=True, slots=True)
class Check:
    """A small case of an operator.

    Attributes:
        run: what the operator gives, and the inputs that its definition needs.
        is_right: raises CheckFailed unless that agrees with the definition.
        same_bytes: on a device every output must be the CPU's, bit by bit; else it is compared
            with the definition, as on a CPU.
    """

    run: Callable[[Memory], Outputs]
    is_right: Callable[[Outputs], None]
    same_bytes: bool = True


class CheckFailed(Exception):
    """An operator gave something else than its definition."""


def require(condition: Any, said: str) -> None:
    """Fail with these words unless all of `condition` holds."""
    if not np.all(condition):
        raise CheckFailed(said)
