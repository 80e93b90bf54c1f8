"""fd_dsa: DeepSeek Sparse Attention on PaddlePaddle, metadata computed once a step."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "StructuredOutputsParams", "__version__"]

_LAZY = {
    "LLM": ("fd_dsa.offline.llm", "LLM"),
    "SamplingParams": ("fd_dsa.engine.sampling_params", "SamplingParams"),
    "StructuredOutputsParams": ("fd_dsa.engine.structured_outputs", "StructuredOutputsParams"),
}


def __getattr__(name: str) -> Any:
    """Import the engine's names on first use, so that `import fd_dsa` stays light."""
    if name not in _LAZY:
        raise AttributeError(f"module 'fd_dsa' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
