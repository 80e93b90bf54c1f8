"""The tree that this process plays, and the place of its tensors. Nothing of FastDeploy is here."""

from __future__ import annotations

import json
import os
from functools import cache

# tests/fakes is on sys.path wherever this package can be imported
from trees import DEVELOP, PLACE_VARIABLE, TREE_VARIABLE, Tree


def current() -> Tree:
    """The tree that `trees.installed` chose; develop in a process where nobody chose."""
    return _parsed(os.environ.get(TREE_VARIABLE, ""))


@cache
def _parsed(text: str) -> Tree:
    return Tree(**json.loads(text)) if text else DEVELOP


def place() -> str:
    """Return the place of the runner's tensors: "cpu", or a device of the test plug-in."""
    return os.environ.get(PLACE_VARIABLE, "cpu")
