"""Worker: the engine whose ranks divide long steps, from a given number of tokens on."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.workers import once_per_step
from fd_dsa.environment import DIVIDED_VARIABLE


class Engine(once_per_step.Engine):
    """The engine of `gpu_engine`, for prompts after a cached prefix.

    Args:
        min_tokens: tokens past `index_topk` of a step that is divided.
        others: options of the base.
    """

    def __init__(self, min_tokens: int, **others: Any) -> None:
        # ranks are child processes
        os.environ[DIVIDED_VARIABLE] = str(min_tokens)
        super().__init__("once", **others)
