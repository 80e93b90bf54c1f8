"""Bind FastDeploy's names of the DSA path to ours: all of them, or none.

FastDeploy looks its backend class up by name whenever a runner asks for one, and its decoder layer
finds indexer and attention as globals of their module, so names are all that has to change. A
class of ours carries `__fd_dsa__`; nothing else remembers that we were here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
_ABSENT: Any = object()


def is_ours(thing: Any) -> bool:
    """Whether a class or function of FastDeploy's was put there by us."""
    return getattr(thing, MARK, None) is not None


def live_backend() -> Any:
    """What FastDeploy, as imported here, takes for DSA_ATTN; None where nothing is imported."""
    return getattr(sys.modules.get(ATTENTION), _BACKEND, None)


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


def take_over() -> str:
    """Bind the backend, the indexer and the attention layer of the installed tree to ours.

    Returns:
        the tree in words, for the log.

    Raises:
        UnsupportedTree: a name is missing, takes other arguments or gives other cache shapes.
        Whatever making or binding one of them raises; every name is then as it was.
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
    indexer = derive(PluginIndexer, models.Indexer)
    dsa_attention = derive(PluginAttention, models.DeepseekV32DSAAttention)
    with _all_or_none() as bind:
        for module in (attention, file, sys.modules.get(RUNNER)):
            if module is attention or hasattr(module, _BACKEND):
                bind(module, _BACKEND, backend)
        _bind_layer(bind, models.Indexer, indexer)
        _bind_layer(bind, models.DeepseekV32DSAAttention, dsa_attention)
        clear = getattr(select(), "cache_clear", None)
        if clear is not None:
            clear()
    return summary


def _bind_layer(bind: Callable[[Any, str, Any], None], upstream: type, ours: type) -> None:
    """Bind a layer's name in its module, and in those of models that have taken it from there."""
    name = upstream.__name__
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(_MODELS) and vars(module).get(name) is upstream:
            bind(module, name, ours)


@contextmanager
def _all_or_none() -> Iterator[Callable[[Any, str, Any], None]]:
    """Gives a function that binds a name; after an exception all of them are as before."""
    before: list[tuple[Any, str, Any]] = []

    def bind(owner: Any, name: str, value: Any) -> None:
        before.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    try:
        yield bind
    except BaseException:
        for owner, name, value in reversed(before):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        raise
