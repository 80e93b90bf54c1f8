"""A group of ranks: what the layers of a split model ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Group(ABC):
    """Some processes that run the same calls in the same order.

    Tensors are NumPy arrays on a CPU and Paddle's on a device.

    Attributes:
        rank: of this process, 0 to `size` - 1.
        size: number of ranks.
    """

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, tensor: Any) -> Any:
        """The sum of a tensor over all ranks, added in the order of ranks, in the tensor's dtype.

        Every rank gets the same bits. On a device it is queued on the stream of the tensor, and
        can be captured.

        Args:
            tensor: contiguous, of one shape and dtype on all ranks; may be overwritten.
        """

    @abstractmethod
    def all_gather(self, tensor: Any) -> Any:
        """The tensors of all ranks, [size, *shape]."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait on the host until every rank has called this."""

    def check(self) -> None:
        """Return while no rank is known to have ended.

        Raises:
            RankError: one has; names it.
        """
        return

    @abstractmethod
    def close(self) -> None:
        """Free what the group holds; may be called twice."""


class SingleGroup(Group):
    """The group of a process that runs a model alone."""

    rank, size = 0, 1

    def all_reduce(self, tensor: Any) -> Any:
        """The tensor itself."""
        return tensor

    def all_gather(self, tensor: Any) -> Any:
        """The tensor as the only one, [1, *shape]."""
        return tensor[None]

    def barrier(self) -> None:
        """Return."""

    def close(self) -> None:
        """Return."""
