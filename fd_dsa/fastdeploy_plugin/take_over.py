"""Replacement of FastDeploy's classes, of all of them or of no class.

Model classes go through FastDeploy's registry, in which a later class replaces an earlier one. The
runner's class is the plug-in's return value. The attention backend has no registry: FastDeploy
finds its class by name, so the plug-in binds that name. A derived class has the attribute
`__fd_dsa__`. No other state is kept.
"""

from __future__ import annotations

import sys
from typing import Any

from fd_dsa import __version__
from fd_dsa.fastdeploy_plugin.tree_checks import (
    ATTENTION,
    BACKEND,
    MARK,
    MODELS,
    REGISTRY,
    examine,
    imported,
    models,
    select,
)


def is_ours(thing: object) -> bool:
    """Return True for a class that the plug-in has derived from a class of FastDeploy."""
    return getattr(thing, MARK, None) is not None


def live_backend() -> Any:
    """Return the class of the imported FastDeploy for DSA_ATTN, None without FastDeploy."""
    return getattr(sys.modules.get(ATTENTION), BACKEND.name, None)


def derive(ours: type, upstream: type, **attributes: object) -> type:
    """Derive a marked class with fd_dsa's methods before FastDeploy's, under FastDeploy's name.

    Args:
        ours: class with the methods of fd_dsa.
        upstream: class of FastDeploy.
        attributes: further attributes of the class.
    """
    marks = {MARK: __version__, "__module__": ours.__module__}
    return type(upstream)(upstream.__name__, (ours, upstream), marks | attributes)


def take_over(runner: type) -> type:
    """Replace the models, the backend and the runner of the imported tree.

    Args:
        runner: FastDeploy's class.

    Returns:
        The runner's class with fd_dsa's hooks.

    Raises:
        UnsupportedTree: a check fails.
        Exception: any error of deriving a class.

    After an error FastDeploy is unchanged.
    """
    examine()
    # imported late, so that an unsupported tree does not load Paddle
    from fd_dsa.fastdeploy_plugin import models as own
    from fd_dsa.fastdeploy_plugin.backend import PluginBackend
    from fd_dsa.fastdeploy_plugin.layers import PluginAttention, PluginIndexer
    from fd_dsa.fastdeploy_plugin.runner import FastDeployRunnerMixin

    version = getattr(imported("fastdeploy"), "__version__", None) or "of unknown version"
    upstream = BACKEND.find()
    backend = derive(
        PluginBackend,
        upstream,
        metadata_class=sys.modules[upstream.__module__].DSAAttentionMetadata,
        tree_summary=f"FastDeploy {version}, derived from its DSA backend",
    )
    layers, file = {}, imported(MODELS)
    for kind, theirs in (
        (PluginIndexer, file.Indexer),
        (PluginAttention, file.DeepseekV32DSAAttention),
    ):
        layers[theirs] = derive(kind, theirs)
    served = {
        name: derive(own.PluginModel, theirs, layer_classes=layers)
        for name, theirs in models().items()
    }
    runner = derive(FastDeployRunnerMixin, runner)
    # all replacements follow this line, and none of them can fail
    getattr(select(), "cache_clear", lambda: None)()
    package, _, module = own.__name__.rpartition(".")
    register = imported(REGISTRY).ModelRegistry.register_model_class
    for name, model in served.items():
        # FastDeploy's registry also finds the class by its module and name
        setattr(own, model.__name__, model)
        register(architecture=name, module_name=module, module_path=package)(model)
    setattr(imported(ATTENTION), BACKEND.name, backend)
    return runner
