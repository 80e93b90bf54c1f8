"""FastDeploy's models with our DSA layers.

`take_over` derives a class for each architecture and adds it to this module, in which FastDeploy's
registry looks for it.

Source: FastDeploy's `model_executor/models/model_base.py` (#4236) and `deepseek_v3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fd_dsa.fastdeploy_plugin.upstream import FDConfig


class PluginModel:
    """Model whose indexers and attention layers have our forward.

    The layers stay FastDeploy's objects: parameters, names and weight loaders do not change. Each
    gets a class of ours that derives from its own.

    Attributes:
        layer_classes: FastDeploy's class of a layer -> ours.
    """

    layer_classes: Mapping[type, Any]

    def __init__(self, fd_config: FDConfig, *args: object, **kwargs: object) -> None:
        super().__init__(fd_config, *args, **kwargs)  # type: ignore[call-arg]
        for layer in self.sublayers():  # type: ignore[attr-defined]
            ours = self.layer_classes.get(type(layer))
            if ours is not None:
                layer.__class__ = ours
                layer.adopt(fd_config)
