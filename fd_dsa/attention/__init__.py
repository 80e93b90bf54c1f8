"""The DSA attention layer: cache layouts, indexer, step plan and backend."""

from fd_dsa.attention.backend import DSAAttentionBackend, DSABackendConfig, StepHints, step_of
from fd_dsa.attention.cache_layout import CacheLayout

__all__ = ["CacheLayout", "DSAAttentionBackend", "DSABackendConfig", "StepHints", "step_of"]
