"""Step metadata: computed once per step, read by every layer, in buffers that never move."""

from __future__ import annotations

from fd_dsa.step.builder import StepMetadataBuilder
from fd_dsa.step.checks import StepHints
from fd_dsa.step.forward_meta import ForwardMeta

__all__ = ["ForwardMeta", "StepHints", "StepMetadataBuilder"]
