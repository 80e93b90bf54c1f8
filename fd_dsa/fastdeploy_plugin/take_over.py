"""Replace FastDeploy's classes by ours: all of them, or none.

Model classes go through FastDeploy's registry, in which a later class replaces an earlier one. The
runner's class is the plug-in's return value. Only the attention backend has no such door:
FastDeploy looks its class up by name, so that one name is bound to ours. A class of ours carries
`__fd_dsa__`, and no other state is kept.
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
    """True for a class that the plug-in has derived from one of FastDeploy's."""
    return getattr(thing, MARK, None) is not None


def live_backend() -> Any:
    """Class that FastDeploy, as imported here, takes for DSA_ATTN; None without FastDeploy."""
    return getattr(sys.modules.get(ATTENTION), BACKEND.name, None)


def derive(ours: type, upstream: type, **attributes: object) -> type:
    """A class with our methods before FastDeploy's, under FastDeploy's name; marked as ours.

    Args:
        attributes: further attributes of the class.
    """
    marks = {MARK: __version__, "__module__": ours.__module__}
    return type(upstream)(upstream.__name__, (ours, upstream), marks | attributes)


def take_over(runner: type) -> type:
    """Replace the models, the backend and the runner of the imported tree.

    Args:
        runner: FastDeploy's class.

    Returns:
        the runner's class with our hooks.

    Raises:
        UnsupportedTree: a check fails; FastDeploy is then as it was.
        Whatever making one of the classes raises; likewise.
    """
    examine()
    # late: a tree that does not fit costs no import of Paddle's parts
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
    # nothing is replaced before this line, and nothing can fail after it
    getattr(select(), "cache_clear", lambda: None)()
    package, _, module = own.__name__.rpartition(".")
    register = imported(REGISTRY).ModelRegistry.register_model_class
    for name, model in served.items():
        # FastDeploy's registry also finds the class by its module and name
        setattr(own, model.__name__, model)
        register(architecture=name, module_name=module, module_path=package)(model)
    setattr(imported(ATTENTION), BACKEND.name, backend)
    return runner
