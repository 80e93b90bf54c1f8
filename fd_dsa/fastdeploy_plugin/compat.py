"""The FastDeploy that is installed: what of it ours derive from, and which variant it is.

Nothing is changed here. What is looked for is the table of `tree_checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from fd_dsa.fastdeploy_plugin.tree_checks import (
    ATTENTION,
    CHECKS,
    backend_base,
    import_models,
    imported,
    select,
)


@dataclass(frozen=True, slots=True)
class TreeFeatures:
    """The variants of one FastDeploy tree that make a difference to us.

    Attributes:
        version: what the package calls itself; for logs alone.
        has_backend: its own DSA backend can be imported, so that ours derives from it.
    """

    version: str
    has_backend: bool

    def summary(self) -> str:
        """The features as words for the log."""
        base = "derived from" if self.has_backend else "in place of"
        return f"FastDeploy {self.version}, {base} its DSA backend"


@dataclass(frozen=True, slots=True)
class Tree:
    """The objects of an imported FastDeploy that ours derive from or stand in for.

    Attributes:
        attention: the package `model_executor.layers.attention`.
        backend_base: class that our backend derives from.
        backend_file: the module of FastDeploy's own backend, None where it was not imported.
        select: `_get_attn_backend`, whose answers are cached.
        models: the module of DeepSeek-V3.2 and GLM-5.
        features: the variants.
    """

    attention: ModuleType
    backend_base: type
    backend_file: ModuleType | None
    select: Callable[[str], type]
    models: ModuleType
    features: TreeFeatures


def examine() -> Tree:
    """What the installed tree has for us.

    Raises:
        UnsupportedTree: a name is missing, or takes other arguments or gives other cache shapes.
    """
    for check in CHECKS:
        if not check.in_worker:
            check.run()
    base, backend_file = backend_base()
    features = TreeFeatures(
        version=str(getattr(imported("fastdeploy"), "__version__", None) or "of unknown version"),
        has_backend=backend_file is not None,
    )
    return Tree(imported(ATTENTION), base, backend_file, select(), import_models(), features)
