"""The grid of a launch: how many programs run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from fd_dsa.errors import LaunchError

Grid = tuple[int, ...] | Callable[[Mapping[str, Any]], tuple[int, ...]]

# what CUDA allows along x, y and z
_LIMITS = ((1 << 31) - 1, 65535, 65535)


def resolve_grid(
    kernel: str, grid: Grid, arguments: Mapping[str, object], options: Mapping[str, object]
) -> tuple[int, int, int]:
    """The grid as three numbers; LaunchError where it is none, or out of CUDA's range.

    A function as a grid gets all arguments and options by name.
    """
    sizes = grid({**options, **arguments}) if callable(grid) else grid
    try:
        # most launches have one of a few grids
        return _numbers(kernel, sizes)
    except TypeError:
        # no hash, such as a list's
        return _numbers.__wrapped__(kernel, sizes)


@lru_cache(maxsize=4096)
def _numbers(kernel: str, sizes: Iterable[int]) -> tuple[int, int, int]:
    try:
        numbers = tuple(int(n) for n in sizes)
        fits = 1 <= len(numbers) <= 3 and all(
            n == size and 0 <= n <= limit
            for n, size, limit in zip(numbers, sizes, _LIMITS, strict=False)
        )
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise LaunchError(
            f"kernel {kernel}: grid {sizes!r}: wanted one to three numbers of programs, x in "
            f"0..{_LIMITS[0]}, y and z in 0..{_LIMITS[1]}, for example (8,)"
        )
    x, y, z = (*numbers, 1, 1)[:3]
    return x, y, z
