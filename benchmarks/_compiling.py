"""Compiling many forms of a kernel ahead of what times them, a process for each processor."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def compile_all(compile_one: Callable[..., str], work: Collection[tuple[Any, ...]]) -> None:
    """Call `compile_one` with each tuple of arguments; prints what it said against any."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=spawn) as pool:
        said = pool.map(compile_one, *zip(*work, strict=True))
    print(f"compiled {len(work)} forms", *filter(None, said), sep="\n", flush=True)
