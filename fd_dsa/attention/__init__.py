"""The DSA attention layer: cache layouts, indexer, step plan and backend."""

from fd_dsa.attention.backend import DSAAttentionBackend
from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.cache_formats import CacheLayout
from fd_dsa.step import StepHints

__all__ = ["CacheLayout", "DSAAttentionBackend", "DSABackendConfig", "StepHints"]
