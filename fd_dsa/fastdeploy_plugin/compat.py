"""The FastDeploy that is installed: the classes that ours derive from, and how.

Nothing is changed here. What is looked for is the table of `tree_checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fd_dsa import __version__
from fd_dsa.fastdeploy_plugin.tree_checks import (
    ATTENTION,
    CHECKS,
    backend_base,
    import_models,
    imported,
    select,
)

MARK = "__fd_dsa__"
"""Attribute of every class of ours that is bound to a name of FastDeploy's."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The objects of an imported FastDeploy that ours derive from or replace.

    Attributes:
        attention: the package `model_executor.layers.attention`.
        backend_base: class that our backend derives from.
        backend_file: the module of FastDeploy's own backend, None where it was not imported.
        select: `_get_attn_backend`, whose answers are cached.
        models: the module of DeepSeek-V3.2 and GLM-5.
        version: what the package calls itself; for logs alone.
    """

    attention: ModuleType
    backend_base: type
    backend_file: ModuleType | None
    select: Callable[[str], type]
    models: ModuleType
    version: str

    def summary(self) -> str:
        """The tree as words for the log."""
        base = "in place of" if self.backend_file is None else "derived from"
        return f"FastDeploy {self.version}, {base} its DSA backend"


def examine() -> Tree:
    """What the installed tree has for us.

    Raises:
        UnsupportedTree: a name is missing, or takes other arguments or gives other cache shapes.
    """
    for check in CHECKS:
        if not check.in_worker:
            check.run()
    base, backend_file = backend_base()
    version = str(getattr(imported("fastdeploy"), "__version__", None) or "of unknown version")
    return Tree(imported(ATTENTION), base, backend_file, select(), import_models(), version)


def derive(ours: type, upstream: type, name: str = "", **attributes: Any) -> type:
    """A class with our methods before FastDeploy's, marked as ours.

    Args:
        ours: its methods take precedence.
        upstream: FastDeploy's class, which `isinstance` tests still find.
        name: of the class, "" = FastDeploy's.
        attributes: further ones of the class.
    """
    marks = {MARK: __version__, "__module__": ours.__module__}
    return type(upstream)(name or upstream.__name__, (ours, upstream), marks | attributes)
