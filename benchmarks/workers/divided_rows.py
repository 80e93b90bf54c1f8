"""Worker: the engine whose ranks divide long steps, from a given number of tokens on."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.workers import once_per_step


class Engine(once_per_step.Engine):
    """The engine of `gpu_engine`, for prompts after a cached prefix.

    Args:
        variable: variable of the environment for the number of tokens.
        min_tokens: tokens past `index_topk` of a step that is divided.
        others: options of the base.
    """

    def __init__(self, variable: str, min_tokens: int, **others: Any) -> None:
        # ranks are child processes
        os.environ[variable] = str(min_tokens)
        super().__init__("once", **others)
