"""LLM, of which only the construction matters to a plug-in (`entrypoints/llm.py`)."""

from __future__ import annotations

from typing import Any

from fastdeploy.plugins.model_register import load_model_register_plugins


class LLM:
    """The offline engine; making one loads the plug-ins again."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.model, self.arguments = model, kwargs
        load_model_register_plugins()
