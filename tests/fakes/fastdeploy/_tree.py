"""Which tree this process plays, and where its tensors lie; nothing of FastDeploy is here."""

from __future__ import annotations

import json
import os
from functools import cache

# tests/fakes is on sys.path wherever this package can be imported
from trees import DEVELOP, DTYPE_VARIABLE, PLACE_VARIABLE, TREE_VARIABLE, Tree


def current() -> Tree:
    """The tree that `trees.installed` chose; develop in a process that nobody told."""
    return _parsed(os.environ.get(TREE_VARIABLE, ""))


@cache
def _parsed(text: str) -> Tree:
    if not text:
        return DEVELOP
    return Tree(**json.loads(text))


def place() -> str:
    """Where the runner's tensors lie: "cpu", or a device of the test plug-in."""
    return os.environ.get(PLACE_VARIABLE, "cpu")


def dtype() -> str:
    """The activations' dtype: float32 on a CPU."""
    return os.environ.get(DTYPE_VARIABLE, "float32")
