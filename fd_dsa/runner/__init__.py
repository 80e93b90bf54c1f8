"""Runner: state of the batch, the step hook of both engines, the embedded runner."""

from typing import Any

from fd_dsa.runner.input_batch import InputBatch

__all__ = ["DSAModelRunnerMixin", "InputBatch", "ModelRunner"]


def __getattr__(name: str) -> Any:
    """Import the names that need Paddle on first use."""
    if name == "ModelRunner":
        from fd_dsa.runner.model_runner import ModelRunner

        return ModelRunner
    if name == "DSAModelRunnerMixin":
        from fd_dsa.runner.mixin import DSAModelRunnerMixin

        return DSAModelRunnerMixin
    raise AttributeError(f"module 'fd_dsa.runner' has no attribute {name!r}")
