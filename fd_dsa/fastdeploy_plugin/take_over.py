"""Bind FastDeploy's names of the DSA path to ours: all of them, or none.

FastDeploy looks its backend class up by name whenever a runner asks for one, and its decoder layer
finds indexer and attention as globals of their module, so names are all that has to change. A
class of ours carries `__fd_dsa__`; nothing else remembers that we were here.
"""

from __future__ import annotations

import sys
from typing import Any

from fd_dsa import __version__
from fd_dsa.fastdeploy_plugin.tree_checks import (
    ATTENTION,
    MARK,
    MODELS,
    RUNNER,
    backend_base,
    examine,
    imported,
    select,
)

_BACKEND = "DSAAttentionBackend"
_MODELS = "fastdeploy.model_executor.models."


def is_ours(thing: Any) -> bool:
    """Whether a class or function of FastDeploy's was put there by us."""
    return getattr(thing, MARK, None) is not None


def live_backend() -> Any:
    """What FastDeploy, as imported here, takes for DSA_ATTN; None where nothing is imported."""
    return getattr(sys.modules.get(ATTENTION), _BACKEND, None)


def derive(ours: type, upstream: type, name: str = "", **attributes: Any) -> type:
    """A class with our methods before FastDeploy's, which `isinstance` still finds; marked as ours.

    Args:
        name: of the class, "" = FastDeploy's.
        attributes: further ones of the class.
    """
    marks = {MARK: __version__, "__module__": ours.__module__}
    return type(upstream)(name or upstream.__name__, (ours, upstream), marks | attributes)


def take_over() -> str:
    """Bind the backend, the indexer and the attention layer of the installed tree to ours.

    Returns:
        the tree in words, for the log.

    Raises:
        UnsupportedTree: a name is missing, takes other arguments or gives other cache shapes.
        Whatever making one of the classes raises; every name is then as it was.
    """
    examine()
    # late: a tree that does not fit costs no import of Paddle's parts
    from fd_dsa.fastdeploy_plugin.backend import PluginBackend
    from fd_dsa.fastdeploy_plugin.layers import PluginAttention, PluginIndexer

    attention, models = imported(ATTENTION), imported(MODELS)
    base, file = backend_base()
    version = getattr(imported("fastdeploy"), "__version__", None) or "of unknown version"
    how = "in place of" if file is None else "derived from"
    summary = f"FastDeploy {version}, {how} its DSA backend"
    backend = derive(PluginBackend, base, _BACKEND, upstream_file=file, tree_summary=summary)
    pairs = (PluginIndexer, models.Indexer), (PluginAttention, models.DeepseekV32DSAAttention)
    layers = {upstream: derive(ours, upstream) for ours, upstream in pairs}
    # a name is bound once nothing can fail any more
    clear = getattr(select(), "cache_clear", None)
    if clear is not None:
        clear()
    for module in (attention, file, sys.modules.get(RUNNER)):
        if module is attention or hasattr(module, _BACKEND):
            setattr(module, _BACKEND, backend)
    for upstream, ours in layers.items():
        # in its module, and in those of models that have taken it from there
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith(_MODELS) and vars(module).get(upstream.__name__) is upstream:
                setattr(module, upstream.__name__, ours)
    return summary
