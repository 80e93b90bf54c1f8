"""A double of FastDeploy for tests: its modules as far as a DSA plug-in meets them.

Written from the public interface; every module names the file of PaddlePaddle/FastDeploy that it
stands for, `tests/fakes/README.md` the commits. Importing the real package imports the whole
engine and with it the models, so plug-ins run; this one does that only when a name asks for it.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

__version__ = "0.0.0+fake"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    # the real package has imported all its parts by now
    if find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    # as upstream: a wrong name is a line on the terminal and None, so hasattr is always true
    print(f"module {__name__} has no attribute {name}")
    return None
