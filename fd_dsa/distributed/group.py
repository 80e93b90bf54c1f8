"""Interface of a group of ranks to the layers of a split model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

_Array = TypeVar("_Array")


class Group(ABC):
    """Processes that run the same calls in the same order.

    Tensors are NumPy arrays on a CPU and Paddle tensors on a device. A model of one rank has no
    group.

    Attributes:
        rank: number of this process, 0 to `size` - 1.
        size: number of ranks.
        gathers_rows: False if `all_gather_rows` or `exchange_rows` fails on a rank.
    """

    rank: int
    size: int
    gathers_rows = True

    # a group takes one kind of array, which the layers do not know
    @abstractmethod
    def all_reduce(self, tensor: Any) -> Any:
        """Return the sum of a tensor over all ranks, in the tensor's dtype.

        The values are added in the order of ranks, so every rank gets the same bits. On a device
        the sum is enqueued on the stream of the tensor, and can be captured.

        Args:
            tensor: contiguous, of one shape and dtype on all ranks; may be overwritten.
        """

    def reduce_scatter(self, tensor: Any) -> Any:
        """Return this rank's part of the sum of a tensor over all ranks.

        Args:
            tensor: as for `all_reduce`, [num_rows, ...]. `size` divides num_rows, and rank r gets
                the r-th of `size` equal parts.
        """
        total, count = self.all_reduce(tensor), tensor.shape[0] // self.size
        return total[self.rank * count : (self.rank + 1) * count]

    @abstractmethod
    def all_gather(self, tensor: Any) -> Any:
        """Return the tensors of all ranks, [size, *shape]."""

    @abstractmethod
    def all_gather_rows(self, rows: Any, bounds: Sequence[int]) -> None:
        """Fill the rows of a tensor that other ranks have computed, in place.

        On a device the copies are enqueued on the stream of the tensor, and can be captured.

        Args:
            rows: contiguous [num_rows, ...], of one shape and dtype on all ranks. Rank r has
                computed the rows from `bounds[r]` to `bounds[r + 1]`. Rows outside of all bounds
                stay as they are.
            bounds: `size` + 1 ascending numbers, the same on all ranks.
        """

    def exchange_rows(
        self, source: Any, source_bounds: Sequence[int], target: Any, target_bounds: Sequence[int]
    ) -> None:
        """Send rows of `source` to each rank, and fill `target` with rows of each rank.

        Only ranks with devices exchange rows. The copies are enqueued on the stream of the tensors.

        Args:
            source: contiguous [num_rows, ...]. Rows from `source_bounds[r]` on, up to the next
                bound, go to rank r.
            target: such rows in other memory. Rows from `target_bounds[r]` on come from rank r.
            source_bounds, target_bounds: `size` + 1 ascending numbers each.
        """
        raise NotImplementedError

    def all_gather_tensors(self, tensors: Sequence[Any], begin: int, end: int) -> None:
        """Fill the same rows of several tensors, each from one rank, as `all_gather_rows` does.

        Args:
            tensors: tensor i has right rows on the rank i modulo `size`.
            begin, end: the rows from `begin` to `end` - 1 are filled.
        """
        for index, rows in enumerate(tensors):
            owner = index % self.size
            self.all_gather_rows(rows, [begin] * (owner + 1) + [end] * (self.size - owner))

    @abstractmethod
    def barrier(self) -> None:
        """Block the host until every rank has made this call."""

    @abstractmethod
    def close(self) -> None:
        """Free what the group holds. A second call has no effect."""


def summed(part: _Array, group: Group | None) -> _Array:
    """Return the sum of the parts of all ranks.

    Args:
        part: part of this rank, as for `Group.all_reduce`.
        group: ranks that add their parts; None = one rank.
    """
    if group is None:
        return part
    total: _Array = group.all_reduce(part)
    return total
