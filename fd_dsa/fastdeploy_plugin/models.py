"""FastDeploy's models with fd_dsa's layers.

`take_over` derives a class for each architecture and adds it to this module, in which FastDeploy's
registry finds it.

Source: FastDeploy's `model_executor/models/model_base.py` (#4236) and `deepseek_v3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fd_dsa.fastdeploy_plugin.upstream import FDConfig


class PluginModel:
    """Model whose indexers and attention layers run fd_dsa's forward.

    The layers stay FastDeploy's objects: parameters, names and weight loaders do not change. Only
    the class of a layer is replaced, by a class that derives from it.

    Attributes:
        layer_classes: FastDeploy's class of a layer -> derived class.
    """

    layer_classes: Mapping[type, Any]

    def __init__(self, fd_config: FDConfig, *args: object, **kwargs: object) -> None:
        super().__init__(fd_config, *args, **kwargs)  # type: ignore[call-arg]
        for layer in self.sublayers():  # type: ignore[attr-defined]
            ours = self.layer_classes.get(type(layer))
            if ours is not None:
                layer.__class__ = ours
                layer.adopt(fd_config)
