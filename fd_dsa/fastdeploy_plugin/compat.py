"""The FastDeploy that is installed: what of it ours derive from, and which variant it is.

Nothing is changed here. What is looked for is the table of `tree_checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from fd_dsa.fastdeploy_plugin.tree_checks import (
    ATTENTION,
    CHECKS,
    backend_base,
    import_models,
    imported,
    layer_norm,
    select,
)

_OPERATORS = "fastdeploy.model_executor.ops.gpu"


@dataclass(frozen=True, slots=True)
class TreeFeatures:
    """The variants of one FastDeploy tree that make a difference to us.

    Attributes:
        version: what the package calls itself; for logs alone.
        has_backend: its own DSA backend can be imported, so that ours derives from it.
        position_dtype: of `forward_meta.position_ids`: "int32", or "int64" with the fused operator.
        model_makes_positions: the model's `pre_process` makes positions, after the backend.
    """

    version: str
    has_backend: bool
    position_dtype: str
    model_makes_positions: bool

    def summary(self) -> str:
        """The features as words for the log."""
        base = "derived from" if self.has_backend else "in place of"
        maker = "model" if self.model_makes_positions else "runner"
        return (
            f"FastDeploy {self.version}, {base} its DSA backend, {self.position_dtype} positions "
            f"as its {maker} makes them"
        )


@dataclass(frozen=True, slots=True)
class Tree:
    """The objects of an imported FastDeploy that ours derive from or stand in for.

    Attributes:
        attention: the package `model_executor.layers.attention`.
        backend_base: class that our backend derives from.
        backend_file: the module of FastDeploy's own backend, None where it was not imported.
        select: `_get_attn_backend`, whose answers are cached.
        models: the module of DeepSeek-V3.2 and GLM-5.
        layer_norm: FastDeploy's LayerNorm.
        features: the variants.
    """

    attention: ModuleType
    backend_base: type
    backend_file: ModuleType | None
    select: Callable[[str], type]
    models: ModuleType
    layer_norm: type
    features: TreeFeatures


def examine() -> Tree:
    """What the installed tree has for us.

    Raises:
        UnsupportedTree: a name is missing, or takes other arguments or gives other cache shapes.
    """
    for check in CHECKS:
        if not check.in_worker:
            check.run()
    models = import_models()
    base, backend_file = backend_base()
    features = TreeFeatures(
        version=str(getattr(imported("fastdeploy"), "__version__", None) or "of unknown version"),
        has_backend=backend_file is not None,
        position_dtype=_position_dtype(),
        model_makes_positions=hasattr(models.DeepseekV3ForCausalLM, "pre_process"),
    )
    return Tree(imported(ATTENTION), base, backend_file, select(), models, layer_norm(), features)


def _position_dtype() -> str:
    """Dtype of the tree's positions: the fused operator of later trees makes int64."""
    try:
        operators = import_module(_OPERATORS)
    except Exception:
        return "int32"
    fused = getattr(operators, "get_position_ids_and_slot_mapping", None)
    return "int32" if fused is None else "int64"
